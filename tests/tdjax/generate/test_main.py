"""The command on tiny models: files and what it prints, many prompts, and every message of a run
that fails."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import random_model
from PIL import Image
from random_model import SMALL, photograph
from safetensors.numpy import load_file
from tolerances import assert_close

import tdjax
from tdjax.checkpoints import orbax
from tdjax.errors import NotFinite
from tdjax.generate import __main__ as generate
from tdjax.media.video import read_video
from tdjax.pipeline.components import Component

FLAGS = ["--num_frames", "5", "--width", "32", "--height", "32", "--compile_cache_dir", "none"]
LATENTS = ["--format", "latents"]  # where frames do not matter: no decoder is loaded
DENSE = dataclasses.replace(random_model.DIT, layers=1, attention="dense")


def command(model, *argv) -> list[str]:
    return ["--model", str(model), *map(str, argv), *FLAGS]


def failing(model, tmp_path, capsys, code, *argv):
    """The message of a command that must stop with this code and leave nothing."""
    words = command(model, "--save_path", tmp_path / "v.mp4", "--prompt", "a", *argv)
    assert generate.main(words) == code
    assert not list(tmp_path.glob("v*")) and not list(tmp_path.glob(".v*"))
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photograph()).save(path)
    return path


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smallest_command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--model", str(model), "--compile_cache_dir", "none"]) == 0
    out = capsys.readouterr()
    assert out.out == "output/random_0_0.mp4\n"
    assert (
        f'no prompt was given, this one is drawn: --prompt "{random_model.PROMPT}" --seed 0'
        in out.err
    )
    assert read_video(tmp_path / "output/random_0_0.mp4").shape == (5, 32, 32, 3)
    facts = json.loads((tmp_path / "output/random_0_0.mp4.json").read_text())
    assert (
        facts["seed"] == 0
        and facts["prompts"] == [random_model.PROMPT]
        and facts["sampler"]["num_steps"] == 4
    )
    assert sorted(p.name for p in (tmp_path / "output").iterdir()) == [
        "random_0_0.mp4",
        "random_0_0.mp4.json",
    ]


@pytest.mark.slow
def test_embeddings_saved_and_given(model, tmp_path, capsys):
    path, out = tmp_path / "e.safetensors", tmp_path / "v.safetensors"
    words = command(model, "--prompt", "a red circle", "--save_prompt_embeds", path)
    assert generate.main(words) == 0
    assert capsys.readouterr().out == f"{path}\n"
    words = command(model, "--prompt_embeds", path, "--save_path", out, "--seed", 3, *LATENTS)
    assert generate.main(words) == 0
    expected = tdjax.load(model)("a red circle", seed=3, output_type="latent", **SMALL)
    assert np.array_equal(load_file(out)["latents"], expected.latents)


@pytest.mark.slow
def test_two_steps_never_reach_the_low_noise_expert(i2v_model, photo, tmp_path, capsys):
    argv = ["--image_path", photo, "--num_steps", 2, "--prompt", "a", "--timings"]
    words = command(i2v_model, *argv, "--save_path", tmp_path / "v.safetensors")
    assert generate.main(words) == 0
    err = capsys.readouterr().err
    assert (
        "low-noise expert is not used" in err and "load dit_low" not in err and "vae encode" in err
    )


def test_dry_run_loads_nothing(model, capsys, monkeypatch):
    monkeypatch.setattr(Component, "load", lambda self: pytest.fail("weights were loaded"))
    monkeypatch.setattr(generate.cli, "take_memory", lambda: pytest.fail("memory of a GPU"))
    assert generate.main(command(model, "--dry_run")) == 0
    out = capsys.readouterr().out
    assert "vae decode" in out and "peak" in out and "5 frames" in out
    assert generate.main(command(model, "--dry_run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * 4 * 4


@pytest.mark.slow
def test_a_plan_needs_no_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    argv = ["--model", "turbowan2.2-i2v-a14b-720p-quant", "--dry_run", "--offline"]
    assert generate.main(argv) == 0
    out = capsys.readouterr()
    assert "is not downloaded" in out.err
    assert "denoise (low noise)" in out.out and "1280x720, 81 frames: 75600 tokens" in out.out


# -- files of many prompts -------------------------------------------------------------------------


@pytest.mark.slow
def test_prompt_file_resumes(model, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,seed,out\na red circle,1,a.npy\na blue square,2,b.npy\n")
    monkeypatch.chdir(tmp_path)
    words = command(model, "--prompt_file", rows)
    assert generate.main(words) == 0
    assert capsys.readouterr().out == "a.npy\nb.npy\n"
    first = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").unlink()
    assert generate.main(words) == 0
    out = capsys.readouterr()
    assert out.out == "b.npy\n" and "a.npy is there already: skipped" in out.err
    assert (tmp_path / "b.npy").read_bytes() == first


@pytest.mark.slow
def test_copies_of_the_weights_make_rows_at_the_same_time(model, tmp_path, monkeypatch, capsys):
    """The files that the same rows have without a mesh; those of another length are a call of their
    own."""
    names = ("a.npy", "b.safetensors", "c.npy", "d.npy", "e.npy")
    prompts = ("a red circle", "a blue square", "a red circle", "a green star", "a blue square")
    asked, call = [], tdjax.Pipeline.__call__
    counted = lambda pipe, prompt, **given: asked.append(prompt) or call(pipe, prompt, **given)
    monkeypatch.setattr(tdjax.Pipeline, "__call__", counted)
    for folder, mesh in (("one", []), ("two", ["--mesh", "dp=2"])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        rows = enumerate(zip(prompts, names, (5, 5, 5, 1, 1), strict=True))
        lines = [f"{prompt},{n},{name},{frames}" for n, (prompt, name, frames) in rows]
        text = "\n".join(["prompt,seed,out,num_frames", *lines])
        (tmp_path / folder / "rows.csv").write_text(text)
        assert generate.main(command(model, "--prompt_file", "rows.csv", *mesh)) == 0
        assert capsys.readouterr().out.split() == list(names)
    assert asked == [*prompts, [*prompts[:2]], prompts[2], [*prompts[3:]]]
    for n, name in enumerate(names):
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        if name.endswith(".npy"):
            far = np.abs(np.load(one).astype(int) - np.load(two))
            assert far.max() <= 1
        else:
            assert_close(load_file(two)["latents"], load_file(one)["latents"], "float32")
        facts = [json.loads(path.with_name(f"{name}.json").read_text()) for path in (one, two)]
        for each in facts:
            each.pop("timings")
        assert facts[0] == facts[1] and facts[0]["seed"] == n


@pytest.mark.slow
def test_a_row_that_is_not_finite_takes_no_row_before_it_along(
    model, tmp_path, monkeypatch, capsys
):
    """Rows made beside it are as they are without a mesh: those before it are there."""
    call = tdjax.Pipeline.__call__

    def broken(pipe, prompt, **given):
        if "a blue square" in prompt:
            raise NotFinite("the latents are not finite", "a test said so", "another prompt")
        return call(pipe, prompt, **given)

    monkeypatch.setattr(tdjax.Pipeline, "__call__", broken)
    monkeypatch.chdir(tmp_path)
    rows = ["prompt,seed,out", "a red circle,1,a.safetensors", "a blue square,2,b.safetensors"]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    words = command(model, "--prompt_file", "rows.csv", "--mesh", "dp=2", *LATENTS)
    assert generate.main(words) == 5
    out = capsys.readouterr()
    assert out.out == "a.safetensors\n" and "not finite" in out.err
    files = ["a.safetensors", "a.safetensors.json", "rows.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


@pytest.mark.slow
def test_samples_are_files_and_grid_is_one(model, tmp_path, capsys):
    save = lambda name, *more: command(
        model, "--num_samples", 2, "--save_path", tmp_path / name, *more
    )
    assert generate.main(save("v.npy")) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "v_0.npy"), str(tmp_path / "v_1.npy")]
    assert generate.main(save("g.npy", "--grid")) == 0
    assert np.load(tmp_path / "g.npy").shape == (5, 32, 64, 3)


@pytest.mark.slow
def test_serving_keeps_weights_and_survives_a_bad_line(model, tmp_path, monkeypatch, capsys):
    lines = (
        "a red circle\n:set num_steps 9\n:set seed abc\n:sett x\n:set num_steps 2\na blue"
        " square\n:quit\nnever\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.chdir(tmp_path)
    assert generate.main(command(model, "--serve", *LATENTS)) == 0
    out = capsys.readouterr()
    assert out.out.split() == [f"output/random_0_{i}.safetensors" for i in range(2)]
    assert "num_steps is 9" in out.err


@pytest.mark.slow
def test_a_session_changes_its_lora_files(model, tmp_path, monkeypatch, capsys, write_safetensors):
    """On, off, and the latents of before; a file that is not there ends nothing."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 4, 128)).astype(np.float32)
    factors = {"lora_A": noise[0], "lora_B": noise[1].T}
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{name}.{part}.weight": value.copy() for part, value in factors.items()}
    write_safetensors(tmp_path / "style.safetensors", tensors)
    prompt = "a red circle\n"
    lines = (
        f"{prompt}:set lora style.safetensors:0.8\n{prompt}:set lora none\n{prompt}"
        f":set lora nothing.safetensors\n{prompt}"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.chdir(tmp_path)
    assert generate.main(command(model, "--serve", "--format", "latents", "--seed", "3")) == 0
    out = capsys.readouterr()
    plain, styled, off, again = (load_file(path)["latents"] for path in out.out.split())
    assert not np.array_equal(plain, styled)
    assert np.array_equal(plain, off) and np.array_equal(plain, again)
    assert "nothing.safetensors does not exist" in out.err


@pytest.mark.slow
def test_rows_of_one_prompt_are_different_files(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("红色的圆\n蓝色的圆\n红色的圆\n")
    assert generate.main(command(model, "--prompt_file", "p.txt", *LATENTS)) == 0
    assert len(set(capsys.readouterr().out.split())) == 3
    (tmp_path / "same.csv").write_text("prompt,out\na,v.npy\nb,v.npy\n")
    assert generate.main(command(model, "--prompt_file", "same.csv")) == 2
    assert "rows 1 and 2" in capsys.readouterr().err and not (tmp_path / "v.npy").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--save_path", "t_{seed}.npy"],
        ["--num_samples", "2", "--save_path", "s.npy"],
        ["--save_path", "o.npy"],
        ["--save_path", "here/t_0.npy"],
    ],
)
def test_what_stands_in_the_way_is_found_before_work(model, tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    for name in ("t_0.npy", "s_1.npy", "o.npy.json", "here"):
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(Component, "load", lambda self: pytest.fail("weights were loaded"))
    assert generate.main(command(model, "--prompt", "a", *argv)) == 2
    assert "error:" in capsys.readouterr().err
    assert all(
        (tmp_path / name).read_text() == "mine"
        for name in ("t_0.npy", "s_1.npy", "o.npy.json", "here")
    )


# -- what goes wrong -------------------------------------------------------------------------------


def test_task_and_image_must_agree(model, i2v_model, photo, tmp_path, capsys):
    message = failing(model, tmp_path, capsys, 2, "--image_path", photo)
    assert "channels" in message and "36" in message
    assert "need an image" in failing(i2v_model, tmp_path, capsys, 2)
    assert "these are t2v weights" in failing(model, tmp_path, capsys, 2, "--task", "i2v")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    assert "bad.png" in failing(i2v_model, tmp_path, capsys, 2, "--image_path", bad)


def test_sla_needs_its_projection(model, tmp_path, capsys):
    folder = tmp_path / "dense"
    random_model.dit_folder(folder, DENSE)
    argv = ["--dit_path", folder, "--vae_path", model / "vae"]
    argv += ["--text_encoder_path", model / "text"]
    argv += ["--tokenizer_path", model / "tokenizer.json", "--attention_type", "sla"]
    message = failing(model, tmp_path, capsys, 3, *argv)
    assert "proj_l" in message and "--attention_type original" in message and "--merge" in message


def test_parts_of_another_kind(model, tmp_path, capsys):
    told = lambda *argv: failing(model, tmp_path, capsys, 3, *argv)
    assert "is a umT5 text encoder, not a video VAE" in told("--vae_path", model / "text")
    cfg = dataclasses.replace(random_model.DIT, in_channels=16, out_channels=16, layers=1)
    random_model.dit_folder(tmp_path / "wide", cfg)
    message = told("--dit_path", tmp_path / "wide")
    assert "8 latent channels, the transformer 16" in message and "48" in message
    cfg = dataclasses.replace(random_model.DIT, text_dim=48, layers=1)
    random_model.dit_folder(tmp_path / "text48", cfg)
    assert "vectors of 64, the transformer takes 48" in told("--dit_path", tmp_path / "text48")


def test_official_model_name_is_checked(model, capsys):
    argv = ["--dit_path", model / "dit", "--vae_path", model / "vae"]
    argv += ["--text_encoder_path", model / "text", "--tokenizer_path", model / "tokenizer.json"]
    assert generate.main(command("Wan2.1-1.3B", *argv)) == 2
    assert "of width 128" in capsys.readouterr().err


@pytest.mark.slow
def test_not_finite_names_the_step(model, tmp_path, capsys):
    folder = random_model.with_dit(model, tmp_path / "model", DENSE, head__proj__bias=np.nan)
    message = failing(folder, tmp_path, capsys, 5)
    assert "step 1 of 4" in message and "--attention_type original" in message
    out = tmp_path / "n.npy"
    words = command(folder, "--prompt", "a", "--save_path", out, "--check", "none")
    assert generate.main(words) == 0 and out.is_file()


@pytest.mark.slow
def test_the_decoder_is_checked_too(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("vae"))
    leaves = random_model.random_leaves("vae", random_model.VAE, 0)
    leaves["decoder.conv_out.bias"][...] = np.nan
    orbax.save(folder / "vae", leaves, kind="vae", cfg=random_model.VAE)
    assert "VAE decoder gave NaN" in failing(folder, tmp_path, capsys, 5)


@pytest.mark.slow
def test_out_of_memory_names_the_stage(model, tmp_path, capsys, monkeypatch):
    def exhausted(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9999 bytes.")

    monkeypatch.setattr(Component, "load", exhausted)
    message = failing(model, tmp_path, capsys, 4)
    assert "stage 'load text'" in message and "estimated need" in message
    assert message.index("low_memory") < message.index("int8") < message.index("480p")


@pytest.mark.slow
def test_interrupt_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tdjax.media.video.encode", interrupted)
    assert "nothing was left half-written" in failing(model, tmp_path, capsys, 130)


@pytest.mark.slow
def test_compile_cache_that_cannot_be_written(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = command(model, "--prompt", "a", "--save_path", tmp_path / "v.safetensors", *LATENTS)
    words[words.index("none")] = str(tmp_path / "file" / "cache")
    assert generate.main(words) == 0
    err = capsys.readouterr().err
    assert "not writable" in err and "--compile_cache_dir" in err and str(tmp_path / "file") in err


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the reader's own, of reads that it gave up
def test_damaged_checkpoint(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    files = sorted(
        (p for p in (folder / "dit" / "params").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    assert str(folder / "dit") in failing(folder, tmp_path, capsys, 3)


@pytest.mark.parametrize("name", ["model.json", "dit/manifest.json"])
def test_damaged_tables(model, tmp_path, capsys, name):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for damage in ("{", "[]"):
        (folder / name).write_text(damage)
        assert "Traceback" not in failing(folder, tmp_path, capsys, 3)
