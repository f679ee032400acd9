import json
import subprocess
import sys
import time

import jax
import pytest
from flax import nnx

from tdjax import bench
from tdjax import linear as layers
from tdjax.config import LINEAR
from tdjax.errors import UsageError
from tdjax.precision import FLOAT32


@pytest.mark.slow
def test_rows_of_the_demo_model(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    argv = ["--model", "demo", "--stage", "dit", "--attention", "sla", "--linear", "float,fp8", "--repeats", "2", "--num_steps", "2"]
    assert bench.main([*argv, "--error", "--teacher", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["sla, float", "sla, fp8", "original step: dense, float, guided"]
    for row in rows:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"] and row["compile_s"] > 0 and row["device"] and row["jax"]
    assert rows[0]["error"] < 1e-6 and 1e-4 < rows[1]["error"] < 5e-2 and rows[2]["error"] is None
    assert rows[1]["weights"] < rows[0]["weights"]
    table = capsys.readouterr().out
    assert all(row["what"] in table for row in rows)


def test_dtype_of_everything():
    configs = bench.configs(bench.parse(["--model", "demo", "--dtype", "bfloat16"]))[:3]
    assert {(cfg.policy.param, cfg.policy.compute) for cfg in configs} == {("bfloat16", "bfloat16")}
    assert bench.configs(bench.parse(["--model", "demo"]))[0].policy == FLOAT32


@pytest.mark.parametrize("kind", LINEAR)
def test_random_weights_keep_variance(kind):
    layer = nnx.Dict(up=layers.LINEAR[kind](256, 384, FLOAT32, rngs=nnx.Rngs(0)))
    layer = bench.random_weights(jax.eval_shape(lambda: layer))
    y = layer["up"](jax.random.normal(jax.random.key(0), (1, 128, 256)))
    assert 0.8 < float(y.std()) < 1.2


def test_text_stage(capsys):
    assert bench.main(["--model", "demo", "--stage", "text", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "32 tokens" in out and "one layer of 2, streamed" in out


def test_vae_stage(capsys):
    assert bench.main(["--model", "demo", "--stage", "vae", "--repeats", "1"]) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("vae")]
    assert lines == [["vae", stage, what] for stage in ("encode", "decode") for what in ("first", "chunk")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attention", "dense,slaa"], "slaa"),
        (["--linear", "int4"], "allowed: float, int8"),
        (["--repeats", "0"], "at least 1"),
        (["--model", "demo", "--size", "720p"], "64x64"),
        (["--num_frames", "80"], "81"),
    ],
)
def test_bad_arguments(argv, words):
    with pytest.raises(UsageError, match=words):
        bench.run(bench.parse(argv))


def test_help_is_quick():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "tdjax.bench", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--attention" in done.stdout
    assert " jax\n" not in done.stderr  # parsing needs no jax, and so no device
    assert time.perf_counter() - start < 10
