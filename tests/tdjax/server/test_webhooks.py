"""Clients that are told: to which addresses, how it is signed, and that each event arrives."""

import asyncio
import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sqlalchemy as sa
from server_cases import SECRET, serving, until

from tdjax.errors import UsageError
from tdjax.server import webhooks
from tdjax.server.limits import Limits
from tdjax.server.store import Store
from tdjax.server.tables import HOOKS
from tdjax.server.webhooks import MARK, Webhooks, allowed_addresses, checked_address, read_secret

ALLOWED = ("https://example.org/hooks/", "http://other.example:81/exactly")


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/hooks/",
        "https://example.org/hooks/x/y?z=..",
        "https://EXAMPLE.org:443/hooks/x",
        ALLOWED[1],
    ],
)
def test_addresses_below_those_that_are_allowed(address):
    assert checked_address(address, ALLOWED) == address


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/hooks",
        "https://example.org/",
        "http://example.org/hooks/",
        "https://example.org:444/hooks/",
        "https://example.org.evil.example/hooks/",
        "https://evil.example/https://example.org/hooks/",
        "https://example.org@evil.example/hooks/",
        "https://user@example.org/hooks/",
        "https://example.org/hooks/../admin",
        "https://example.org/hooks/..",
        "https://example.org/hooks/%2e%2e/admin",
        "https://example.org/hooks/..%2Fadmin",
        "https://example.org/hooks/x\\..\\y",
        "https://example.org/hooks//x",
        "https://example.org/hooks/#x",
        "https://example.org/hooks/ x",
        "https://example.org/hooks/\r\nX: y",
        "https://example.org/hooks/\u00e9",
        "https://example.org:99999/hooks/",
        "https://[::1/hooks/",
        "//example.org/hooks/",
        "file:///etc/passwd",
        "http://other.example:81/exactly/more",
        "http://other.example:81/exactly?a=bc",
        "https://example.org/hooks/" + "x" * 2000,
        "",
        7,
    ],
)
def test_no_other_address_is_called(address):
    with pytest.raises(UsageError) as error:
        checked_address(address, ALLOWED)
    assert str(error.value).count("\n") == 2
    with pytest.raises(UsageError, match="calls no addresses"):
        checked_address(address, ())


def test_a_host_alone_allows_all_of_its_own():
    assert allowed_addresses(["https://example.org"]) == ("https://example.org/",)
    assert checked_address("https://example.org/x", allowed_addresses(["https://example.org"]))


def test_a_secret_is_drawn_once_and_others_cannot_read_it(tmp_path):
    file = tmp_path / "folder" / "secret"
    key = read_secret(file)
    assert len(key) == 32 and read_secret(file) == key
    assert file.stat().st_mode & 0o777 == 0o600
    for wrong in ("", "whsec_", "whsec_YQ==", "\u00e9", file.read_text()[6:]):
        file.write_text(wrong)
        with pytest.raises(UsageError, match="cannot be the secret"):
            read_secret(file)
    with pytest.raises(UsageError):
        read_secret(tmp_path)


@contextlib.contextmanager
def receiving(statuses):
    """(address, requests that came) of a server that answers with these, one after another."""
    came, left = [], list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((self.path, dict(self.headers), body))
            self.send_response(left.pop(0) if left else 204)
            self.send_header("Location", "/other")
            self.end_headers()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_each_event_arrives_signed_and_is_tried_again(tmp_path, monkeypatch):
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(webhooks, "SOONEST", 0.05)
    monkeypatch.setattr(webhooks, "LOOK", 0.05)
    secret = MARK + webhooks.base64.b64encode(SECRET).decode()
    client = openai.OpenAI(api_key="any", webhook_secret=secret)
    with (
        receiving([500, 302]) as (url, came),
        serving(tmp_path, webhooks=(url,)) as server,
    ):
        done = server.add("a", webhook=url + "x?y=z")
        assert server.ended(done)["webhook"] == url + "x?y=z"
        until(lambda: len(came) == 3)
        failed = server.ended(server.add("fail", webhook=url))["id"]
        server.client.post(f"/v1/videos/{(id := server.add('sleep 30', webhook=url))}/cancel")
        until(lambda: len(came) == 5)
        assert [path for path, _, _ in came[:3]] == ["/x?y=z"] * 3
        assert len({headers["webhook-id"] for _, headers, _ in came[:3]}) == 1
        events = [client.webhooks.unwrap(body, headers) for _, headers, body in came[2:]]
        assert {(event.type, event.data.id) for event in events} == {
            ("video.completed", done),
            ("video.failed", failed),
            ("video.cancelled", id),
        }
        _, headers, body = came[2]
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body.replace(b"completed", b"failed"), headers)
        wrong = server.post(webhook=url.replace("127.0.0.1", "localhost"))
        assert wrong.status_code == 400 and url in wrong.json()["error"]["message"]
    client.close()


@pytest.fixture
def ended(tmp_path):
    """(store, job that has ended and waits to tell of it)."""
    with contextlib.closing(Store(tmp_path, Limits())) as jobs:
        request = {"format": "mp4", "prompt": "a", "webhook": "http://127.0.0.1:9/"}
        id = jobs.add("", request, digest="d", shape="s").id
        jobs.cancel(id)
        yield jobs, jobs.get(id)


def due(jobs):
    with jobs.db.transaction() as connection:
        return list(connection.execute(sa.select(HOOKS.c.due)).scalars())


def test_the_longer_nobody_answers_the_later_it_is_tried(ended, monkeypatch, capsys):
    jobs, job = ended
    hooks = Webhooks(jobs, ("http://127.0.0.1:9/",), SECRET)
    for since, pause in ((1, 5), (60, 60), (9000, 3600)):
        monkeypatch.setattr(webhooks.time, "time", lambda since=since: job.completed_at + since)
        asyncio.run(hooks._tell(job))
        (when,) = due(jobs)
        assert when - job.completed_at - since == pytest.approx(pause, abs=1)
    monkeypatch.setattr(webhooks.time, "time", lambda: job.completed_at + 90_000)
    asyncio.run(hooks._tell(job))
    assert not due(jobs) and "given up" in capsys.readouterr().err


def test_an_address_that_is_no_longer_allowed_is_not_called(ended):
    jobs, job = ended
    asyncio.run(Webhooks(jobs, ("http://127.0.0.1:10/",), SECRET)._tell(job))
    assert not due(jobs)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1", b"\0" * 9000, b"220 mail\r\n", None], ids=str)
def test_whatever_answers_it_ends_and_is_tried_again(ended, monkeypatch, answer):
    jobs, job = ended
    monkeypatch.setattr(webhooks, "SECONDS", 0.3)

    async def strange(reader, writer):
        try:
            await reader.readline()
            if answer is None:  # one that never answers
                await asyncio.sleep(1)
            writer.write(answer or b"")
        finally:
            writer.close()

    async def told():
        server = await asyncio.start_server(strange, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        job.request["webhook"] = url
        await asyncio.wait_for(Webhooks(jobs, (url,), SECRET)._tell(job), 5)
        server.close()

    asyncio.run(told())
    assert due(jobs)[0] > time.time()
