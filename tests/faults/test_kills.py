"""Commands that are stopped at random, and a full disk; `python tests/faults/kills.py 200` runs
longer."""

import pytest
from faults import kills

CONVERT = 2  # of `jobs`: the command that compiles nothing


@pytest.mark.slow  # eight processes, each of which imports jax
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_conversion_that_is_stopped_anywhere(tmp_path):
    harness = kills.Harness(tmp_path, seed=1)
    job = kills.jobs(tmp_path)[CONVERT]
    want, seconds = harness.baseline(job)
    assert list(want) == ["vae"]
    harness.kills(job, want, seconds, 3, chain=3)
    harness.full_disk(job, want, 2000)
    assert harness.counts["convert resumed"]
    assert harness.counts["convert full disk, exit 2"] == 1


def test_what_a_kill_must_not_leave_is_found(tmp_path):
    harness = kills.Harness(tmp_path, seed=1)
    job = kills.Job("x", (), (), kills.files)
    harness.clear()
    out = harness.work / "out"
    harness.known = {"fox.mp4": "the digest of all of it"}
    (out / "fox.mp4").write_bytes(b"half")
    with pytest.raises(AssertionError, match="fox.mp4 is not what it should be"):
        harness.check(job)
    (out / "fox.mp4").unlink()
    harness.check(job)
    (out / "poem.txt").write_bytes(b"changed")
    with pytest.raises(AssertionError, match="poem.txt was touched"):
        harness.check(job)
