"""Workers that die, hang, fail and are stopped: every job ends once, and none is lost."""

import contextlib
import os
import signal
import sqlite3
import time
import types

import fsspec
import pytest
import sqlalchemy as sa
from server_cases import serving, until
from stub_worker import MODEL

import tdjax.server.service
from tdjax.server.asking import model_of
from tdjax.server.service import Service
from tdjax.server.tables import Database


def full_disk():
    cause = sqlite3.OperationalError("database or disk is full")
    return sa.exc.OperationalError("INSERT INTO jobs", {"prompt": "a secret"}, cause)


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


def test_the_end_of_a_job_whose_frames_are_there_frees_no_place_of_the_next(short):
    late, long, third = short.add("late fail"), short.add("sleep 2"), short.add("a fox")
    assert short.ended(late)["status"] == "failed"
    assert [short.get(id)["status"] for id in (long, third)] == ["in_progress", "queued"]
    short.client.post(f"/v1/videos/{long}/cancel")
    assert short.ended(third)["status"] == "completed"


def test_a_job_goes_first_to_a_worker_that_has_nothing_to_end():
    asked = []
    worker = lambda name, jobs: types.SimpleNamespace(jobs=jobs, feed=lambda: asked.append(name))
    workers = [worker("ends two", {"a", "b"}), worker("idle", set()), worker("ends one", {"c"})]
    Service.feed(types.SimpleNamespace(workers=workers))
    assert asked == ["idle", "ends one", "ends two"]


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
            raise full_disk()

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
        jobs = server.service.store.db
        ((pages,),) = jobs.rows(sa.text("PRAGMA page_count"))
        jobs.rows(sa.text(f"PRAGMA max_page_count = {pages}"))
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
            raise full_disk()

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


@pytest.mark.slow
def test_a_database_that_is_away_for_a_while_ends_nothing(tmp_path, postgresql, monkeypatch):
    place = {"store": postgresql, "videos": str(tmp_path)}
    with serving(tmp_path / "a", **place) as server:
        running(server, id := server.add("sleep 0.3"))
        jobs, away = server.service.store, [full_disk(), full_disk()]
        real = jobs.complete

        def complete(*arguments):
            if away:
                raise away.pop()
            return real(*arguments)

        monkeypatch.setattr(jobs, "complete", complete)
        ended = sa.func.pg_terminate_backend(sa.column("pid"))
        with contextlib.closing(Database(postgresql)) as db:
            others = sa.column("pid") != sa.func.pg_backend_pid()
            clients = sa.column("backend_type") == "client backend"
            query = sa.select(ended).select_from(sa.table("pg_stat_activity"))
            assert db.rows(query.where(others, clients))
        assert server.ended(id)["status"] == "completed" and not away
        assert server.service.fault is None and jobs.get(id).attempts == 1
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "get", lambda *arguments: (_ for _ in ()).throw(full_disk()))
            answer = server.client.get(f"/v1/videos/{id}")
        assert answer.status_code == 503 and "secret" not in answer.text
        assert "the store of jobs does not answer" in answer.text


@pytest.mark.slow  # two servers start
def test_servers_share_jobs_and_videos(tmp_path):
    place = {"store": f"sqlite:///{tmp_path}/jobs.sqlite3", "videos": "memory://shared/videos"}
    stored = fsspec.filesystem("memory").store
    stored.clear()
    with serving(tmp_path / "a", **place) as one, serving(tmp_path / "b", **place) as other:
        ids = [one.add("sleep 0.5") for _ in range(4)]
        until(lambda: one.service.workers[0].jobs and other.service.workers[0].jobs)
        for id in ids:
            job = other.ended(id)
            assert job["status"] == "completed" and job == one.get(id)
            contents = [each.client.get(f"/v1/videos/{id}/content") for each in (one, other)]
            assert {each.content for each in contents} == {f"video of {id} ".encode() * 100}
        part = other.client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=6-7"})
        assert part.status_code == 206 and part.content == b"of"
        assert not list((tmp_path / "a" / "work" / "videos").glob("*.mp4"))
        id = one.add("sleep 60")
        until(lambda: (job := one.get(id))["preview"] and job == other.get(id))
        preview = {
            each.client.get(f"/v1/videos/{id}/content?variant=thumbnail").content[:2]
            for each in (one, other)
        }
        assert preview == {b"\xff\xd8"}
        idle = other if one.service.workers[0].jobs else one
        with idle.client.stream("GET", f"/v1/videos/{id}/events") as events:
            lines = events.iter_lines()
            assert next(lines) == "event: in_progress"
            idle.client.post(f"/v1/videos/{id}/cancel")
        for each in (one, other):
            until(lambda each=each: not each.service.workers[0].jobs and each.get(id)["status"])
        for each in ids:
            one.client.delete(f"/v1/videos/{each}")
        until(lambda: not stored)
