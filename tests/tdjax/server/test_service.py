"""Workers that die, hang, fail and are stopped: every job ends once, and none is lost."""

import os
import signal
import sqlite3
import time

import pytest
from server_cases import serving, until
from stub_worker import MODEL

import tdjax.server.service
from tdjax.server.asking import model_of


def kill_worker(served, number=0):
    process = served.service.workers[number].process
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: served.service.workers[number].process is not process)


def running(served, id):
    return until(lambda: served.get(id)["status"] == "in_progress")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A server that gives jobs up soon."""
    with serving(tmp_path_factory.mktemp("short"), attempts=2, job_seconds=3.0) as server:
        yield server


def test_a_job_whose_worker_dies_is_made_by_the_next(short):
    id, waiting = short.add("sleep 0.5"), short.add("a fox")
    running(short, id)
    kill_worker(short)
    assert short.get(id)["status"] == "queued"
    jobs = short.ended(id), short.ended(waiting)
    assert [job["status"] for job in jobs] == ["completed", "completed"]
    names = [path.name for path in short.service.store.videos.glob(f"{id}.*.mp4")]
    assert names == [f"{id}.2.mp4"]


def test_a_job_that_kills_workers_fails_and_the_others_do_not(short):
    poison, fine = short.add("die"), short.add("a fox")
    assert short.ended(poison)["error"]["code"] == "worker_died"
    assert short.ended(fine)["status"] == "completed"


@pytest.mark.parametrize("prompt,name", [("break", "RuntimeError"), ("damaged", "CheckpointError")])
def test_a_fault_fails_its_job_without_a_word_of_the_machine(short, prompt, name):
    starts = short.service.workers[0].starts
    broken, fine = short.add(prompt), short.add("a fox")
    error = short.ended(broken)["error"]
    assert error["code"] == "internal" and name in error["message"]
    assert "secret" not in error["message"]
    assert short.ended(fine)["status"] == "completed"
    assert short.service.workers[0].starts == starts + 1


@pytest.mark.slow  # it waits for the limit
def test_a_job_that_takes_too_long_is_given_up(short):
    stuck, fine = short.add("sleep 60"), short.add("a fox")
    assert short.ended(stuck)["error"]["code"] == "timeout"
    assert short.ended(fine)["status"] == "completed"


@pytest.mark.slow  # the same
def test_a_stuck_worker_is_replaced_also_when_that_cannot_be_written_down(tmp_path, monkeypatch):
    with serving(tmp_path, job_seconds=0.5, attempts=1) as server:
        real, refused = server.service.store.fail, []

        def once(*arguments):
            if refused:
                return real(*arguments)
            refused.append(arguments)
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(server.service.store, "fail", once)
        stuck, fine = server.add("sleep 60"), server.add("a fox")
        assert server.ended(stuck)["status"] == "failed" and refused
        assert server.ended(fine)["status"] == "completed"


@pytest.mark.slow  # two workers start
def test_workers_share_the_queue(tmp_path):
    with serving(tmp_path, workers=2) as server:
        until(lambda: all(worker.ready for worker in server.service.workers))
        ids = [server.add("sleep 0.3") for _ in range(4)]
        until(lambda: all(worker.jobs for worker in server.service.workers))
        assert {server.ended(id)["status"] for id in ids} == {"completed"}


def test_a_server_that_stops_keeps_what_was_not_made(tmp_path):
    with serving(tmp_path) as server:
        running(server, long := server.add("sleep 60"))
        waiting = server.add("a fox")
    with serving(tmp_path) as server:
        assert server.get(long)["status"] == "in_progress"
        assert server.service.store.get(long).deaths == 0
        server.client.delete(f"/v1/videos/{long}")
        assert server.ended(waiting)["status"] == "completed"


@pytest.mark.slow  # two servers start
def test_a_full_disk_is_said_and_ends_the_server_rather_than_its_queue(tmp_path):
    with serving(tmp_path) as server:
        running(server, id := server.add("sleep 0.3"))
        pages = server.service.store.db.execute("PRAGMA page_count").fetchone()[0]
        server.service.store.db.execute(f"PRAGMA max_page_count = {pages}")
        answers = [server.post("a" * 9000) for _ in range(3)]
        assert answers[-1].status_code == 503 and "disk" in answers[-1].text
        assert answers[-1].headers["retry-after"] == "60"
        server.service.store.complete = lambda *arguments: 1 / 0  # as sqlite does then
        until(lambda: isinstance(server.service.fault, ZeroDivisionError))
        assert server.get(id)["status"] == "in_progress"
    with serving(tmp_path) as server:
        assert server.ended(id)["status"] == "completed"


def test_a_job_that_a_full_disk_kept_from_being_begun_is_begun_later(tmp_path, monkeypatch):
    monkeypatch.setattr(tdjax.server.service, "AGAIN", 0.05)
    with serving(tmp_path) as server:
        real, expired = server.service.store.claim, []

        def full(*arguments):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(server.service.store, "expire", lambda: expired.append(1) or full())
        monkeypatch.setattr(server.service.store, "claim", full)
        id = server.add("a fox")  # it is kept, and so it is answered
        assert server.get(id)["status"] == "queued"
        until(lambda: len(expired) > 2)
        monkeypatch.setattr(server.service.store, "claim", real)
        assert server.ended(id)["status"] == "completed" and server.service.fault is None


def test_a_model_that_cannot_be_opened_is_said(tmp_path):
    with serving(tmp_path, task="none") as server:
        until(lambda: server.service.refused is not None)
        assert (
            "no such model" in str(server.service.refused) and server.service.refused.exit_code == 2
        )
        assert server.client.get("/ready").status_code == 503
        assert server.post("a fox").status_code == 503


def test_what_a_worker_tells_of_its_model_is_the_model():
    import dataclasses
    import json

    assert model_of(json.loads(json.dumps(dataclasses.asdict(MODEL)))) == MODEL


def test_the_time_until_a_place_is_free_is_bounded(short):
    service = short.service
    before, service.seconds = service.seconds, 1e9
    assert service.retry_after() == 600
    service.seconds = 0.0
    assert service.retry_after() == 1
    service.seconds = before
    begun = time.monotonic()
    short.ended(short.add("a fox"))
    assert time.monotonic() - begun < 5
