"""The command: what it refuses, and the server as a process that is killed and stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest
import stub_worker
import yaml
from server_cases import until

from tdjax.errors import UsageError
from tdjax.media.video import read_video
from tdjax.server import __main__ as server
from tdjax.server import keys
from tdjax.server.limits import Limits


def refused(capsys, *words) -> str:
    assert server.main([*map(str, words)]) == 2
    return capsys.readouterr().err


WRONG = {
    "--workers 0": "1 to 64",
    "--port 70000": "65535",
    "--drain -1": "seconds",
    "--queue 0": "--queue is 0",
    "--sizes large": "832x480x81",
    "--sizes 64x64 65x64": "width is 65",
    "--max_frames -3": "--max_frames is -3",
    "--keep_hours nan": "--keep_hours",
    "--host 0.0.0.0": "whoever reaches this address",
    "--store postgresql://127.0.0.1/jobs": "--store without --videos",
    "--store mysql://127.0.0.1/jobs --videos v": "nearest: sqlite",
    "--videos nowhere://bucket": "nowhere://bucket cannot be opened",
    "--lease 0": "--lease is 0",
    "--api_keys missing.toml": "cannot be read",
    "--api_keys env:NO_SUCH_KEYS": "no variable NO_SUCH_KEYS",
    "--loras missing": "no such folder",
    "--webhooks ftp://example.org/": "https://example.org/videos/",
    "--webhooks https://user@example.org/": "https://example.org/videos/",
    "--webhooks https://example.org:port/": "https://example.org/videos/",
    "--modle demo": "did you mean --model?",
    "--host 203.0.113.1 --api_keys none": "cannot be listened at",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told_before_anything_starts(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *words.split())
    assert WRONG[words] in message and message.startswith("error: ")
    assert message.count("\n") == 3


def test_limits_of_the_command_are_the_librarys():
    assert server.limits_of(server.build_parser().parse_args([])) == Limits()


def test_workers_get_devices_of_their_own():
    assert server.devices_of(1, None, None) == ["0"]
    assert server.devices_of(1, None, "3,4") == ["3"]
    assert server.devices_of(1, "sp=2", None) == ["0,1"]
    assert server.devices_of(1, "auto", "3,4") == [None]
    assert server.devices_of(2, None, "") == [None, None]
    assert server.devices_of(2, None, None) == ["0", "1"]
    assert server.devices_of(2, "sp=2", "4,5,6,7") == ["4,5", "6,7"]
    assert server.devices_of(2, "tp=2,sp=2", None) == ["0,1,2,3", "4,5,6,7"]
    with pytest.raises(UsageError, match="need 4 devices"):
        server.devices_of(2, "2", "0,1,2")


def test_workers_open_the_model_of_the_command_line():
    args = server.build_parser().parse_args(["--model", "m", "--quant", "int8", "--port", "1"])
    options = json.loads(server.worker_command(args)[-1])
    assert (options["model"], options["quant"]) == ("m", "int8")
    assert "lora_low" in options and "vae_path" in options and "port" not in options


def test_small_answers_leave_at_once():
    with server.listening("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP  # by which asyncio tells


def test_libraries_that_are_missing_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "fcntl" or None)
    assert "pip install" in refused(capsys, "--folder", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "WSL" in refused(capsys, "--folder", tmp_path)


def test_windows_is_told_where_it_runs(tmp_path):
    code = "import sys; sys.modules['fcntl'] = None\n"
    code += "import importlib.util as u; real = u.find_spec\n"
    code += "u.find_spec = lambda name: None if name == 'fcntl' else real(name)\n"
    code += f"from tdjax.server import __main__ as s; s.main(['--folder', {str(tmp_path)!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("error: the server does not run on Windows itself\n")


def test_the_web_process_has_no_jax():
    code = "import tdjax.server.app, tdjax.server.http, tdjax.server.__main__, sys\n"
    code += "print(sorted({'jax', 'flax', 'orbax', 'av'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


# -- keys ------------------------------------------------------------------------------------------


def test_keys_are_drawn_once_and_kept_as_hashes(tmp_path, capsys):
    assert keys.main(["alice", "bob"]) == 0
    out = capsys.readouterr()
    drawn = dict(re.findall(r"(\w+): (tdjax-\S+)", out.err))
    assert set(drawn) == {"alice", "bob"} and not any(key in out.out for key in drawn.values())
    (tmp_path / "keys.toml").write_text(out.out + "priority = 2\njobs = 3\n")
    read = keys.read_keys(tmp_path / "keys.toml")
    assert read.of(f"Bearer {drawn['alice']}").name == "alice"
    bob = read.of(f"bearer  {drawn['bob']}")
    assert (bob.priority, bob.limits(Limits()).jobs, bob.limits(Limits(jobs=2)).jobs) == (2, 3, 2)
    for header in (None, "", "Bearer", "Bearer x", drawn["alice"], "Bearer \udcff"):
        assert read.of(header) is None
    assert keys.main(["a b"]) == 2


FILES = {
    "": "has no keys",
    "[alice]": "no sha256",
    "alice = 3": "no sha256",
    '[alice]\nsha256 = "abc"': "no sha256",
    f'[alice]\nsha256 = "{"0" * 64}"\npriorty = 1': "nearest: priority",
    f'[alice]\nsha256 = "{"0" * 64}"\njobs = "many"': "jobs is 'many'",
    f'[alice]\nsha256 = "{"0" * 64}"\njobs = 0': "`jobs` of the key alice is 0",
    f'[alice]\nsha256 = "{"0" * 64}"\n[bob]\nsha256 = "{"0" * 64}"': "the same key as alice",
    "[alice": "cannot be read",
    "a = " + "[" * 3000: "cannot be read",
}


def test_keys_that_change_are_read_and_wrong_ones_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(keys, "LOOK", 0.0)
    file = tmp_path / "keys.toml"
    file.write_text(keys.table_of("alice", "a") + keys.table_of("bob", "b"))
    found = keys.read_keys(file)
    known = lambda: [name for name in "abc" if found.of(f"Bearer {name}")]
    assert known() == ["a", "b"]
    file.write_text(keys.table_of("bob", "b") + keys.table_of("carol", "c") + "jobs = 3\n")
    assert known() == ["b", "c"] and found.of("Bearer c").jobs == 3
    for wrong in ("[bob", "", "[bob]\n"):  # nobody may come in by an empty file
        file.write_text(wrong)
        assert known() == ["b", "c"]
    file.unlink()
    assert known() == ["b", "c"]
    assert "has changed: 2 keys" in (said := capsys.readouterr().err) and "stay" in said


@pytest.mark.parametrize("text", FILES, ids=FILES.values())
def test_strange_files_of_keys_are_refused(tmp_path, text, monkeypatch):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=FILES[text]):
        keys.read_keys(path)
    monkeypatch.setenv("OUR_KEYS", text)
    with pytest.raises(UsageError, match=FILES[text]):
        keys.environment_keys("OUR_KEYS")


def test_keys_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("OUR_KEYS", keys.table_of("alice", "a") + "jobs = 3\n")
    args = server.build_parser().parse_args(["--host", "0.0.0.0", "--api_keys", "env:OUR_KEYS"])
    found = server.keys_of(args)
    assert found.of("Bearer a").jobs == 3 and found.of("Bearer b") is None


# -- the container ---------------------------------------------------------------------------------


def test_the_servers_of_the_compose_file_share_what_is_there():
    file = yaml.safe_load(
        (Path(server.__file__).parents[2] / "docs/deploy/compose.yaml").read_text()
    )
    sharing = [each for each in file["services"].values() if "--store" in each.get("command", ())]
    assert len(sharing) == 2
    for each in sharing:
        args = server.build_parser().parse_args(each["command"])
        assert args.store == "postgresql+psycopg://tdjax@database/tdjax"
        folders = dict(volume.split(":")[::-1] for volume in each["volumes"])
        assert folders[args.videos] == "videos" and set(folders.values()) <= set(file["volumes"])
        assert "postgresql" in each["build"]["args"]["EXTRAS"] and "database" in each["depends_on"]
    assert len({each["volumes"][0] for each in sharing}) == 2


def test_the_container_starts_the_server():
    root = Path(server.__file__).parents[2]
    text = (root / "docs/deploy/Dockerfile").read_text()
    entry, command = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.M)
    compose = (root / "docs/deploy/compose.yaml").read_text()
    services = yaml.safe_load(compose)["services"]
    commands = [each["command"] for each in services.values() if "build" in each]
    assert len(commands) == 4
    for each in [json.loads(command), *commands]:
        args = server.build_parser().parse_args((json.loads(entry) + each)[3:])
        assert (args.host, args.api_keys) == ("0.0.0.0", "/run/secrets/keys")
    for seconds in re.findall(r"stop_grace_period: (\d+)s", compose):
        assert int(seconds) > args.drain
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((root / name).exists() for name in sources.split())


# -- the process -----------------------------------------------------------------------------------

# The command with workers that need no model.
STUBBED = f"""
import sys
from tdjax import cli
from tdjax.server import __main__ as server
server.worker_command = lambda args: [sys.executable, "-P", {stub_worker.__file__!r}, args.model]
cli.run(server.main)
"""


class Process:
    """A server as a process, at one port and over one folder, however often it is started."""

    def __init__(self, folder, *words, code=STUBBED):
        self.command = [sys.executable, "-c", code, "--folder", str(folder), *words]
        self.log = folder / "log"
        folder.mkdir()
        self.port = 0

    def start(self):
        with open(self.log, "a") as log:
            command = [*self.command, "--port", str(self.port)]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        if not self.port:
            found = until(lambda: re.search(r":(\d+) \(the page", self.log.read_text()))
            self.port = int(found[1])
            self.url = f"http://127.0.0.1:{self.port}"
        return self

    def ask(self, method, path, **options):
        """An answer, however long the server is away."""
        while True:
            try:
                answer = httpx.request(method, self.url + path, timeout=60, **options)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code not in (429, 503):
                return answer
            time.sleep(0.05)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def process(*arguments, **options):
    running = Process(*arguments, **options).start()
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow  # processes start and stop
def test_a_stopped_server_lets_jobs_end_and_answers_meanwhile(tmp_path):
    with process(tmp_path / "s", "--model", "t2v", "--drain", "20") as running:
        ask = running.ask
        until(lambda: ask("GET", "/v1/models").status_code == 200)
        id = ask("POST", "/v1/videos", json={"prompt": "sleep 3"}).json()["id"]
        until(lambda: ask("GET", f"/v1/videos/{id}").json()["status"] == "in_progress")
        (worker,) = children(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        answer = httpx.post(running.url + "/v1/videos", json={"prompt": "late"})
        assert answer.status_code == 503 and "stopped" in answer.text
        assert running.process.wait(30) == 0
        assert not os.path.exists(f"/proc/{worker}")
        running.start()
        assert ask("GET", f"/v1/videos/{id}").json()["status"] == "completed"
        assert running.stop(signal.SIGINT) == 0
        assert "1 jobs have up to 20 s" in running.log.read_text()


@pytest.mark.slow  # the same
def test_a_server_without_its_model_ends_with_its_message(tmp_path):
    with process(tmp_path / "s", "--model", "none") as running:
        assert running.process.wait(30) == 2
        message = "error: no such model\nthe stub was told so\nleave --offline away\n"
        assert message in running.log.read_text()


@pytest.mark.slow  # the same
def test_a_full_disk_ends_the_server_with_a_message(tmp_path):
    full = "import sqlite3\nfrom sqlalchemy import exc\nfrom tdjax.server.store import Store\n"
    full += "cause = sqlite3.OperationalError('database or disk is full')\n"
    full += "def fail(*a): raise exc.OperationalError('', {}, cause)\n"
    code = STUBBED.replace("cli.run", f"{full}Store.complete = fail\ncli.run")
    with process(tmp_path / "s", "--model", "t2v", code=code) as running:
        until(lambda: running.ask("GET", "/v1/models").status_code == 200)
        running.ask("POST", "/v1/videos", json={"prompt": "a fox"})
        assert running.process.wait(30) == 2
        said = running.log.read_text().partition("error: ")[2].splitlines()
        assert "jobs.sqlite3: database or disk is full" in said[0] and len(said) == 3


@pytest.mark.slow  # a process starts
def test_connections_that_ask_for_nothing_do_not_end_the_server(tmp_path):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n" + STUBBED
    with process(tmp_path / "s", "--model", "t2v", code=code) as running:
        until(lambda: running.ask("GET", "/v1/models").status_code == 200)
        id = running.ask("POST", "/v1/videos", json={"prompt": "sleep 1"}).json()["id"]
        with contextlib.ExitStack() as idle:
            connect = lambda: socket.create_connection(("127.0.0.1", running.port))
            for _ in range(100):
                idle.enter_context(connect())
            assert httpx.get(running.url + "/health").status_code == 503
            for _ in range(300):
                idle.enter_context(connect())
            until(lambda: list((tmp_path / "s" / "videos").glob(f"{id}*.mp4")))
        assert running.ask("GET", f"/v1/videos/{id}").json()["status"] == "completed"
        assert running.stop() == 0


@pytest.mark.slow  # two servers start
def test_jobs_of_a_server_that_is_killed_are_made_by_another_one(tmp_path, postgresql):
    videos = tmp_path / "shared"
    words = ["--model", "t2v", "--store", postgresql, "--videos", str(videos), "--lease", "3"]
    with process(tmp_path / "a", *words) as dies, process(tmp_path / "b", *words) as lives:
        for each in (dies, lives):
            until(lambda each=each: each.ask("GET", "/ready").status_code == 200)
        body = {"prompt": "sleep 6"}
        ids = [dies.ask("POST", "/v1/videos", json=body).json()["id"] for _ in range(2)]
        states = lambda: [job["status"] for job in lives.ask("GET", "/v1/videos").json()["data"]]
        until(lambda: states().count("in_progress") == 2)
        dies.process.kill()
        until(lambda: set(states()) == {"completed"}, 60)
        for id in ids:
            content = lives.ask("GET", f"/v1/videos/{id}/content").content
            assert content == f"video of {id} ".encode() * 100
        names = sorted(path.name for path in (videos / "videos").glob("*.mp4"))
        assert [name.split(".")[0] for name in names] == sorted(ids)
        assert sorted(name.split(".")[1] for name in names) == ["1", "2"]
        assert lives.stop() == 0


@pytest.mark.slow  # processes are killed and start again
def test_no_job_is_lost_or_made_twice_whoever_is_killed(tmp_path):
    check_kills(tmp_path / "s", jobs=12, clients=3, kills=3, server_kills=1, seconds=0.2, pause=0.7)


def check_kills(folder, *, jobs, clients, kills, server_kills, seconds, pause) -> dict:
    """Clients add jobs, each under a key of idempotency that it repeats until it has an answer,
    while workers and the server are killed; then every job has ended once, with its video."""
    with process(folder, "--model", "t2v", "--workers", "2", "--attempts", "9") as running:
        ids: dict[str, str] = {}

        def add(number):
            for job in range(number, jobs, clients):
                body = {"prompt": f"sleep {seconds}", "seed": job}
                headers = {"Idempotency-Key": f"job-{job}"}
                answer = running.ask("POST", "/v1/videos", json=body, headers=headers)
                ids[headers["Idempotency-Key"]] = answer.json()["id"]

        threads = [threading.Thread(target=add, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        killed = memory = 0
        for number in range(kills + server_kills):
            time.sleep(pause)
            if number % (kills // server_kills + 1) == 1:
                running.process.kill()
                running.process.wait()
                running.start()
            else:
                workers = until(lambda: children(running.process.pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(workers[number % len(workers)], signal.SIGKILL)
            killed += 1
        for thread in threads:
            thread.join()
        assert len(set(ids.values())) == len(ids) == jobs
        states = {}
        for id in ids.values():
            get = lambda id=id: running.ask("GET", f"/v1/videos/{id}").json()
            job = until(lambda get=get: (job := get())["completed_at"] and job, 300)
            states[id] = job["status"]
            content = running.ask("GET", f"/v1/videos/{id}/content").content
            assert content == f"video of {id} ".encode() * 100
        assert set(states.values()) == {"completed"}
        page = running.ask("GET", "/v1/videos?limit=100").json()["data"]
        assert len(page) == min(jobs, 100)
        names = [path.name for path in (folder / "videos").glob("*.mp4")]
        assert sorted(name.split(".")[0] for name in names) == sorted(ids.values())
        with open(f"/proc/{running.process.pid}/status") as file:
            memory = int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])
        assert running.stop() == 0
        return {"killed": killed, "jobs": len(states), "web process MB": memory // 1024}


@pytest.mark.slow  # a process with jax, which compiles
def test_the_demo_model_is_served(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    code = "from tdjax import cli\nfrom tdjax.server import __main__ as s\ncli.run(s.main)"
    with process(tmp_path / "s", code=code) as running:
        model = running.ask("GET", "/v1/models").json()["data"][0]
        assert model["id"] == "demo" and model["size"] == "64x64"
        # One step is too few for this motion: what the clip itself shows is told.
        prompt = "small yellow triangle bouncing horizontally slowly, navy background"
        body = {"prompt": prompt, "seed": 0, "num_steps": 1}
        answer = running.ask("POST", "/v1/videos/sync", json=body)
        assert answer.status_code == 200, answer.text
        (tmp_path / "x.mp4").write_bytes(answer.content)
        frames = read_video(tmp_path / "x.mp4")
        assert frames.shape == (33, 384, 384, 3) and frames.std() > 5
        job = running.ask("GET", f"/v1/videos/{answer.headers['x-video-id']}").json()
        assert job["timings"] and job["seed"] == 0
        assert any("the clip does not show what was asked for" in line for line in job["warnings"])
        picture = running.ask("GET", f"/v1/videos/{job['id']}/content?variant=thumbnail").content
        assert picture[:2] == b"\xff\xd8"
        assert running.stop() == 0
