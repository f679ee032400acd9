"""Five thousand changed files: an error of ours or the values, in time, in memory, and nothing run.

`python tests/fuzz/readers.py` runs longer."""

import time

import numpy as np
import pytest
from fuzz import guided, readers
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tdjax.errors import CheckpointError

TOTAL = 5_000
FEW = {"arrays": 40, "arrays' own table": 60}  # each opens a checkpoint of Orbax


@pytest.mark.slow  # five thousand files of a few kilobytes
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_five_thousand_changed_files(tmp_path):
    every = readers.readers(tmp_path)
    count = (TOTAL - sum(FEW.values())) // (len(every) - len(FEW)) + 1
    before, refused, total = readers.peak_bytes(), 0, 0
    for reader in every:
        case = readers.run(reader, FEW.get(reader.name, count), seed=0)
        refused += case.counts["refused"]
        total += case.counts.total()
        # A damaged entry of the prompt cache is no error: it counts as absent.
        told = case.counts["other" if reader.name == "prompt cache" else "refused"]
        assert told, f"{reader.name} takes everything"
    assert total >= TOTAL and refused > total / 2
    assert readers.peak_bytes() - before < readers.MEMORY


def wrong(read, tmp_path, summed=False):
    """A reader that does what `read` does once its file is changed."""
    file = tmp_path / "file"
    file.write_bytes(bytes(64))
    answer = lambda path: "values" if path.read_bytes() == bytes(64) else read(path)
    return readers.Reader("wrong", file, answer, summed=summed)


def fail(path):
    raise ValueError("a library's own error")


def execute(path):
    (path.parent / "executed").touch()


@pytest.mark.parametrize(
    "read, summed, error",
    [
        (fail, False, ValueError),
        (lambda path: time.sleep(60), False, readers.Hang),
        (lambda path: "other values", True, AssertionError),
        (execute, False, AssertionError),
    ],
)
def test_what_is_wrong_is_found(tmp_path, monkeypatch, read, summed, error):
    if error is readers.Hang:
        monkeypatch.setattr(readers, "SECONDS", 0.01)
    with pytest.raises(error):
        readers.run(wrong(read, tmp_path, summed), 20, seed=0)


def test_what_is_right_passes(tmp_path):
    def refuse(path):
        raise CheckpointError("it is damaged")

    case = readers.run(wrong(refuse, tmp_path, summed=True), 20, seed=0)
    assert case.counts["refused"] + case.counts["same"] == 20


@pytest.mark.parametrize("parts", [(readers.WHOLE,), (readers.WHOLE, readers.SAFETENSORS)])
def test_guided_bytes_begin_with_the_valid_file(tmp_path, parts, write_safetensors):
    file = write_safetensors(tmp_path / "a.safetensors", {"w": np.arange(6, dtype=np.float32)})
    case = readers.Case(readers.Reader("x", file, lambda path: load_file(path)["w"], parts))
    for number, data in enumerate(guided.seeds(case)):
        assert data[0] == number and guided.feed(case, data) == "same"
    with pytest.raises(SafetensorError):
        guided.feed(case, b"\0{")
