"""Jobs in a file and in PostgreSQL: who comes next, what ends once, what is found after a crash,
and servers that share them."""

import contextlib
import threading
import time

import pytest
import sqlalchemy as sa

from tdjax.errors import UsageError
from tdjax.server import store
from tdjax.server.limits import DAY, Limits
from tdjax.server.store import Conflict, Full, Store
from tdjax.server.tables import HOOKS, JOBS, SERVERS, TURNS, Database


@pytest.fixture(params=["file", "postgresql"])
def url(request, tmp_path):
    """The address of an empty store of many servers."""
    if request.param == "file":
        yield f"sqlite:///{tmp_path}/shared.sqlite3"
        return
    yield (address := request.getfixturevalue("postgresql"))
    with contextlib.closing(Database(address)) as db, db.transaction() as connection:
        for table in (JOBS, HOOKS, TURNS, SERVERS):
            connection.execute(table.delete())


@pytest.fixture(params=["alone", "postgresql"])
def jobs(request, tmp_path):
    """A server's jobs: in its folder, and in a database."""
    limits = Limits(queue=20, jobs=20, attempts=2)
    address = None if request.param == "alone" else request.getfixturevalue("postgresql")
    with contextlib.closing(Store(tmp_path, limits, url=address)) as opened:
        yield opened
        with opened.db.transaction() as connection:
            for table in (JOBS, HOOKS, TURNS, SERVERS):
                connection.execute(table.delete())


@pytest.fixture
def server(url, tmp_path):
    """Opens one server after another of a store."""
    with contextlib.ExitStack() as opened:

        def another(**limits):
            folder, videos = tmp_path / str(time.monotonic_ns()), str(tmp_path)
            store = Store(folder, Limits(**limits), url=url, videos=videos)
            return opened.enter_context(contextlib.closing(store))

        yield another


def add(opened, owner="", shape="small", **values):
    request = {"format": "mp4", "prompt": "a"}
    return opened.add(owner, request, digest=values.pop("digest", "d"), shape=shape, **values)


def written(jobs, job, content=b"video"):
    jobs.video(job).write_bytes(content)
    return job


def test_jobs_come_back_as_they_went(jobs):
    job = add(jobs, owner="alice", priority=2)
    assert jobs.get(job.id) == job and job.status == "queued" and job.request["prompt"] == "a"
    assert jobs.get(job.id, "alice") == job
    assert jobs.get(job.id, "bob") is None and jobs.get("video_none") is None


def test_the_oldest_comes_first(jobs):
    ids = [add(jobs).id for _ in range(4)]
    assert [jobs.claim().id for _ in ids] == ids
    assert jobs.claim() is None


def test_a_higher_priority_comes_before_all(jobs):
    add(jobs, shape="small")
    high = add(jobs, shape="large", priority=1)
    assert jobs.claim("small").id == high.id


def test_jobs_of_one_shape_run_in_a_row(jobs):
    small, large, small_again = add(jobs), add(jobs, shape="large"), add(jobs)
    assert jobs.claim().id == small.id
    assert jobs.claim("small").id == small_again.id
    assert jobs.claim("small").id == large.id


def test_owners_take_turns(jobs):
    for owner in ("alice", "alice", "alice", "bob", "carol", "bob"):
        add(jobs, owner=owner)
    order = [jobs.claim().owner for _ in range(6)]
    assert order == ["alice", "bob", "carol", "alice", "bob", "alice"]


def test_a_job_ends_once(jobs):
    add(jobs)
    job = written(jobs, jobs.claim())
    assert jobs.complete(job, {"timings": {}})
    assert not jobs.fail(job, "late", "too late") and not jobs.cancel(job.id)
    after = jobs.get(job.id)
    assert after.status == "completed" and after.bytes == 5 and after.result == {"timings": {}}


def test_a_beginning_that_was_given_up_ends_nothing(jobs):
    add(jobs)
    first = jobs.claim()
    assert not jobs.give_back(first, counted=True)
    second = written(jobs, jobs.claim())
    written(jobs, first, b"of the first")
    assert first.id == second.id and not jobs.complete(first, {})
    assert not jobs.video(first).exists() and jobs.video(second).exists()
    assert jobs.complete(second, {}) and jobs.get(second.id).attempts == 2


def test_a_job_that_kills_its_worker_fails_in_the_end(jobs):
    add(jobs)
    assert not jobs.give_back(jobs.claim(), counted=True)
    assert not jobs.give_back(jobs.claim(), counted=False)  # the server was stopped
    assert jobs.give_back(jobs.claim(), counted=True)
    job = jobs.page("", None, 1, True)[0]
    assert job.status == "failed" and job.error["code"] == "worker_died"


def test_a_job_without_its_video_is_not_complete(jobs):
    add(jobs)
    job = jobs.claim()
    jobs.complete(job, {})
    assert jobs.get(job.id).error["code"] == "no_video"


def test_cancelled_jobs_end_and_leave_no_files(jobs):
    waiting = add(jobs)
    assert jobs.cancel(waiting.id) and not jobs.cancel(waiting.id)
    add(jobs)
    running = written(jobs, jobs.claim())
    jobs.image(running.id).write_bytes(b"image")
    assert jobs.cancel(running.id)
    assert not list(jobs.videos.iterdir()) and not list(jobs.inputs.iterdir())
    written(jobs, running)  # its worker had not heard yet
    assert not jobs.complete(running, {}) and not list(jobs.videos.iterdir())


def test_one_key_of_idempotency_is_one_job(jobs):
    first = add(jobs, owner="alice", idempotency="k")
    assert add(jobs, owner="alice", idempotency="k").id == first.id
    assert add(jobs, owner="bob", idempotency="k").id != first.id
    assert add(jobs, owner="alice").id != first.id
    with pytest.raises(Conflict, match="another request"):
        add(jobs, owner="alice", idempotency="k", digest="other")


def test_the_queue_is_bounded(jobs):
    for _ in range(20):
        add(jobs, jobs=100)
    with pytest.raises(Full, match="queue is full"):
        add(jobs, owner="bob", jobs=100)


def test_the_jobs_of_a_key_are_bounded_while_they_run_too(jobs):
    add(jobs, owner="alice", jobs=2)
    jobs.claim()
    add(jobs, owner="alice", jobs=2)
    with pytest.raises(Full, match="2 wait or run"):
        add(jobs, owner="alice", jobs=2)
    add(jobs, owner="bob", jobs=2)


def test_pages_follow_one_another(jobs):
    ids = [add(jobs, owner="alice").id for _ in range(5)]
    add(jobs, owner="bob")
    newest = [job.id for job in jobs.page("alice", None, 2, True)]
    assert newest == ids[:2:-1]
    assert [job.id for job in jobs.page("alice", newest[-1], 9, True)] == ids[2::-1]
    assert [job.id for job in jobs.page("alice", ids[1], 2, False)] == ids[2:4]
    assert jobs.page("alice", "video_none", 9, True) == []


def test_what_a_crash_left_is_ended_or_queued_again(tmp_path):
    before = Store(tmp_path, Limits(attempts=2))
    for _ in range(3):
        add(before)
    done, half, waiting = before.claim(), before.claim(), before.page("", None, 9, False)[2]
    written(before, done)
    (before.videos / "video_gone.1.mp4").write_bytes(b"of no job")
    before.image("video_gone").write_bytes(b"of no job")
    before.image(half.id).write_bytes(b"image")
    before.close()
    after = Store(tmp_path, Limits(attempts=2))
    assert after.recover() == (1, 1)
    after.sweep()
    states = [after.get(job.id).status for job in (done, half, waiting)]
    assert states == ["completed", "queued", "queued"]
    assert [path.name for path in after.videos.iterdir()] == [after.video(done).name]
    assert [path.stem for path in after.inputs.iterdir()] == [half.id]
    after.claim()
    assert after.recover() == (0, 1)  # the second time it is given up
    assert after.get(half.id).status == "failed"
    after.close()


def test_a_folder_is_one_servers(tmp_path, jobs):
    with pytest.raises(UsageError, match="another server's"):
        Store(tmp_path, Limits())


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    if content is None:
        jobs = Store(tmp_path, Limits())
        jobs.db.rows(sa.text("UPDATE tdjax_version SET version = 99 RETURNING version"))
        jobs.close()
    else:
        (tmp_path / "jobs.sqlite3").write_bytes(content)
    for _ in range(2):  # it also lets the folder go
        with pytest.raises(UsageError, match="jobs.sqlite3 cannot be read"):
            Store(tmp_path, Limits())


def test_old_and_large_videos_go(tmp_path):
    jobs = Store(tmp_path, Limits(keep_bytes=10, keep_seconds=1000))
    ended = []
    for _ in range(3):
        add(jobs)
        ended.append(written(jobs, jobs.claim()))
        jobs.complete(ended[-1], {})
    waiting = add(jobs)
    assert jobs.expire() == 1 and jobs.get(ended[0].id) is None
    assert not jobs.video(ended[0]).exists() and jobs.video(ended[1]).exists()
    long_ago = JOBS.update().values(completed_at=JOBS.c.completed_at - 2000)
    jobs.db.rows(long_ago.where(JOBS.c.status == "completed").returning(JOBS.c.id))
    assert jobs.expire() == 2
    assert [job.id for job in jobs.page("", None, 9, True)] == [waiting.id]
    assert jobs.counts()[store.WAITING] == 1
    jobs.close()


def hooked(jobs, **more):
    request = {"format": "mp4", "prompt": "a", "webhook": "https://example.org/"}
    return jobs.add("", request, digest="d", shape="small", **more)


def test_a_webhook_is_due_when_its_job_has_ended(jobs):
    waiting, plain = hooked(jobs), add(jobs)
    jobs.cancel(plain.id)
    assert not jobs.take_hooks(9, 60)
    jobs.cancel(waiting.id)
    assert [job.id for job in jobs.take_hooks(9, 60)] == [waiting.id]
    assert not jobs.take_hooks(9, 60)  # another one has it
    jobs.put_off_hook(waiting.id, 0)
    assert [job.status for job in jobs.take_hooks(9, 60)] == ["cancelled"]
    jobs.put_off_hook(waiting.id, None)
    assert not jobs.db.rows(sa.select(HOOKS))


def test_webhooks_come_in_turn_and_outlive_the_process_and_a_clock_put_back(jobs):
    ids = [hooked(jobs).id for _ in range(3)]
    for id in ids:
        jobs.cancel(id)
    first = [job.id for job in jobs.take_hooks(2, 0)]
    assert len(first) == 2 and ids[2] not in first
    assert ids[2] in [job.id for job in jobs.take_hooks(1, 0)]
    jobs.delete(ids[0])
    jobs.put_off_hook(ids[1], 60)
    jobs.put_off_hook(ids[2], 3 * DAY)  # as a clock leaves it that was days ahead
    url = jobs.db.url.render_as_string(hide_password=False)
    with contextlib.closing(Store(jobs.folder / "other", jobs.limits, url=url)) as other:
        assert [job.id for job in other.take_hooks(9, 0)] == [ids[2]]


def test_a_page_of_what_was_searched(jobs):
    for prompt in ("A red fox", "a boat", "a FOX, 100%", "100 boats"):
        jobs.add("", {"format": "mp4", "prompt": prompt}, digest="d", shape="small")
    found = jobs.page("", None, 9, True, "fOx")
    assert [job.request["prompt"] for job in found] == ["a FOX, 100%", "A red fox"]
    assert len(jobs.page("", found[0].id, 9, True, "fox")) == 1
    assert len(jobs.page("", None, 9, True, "100%")) == 1
    assert not jobs.page("", None, 9, True, "mp4") and not jobs.page("bob", None, 9, True, "fox")


# -- many servers ----------------------------------------------------------------------------------


def test_what_one_server_is_asked_another_one_does(server):
    asked, makes = server(), server()
    id = add(asked, owner="alice").id
    job = makes.claim()
    assert job.id == id and job.server == makes.server and asked.claim() is None
    makes.report(job, 40, "denoise", True)
    seen = asked.get(id)
    assert (seen.status, seen.percent, seen.stage, seen.preview) == (
        *("in_progress", 40),
        *("denoise", True),
    )
    assert asked.cancel(id) and makes.many([id])[id].status == "cancelled"
    assert not makes.complete(written(makes, job), {}) and not makes.video(job).exists()


def test_jobs_of_a_server_that_is_not_heard_of_are_anothers(server):
    dead, heir = server(attempts=2), server(attempts=2)
    for _ in range(2):
        add(dead)
    dead.keep_lease()
    heir.keep_lease()
    half, done = dead.claim(), written(dead, dead.claim())
    assert heir.recover() == (0, 0)  # it lives still
    lapsed = SERVERS.update().where(SERVERS.c.id == dead.server).values(until=0)
    heir.db.rows(lapsed.returning(SERVERS.c.id))
    assert heir.recover() == (1, 1) and heir.recover() == (0, 0)
    assert heir.get(done.id).status == "completed"
    again = written(heir, heir.claim())
    assert again.id == half.id and again.attempts == 2
    # It was not dead but slow, and comes late with both.
    assert not dead.complete(written(dead, half), {}) and not dead.complete(done, {})
    assert not heir.video(half).exists() and heir.video(done).exists()
    assert heir.complete(again, {}) and heir.get(half.id).attempts == 2


def test_a_server_that_leaves_is_not_waited_for(server):
    leaves, heir = server(), server()
    add(leaves)
    leaves.keep_lease()
    leaves.claim()
    assert heir.recover() == (0, 0)
    leaves.leave()
    assert heir.recover() == (0, 1)


def test_a_job_is_begun_once_whoever_asks_at_the_same_time(server):
    servers = [server(queue=18, jobs=100) for _ in range(3)]
    begun, refused, same = [], [], set()

    def work(own):
        same.add(add(own, owner="bob", idempotency="k").id)
        for _ in range(8):
            try:
                add(own, owner="alice")
            except Full:
                refused.append(own)
        same.add(add(own, owner="bob", idempotency="k").id)
        while (job := own.claim("small")) is not None:
            begun.append(job.id)

    threads = [threading.Thread(target=work, args=(own,)) for own in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 1 and len(set(begun)) == len(begun) == 25 - len(refused)
    assert servers[0].counts()["in_progress"] == len(begun) and servers[0].claim() is None


STRANGE_STORES = {
    "jobs.sqlite3": "no address",
    "mysql://host/jobs": "allowed: postgresql",
    "sqlite://": "the store has no file",
    "postgresql://alice:secret@127.0.0.1:1/jobs": r"alice:\*\*\*@127.0.0.1:1/jobs cannot be read",
    "sqlite:////none/of/it.sqlite3": "it.sqlite3 cannot be read",
}


@pytest.mark.parametrize("address", STRANGE_STORES)
def test_strange_stores_are_refused_without_their_password(tmp_path, address):
    for _ in range(2):
        with pytest.raises(UsageError, match=STRANGE_STORES[address]) as refused:
            Store(tmp_path, Limits(), url=address)
        assert "secret" not in str(refused.value) and str(refused.value).count("\n") == 2


def test_names_that_no_database_takes_are_no_jobs(jobs):
    for name in ("video_\0", "a\0", "", "%", "video_" + "a" * 9999):
        assert jobs.get(name) is None and not jobs.cancel(name)
        assert not jobs.page("", name, 9, True) and not jobs.page("", None, 9, True, name or "x")
