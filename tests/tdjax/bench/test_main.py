import dataclasses
import json
import subprocess
import sys
import time

import jax
import pytest
from flax import nnx
from tiny_cases import SMALL_VAE

from tdjax.bench import __main__ as bench
from tdjax.bench import stages
from tdjax.config import LINEAR, SamplerConfig, VideoSize
from tdjax.errors import UsageError
from tdjax.media import video
from tdjax.models import linear as layers
from tdjax.pipeline import memory, vae_tiling
from tdjax.precision import FLOAT32
from tdjax.train.tiny import configs as demo


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """The demo's transformer has fewer layers, and its VAE fewer channels."""
    monkeypatch.setattr(demo, "DIT_SLA", dataclasses.replace(demo.DIT_SLA, layers=2))
    monkeypatch.setattr(demo, "VAE", dataclasses.replace(demo.VAE, dim=8, multipliers=(1,) * 4))


@pytest.mark.slow
def test_rows_of_the_demo_model(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    argv = [
        "--model",
        "demo",
        "--stage",
        "dit",
        "--attention",
        "sla",
        "--linear",
        "float,fp8",
        "--repeats",
        "2",
        "--num_steps",
        "2",
        "--num_frames",
        "5",
    ]
    assert bench.main([*argv, "--error", "--teacher", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["what"] for row in rows] == [
        "original step: dense, float, guided",
        "sla, float",
        "sla, fp8",
    ]
    for row in rows:
        assert (
            0 < row["p10"] <= row["ms"] <= row["p90"]
            and row["compile_s"] > 0
            and row["device"]
            and row["jax"]
        )
    original, plain, fp8 = rows
    assert plain["error"] < 1e-6 and 1e-4 < fp8["error"] < 5e-2 and original["error"] is None
    assert plain["psnr"] > 80 and 20 < fp8["psnr"] < 70 and original["psnr"] is None
    assert fp8["weights"] < plain["weights"]
    assert original["ratio"] is None and plain["ratio"] == pytest.approx(
        50 * original["ms"] / (2 * plain["ms"])
    )
    text = capsys.readouterr().out
    assert all(row["what"] in text for row in rows)
    line = (
        f"original 50 steps {50 * original['ms'] / 1e3:.1f} s; sla, float: 2 steps"
        f" {2 * plain['ms'] / 1e3:.2f} s, {plain['ratio']:.0f}x"
    )
    assert line in text.splitlines()


@pytest.mark.slow
def test_rows_of_a_mesh_stand_beside_one_device(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    sizes = ["--num_steps", "1", "--num_frames", "5", "--repeats", "2"]
    kinds = ["--attention", "sagesla", "--linear", "int8_channel", "--lora", "4"]
    argv = ["--model", "demo", "--stage", "dit", "--mesh", "one", "tp=2,sp=2"]
    assert bench.main([*argv, *sizes, *kinds, "--error", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    what = ["sagesla, int8_channel", "sagesla, int8_channel, LoRA of rank 4"]
    meshes = (None, "tp=2,sp=2")
    assert [(row["mesh"], row["what"]) for row in rows] == [(m, w) for m in meshes for w in what]
    for row, one in zip(rows, 2 * rows[:2], strict=True):
        assert row["one"] == (pytest.approx(one["ms"] / row["ms"]) if row["mesh"] else None)
    plain, divided = (row["error"] for row in rows[::2])
    assert divided == pytest.approx(plain, rel=0.2)
    assert rows[2]["weights"] < rows[0]["weights"]  # which tp divides
    assert f"{rows[2]['one']:.2f}x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mesh", "dp=2"], "--mesh dp=2"),
        (["--mesh", "one", "cfg=2"], "--mesh cfg=2 without --teacher"),
        (["--mesh", "one", "sp=x"], "cannot read"),
        (["--stream", "--mesh", "sp=2"], "--stream with --mesh"),
        (["--stage", "vae", "--lora", "4"], "--lora with --stage vae"),
        (["--stage", "dit", "--vae", "tiny"], "--vae with --stage dit"),
        *((["--lora", rank], f"--lora is {rank}") for rank in ("0", "-4", "4097", "100000000")),
    ],
)
def test_meshes_that_it_does_not_take(words, message, capsys):
    assert bench.main(["--model", "demo", *words]) == 2
    assert message in capsys.readouterr().err


def test_dtype_of_everything():
    configs = bench.configs(bench.parse(["--model", "demo", "--dtype", "bfloat16"]))[:3]
    assert {(cfg.policy.param, cfg.policy.compute) for cfg in configs} == {("bfloat16", "bfloat16")}
    assert bench.configs(bench.parse(["--model", "demo"]))[0].policy == FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("kind", LINEAR)
def test_random_weights_keep_variance(kind):
    layer = nnx.Dict(up=layers.LINEAR[kind](256, 384, FLOAT32, rngs=nnx.Rngs(0)))
    layer = stages.random_weights(jax.eval_shape(lambda: layer))
    y = layer["up"](jax.random.normal(jax.random.key(0), (1, 128, 256)))
    assert 0.8 < float(y.std()) < 1.2


@pytest.mark.slow
def test_text_stage(capsys):
    assert bench.main(["--model", "demo", "--stage", "text", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "32 tokens" in out and "one layer of 2, streamed" in out


@pytest.mark.slow
def test_a_step_of_streamed_blocks():
    """Its weights are those on the device at a time; the rest waits in the host's memory."""
    cfg = dataclasses.replace(demo.DIT_SLA, layers=5, attention="dense", linear="int8_channel")
    size = VideoSize(frames=5, height=32, width=32)
    row = stages.streamed_row(cfg, size, SamplerConfig(num_steps=2), 2)
    assert (row.stage, row.what) == ("step", "dense, int8_channel, blocks streamed")
    two = 2 * memory.block_bytes(cfg)
    assert row.weights == memory.weight_bytes("dit", cfg) - two
    assert row.working > 0 and row.ms > 0
    assert bench.parse(["--stage", "dit", "--stream"]).stream


@pytest.mark.slow
def test_vae_stage_takes_whole_clips(monkeypatch):
    monkeypatch.setattr(vae_tiling, "TILE", 4)
    monkeypatch.setattr(vae_tiling, "OVERLAP", 2)
    size = VideoSize(frames=5, height=32, width=64)  # three tiles
    encode, decode, tiles = stages.vae_rows(SMALL_VAE, size, 2)
    assert [(row.stage, row.what) for row in (encode, decode)] == [
        ("vae encode", "5 frames"),
        ("vae decode", "5 frames"),
    ]
    assert (tiles.stage, tiles.what) == ("vae decode", "5 frames, tiles of 32x32")
    assert all(
        0 < row.p10 <= row.ms <= row.p90 and row.compile_s > 0 and row.weights == decode.weights
        for row in (encode, decode, tiles)
    )
    assert 0 < tiles.working < decode.working


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
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tdjax.bench", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--attention" in done.stdout
    assert " jax\n" not in done.stderr  # parsing needs no jax, and so no device
    assert time.perf_counter() - start < 10


# The last one, as what it asks for holds for the rest of the module.
@pytest.mark.slow
@pytest.mark.usefixtures("as_users")  # compiling takes longer than reading what was compiled
def test_end_to_end(tmp_path, capsys):
    out, before = tmp_path / "rows.jsonl", jax.config.jax_compilation_cache_dir
    argv = [
        "--model",
        "demo",
        "--stage",
        "e2e",
        "--repeats",
        "2",
        "--attention",
        "sla",
        "--linear",
        "float",
        "--num_steps",
        "2",
        "--num_frames",
        "5",
    ]
    assert bench.main([*argv, "--save", str(tmp_path / "videos"), "--json", str(out)]) == 0
    rows = {
        (row["stage"], row["what"].removesuffix(", sla, float")): row
        for row in map(json.loads, out.read_text().splitlines())
    }
    ms = {key: row["ms"] for key, row in rows.items()}
    compiling = [
        ("compile", f"all stages, {what}") for what in ("cold", "from the persistent cache")
    ]
    stages = [
        (name, "in the pipeline") for name in ("text", "denoise", "vae decode")
    ]  # and none that compiles or loads
    whole = [("end to end", what) for what in ("prompt to frames on the host", "prompt to mp4")]
    assert list(rows) == [*compiling, *stages, *whole] and min(ms.values()) > 0
    assert ms[compiling[1]] < ms[compiling[0]]
    assert ms[whole[0]] > 0.9 * sum(ms[stage] for stage in stages)  # medians of two runs
    assert rows[whole[0]]["weights"] == sum(rows[stage]["weights"] for stage in stages)
    assert min(row["working"] for row in rows.values()) > 0
    peaks = [row["host_peak"] for row in rows.values()]
    assert peaks == sorted(peaks) and peaks[-1] > rows[whole[0]]["weights"]
    assert (
        f"peak of the process: device not reported, host {peaks[-1] / 2**30:.2f} GiB"
        in capsys.readouterr().out
    )
    frames = video.read_video(tmp_path / "videos" / "demo-sla-float.mp4")
    assert frames.shape == (5, 64, 64, 3) and frames.std() > 10
    assert jax.config.jax_compilation_cache_dir == before
