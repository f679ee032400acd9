"""The tables of jobs in a database, SQLite or PostgreSQL, and how each is opened."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from tdjax import errors
from tdjax.errors import UsageError
from tdjax.files import near

__all__ = ["HOOKS", "JOBS", "SERVERS", "TURNS", "Database", "OperationalError", "first_line"]

VERSION = 2  # of the tables
BUSY = 5  # seconds that another server's transaction in a file is waited for
ANSWER = 10  # seconds that a database on another host may take to answer
LOCK = 7_236_417  # a number for PostgreSQL's advisory lock, the same in all servers

_METADATA = sa.MetaData()
_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_JSON = sa.JSON(none_as_null=True)

JOBS = sa.Table(
    "tdjax_jobs",
    _METADATA,
    sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("idempotency", sa.Text),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("shape", sa.Text, nullable=False),
    sa.Column("request", _JSON, nullable=False),
    sa.Column("server", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("deaths", sa.Integer, nullable=False, default=0),
    sa.Column("percent", sa.Integer, nullable=False, default=0),
    sa.Column("stage", sa.Text, nullable=False, default=""),
    sa.Column("preview", sa.Boolean, nullable=False, default=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("error", _JSON),
    sa.Column("result", _JSON),
    sa.Column("bytes", sa.BigInteger, nullable=False, default=0),
    sa.UniqueConstraint("owner", "idempotency"),
    sa.Index("tdjax_jobs_by_status", "status", "priority"),
    sa.Index("tdjax_jobs_by_owner", "owner", "number"),
    sqlite_autoincrement=True,
)
# Whose job was begun when, in a count of turns.
TURNS = sa.Table(
    "tdjax_turns",
    _METADATA,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("turn", sa.BigInteger, nullable=False),
)
# Webhooks that are to be told of the end of a job.
HOOKS = sa.Table(
    "tdjax_hooks",
    _METADATA,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("due", sa.Double, nullable=False),
)
# Until when the jobs of each server are its own, in seconds of the database's clock.
SERVERS = sa.Table(
    "tdjax_servers",
    _METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("until", sa.Double, nullable=False),
)
_VERSION = sa.Table("tdjax_version", _METADATA, sa.Column("version", sa.Integer))


class _OtherVersion(Exception):
    """Tables of another version."""


class Database:
    """The tables behind an address. Raises UsageError where they cannot be had.

    url:  of SQLAlchemy, sqlite:///jobs.sqlite3 or postgresql+psycopg://user@host/name.
    name: as users know it, for messages; None: the address without its password.
    """

    def __init__(self, url: str, name: str | None = None):
        self.url = _checked(url)
        self.name = name or self.url.render_as_string(hide_password=True)
        self.is_file = self.url.get_backend_name() == "sqlite"
        self.engine = _engine(self.url, self.is_file)
        self.single = self.engine  # of statements that are transactions by themselves
        if not self.is_file:
            self.single = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        try:
            self._create()
        except (DBAPIError, _OtherVersion) as error:
            self.engine.dispose()
            why = first_line(error)
            fix = "move it away, or give another folder"
            if not self.is_file:
                fix = "check its address, its password (PGPASSWORD, ~/.pgpass) and that it runs"
            raise UsageError(f"{self.name} cannot be read", why, fix) from error

    def _create(self) -> None:
        with self.transaction(alone=True) as db:
            there = sa.inspect(db).has_table(_VERSION.name)
            if not there and sa.inspect(db).has_table("jobs") and self.is_file:
                raise _OtherVersion("its tables are of an earlier version")
            _METADATA.create_all(db)
            if not there:
                db.execute(_VERSION.insert().values(version=VERSION))
            version = db.execute(sa.select(_VERSION.c.version)).scalar_one()
            if version != VERSION:
                raise _OtherVersion(f"its tables have version {version}, not {VERSION}")

    @contextlib.contextmanager
    def transaction(self, alone: bool = False) -> Iterator[sa.Connection]:
        """A connection whose changes are kept together when the block ends well. alone: no other
        server's block of this kind runs meanwhile; in a file none does in any case."""
        with self.engine.begin() as db:
            if self.is_file:
                db.exec_driver_sql("BEGIN IMMEDIATE")
            elif alone:
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            yield db

    def rows(self, statement: Any) -> list[sa.Row]:
        """Returns all rows of a query, or of what a single statement has changed (RETURNING)."""
        with self.single.connect() as db:
            return list(db.execute(statement))

    def upsert(self, table: sa.Table, key: str, values: dict[str, Any]) -> Any:
        """Returns the statement that puts a row in, or in place of the one of its key."""
        insert = (sqlite.insert if self.is_file else postgresql.insert)(table).values(values)
        rest = {name: insert.excluded[name] for name in values if name != key}
        return insert.on_conflict_do_update(index_elements=[key], set_=rest)

    def now(self) -> Any:
        """Returns the seconds of a clock that all servers share."""
        return time.time() if self.is_file else sa.extract("epoch", sa.func.clock_timestamp())

    def close(self) -> None:
        """Lets the database go."""
        self.engine.dispose()


def _checked(text: str) -> sa.URL:
    """An address whose database and library are there. Raises UsageError."""
    fix = "for example postgresql+psycopg://user@host/tdjax, or sqlite:////srv/jobs.sqlite3"
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError) as error:
        raise UsageError("the store has no address that can be read", "a URL is needed", fix) from (
            error
        )
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    known = ("postgresql+psycopg", "sqlite")
    if url.drivername not in known:
        nearest = near(url.drivername, known, cutoff=0.0)[0]
        raise UsageError(
            f"the store is {url.drivername}", f"allowed: {', '.join(known)}", f"nearest: {nearest}"
        )
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UsageError("the store has no file", "jobs outlive the process in one", fix)
    if url.get_backend_name() != "sqlite" and importlib.util.find_spec("psycopg") is None:
        raise UsageError(
            "psycopg is not installed",
            "PostgreSQL is spoken to by it",
            'pip install "tdjax[postgresql]", or pip install -e ".[postgresql]" in a checkout',
        )
    return url


def _engine(url: sa.URL, is_file: bool) -> sa.Engine:
    """One connection at a time: what asks runs in one event loop."""
    options: dict[str, Any] = {
        "isolation_level": None,  # transactions are begun here
        "check_same_thread": False,
        "timeout": BUSY,
    }
    if not is_file:
        options = {
            "connect_timeout": ANSWER,
            "tcp_user_timeout": 1000 * ANSWER,
            "options": f"-c statement_timeout={1000 * ANSWER}",
        }
    try:
        engine = sa.create_engine(
            url,
            poolclass=sa.pool.QueuePool,
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=not is_file,
            connect_args=options,
        )
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise UsageError("the store cannot be opened", first_line(error), "check its URL") from (
            error
        )
    if is_file:
        sa.event.listen(engine, "connect", _prepare_file)
    return engine


def _prepare_file(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what was answered outlives a power cut


def first_line(error: Exception) -> str:
    """Returns what went wrong, in one line without the statement."""
    return errors.first_line(getattr(error, "orig", None) or error)
