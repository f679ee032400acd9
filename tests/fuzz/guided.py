"""The readers of `readers.py` under atheris, which keeps the bytes that reach new lines of the
readers and changes those further. The seeds are the parts of each reader's valid file.

atheris (https://github.com/google/atheris) has wheels for some versions of Python on Linux and is
no dependency: `pip install atheris` where there is one. Options after the reader's name are those
of libFuzzer, which ends the process by itself: the run's folder stays among the temporary files,
and what fails as crash-HASH in the working folder, which the same command takes as an option.

    PYTHONPATH=.:tests python tests/fuzz/guided.py "model.json" -max_total_time=600
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def seeds(case) -> list[bytes]:
    """Each part of a case's valid file behind its number."""
    parts = case.reader.parts
    return [bytes([i]) + part.take(case.valid) for i, part in enumerate(parts)]


def feed(case, data: bytes) -> str:
    """What the reader made of bytes whose first says which part they stand for."""
    found = case.fed(case.part(data[0] if data else 0), data[1:])
    case.check_left_behind()
    return found


def main(argv: list[str]) -> None:
    import atheris  # no dependency of the tests

    with atheris.instrument_imports(include=["tdjax", "convert"]):
        from fuzz import readers

    folder = Path(tempfile.mkdtemp())
    every = {reader.name: reader for reader in readers.readers(folder)}
    if not argv or argv[0] not in every:
        sys.exit(f"readers: {', '.join(every)}")
    case = readers.Case(every[argv[0]])
    corpus = Path(tempfile.mkdtemp())
    for i, data in enumerate(seeds(case)):
        (corpus / str(i)).write_bytes(data)
    files = [] if any(not word.startswith("-") for word in argv[1:]) else [str(corpus)]
    # The reader's own limit of time stands in place of libFuzzer's, which has the same signal.
    options = ["-timeout=0", "-max_len=65536", *argv[1:], *files]
    atheris.Setup([sys.argv[0], *options], lambda data: feed(case, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
