"""Jobs in a database and videos in a folder, which outlive the process and may be shared by servers
of many hosts.

A job is begun by one server at a time, and every beginning has a number (`attempts`) that is in the
name of its video: what a process that was given up still writes is never another beginning's video.
A server whose lease has run out is taken for dead; another one queues its jobs again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tdjax.errors import TdjaxError, UsageError
from tdjax.server.limits import DAY, Limits
from tdjax.server.storage import Storage, opened
from tdjax.server.tables import HOOKS, JOBS, SERVERS, TURNS, Database

WAITING, RUNNING = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)
IN_A_ROW = 8  # jobs of one size and number of steps that one worker runs before others' turn


class Full(TdjaxError):
    """The queue, or a key's part of it, has no room."""


class Conflict(TdjaxError):
    """An idempotency key was used before, for another request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One row. shape: what jobs have in common that run one after another without compiling.
    request: what the client asked for, as the pipeline's arguments and a few of the file.
    server: who runs it. attempts: how often it was begun; deaths: how many of those ended with the
    process. percent, stage, preview: how far it is, as its server last told others. error:
    {"code", "message"}. result: what a worker told of the video."""

    number: int
    id: str
    owner: str
    status: str
    priority: int
    shape: str
    request: dict[str, Any]
    server: str | None
    attempts: int
    deaths: int
    percent: int
    stage: str
    preview: bool
    created_at: float
    started_at: float | None
    completed_at: float | None
    error: dict[str, str] | None
    result: dict[str, Any] | None
    bytes: int

    @property
    def suffix(self) -> str:
        """Of the video's file, with its dot."""
        return "." + self.request["format"]


_COLUMNS = [JOBS.c[field.name] for field in dataclasses.fields(Job)]


def _job(row: sa.Row) -> Job:
    return Job(**row._mapping)


class Store:
    """The jobs of one server, or of all that share a database.

    folder: of this server alone: what its workers read and write, and, where no other place is
            given, jobs and videos as well.
    url:    of a database that other servers use too; None: a file in the folder.
    videos: a folder or an address of fsspec where finished videos are; None: the folder.
    """

    def __init__(
        self, folder: Path, limits: Limits, *, url: str | None = None, videos: str | None = None
    ):
        self.folder, self.limits = folder, limits
        self.server, self.shared = f"server_{secrets.token_hex(8)}", url is not None
        place = folder if videos is None else opened(videos)
        self.storage = place if isinstance(place, Storage) else None
        root = place if isinstance(place, Path) else folder / "work"
        self.videos, self.inputs = root / "videos", root / "inputs"
        self._alone = root == folder and not self.shared
        for each in (folder, self.videos, self.inputs):
            each.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        file = folder / "jobs.sqlite3"
        try:
            name = None if self.shared else str(file)
            self.db = Database(url or f"sqlite:///{file.absolute()}", name)
        except UsageError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Lets another process have the folder, and other servers the jobs that run."""
        self.db.close()
        if self.storage is not None:
            self.storage.close()
        os.close(self._lock)

    # -- files -------------------------------------------------------------------------------------

    def video(self, job: Job) -> Path:
        """Where this beginning of a job writes its video."""
        return self.videos / f"{job.id}.{job.attempts}{job.suffix}"

    def thumbnail(self, job: Job) -> Path:
        """Where its first frame is."""
        return self.videos / f"{job.id}.{job.attempts}.jpg"

    def image(self, id: str) -> Path:
        """Where the image that a client sent is."""
        return self.inputs / f"{id}.png"

    def size(self, path: Path) -> int:
        """Returns the bytes of a file that is published; 0 where it is not."""
        if self.storage is not None:
            return self.storage.size(path.name)
        return path.stat().st_size if path.is_file() else 0

    def publish(self, paths: Iterable[Path]) -> None:
        """Makes files of this machine those of all servers; what is in a folder of theirs is so
        already."""
        for path in paths if self.storage is not None else ():
            if path.is_file():
                self.storage.put(path)

    def fetch(self, path: Path) -> None:
        """Makes a file of all servers one of this machine."""
        if self.storage is not None and not path.is_file():
            self.storage.fetch(path.name, path)

    def _remove_files(self, job: Job, keep: int | None = None) -> None:
        """Removes what there is of a job. keep: the beginning whose video stays."""
        for path in self.videos.glob(f"{job.id}.*"):
            # Where finished ones are elsewhere, those here were for the way there.
            if self.storage is not None or path.name.split(".")[1] != str(keep):
                path.unlink(missing_ok=True)
        self.image(job.id).unlink(missing_ok=True)
        if self.storage is not None:
            gone = [number for number in range(1, job.attempts + 1) if number != keep]
            each = [dataclasses.replace(job, attempts=number) for number in gone]
            paths = [path for job in each for path in (self.video(job), self.thumbnail(job))]
            self.storage.remove(path.name for path in [*paths, self.image(job.id)])

    # -- what clients do ---------------------------------------------------------------------------

    def add(
        self,
        owner: str,
        request: dict[str, Any],
        *,
        digest: str,
        shape: str,
        priority: int = 0,
        jobs: int | None = None,
        idempotency: str | None = None,
        id: str | None = None,
    ) -> Job:
        """Returns the job that a request becomes, or has become under this idempotency key.

        digest: of the request as it came. jobs: how many the owner may have waiting and running.
        Raises Full and Conflict.
        """
        with self.db.transaction(alone=True) as db:
            before = _before(db, owner, idempotency)
            if before is not None:
                if before.digest != digest:
                    raise Conflict(
                        "this Idempotency-Key was used for another request",
                        f"that one is {before.id}",
                        "draw a new key for a new request",
                    )
                found = db.execute(sa.select(*_COLUMNS).where(JOBS.c.id == before.id))
                return _job(found.one())
            self._check_room(db, owner, jobs or self.limits.jobs)
            row = JOBS.insert().values(
                id=id or new_id(),
                owner=owner,
                idempotency=idempotency,
                digest=digest,
                status=WAITING,
                priority=priority,
                shape=shape,
                created_at=time.time(),
                request=request,
            )
            job = _job(db.execute(row.returning(*_COLUMNS)).one())
            if "webhook" in request:
                db.execute(HOOKS.insert().values(job=job.id, due=0))
            return job

    def _check_room(self, db: sa.Connection, owner: str, jobs: int) -> None:
        waiting = _count(db, JOBS.c.status == WAITING)
        own = _count(db, JOBS.c.owner == owner, JOBS.c.status.in_((WAITING, RUNNING)))
        if waiting >= self.limits.queue:
            raise Full(
                "the queue is full", f"{waiting} jobs wait", "ask again after Retry-After seconds"
            )
        if own >= jobs:
            raise Full(
                "too many jobs of this key",
                f"{own} wait or run, and {jobs} are allowed",
                "ask again after Retry-After seconds",
            )

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """Returns a job; None where there is none, or it is another one's. owner: None for any."""
        query = sa.select(*_COLUMNS).where(JOBS.c.id == _named(id))
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        rows = self.db.rows(query)
        return _job(rows[0]) if rows else None

    def page(
        self, owner: str, after: str | None, limit: int, newest: bool, search: str = ""
    ) -> list[Job]:
        """Returns so many jobs of an owner, those that follow one in the order of their coming.
        search: what the prompt holds, in small letters or large."""
        if "\0" in search:  # which no prompt holds, and no database takes
            return []
        number, prompt = JOBS.c.number, JOBS.c.request["prompt"].as_string()
        query = sa.select(*_COLUMNS).where(JOBS.c.owner == owner).limit(limit)
        if after is not None:
            of_it = (JOBS.c.id == _named(after)) & (JOBS.c.owner == owner)
            place = sa.select(number).where(of_it).scalar_subquery()
            query = query.where(number < place if newest else number > place)
        if search:
            words = re.sub(r"([/%_])", r"/\1", search)
            pattern = sa.func.lower(sa.literal(f"%{words}%"))
            query = query.where(sa.func.lower(prompt).like(pattern, escape="/"))
        query = query.order_by(number.desc() if newest else number)
        return [_job(row) for row in self.db.rows(query)]

    def cancel(self, id: str) -> bool:
        """Ends a job that waits, or one that runs, whose worker is told by the caller; False where
        it has ended already."""
        one = (JOBS.c.id == _named(id)) & JOBS.c.status.in_((WAITING, RUNNING))
        ended = JOBS.update().where(one).values(status=CANCELLED, completed_at=time.time())
        rows = self.db.rows(ended.returning(*_COLUMNS))
        for row in rows:
            self._remove_files(_job(row))
        return len(rows) == 1

    def delete(self, id: str) -> None:
        """Removes a job and its files."""
        gone = JOBS.delete().where(JOBS.c.id == _named(id)).returning(*_COLUMNS)
        with self.db.transaction() as db:
            rows = list(db.execute(gone))
            db.execute(HOOKS.delete().where(HOOKS.c.job == _named(id)))
        for row in rows:
            self._remove_files(_job(row))

    # -- what workers do ---------------------------------------------------------------------------

    def claim(self, last_shape: str | None = None) -> Job | None:
        """Returns the job to run next, which is now in progress and this server's; None where none
        waits.

        Those of the highest priority; among them those of `last_shape`, which need no compiling;
        then the owner whose last turn is longest ago; then the oldest. Where servers ask at the
        same time, each passes over what another one is about to have.
        """
        same = sa.case((JOBS.c.shape == last_shape, 0), else_=1)
        turn = sa.func.coalesce(TURNS.c.turn, 0)
        query = (
            sa.select(JOBS.c.id, JOBS.c.owner)
            .outerjoin(TURNS, TURNS.c.owner == JOBS.c.owner)
            .where(JOBS.c.status == WAITING)
            .order_by(JOBS.c.priority.desc(), same, turn, JOBS.c.number)
            .limit(1)
            .with_for_update(of=JOBS, skip_locked=True)
        )
        with self.db.transaction() as db:
            found = db.execute(query).one_or_none()
            if found is None:
                return None
            begun = JOBS.update().where(JOBS.c.id == found.id)
            begun = begun.values(
                status=RUNNING,
                started_at=time.time(),
                attempts=JOBS.c.attempts + 1,
                server=self.server,
                percent=0,
                stage="",
                preview=False,
            )
            job = _job(db.execute(begun.returning(*_COLUMNS)).one())
            (last,) = db.execute(sa.select(sa.func.max(TURNS.c.turn))).one()
            values = {"owner": found.owner, "turn": (last or 0) + 1}
            db.execute(self.db.upsert(TURNS, "owner", values))
            return job

    def complete(self, job: Job, result: dict[str, Any]) -> bool:
        """Ends a job whose video is complete; False, and the video is removed, where this beginning
        of it is not the one that counts."""
        size = self.size(self.video(job))
        if not size:
            what = "the worker told of a video that is not there"
            error = TdjaxError(what, "its file is missing or empty", "ask for the video anew")
            return self.fail(job, "no_video", str(error))
        return self._end(job, COMPLETED, result=result, bytes=size)

    def fail(self, job: Job, code: str, message: str) -> bool:
        """Ends a job that went wrong; False where this beginning is not the one that counts."""
        return self._end(job, FAILED, error={"code": code, "message": message})

    def _end(self, job: Job, status: str, **values: Any) -> bool:
        ended = JOBS.update().where(_this_beginning(job))
        ended = ended.values(status=status, completed_at=time.time(), **values)
        if self.db.rows(ended.returning(JOBS.c.id)):
            self._remove_files(job, keep=job.attempts if status == COMPLETED else None)
            return True
        now = self.get(job.id)
        if now is None or now.status in (FAILED, CANCELLED):
            self._remove_files(job)
        elif now.attempts != job.attempts:  # another beginning has come or waits
            self._remove_beginning(job)
        return False

    def _remove_beginning(self, job: Job) -> None:
        paths = self.video(job), self.thumbnail(job)
        for path in self.videos.glob(f"{job.id}.{job.attempts}.*"):
            path.unlink(missing_ok=True)
        if self.storage is not None:
            self.storage.remove(path.name for path in paths)

    def give_back(self, job: Job, *, counted: bool) -> bool:
        """Queues a job again whose worker is gone, or ends it after as many beginnings as are
        allowed: whether it has ended. counted: False where the worker was stopped on purpose."""
        deaths = job.deaths + counted
        if deaths >= self.limits.attempts:
            what = f"the process ended while it made this video, {deaths} times"
            why, fix = "it is begun no more often", "ask for a smaller size, or fewer frames"
            return self.fail(job, "worker_died", str(TdjaxError(what, why, fix)))
        again = JOBS.update().where(_this_beginning(job))
        again = again.values(status=WAITING, started_at=None, deaths=deaths, server=None)
        self.db.rows(again.returning(JOBS.c.id))
        return False

    # -- what servers do ---------------------------------------------------------------------------

    def keep_lease(self) -> None:
        """Says that this server lives: its jobs are its own for so long again."""
        until = self.db.now() + self.limits.lease
        with self.db.transaction() as db:
            db.execute(self.db.upsert(SERVERS, "id", {"id": self.server, "until": until}))
            db.execute(SERVERS.delete().where(SERVERS.c.until < self.db.now()))

    def leave(self) -> None:
        """Ends the lease: jobs that this server has left are others' at once."""
        self.db.rows(SERVERS.delete().where(SERVERS.c.id == self.server).returning(SERVERS.c.id))

    def report(self, job: Job, percent: int, stage: str, preview: bool) -> None:
        """Writes down how far a job is, for clients that ask another server."""
        told = JOBS.update().where(_this_beginning(job))
        told = told.values(percent=percent, stage=stage, preview=preview)
        self.db.rows(told.returning(JOBS.c.id))

    def many(self, ids: Iterable[str]) -> dict[str, Job]:
        """Returns those jobs of these that there are."""
        query = sa.select(*_COLUMNS).where(JOBS.c.id.in_(list(ids)))
        return {row.id: _job(row) for row in self.db.rows(query)}

    def recover(self) -> tuple[int, int]:
        """Ends or queues again what servers ran that have died: (jobs whose video was complete,
        jobs that wait again)."""
        query = sa.select(*_COLUMNS).where(JOBS.c.status == RUNNING)
        if self.shared:
            alive = sa.select(SERVERS.c.id).where(SERVERS.c.until > self.db.now())
            query = query.where(JOBS.c.server.not_in(alive))
        jobs = [_job(row) for row in self.db.rows(query)]
        done = [job for job in jobs if self.size(self.video(job))]
        for job in done:  # a name appears only when the file is complete
            self.complete(job, {})
        for job in jobs:
            if job not in done:
                self.give_back(job, counted=True)
        return len(done), len(jobs) - len(done)

    def sweep(self) -> None:
        """Removes files of no job, where they are in this server's own folder and nobody else is
        about to name one."""
        if self.storage is not None:
            for path in [*self.videos.iterdir(), *self.inputs.iterdir()]:
                if path.is_file():
                    path.unlink(missing_ok=True)
        if not self._alone:
            return
        query = sa.select(JOBS.c.id, JOBS.c.attempts).where(JOBS.c.status == COMPLETED)
        kept = {f"{row.id}.{row.attempts}" for row in self.db.rows(query)}
        for path in self.videos.iterdir():
            if path.is_file() and ".".join(path.name.split(".")[:2]) not in kept:
                path.unlink(missing_ok=True)
        waiting = {row.id for row in self.db.rows(sa.select(JOBS.c.id).where(JOBS.c.bytes == 0))}
        for path in self.inputs.glob("*.png"):
            if path.stem not in waiting:
                path.unlink(missing_ok=True)

    def expire(self) -> int:
        """Removes what has been kept long enough, and the oldest videos where all are too large;
        how many jobs went."""
        limits = self.limits
        old = time.time() - limits.keep_seconds
        query = sa.select(JOBS.c.id, JOBS.c.bytes).where(JOBS.c.status.in_(ENDED))
        gone = {row.id for row in self.db.rows(query.where(JOBS.c.completed_at < old))}
        total = 0
        for row in self.db.rows(query.order_by(JOBS.c.completed_at.desc())):
            total += row.bytes
            if total > limits.keep_bytes and row.bytes:
                gone.add(row.id)
        for id in gone:
            self.delete(id)
        return len(gone)

    def counts(self) -> dict[str, int]:
        """Returns how many jobs there are of every status."""
        query = sa.select(JOBS.c.status, sa.func.count().label("number")).group_by(JOBS.c.status)
        found = {row.status: row.number for row in self.db.rows(query)}
        return dict.fromkeys((WAITING, RUNNING, *ENDED), 0) | found

    # -- webhooks ----------------------------------------------------------------------------------

    def take_hooks(self, count: int, seconds: float) -> list[Job]:
        """Returns jobs that have ended and whose webhook is due, the longest due first, and puts
        each of these off: nobody else takes it meanwhile, and it is due again where the process
        dies. count: of jobs, at most. seconds: to put off."""
        now, due = time.time(), HOOKS.c.due
        query = (
            sa.select(*_COLUMNS)
            .join(HOOKS, HOOKS.c.job == JOBS.c.id)
            # Due after more than a day: the clock was put back.
            .where(JOBS.c.status.in_(ENDED), (due <= now) | (due > now + DAY))
            .order_by(due)
            .limit(count)
            .with_for_update(of=HOOKS, skip_locked=True)
        )
        with self.db.transaction() as db:
            jobs = [_job(row) for row in db.execute(query)]
            taken = HOOKS.c.job.in_([job.id for job in jobs])
            db.execute(HOOKS.update().where(taken).values(due=now + seconds))
        return jobs

    def put_off_hook(self, id: str, seconds: float | None) -> None:
        """Makes a job's webhook due after so many seconds; None: never again."""
        one = HOOKS.c.job == id
        if seconds is None:
            changed = HOOKS.delete().where(one)
        else:
            changed = HOOKS.update().where(one).values(due=time.time() + seconds)
        self.db.rows(changed.returning(HOOKS.c.job))


def _before(db: sa.Connection, owner: str, idempotency: str | None) -> sa.Row | None:
    if idempotency is None:
        return None
    of_key = (JOBS.c.owner == owner) & (JOBS.c.idempotency == idempotency)
    return db.execute(sa.select(JOBS.c.id, JOBS.c.digest).where(of_key)).one_or_none()


def _count(db: sa.Connection, *where: Any) -> int:
    return db.execute(sa.select(sa.func.count()).select_from(JOBS).where(*where)).scalar_one()


def _this_beginning(job: Job) -> Any:
    """Whether a job runs still, and was begun no more often since."""
    return (JOBS.c.id == job.id) & (JOBS.c.status == RUNNING) & (JOBS.c.attempts == job.attempts)


def _named(id: str) -> str:
    """A name as it came from a client, if a job can have it: databases refuse some characters."""
    return id if re.fullmatch(r"video_[0-9a-z]{1,64}", id) else ""


def new_id() -> str:
    """Returns a name for a job that nobody can guess."""
    return f"video_{secrets.token_hex(12)}"


def _locked(folder: Path) -> int:
    """The descriptor of a lock that ends with the process. Raises UsageError where another process
    has it."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UsageError(
            f"{folder} is another server's",
            "a folder of jobs belongs to one process at a time",
            "give another folder, or stop that server",
        ) from error
    return descriptor
