"""Jobs in one SQLite file and videos in one folder, which outlive the process.

A job is begun by one process at a time, and every beginning has a number (`attempt`) that is in the
name of its video: what a process that was given up still writes is never another beginning's video.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdjax.errors import TdjaxError, UsageError
from tdjax.server.limits import Limits

WAITING, RUNNING = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)
VERSION = 1  # of the tables
DAY = 86400.0  # seconds
IN_A_ROW = 8  # jobs of one size and number of steps that one worker runs before others' turn

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  owner TEXT NOT NULL,
  idempotency TEXT,
  digest TEXT NOT NULL,
  status TEXT NOT NULL,
  priority INTEGER NOT NULL,
  shape TEXT NOT NULL,
  request TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  deaths INTEGER NOT NULL DEFAULT 0,
  created_at REAL NOT NULL,
  started_at REAL,
  completed_at REAL,
  error TEXT,
  result TEXT,
  bytes INTEGER NOT NULL DEFAULT 0,
  UNIQUE (owner, idempotency)
);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, priority);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, number);
CREATE TABLE IF NOT EXISTS turns (owner TEXT PRIMARY KEY, turn INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS hooks (job TEXT PRIMARY KEY, due REAL NOT NULL);
"""


class Full(TdjaxError):
    """The queue, or a key's part of it, has no room."""


class Conflict(TdjaxError):
    """An idempotency key was used before, for another request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One row. shape: what jobs have in common that run one after another without compiling.
    request: what the client asked for, as the pipeline's arguments and a few of the file.
    attempts: how often it was begun; deaths: how many of those ended with the process. error:
    {"code", "message"}. result: what a worker told of the video."""

    number: int
    id: str
    owner: str
    status: str
    priority: int
    shape: str
    request: dict[str, Any]
    attempts: int
    deaths: int
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


_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Job))


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    for name in ("request", "error", "result"):
        values[name] = json.loads(values[name]) if values[name] else None
    return Job(**values)


class Store:
    """The jobs of one server. Only one process at a time has a folder."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder, limits
        self.videos, self.inputs = folder / "videos", folder / "inputs"
        for each in (self.videos, self.inputs):
            each.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        try:
            self.db = _opened(folder / "jobs.sqlite3")
        except (sqlite3.Error, UsageError):
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Lets another process have the folder."""
        self.db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

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

    def _remove_files(self, id: str, keep: int | None = None) -> None:
        """Removes what there is of a job. keep: the beginning whose video stays."""
        for path in self.videos.glob(f"{id}.*"):
            if keep is None or path.name.split(".")[1] != str(keep):
                path.unlink(missing_ok=True)
        self.image(id).unlink(missing_ok=True)

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
        with self._transaction() as db:
            before = self._before(owner, idempotency)
            if before is not None:
                if before["digest"] != digest:
                    raise Conflict(
                        "this Idempotency-Key was used for another request",
                        f"that one is {before['id']}",
                        "draw a new key for a new request",
                    )
                return self._get(before["id"])
            self._check_room(owner, jobs or self.limits.jobs)
            id, text = id or new_id(), json.dumps(request)
            db.execute(
                "INSERT INTO jobs (id, owner, idempotency, digest, status, priority, shape,"
                " created_at, request) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (id, owner, idempotency, digest, WAITING, priority, shape, time.time(), text),
            )
            if "webhook" in request:
                db.execute("INSERT INTO hooks VALUES (?, 0)", (id,))
            return self._get(id)

    def _before(self, owner: str, idempotency: str | None) -> sqlite3.Row | None:
        if idempotency is None:
            return None
        query = "SELECT id, digest FROM jobs WHERE owner = ? AND idempotency = ?"
        return self.db.execute(query, (owner, idempotency)).fetchone()

    def _check_room(self, owner: str, jobs: int) -> None:
        waiting = self._count("status = ?", WAITING)
        own = self._count("owner = ? AND status IN (?, ?)", owner, WAITING, RUNNING)
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

    def _count(self, where: str, *values: Any) -> int:
        return self.db.execute(f"SELECT COUNT(*) FROM jobs WHERE {where}", values).fetchone()[0]

    def _get(self, id: str) -> Job:
        query = f"SELECT {_COLUMNS} FROM jobs WHERE id = ?"
        return _job(self.db.execute(query, (id,)).fetchone())

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """Returns a job; None where there is none, or it is another one's. owner: None for any."""
        query = f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND owner = coalesce(?, owner)"
        row = self.db.execute(query, (id, owner)).fetchone()
        return None if row is None else _job(row)

    def page(
        self, owner: str, after: str | None, limit: int, newest: bool, search: str = ""
    ) -> list[Job]:
        """Returns so many jobs of an owner, those that follow one in the order of their coming.
        search: what the prompt holds, in small letters or large."""
        sign, order = ("<", "DESC") if newest else (">", "ASC")
        query = f"SELECT {_COLUMNS} FROM jobs WHERE owner = ?"
        values: list[Any] = [owner]
        if after is not None:
            query += f" AND number {sign} (SELECT number FROM jobs WHERE id = ? AND owner = ?)"
            values += [after, owner]
        if search:
            query += " AND instr(lower(json_extract(request, '$.prompt')), lower(?)) > 0"
            values.append(search)
        rows = self.db.execute(f"{query} ORDER BY number {order} LIMIT ?", [*values, limit])
        return [_job(row) for row in rows]

    def cancel(self, id: str) -> bool:
        """Ends a job that waits, or one that runs, whose worker is told by the caller; False where
        it has ended already."""
        now = time.time()
        changed = self.db.execute(
            "UPDATE jobs SET status = ?, completed_at = ? WHERE id = ? AND status IN (?, ?)",
            (CANCELLED, now, id, WAITING, RUNNING),
        ).rowcount
        if changed:
            self._remove_files(id)
        return changed == 1

    def delete(self, id: str) -> None:
        """Removes a job and its files."""
        self.db.execute("DELETE FROM jobs WHERE id = ?", (id,))
        self.db.execute("DELETE FROM hooks WHERE job = ?", (id,))
        self._remove_files(id)

    # -- what workers do ---------------------------------------------------------------------------

    def claim(self, last_shape: str | None = None) -> Job | None:
        """Returns the job to run next, which is now in progress; None where none waits.

        Those of the highest priority; among them those of `last_shape`, which need no compiling;
        then the owner whose last turn is longest ago; then the oldest.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT id, jobs.owner AS owner FROM jobs LEFT JOIN turns USING (owner)"
                " WHERE status = ? ORDER BY priority DESC, shape = coalesce(?, shape) DESC,"
                " coalesce(turn, 0), number LIMIT 1",
                (WAITING, last_shape),
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET status = ?, started_at = ?, attempts = attempts + 1 WHERE id = ?",
                (RUNNING, time.time(), row["id"]),
            )
            db.execute(
                "INSERT INTO turns VALUES (?, (SELECT coalesce(max(turn), 0) + 1 FROM turns))"
                " ON CONFLICT (owner) DO UPDATE SET turn = excluded.turn",
                (row["owner"],),
            )
            return self._get(row["id"])

    def complete(self, job: Job, result: dict[str, Any]) -> bool:
        """Ends a job whose video is complete; False, and the video is removed, where this beginning
        of it is not the one that counts."""
        video = self.video(job)
        size = video.stat().st_size if video.is_file() else 0
        if not size:
            what = "the worker told of a video that is not there"
            error = TdjaxError(what, "its file is missing or empty", "ask for the video anew")
            return self.fail(job, "no_video", str(error))
        return self._end(job, COMPLETED, result=result, size=size)

    def fail(self, job: Job, code: str, message: str) -> bool:
        """Ends a job that went wrong; False where this beginning is not the one that counts."""
        return self._end(job, FAILED, error={"code": code, "message": message})

    def _end(
        self,
        job: Job,
        status: str,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, str] | None = None,
        size: int = 0,
    ) -> bool:
        changed = self.db.execute(
            "UPDATE jobs SET status = ?, completed_at = ?, result = ?, error = ?, bytes = ?"
            " WHERE id = ? AND status = ? AND attempts = ?",
            (
                status,
                time.time(),
                json.dumps(result) if result is not None else None,
                json.dumps(error) if error is not None else None,
                size,
                job.id,
                RUNNING,
                job.attempts,
            ),
        ).rowcount
        if changed:
            self._remove_files(job.id, keep=job.attempts if status == COMPLETED else None)
        else:
            for path in self.videos.glob(f"{job.id}.{job.attempts}.*"):
                path.unlink(missing_ok=True)
        return changed == 1

    def give_back(self, job: Job, *, counted: bool) -> bool:
        """Queues a job again whose worker is gone, or ends it after as many beginnings as are
        allowed: whether it has ended. counted: False where the worker was stopped on purpose."""
        deaths = job.deaths + counted
        if deaths >= self.limits.attempts:
            what = f"the process ended while it made this video, {deaths} times"
            why, fix = "it is begun no more often", "ask for a smaller size, or fewer frames"
            return self.fail(job, "worker_died", str(TdjaxError(what, why, fix)))
        self.db.execute(
            "UPDATE jobs SET status = ?, started_at = NULL, deaths = ? WHERE id = ? AND"
            " status = ? AND attempts = ?",
            (WAITING, deaths, job.id, RUNNING, job.attempts),
        )
        return False

    def recover(self) -> tuple[int, int]:
        """Ends or queues again what ran when the server before this one died: (jobs whose video was
        complete, jobs that wait again). A name without a job is removed."""
        query = f"SELECT {_COLUMNS} FROM jobs WHERE status = ?"
        jobs = [_job(row) for row in self.db.execute(query, (RUNNING,))]
        done = [job for job in jobs if self.video(job).is_file()]
        for job in done:  # a name appears only when the file is complete
            self.complete(job, {})
        for job in jobs:
            if job not in done:
                self.give_back(job, counted=True)
        kept = {
            f"{row['id']}.{row['attempts']}"
            for row in self.db.execute(
                "SELECT id, attempts FROM jobs WHERE status = ?", (COMPLETED,)
            )
        }
        for path in self.videos.iterdir():
            if path.is_file() and ".".join(path.name.split(".")[:2]) not in kept:
                path.unlink(missing_ok=True)
        waiting = {row["id"] for row in self.db.execute("SELECT id FROM jobs WHERE bytes = 0")}
        for path in self.inputs.glob("*.png"):
            if path.stem not in waiting:
                path.unlink(missing_ok=True)
        return len(done), len(jobs) - len(done)

    def expire(self) -> int:
        """Removes what has been kept long enough, and the oldest videos where all are too large;
        how many jobs went."""
        limits = self.limits
        old = time.time() - limits.keep_seconds
        query = "SELECT id, bytes FROM jobs WHERE status IN (?, ?, ?)"
        gone = [
            row["id"] for row in self.db.execute(f"{query} AND completed_at < ?", (*ENDED, old))
        ]
        total = 0
        for row in self.db.execute(f"{query} ORDER BY completed_at DESC", ENDED):
            total += row["bytes"]
            if total > limits.keep_bytes and row["bytes"]:
                gone.append(row["id"])
        for id in set(gone):
            self.delete(id)
        return len(set(gone))

    def counts(self) -> dict[str, int]:
        """Returns how many jobs there are of every status."""
        rows = self.db.execute("SELECT status, COUNT(*) AS n FROM jobs GROUP BY status")
        return dict.fromkeys((WAITING, RUNNING, *ENDED), 0) | {r["status"]: r["n"] for r in rows}

    # -- webhooks ----------------------------------------------------------------------------------

    def take_hooks(self, count: int, seconds: float) -> list[Job]:
        """Returns jobs that have ended and whose webhook is due, the longest due first, and puts
        each of these off: nobody else takes it meanwhile, and it is due again where the process
        dies. count: of jobs, at most. seconds: to put off."""
        now, columns = time.time(), ", ".join(f"jobs.{name}" for name in _COLUMNS.split(", "))
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {columns} FROM jobs JOIN hooks ON hooks.job = jobs.id WHERE"
                " status IN (?, ?, ?) AND (due <= ? OR due > ?) ORDER BY due LIMIT ?",
                # Due after more than a day: the clock was put back.
                (*ENDED, now, now + DAY, count),
            ).fetchall()
            taken = [(now + seconds, row["id"]) for row in rows]
            db.executemany("UPDATE hooks SET due = ? WHERE job = ?", taken)
        return [_job(row) for row in rows]

    def put_off_hook(self, id: str, seconds: float | None) -> None:
        """Makes a job's webhook due after so many seconds; None: never again."""
        if seconds is None:
            self.db.execute("DELETE FROM hooks WHERE job = ?", (id,))
        else:
            due = time.time() + seconds
            self.db.execute("UPDATE hooks SET due = ? WHERE job = ?", (due, id))


def _opened(path: Path) -> sqlite3.Connection:
    """The tables of a file. Raises UsageError where it holds something else."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"its tables have version {version}, not {VERSION}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # what was answered outlives a power cut
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.DatabaseError as error:
        db.close()
        raise UsageError(
            f"{path} cannot be read", str(error), "move it away, or give another folder"
        ) from error
    return db


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
