"""A pipeline in two processes with two fake devices each, which the user has joined: the results of
one device, and what one of them asks for ends the call in both."""

import json

import numpy as np
import pytest
from conftest import REPOSITORY
from hosts_calls import CALL
from hosts_cases import ends, free_port, started
from random_model import PROMPT
from tolerances import assert_close

import tdjax


@pytest.mark.slow
def test_two_processes_and_one(dense_model, tmp_path):
    script, port = REPOSITORY / "tests/hosts_calls.py", free_port()
    line = [script, dense_model, tmp_path, port]
    both = [started([*line, i], tmp_path / f"cache{i}") for i in range(2)]
    try:
        done = ends(both)
    finally:
        for process in both:
            process.kill()
    assert [code for code, *_ in done] == [0, 0], done
    told = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert told[0]["previews"] == [[5, 32, 32, 3]] * 2 and told[1]["steps"] == [1, 2]
    assert [len(each["folder"]) for each in told] == [1, 0]  # the first has the cache
    for each in told:
        assert each["same"] and each["one cache"] is None
        assert "is not one folder of all processes" in each["two caches"]
        assert each["by step"] == "the call was cancelled after step 1 of 2"
        assert each["by event"] == "the call was cancelled after step 1 of 2"
        assert each["other seed"] == "the processes were asked for different videos"
    made = tdjax.load(dense_model, compile_cache=False)(PROMPT, **CALL)
    for i in range(2):
        found = np.load(tmp_path / f"{i}.npz")
        assert_close(found["latents"], made.latents, "float32", f"latents of {i}")
        assert np.abs(found["frames"].astype(int) - made.frames).max() <= 1
        np.testing.assert_array_equal(found["decoded"], found["frames"])
