"""Who may ask a server: keys, of which only hashes are kept. `python -m tdjax.server.keys NAME`
draws one."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import secrets
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

from tdjax import cli
from tdjax.config.values import settle
from tdjax.errors import UsageError
from tdjax.files import near
from tdjax.progress import say
from tdjax.server.limits import Limits

LOOK = 1.0  # seconds until a file of keys is looked at again
LIMITS = ("jobs", "frames", "pixels", "body")  # that a key may have below the server's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """Who asks. priority: of the jobs, higher ones run first. jobs, frames, pixels, body:
    limits of this key below those of the server (see `Limits`); None: the server's."""

    name: str
    priority: int = 0
    jobs: int | None = None
    frames: int | None = None
    pixels: int | None = None
    body: int | None = None

    def __post_init__(self):
        settle(self)
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    f"`{name}` of the key {self.name} is {value}",
                    "a limit is a number above zero",
                    "leave it away, or take the key out of the file",
                )

    def limits(self, server: Limits) -> Limits:
        """Returns the server's limits, with the key's own where they are lower."""
        own = {
            name: min(getattr(self, name), getattr(server, name))
            for name in LIMITS
            if getattr(self, name) is not None
        }
        return dataclasses.replace(server, **own)


NOBODY = Key(name="")  # who asks where no keys are needed


class Keys:
    """The keys of a server by the SHA-256 of their text; none: everybody may ask.

    file: where they stand; it is read again when it has changed.
    """

    def __init__(self, by_digest: dict[str, Key] | None = None, file: Path | None = None):
        self.by_digest, self.file = by_digest or {}, file
        self._version = None if file is None else _version(file)
        self._look = 0.0  # when to look at the file again, of the monotonic clock

    def _renew(self) -> None:
        """Takes what the file has become; one that is wrong, or gone, changes nothing."""
        now = time.monotonic()
        if self.file is None or now < self._look:
            return
        self._look = now + LOOK
        version = _version(self.file)
        if version == self._version:
            return
        self._version = version
        try:
            self.by_digest = read_keys(self.file).by_digest
            say(f"tdjax: {self.file} has changed: {len(self.by_digest)} keys")
        except UsageError as error:
            say(f"tdjax: keys stay as they were: {error}")

    def of(self, authorization: str | None) -> Key | None:
        """Returns the key of a header "Bearer KEY", None where there is no such key."""
        self._renew()
        if not self.by_digest:
            return NOBODY
        scheme, _, text = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self.by_digest.get(digest(text.strip()))


def _version(file: Path) -> tuple[int, ...] | None:
    """What differs when a file has changed; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def digest(text: str) -> str:
    """The SHA-256 of a key's text. Keys are drawn with 256 bits, so that no slow hash is needed."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> Keys:
    """Returns the keys of a TOML file: a table for each, with sha256 and perhaps limits. Raises
    UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return Keys(_parsed(text, path), path)


def environment_keys(name: str) -> Keys:
    """Returns the keys of a variable of the environment, whose text is that of such a file. Raises
    UsageError."""
    text = os.environ.get(name)
    if text is None:
        raise UsageError(
            f"--api_keys env:{name}",
            f"the environment has no variable {name}",
            f'export {name}="$(python -m tdjax.server.keys alice)"',
        )
    return Keys(_parsed(text, f"the variable {name}"))


def _parsed(text: str, source: object) -> dict[str, Key]:
    """Returns {SHA-256: key} of TOML. source: what a message calls it."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(source, error) from error
    keys: dict[str, Key] = {}
    for name, table in tables.items():
        values = dict(table) if isinstance(table, dict) else {}
        hashed = values.pop("sha256", None)
        if not isinstance(hashed, str) or not re.fullmatch(r"[0-9a-f]{64}", hashed):
            raise _bad_key(source, name, "it has no sha256 of 64 hexadecimal digits")
        if hashed in keys:
            raise _bad_key(source, name, f"it is the same key as {keys[hashed].name}")
        known = {field.name for field in dataclasses.fields(Key)} - {"name"}
        for unknown in set(values) - known:
            close = near(unknown, known, cutoff=0.0)[0]
            raise _bad_key(source, name, f"{unknown} is unknown; nearest: {close}")
        keys[hashed] = Key(name=name, **values)
    if not keys:
        raise UsageError(
            f"{source} has no keys",
            "nobody could ask",
            "python -m tdjax.server.keys NAME draws one, and prints the lines that belong there",
        )
    return keys


def _unreadable(source: object, error: Exception) -> UsageError:
    return UsageError(
        f"{source} cannot be read",
        str(error),
        "it is TOML, with a table for each key: python -m tdjax.server.keys NAME",
    )


def _bad_key(source: object, name: str, why: str) -> UsageError:
    return UsageError(
        f"{source}: the key {name}", why, "python -m tdjax.server.keys NAME draws a key"
    )


def table_of(name: str, text: str) -> str:
    """The lines that stand in the file for a key."""
    return f'[{name}]\nsha256 = "{digest(text)}"\n'


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command that draws keys."""
    p = cli.Parser(
        "python -m tdjax.server.keys",
        description=(
            "Draws API keys for python -m tdjax.server --api_keys FILE. Lines for the file, with"
            " hashes, go to stdout; the keys, which are stored nowhere, to stderr."
        ),
    )
    p.add_argument("names", nargs="+", metavar="NAME", help="whom each is for: letters, digits, _-")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage."""
    return cli.main(_command, argv, parser=build_parser)


def _command(argv: list[str]) -> int:
    print(*drawn(build_parser().parse_args(argv).names), sep="\n", end="")
    return 0


def drawn(names: Iterable[str]) -> list[str]:
    """Returns the tables of new keys, after telling each key on stderr. Raises UsageError."""
    tables = []
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise UsageError(
                f"the name {name!r}", "letters, digits, _ and -, 64 at most", "for example alice"
            )
        text = f"tdjax-{secrets.token_urlsafe(32)}"
        print(f"{name}: {text}", file=sys.stderr)
        tables.append(table_of(name, text))
    return tables


if __name__ == "__main__":
    cli.run(main)
