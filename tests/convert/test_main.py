"""`python -m convert`: reports, exit codes, model folders, interrupted and killed runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert import quantize
from convert.__main__ import main
from tdjax.checkpoints import orbax
from tdjax.checkpoints.demo import PACKAGED
from tdjax.checkpoints.published.checkpoint import open_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tmp_path, states, write_safetensors):
    """tiny(kind, name) -> a safetensors file."""

    def make(kind, name=None):
        path = tmp_path / (name or f"{kind}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_safetensors(path, states(kind))

    return make


def left_over(folder):
    return [p.name for p in folder.rglob("*") if p.name.startswith(".")]


def test_one_file(tmp_path, tiny, capsys):
    source = tiny("sla")
    assert main([str(source), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    digest = open_checkpoint(source).sha256()
    for part in (
        "text to video, 1 layers of 128, sla attention",
        "44 matched, 0 dropped, 0 missing, 0 unexpected -> 44 leaves",
        f"sha256      {digest}",
    ):
        assert part in err
    manifest = orbax.inspect(tmp_path / "out")
    assert (
        manifest["kind"] == "dit"
        and manifest["source"]["sha256"] == digest
        and manifest["source"]["name"] == "sla.safetensors"
    )
    cfg, module = orbax.restore(tmp_path / "out")
    direct = open_checkpoint(source).load()
    assert cfg == direct.cfg and cfg.policy.param == "bfloat16"
    for name, value in orbax.named_leaves(direct).items():
        np.testing.assert_array_equal(
            np.asarray(orbax.named_leaves(module)[name]), np.asarray(value), err_msg=name
        )
    assert not left_over(tmp_path)


@pytest.mark.slow
def test_json_dtype_and_export(tmp_path, tiny, as_json, states):
    source = tiny("dit")
    assert (
        main(
            [
                str(source),
                str(tmp_path / "out"),
                "--heads",
                "4",
                "--dtype",
                "float32",
                "--json",
                "--no-hash",
            ]
        )
        == 0
    )
    (report,) = as_json()["parts"]
    assert (report["kind"], report["names"], report["param"], report["matched"]) == (
        "dit",
        "turbo",
        "float32",
        len(states("dit")),
    )
    assert report["config"]["heads"] == 4 and "sha256" not in report
    assert (
        main(
            [
                str(tmp_path / "out"),
                str(tmp_path / "back.safetensors"),
                "--to",
                "safetensors",
                "--json",
            ]
        )
        == 0
    )
    assert as_json()["parts"][0]["tensors"] == report["leaves"]
    back = open_checkpoint(tmp_path / "back.safetensors")
    for key, value in states("dit").items():
        np.testing.assert_array_equal(back.tensors[key].read(), value)
    assert (
        main(
            [
                str(source),
                str(tmp_path / "d.safetensors"),
                "--heads",
                "4",
                "--names",
                "diffusers",
                "--json",
                "--no-hash",
            ]
        )
        == 0
    )
    assert open_checkpoint(tmp_path / "d.safetensors").found.naming == "diffusers"


def test_merge_and_lora(tmp_path, tiny, states, write_safetensors, as_json):
    base, plain = tiny("dit", "base.safetensors"), tiny("dit", "plain.safetensors")
    tuned = write_safetensors(
        tmp_path / "tuned.safetensors", {k: v + 1 for k, v in states("dit").items()}
    )
    lora = write_safetensors(
        tmp_path / "l.safetensors", {"diffusion_model.blocks.0.norm3.diff": np.ones(80, np.float32)}
    )
    argv = [
        "--merge",
        f"{base},{plain},{tuned},0.5",
        str(tmp_path / "out.safetensors"),
        "--heads",
        "4",
        "--dtype",
        "float32",
        "--json",
    ]
    assert main([*argv, "--lora", f"{lora}:0.25", "--lora", str(lora)]) == 0
    (report,) = as_json()["parts"]
    merge, *loras = report["changes"]
    assert (merge["matched"], merge["kept"], merge["copied"]) == (len(states("dit")), 0, 0)
    assert [(c["weight"], c["full"]) for c in loras] == [(0.25, 1), (1.0, 1)]
    got = open_checkpoint(tmp_path / "out.safetensors").tensors
    for key, value in states("dit").items():
        extra = 0.5 + 1.25 * (key == "blocks.0.norm3.weight")
        np.testing.assert_allclose(got[key].read(), value + np.float32(extra), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_model_folder_from_files_and_from_a_folder(tmp_path, tiny, as_json):
    high, low = (
        tiny("i2v", "m/high_noise_model/x.safetensors"),
        tiny("i2v", "m/low_noise_model/x.safetensors"),
    )
    vae, text = (
        tiny("vae", "m/Wan2.1_VAE.safetensors"),
        tiny("text", "m/models_t5_umt5-xxl-enc-bf16.safetensors"),
    )
    tokenizer = tmp_path / "m" / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text("{}")
    options = ["--heads", "4", "--no-hash", "--json"]
    assert main([*map(str, (low, vae, tokenizer, high, text)), str(tmp_path / "a"), *options]) == 0
    assert {p["out"] for p in as_json()["parts"]} == {
        str(tmp_path / "a" / part) for part in ("dit_high", "dit_low", "vae", "text")
    }
    assert main([str(tmp_path / "m"), str(tmp_path / "b"), *options]) == 0
    for folder in ("a", "b"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == [
            "dit_high",
            "dit_low",
            "text",
            "tokenizer.json",
            "vae",
        ]
        assert orbax.inspect(tmp_path / folder / "vae")["kind"] == "vae"
        for part in ("dit_high", "dit_low", "text"):
            orbax.restore(tmp_path / folder / part)
    assert not left_over(tmp_path)


@pytest.mark.slow
def test_one_transformer_beside_another_part_and_again(tmp_path, tiny, as_json):
    assert (
        main([str(tiny("sla")), str(tiny("text")), str(tmp_path / "m"), "--no-hash", "--json"]) == 0
    )
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["dit", "text"]
    as_json()
    assert (
        main([str(tmp_path / "m"), str(tmp_path / "wide"), "--dtype", "float32", "--json"]) == 0
    )  # our own folder is a source too
    assert {p["param"] for p in as_json()["parts"]} == {"float32"}
    narrow, wide = (
        orbax.restore(tmp_path / folder / "dit")[1].blocks.up.kernel[...]
        for folder in ("m", "wide")
    )
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, np.asarray(narrow, np.float32))


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["only_one"], 2, "a source and a destination are needed"),
        (["sla.safetensors", "out", "--to", "safetensors"], 2, "named .safetensors"),
        (["sla.safetensors", "out.safetensors", "--to", "orbax"], 2, "change one of them"),
        (["sla.safetensors", "out", "--names", "wan"], 2, "our layout has its own names"),
        (["sla.safetensors", "vae.safetensors", "out.safetensors"], 2, "one component"),
        (["sla.safetensors", "taken"], 2, "taken exists"),
        (["sla.safetensors", "dit2.safetensors", "vae.safetensors", "out"], 2, "high or low"),
        (["--merge", "a,b", "out"], 2, "three files and a weight"),
        (["--merge", "a,b,c,d", "out"], 2, "must be a number"),
        (["sla.safetensors", "--merge", "a,b,c", "out"], 2, "BASE is the source"),
        (["absent.pth", "out"], 3, "absent.pth does not exist"),
        (["taken", "out"], 3, "holds no .safetensors, .pth or .gguf"),
        (["broken.safetensors", "out"], 3, "truncated"),
        (["less.safetensors", "out"], 3, "missing     blocks.0.ffn.2.bias"),
        (["sla.safetensors", "out", "--lora", "vae.safetensors"], 3, "is not a LoRA"),
    ],
)
def test_exit_codes(
    tmp_path, tiny, states, write_safetensors, monkeypatch, capsys, argv, code, message
):
    monkeypatch.chdir(tmp_path)
    for kind in ("sla", "vae"):
        tiny(kind)
    tiny("sla", "dit2.safetensors")
    (tmp_path / "taken").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(
        (tmp_path / "sla.safetensors").read_bytes()[:-100]
    )
    write_safetensors(
        tmp_path / "less.safetensors",
        {k: v for k, v in states("sla").items() if k != "blocks.0.ffn.2.bias"},
    )
    before = sorted(tmp_path.rglob("*"))
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_options_are_usage_errors(capsys):
    for argv in ([], ["a", "b", "--dtype", "int4"], ["a", "b", "--unknown"]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") <= 3 and out == ""


def test_interrupted_and_repeated(tmp_path, tiny, monkeypatch, capsys):
    from tdjax.checkpoints.published import checkpoint

    source, real, calls = tiny("sla"), checkpoint.Checkpoint.final, []

    def interrupted(self, claim, *args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(self, claim, *args)

    with monkeypatch.context() as m:
        m.setattr(checkpoint.Checkpoint, "final", interrupted)
        assert main([str(source), str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sla.safetensors"]
    assert main([str(source), str(tmp_path / "out"), "--no-hash"]) == 0


def test_overwrite_replaces_only_when_complete(tmp_path, tiny, monkeypatch):
    from tdjax.checkpoints.published import checkpoint

    assert main([str(tiny("sla")), str(tmp_path / "out"), "--no-hash"]) == 0
    other = tiny("text")
    with monkeypatch.context() as m:
        m.setattr(
            checkpoint.Checkpoint, "final", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert main([str(other), str(tmp_path / "out"), "--no-hash", "--overwrite"]) == 130
    assert orbax.inspect(tmp_path / "out")["kind"] == "dit"
    assert main([str(other), str(tmp_path / "out"), "--no-hash", "--overwrite"]) == 0
    assert orbax.inspect(tmp_path / "out")["kind"] == "text" and not left_over(tmp_path)


FOREIGN = {  # folders that hold more, or other things, than what the command wrote
    "a text": ["thesis.tex"],
    "another program's manifest": ["manifest.json"],
    "a checkpoint and a text": ["params/", "vae", "notes.txt"],
    "a model folder and a text": ["vae/params/", "vae/vae", "notes.txt"],
    "a model folder and a folder": ["vae/params/", "vae/vae", "papers/thesis.tex"],
    "a checkpoint under another name": ["fox/params/", "fox/vae"],
    "a checkpoint deep below": ["a/b/params/", "a/b/vae"],
    "published files": ["Wan2.1_VAE.pth"],
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", [main, quantize.main])
def test_overwrite_does_not_replace_a_folder_of_others(tmp_path, tiny, capsys, kind, command):
    source, target = tiny("sla"), tmp_path / "keep"
    for name in FOREIGN[kind]:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif path.name == "vae":  # a manifest of ours
            shutil.copy(PACKAGED / "vae" / "manifest.json", path.parent)
        else:
            path.write_text("{}")
    before = sorted(target.rglob("*"))
    assert command([str(source), str(target), "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert "only a folder that tdjax wrote" in err and str(target / "NAME") in err
    assert sorted(target.rglob("*")) == before and not left_over(tmp_path)


@pytest.mark.slow
def test_an_input_is_not_replaced(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny("sla")), str(tiny("vae")), "m", "--no-hash"]) == 0
    (tmp_path / "link").symlink_to("m")
    before = sorted(tmp_path.rglob("*"))
    for target in ("m", "m/vae", "link", "link/vae", "."):
        for source in ("m/vae", "link/vae", str(tmp_path / "m" / "vae")):
            assert main([source, target, "--overwrite"]) == 2, (source, target)
        assert sorted(tmp_path.rglob("*")) == before, target
    assert main(["m/vae", "m/other.safetensors", "--overwrite", "--no-hash"]) == 0
    assert main(["m/other.safetensors", "m/other.safetensors", "--overwrite"]) == 2
    assert "is the input" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_folder_is_replaced(tmp_path, tiny):
    files = [str(tiny("sla")), str(tiny("vae")), str(tmp_path / "m"), "--no-hash"]
    assert main(files) == 0 and main(files) == 2 and main([*files, "--overwrite"]) == 0
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["dit", "vae"]


def test_a_place_that_cannot_be_written_is_told_in_three_lines(tmp_path, tiny, capsys):
    source = tiny("vae")
    for target in ("/proc/x", "/proc/x.safetensors", str(source / "x")):
        assert main([str(source), target, "--no-hash"]) == 2
        assert capsys.readouterr().err.count("\n") == 3


KILLED = """
import os, signal, sys
from tdjax.checkpoints.published import checkpoint as load
from convert.__main__ import main
real, calls = load.Checkpoint.final, []
def final(self, *args):
    calls.append(1)
    if len(calls) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)
load.Checkpoint.final = final
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_and_repeated(tmp_path, tiny):
    source, out = tiny("sla"), tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), "--no-hash"],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not out.exists() and len(left_over(tmp_path)) >= 1
    assert main([str(source), str(out), "--no-hash"]) == 0
    orbax.restore(out)
    assert not left_over(tmp_path)


@pytest.mark.slow
def test_help_is_fast_and_stdout_is_clean(tmp_path, tiny):
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "convert", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = time.perf_counter() - start
    assert run.returncode == 0 and "SRC... DST" in run.stdout
    assert seconds < 2, (
        f"--help took {seconds:.1f} s"
    )  # 0.1 s on a quiet machine; jax alone takes longer than this
    source = tiny("text")
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore::DeprecationWarning",
            "-m",
            "convert",
            str(source),
            str(tmp_path / "out"),
            "--json",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert (run.returncode, run.stderr) == (
        0,
        "",
    )  # no progress, and no word of Orbax, where nobody looks
    assert json.loads(run.stdout)["parts"][0]["kind"] == "text"
