"""The routes as clients meet them: over a socket, with workers that need no model."""

import base64
import contextlib
import json
import re
import socket
import threading
import time

import httpx2 as httpx
import pytest
from generated import examples
from hypothesis import given
from hypothesis import strategies as st
from server_cases import REFUSED, STRANGE, encoded, serving, until

from tdjax.server import app
from tdjax.server.app import PAGE, content_policy
from tdjax.server.asking import FIELDS
from tdjax.server.keys import Key, Keys, digest


def error_of(answer: httpx.Response, status: int) -> str:
    """The message of an error in the form that OpenAI's clients read."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    lines = error["message"].split("\n")
    assert len(lines) == 3 and all(lines), error["message"]
    return error["message"]


# -- a video's life --------------------------------------------------------------------------------


def test_a_video_from_request_to_file_to_nothing(served):
    job = served.post("a fox", seed=7, size="32x32").json()
    assert job["object"] == "video" and job["status"] in ("queued", "in_progress")
    assert re.fullmatch(r"video_[0-9a-f]{24}", job["id"]) and isinstance(job["created_at"], int)
    job = served.ended(job["id"])
    assert job["status"] == "completed" and job["progress"] == 100 and job["error"] is None
    assert (job["size"], job["seconds"], job["seed"]) == ("32x32", "0.25", 7)
    assert job["completed_at"] >= job["created_at"] and job["expires_at"] > job["completed_at"]
    content = served.client.get(f"/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4" and job["id"].encode() in content.content
    part = served.client.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=0-4"})
    assert part.status_code == 206 and part.content == b"video"
    thumbnail = served.client.get(f"/v1/videos/{job['id']}/content?variant=thumbnail")
    assert thumbnail.content[:2] == b"\xff\xd8"
    assert thumbnail.headers["content-type"] == "image/jpeg"
    deleted = served.client.delete(f"/v1/videos/{job['id']}").json()
    assert deleted == {"id": job["id"], "object": "video.deleted", "deleted": True}
    error_of(served.client.get(f"/v1/videos/{job['id']}"), 404)
    assert not [p for p in served.service.store.videos.iterdir() if job["id"] in p.name]


def test_what_goes_wrong_is_said_and_the_worker_lives_on(served):
    failed = served.ended(served.add("fail"))
    assert failed["status"] == "failed" and failed["error"]["code"] == "out_of_memory"
    assert failed["error"]["message"] == "no room\nthe stub is full\nask for less"
    unwritten = served.ended(served.add("wide"))
    assert unwritten["error"]["code"] == "not_written"
    assert "/the/machine" not in unwritten["error"]["message"]
    content = served.client.get(f"/v1/videos/{failed['id']}/content")
    assert "the video is failed" in error_of(content, 409)
    assert served.ended(served.add("a fox"))["status"] == "completed"


def test_the_request_can_wait_for_its_video(served):
    answer = served.client.post("/v1/videos/sync", json={"prompt": "a fox"})
    assert answer.status_code == 200 and answer.headers["x-video-id"].encode() in answer.content
    answer = served.client.post("/v1/videos/sync", json={"prompt": "fail"})
    assert "no room" in error_of(answer, 500)


def test_who_stops_waiting_ends_the_video(served):
    before = set(served.service.store.counts().items())
    with pytest.raises(httpx.ReadTimeout):
        served.client.post("/v1/videos/sync", json={"prompt": "sleep 20"}, timeout=0.3)
    until(lambda: served.service.store.counts()["cancelled"] > dict(before)["cancelled"])
    assert served.ended(served.add("a fox"))["status"] == "completed"


@pytest.mark.slow  # the server looks every half second whether clients are there
def test_who_stops_waiting_may_ask_again_by_a_key(served):
    ask = lambda seconds: served.client.post(
        "/v1/videos/sync",
        json={"prompt": "sleep 1.5"},
        headers={"Idempotency-Key": "again"},
        timeout=seconds,
    )
    with pytest.raises(httpx.ReadTimeout):
        ask(0.3)
    time.sleep(0.7)
    answer = ask(30)
    assert answer.status_code == 200 and answer.headers["x-video-id"].encode() in answer.content


def test_a_video_is_cancelled_while_it_runs_and_while_it_waits(served):
    running, waiting = served.add("sleep 20"), served.add("sleep 20")
    until(lambda: served.get(running)["status"] == "in_progress")
    for id in (waiting, running):
        assert served.client.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
        assert served.client.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
    done = served.ended(served.add("a fox"))
    assert done["status"] == "completed" and not served.service.progress
    assert "already" in error_of(served.client.post(f"/v1/videos/{done['id']}/cancel"), 409)


def test_a_running_video_can_be_deleted(served):
    id = served.add("sleep 20")
    until(lambda: served.get(id)["status"] == "in_progress")
    assert served.client.delete(f"/v1/videos/{id}").json()["deleted"]
    assert served.ended(served.add("a fox"))["status"] == "completed"


def test_events_tell_the_states_as_they_change(served):
    id = served.add("sleep 0.2")
    states = []
    with served.client.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                states.append(json.loads(line[6:]))
    progress = [state["progress"] for state in states]
    assert progress == sorted(progress) and len(set(progress)) > 5
    assert states[-1]["status"] == "completed" and "denoise" in [s["stage"] for s in states]


def test_a_key_has_so_many_streams_of_events_and_those_that_end_make_room(served, monkeypatch):
    monkeypatch.setattr(app, "WATCHING", 2)
    id = served.add("sleep 30")
    stream = lambda: served.client.stream("GET", f"/v1/videos/{id}/events")
    with contextlib.ExitStack() as streams:
        lines = [streams.enter_context(stream()).iter_lines() for _ in range(2)]
        for each in lines:
            next(each)
        error_of(served.client.get(f"/v1/videos/{id}/events"), 429)
        head = served.client.head(f"/v1/videos/{id}/events")
        assert head.status_code == 200 and not head.content
    served.client.delete(f"/v1/videos/{id}")
    id = served.add("a fox")
    served.ended(id)
    until(lambda: served.client.get(f"/v1/videos/{id}/events").status_code == 200)


RANGES = {
    "bytes=0-4": (206, b"video"),
    "bytes=-3": (206, None),
    "BYTES = 2-": (206, None),
    "bytes=0-1,4-5": (206, None),
    "bytes=999999-": (416, b""),
    "bytes=-0": (416, b""),
    "bytes=5-2": (200, None),
    "bytes=a-b": (200, None),
    "bytes=": (200, None),
    "bytes=--1": (200, None),
    "bytes=1" + "0" * 300 + "-": (200, None),
    "lines=0-1": (200, None),
    "bytes": (200, None),
    "=,-": (200, None),
}


def test_parts_of_a_file(served):
    id = served.add("a fox")
    served.ended(id)
    whole = served.client.get(url := f"/v1/videos/{id}/content").content
    for wanted, (status, content) in RANGES.items():
        answer = served.client.get(url, headers={"Range": wanted})
        assert answer.status_code == status, wanted
        assert content is None or answer.content == content, wanted
        assert status != 200 or answer.content == whole
        head = served.client.head(url, headers={"Range": wanted})
        assert head.status_code == status and not head.content, wanted


def test_a_file_that_is_sent_while_it_is_removed(served):
    id = served.add("a fox")
    served.ended(id)
    path = served.service.store.video(served.service.store.get(id))
    path.write_bytes(bytes(8 * 2**20))
    with served.client.stream("GET", f"/v1/videos/{id}/content") as answer:
        assert served.client.delete(f"/v1/videos/{id}").json()["deleted"]
        assert sum(map(len, answer.iter_bytes())) == 8 * 2**20


def test_many_hands_on_one_video(served):
    def hand(id, n):
        with httpx.Client(base_url=served.url, timeout=30) as client:
            one = f"/v1/videos/{id}"
            ask = [
                lambda: client.post(f"{one}/cancel"),
                lambda: client.delete(one),
                lambda: client.get(f"{one}/events"),
                lambda: client.get(f"{one}/content?variant=thumbnail"),
            ]
            seen.append(ask[n % 4]().status_code)

    seen: list[int] = []
    for prompt in ("sleep 5", "a fox"):
        id = served.add(prompt)
        hands = [threading.Thread(target=hand, args=(id, n)) for n in range(8)]
        for each in hands:
            each.start()
        for each in hands:
            each.join()
    assert len(seen) == 16 and set(seen) <= {200, 404, 409}
    assert served.ended(served.add("a fox"))["status"] == "completed"
    assert not served.service.progress and not served.service.listeners


def test_the_first_frame_is_seen_before_the_video(served):
    id = served.add("sleep 30")
    until(lambda: served.get(id)["preview"])
    thumbnail = served.client.get(f"/v1/videos/{id}/content?variant=thumbnail")
    assert thumbnail.content[:2] == b"\xff\xd8"
    error_of(served.client.get(f"/v1/videos/{id}/content"), 409)
    served.client.delete(f"/v1/videos/{id}")
    assert not list(served.service.store.videos.glob(f"{id}*"))


def test_pages_of_videos(served):
    ids = [served.add("a fox") for _ in range(3)]
    page = served.client.get("/v1/videos", params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1] and page["has_more"]
    rest = served.client.get("/v1/videos", params={"after": page["last_id"], "limit": 1}).json()
    assert rest["data"][0]["id"] == ids[0]
    for query in ("limit=0", "limit=101", "limit=x", "limit=1e1", "limit=-1", "order=up"):
        error_of(served.client.get(f"/v1/videos?{query}"), 400)
    ids.append(served.add("a BOAT & 50%"))
    found = lambda search: served.client.get("/v1/videos", params={"search": search}).json()
    assert [job["id"] for job in found("boat & 50%")["data"]] == ids[3:]
    assert found("no such words") == found("%_") and not found("%_")["has_more"]
    error_of(served.client.get("/v1/videos", params={"search": "a" * 201}), 400)
    for id in ids:
        served.ended(id)


def test_an_idempotency_key_makes_one_video(served):
    headers = {"Idempotency-Key": "one"}
    first = served.post("a fox", headers=headers).json()
    assert served.post("a fox", headers=headers).json()["id"] == first["id"]
    assert "another request" in error_of(served.post("a cat", headers=headers), 409)
    for strange in ("", "a b", "k" * 300):
        error_of(served.post("a fox", headers={"Idempotency-Key": strange}), 400)
    served.ended(first["id"])


def test_what_operators_ask(served):
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.get("/ready").json() == {"ready": True}
    served.ended(served.add("a fox"))
    text = served.client.get("/metrics").text
    assert re.search(r'tdjax_jobs_total{status="completed"} [1-9]', text)
    assert re.search(r'tdjax_stage_seconds_count{stage="denoise"} [1-9]', text)
    assert "tdjax_workers_ready 1.0" in text and "process_resident_memory_bytes" in text


def test_models(served):
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["size"]) == ("stub", "model", "64x48")
    assert served.client.get("/v1/models/stub").json() == model
    error_of(served.client.get("/v1/models/sora-2"), 404)
    assert "stub" in error_of(served.post("a fox", model="sora-2"), 404)
    assert served.ended(served.add("a fox", model="stub"))["model"] == "stub"


@pytest.mark.slow  # the client takes a second to import
@pytest.mark.filterwarnings("ignore")  # its videos are deprecated there
def test_openais_client(served):
    import openai

    with openai.OpenAI(base_url=served.url + "/v1", api_key="any") as client:
        video = client.videos.create_and_poll(
            prompt="a fox", size="64x48", seconds="4", poll_interval_ms=20
        )
        assert (video.status, video.seconds, video.progress) == ("completed", "4", 100)
        assert video.id.encode() in client.videos.download_content(video.id).read()
        extra = {"seed": 5, "num_frames": 9, "num_steps": 2}
        other = client.videos.create(prompt="fail", extra_body=extra)
        assert other.seed == 5 and other.model == "stub"
        failed = client.videos.poll(other.id, poll_interval_ms=20)
        assert failed.status == "failed" and failed.error.code == "out_of_memory"
        assert failed.id in [video.id for video in client.videos.list(limit=1)]
        assert client.models.list().data[0].id == "stub"
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError, match="size is"):
            client.videos.create(prompt="a", size="large")


@pytest.mark.slow  # a process for each image
def test_images_come_in_forms_and_in_json(tmp_path):
    with serving(tmp_path, task="i2v", image_pixels=20_000) as server:
        picture = encoded(size=(64, 48))
        inline = "data:image/png;base64," + base64.b64encode(picture).decode()
        ids = [server.add(input_reference={"image_url": inline})]
        files = {"input_reference": ("../../../etc/x.png", picture, "image/png")}
        answer = server.client.post("/v1/videos", data={"prompt": "a", "seed": "3"}, files=files)
        ids.append(answer.json()["id"])
        for id in ids:
            assert server.ended(id)["warnings"] == ["image: True"]
        assert not list(server.service.store.inputs.iterdir())
        assert "need an image" in error_of(server.post("a fox"), 400)
        for data in (STRANGE["bomb"], STRANGE["cut in the pixels"]):
            files = {"input_reference": ("x.png", data, "image/png")}
            answer = server.client.post("/v1/videos", data={"prompt": "a"}, files=files)
            error_of(answer, 400)
        first, last = (("x.png", picture, "image/png") for _ in range(2))
        files = {"input_reference": first, "last_image": last}
        answer = server.client.post("/v1/videos", data={"prompt": "a"}, files=files)
        assert "one image, the first" in error_of(answer, 400)


# -- hostile ones ----------------------------------------------------------------------------------


def sent(served, data: bytes, seconds=10.0) -> bytes:
    """What comes back for bytes of a socket."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        sock.sendall(data)
        out = b""
        while chunk := sock.recv(65536):
            out += chunk
            if b"}" in chunk:
                break
    return out


def test_wrong_fields_are_refused_over_http_too(served):
    before = served.service.store.counts()
    for fields in REFUSED:
        body = json.dumps({"prompt": "a fox", **fields})
        headers = {"Content-Type": "application/json"}
        error_of(served.client.post("/v1/videos", content=body, headers=headers), 400)
    assert served.service.store.counts() == before


BODIES = {
    "empty": (b"", "application/json", 400),
    "no object": (b"[1]", "application/json", 400),
    "cut": (b'{"prompt": "a', "application/json", 400),
    "nested": (b'{"prompt":' + b"[" * 40_000, "application/json", 400),
    "twice": (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
    "both names": (
        b'{"prompt": "a", "format": "mp4", "output_format": "gif"}',
        "application/json",
        400,
    ),
    "many values": (b'{"a": [' + b"1," * 30_000 + b"1]}", "application/json", 400),
    "long number": (b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}", "application/json", 400),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "application/json", 400),
    "bytes": (bytes(range(256)), "application/json", 400),
    "no type": (b"{}", "", 415),
    "text": (b"prompt=a", "text/plain", 415),
    "pickle": (b"\x80\x04.", "application/octet-stream", 415),
    "urlencoded": (b"prompt=a", "application/x-www-form-urlencoded", 415),
    "form without a boundary": (b"x", "multipart/form-data", 400),
    "form that is none": (b"x", "multipart/form-data; boundary=b", 400),
    "form of two images": (
        b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\nx\r\n'
        * 2
        + b"--b--\r\n",
        "multipart/form-data; boundary=b",
        400,
    ),
    "form of many fields": (
        b"".join(
            b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % n for n in range(99)
        )
        + b"--b--\r\n",
        "multipart/form-data; boundary=b",
        400,
    ),
    "large field": (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        + b"x" * 70_000
        + b"\r\n--b--",
        "multipart/form-data; boundary=b",
        400,
    ),
    "file for a field": (
        b'--b\r\nContent-Disposition: form-data; name="prompt"; filename="a"\r\n\r\nx\r\n--b--\r\n',
        "multipart/form-data; boundary=b",
        400,
    ),
}


@pytest.mark.parametrize("body,kind,status", BODIES.values(), ids=BODIES)
def test_strange_bodies_are_refused_with_a_reason(served, body, kind, status):
    headers = {"Content-Type": kind} if kind else {}
    error_of(served.client.post("/v1/videos", content=body, headers=headers), status)


def test_large_bodies_are_refused_before_they_are_read(served):
    headers = {"Content-Type": "application/json"}
    answer = served.client.post("/v1/videos", content=b"x" * 200_000, headers=headers)
    assert "100000 bytes" in error_of(answer, 413)

    def chunks():  # no length is declared
        for _ in range(20):
            yield b"x" * 10_000

    error_of(served.client.post("/v1/videos", content=chunks(), headers=headers), 413)
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    assert b" 413 " in sent(served, head)


def test_slow_clients_are_sent_away_and_hold_nobody_up(served):
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{"
    answers = []
    slow = [threading.Thread(target=lambda: answers.append(sent(served, head))) for _ in range(8)]
    for thread in slow:
        thread.start()
    begun = time.monotonic()
    assert served.client.get("/health").status_code == 200
    assert time.monotonic() - begun < 0.7  # they are waited for 0.8 s
    for thread in slow:
        thread.join()
    assert all(b" 408 " in answer for answer in answers) and len(answers) == 8


@pytest.mark.parametrize(
    "path",
    [
        "/v1/videos/..%2f..%2f..%2fetc%2fpasswd/content",
        "/v1/videos/../../etc/passwd",
        "/v1/videos/%00/content",
        "/v1/videos/video_*/content",
        "/v1/videos/%F0%9F%A6%8A",
        "/v1/videos/' OR 1=1 --",
        "/v1/models/../../etc/passwd",
        "/jobs.sqlite3",
        "/page.html",
    ],
)
def test_paths_lead_nowhere(served, path):
    raw = f"GET {path.replace(' ', '%20')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    assert b" 404 " in sent(served, raw)


def test_other_sites_pages_are_refused(served):
    for headers in ({"Origin": "https://example.org"}, {"Origin": "null"}):
        assert "other sites" in error_of(served.post("a fox", headers=headers), 403)
    foreign = {"Host": "example.org:80"}
    assert "name" in error_of(served.client.get("/v1/videos", headers=foreign), 421)
    assert served.client.get("/health", headers=foreign).status_code == 200
    assert served.client.get("/v1/videos", headers={"Host": "LOCALHOST:1"}).status_code == 200
    same = {"Origin": served.url}
    assert served.ended(served.post("a fox", headers=same).json()["id"])["status"] == "completed"
    preflight = served.client.options("/v1/videos", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in preflight.headers


# -- keys ------------------------------------------------------------------------------------------

ALICE, BOB = Key(name="alice", jobs=1, pixels=64 * 48, body=300), Key(name="bob", priority=1)
KEYS = Keys({digest("secret-a"): ALICE, digest("secret-b"): BOB})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("guarded"), keys=KEYS, queue=2) as server:
        yield server


def of(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_there_is_nothing(guarded):
    for path in ("/v1/videos", "/v1/models", "/v1/models/stub", "/metrics", "/v1/videos/x/events"):
        for headers in ({}, of("wrong"), {"Authorization": "secret-a"}):
            answer = guarded.client.get(path, headers=headers)
            error_of(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/videos", "/v1/videos/sync"):
        error_of(guarded.client.post(path, json={"prompt": "a"}), 401)
    for path in ("/", "/health", "/ready"):
        assert guarded.client.get(path).status_code == 200


def test_a_key_sees_its_own_videos_and_keeps_to_its_limits(guarded):
    first = guarded.post("sleep 20", headers=of("secret-a")).json()
    full = guarded.post("a fox", headers=of("secret-a"))
    assert "1 are allowed" in error_of(full, 429) and int(full.headers["retry-after"]) > 0
    error_of(guarded.post("a fox", headers=of("secret-a"), size="96x96"), 400)
    assert "300 bytes" in error_of(guarded.post("a" * 300, headers=of("secret-a")), 413)
    for path in ("", "/content", "/events"):
        error_of(guarded.client.get(f"/v1/videos/{first['id']}{path}", headers=of("secret-b")), 404)
    assert guarded.client.get("/v1/videos", headers=of("secret-b")).json()["data"] == []
    own = guarded.client.get("/v1/videos", headers=of("secret-a")).json()["data"]
    assert [job["id"] for job in own] == [first["id"]]
    guarded.client.delete(f"/v1/videos/{first['id']}", headers=of("secret-a"))


def test_a_full_queue_says_when_to_come_again(guarded):
    post = lambda: guarded.post("sleep 20", headers=of("secret-b"), size="96x96")
    answers = [post()]
    until(lambda: guarded.service.store.counts()["in_progress"])
    answers += [post() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]  # one runs, two wait
    assert "queue is full" in error_of(answers[-1], 429)
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 600
    for answer in answers[:3]:
        guarded.client.delete(f"/v1/videos/{answer.json()['id']}", headers=of("secret-b"))


# -- the page --------------------------------------------------------------------------------------


def test_the_page_stands_alone(served):
    answer = served.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    text = answer.text
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert policy == content_policy(PAGE.read_text())
    assert " on" not in "".join(re.findall(r"<[a-z]+ [^>]*>", text.partition("<script>")[0]))


# -- anything --------------------------------------------------------------------------------------

IDS = st.sampled_from(["video_" + "0" * 24, "x", "..", "%2e%2e%2f", "sync", "%00", "é", "a/b"])
PATHS = st.sampled_from(
    [
        "/",
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/videos",
        "/v1/videos/sync",
        "/v1",
        "//",
    ]
) | st.builds(
    lambda id, rest: f"/v1/videos/{id}{rest}",
    IDS,
    st.sampled_from(["", "/content", "/events", "/cancel", "/content?variant=x"]),
)
KINDS = ["application/json", "multipart/form-data; boundary=b", "text/plain", "", "a" * 300, "/;="]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from([*FIELDS, "input_reference", "x"]), inside, max_size=4)
    ),
    max_leaves=8,
)


@examples(150)
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"]),
    path=PATHS,
    query=st.dictionaries(
        st.sampled_from(["limit", "after", "order", "search", "x"]), st.text(max_size=9)
    ),
    kind=st.sampled_from(KINDS),
    body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()),
    headers=st.dictionaries(
        st.sampled_from(["Range", "Idempotency-Key", "Authorization", "If-Range", "X"]),
        st.text("ab =-,/0123456789~", min_size=1, max_size=12).map(str.strip),
    ),
)
def test_nothing_makes_the_server_fail(served, method, path, query, kind, body, headers):
    headers = headers | ({"Content-Type": kind} if kind else {})
    url = path + ("&" if "?" in path else "?") + str(httpx.QueryParams(query))
    answer = served.client.request(method, url, content=body, headers=headers)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        error_of(answer, answer.status_code)
