"""The whole path on tiny models: bits, seeds, experts, images, memory, and every message of a
failing run."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import random_model

import tdjax
from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, VideoSize
from tdjax.errors import CheckpointError, NotFinite, OutOfMemory, UsageError
from tdjax.generate import __main__ as generate
from tdjax.media.video import read_video
from tdjax.pipeline import compilation, memory
from tdjax.pipeline.components import Component
from tdjax.pipeline.load import plan_pipeline
from tdjax.pipeline.options import PipelineOptions
from tdjax.presets import PRESETS
from tdjax.progress import Stages

SMALL = {
    "num_frames": 5,
    "width": 32,
    "height": 32,
}  # shapes shared by most tests, so that programs are compiled once
FLAGS = ["--num_frames", "5", "--width", "32", "--height", "32", "--compile_cache_dir", "none"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model folder of random weights."""
    return random_model.write(tmp_path_factory.mktemp("cache") / "random")


@pytest.fixture(scope="module")
def pipe(model):
    return tdjax.load(model)


def dit_folder(path, cfg: DiTConfig, seed: int = 0, **change):
    """A transformer of random weights in our layout; change={leaf: value} fills a leaf (dots as
    double underscores)."""
    leaves = random_model.random_leaves("dit", cfg, seed)
    for name, value in change.items():
        leaves[name.replace("__", ".")][...] = value
    return orbax.save(path, leaves, kind="dit", cfg=cfg, source={"name": "test"})


@pytest.fixture(scope="session")
def i2v_model(model, tmp_path_factory):
    """Two image-to-video experts over the same VAE and text encoder: 8 latent channels + 4 mask + 8
    image latents."""
    folder = tmp_path_factory.mktemp("i2v") / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")
    cfg = dataclasses.replace(random_model.DIT, in_channels=20, attention="dense", layers=2)
    dit_folder(folder / "dit_high", cfg, 1)
    dit_folder(folder / "dit_low", cfg, 2)
    (folder / "model.json").write_text(json.dumps({**random_model.FACTS, "name": "i2v-test"}))
    return folder


def photograph(height=48, width=80) -> np.ndarray:
    """Something like a photograph: a bright sky over dark ground, a sun, some grain. uint8 [H W
    3]"""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    sky = np.stack([0.4 + 0.4 * y, 0.6 + 0.2 * y, 0.95 - 0.1 * y], -1)
    ground = np.stack([0.25 + 0.1 * x, 0.3 + 0.05 * x, 0.15 + 0 * x], -1)
    image = np.where((y > 0.6 + 0.05 * np.sin(9 * x))[..., None], ground, sky)
    sun = np.exp(-(((x - 0.7) ** 2 + (y - 0.25) ** 2) / 0.01))[..., None]
    grain = np.random.default_rng(0).normal(0, 0.02, image.shape)
    return np.clip((image + sun * [0.6, 0.5, 0.1] + grain) * 255, 0, 255).astype(np.uint8)


# -- what comes out --------------------------------------------------------------------------------


def test_the_smallest_command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--model", str(model), "--compile_cache_dir", "none"]) == 0
    out = capsys.readouterr()
    assert out.out == "output/random_0_0.mp4\n"
    assert (
        f'no prompt was given, this one is drawn: --prompt "{random_model.PROMPT}" --seed 0'
        in out.err
    )
    assert read_video(tmp_path / "output/random_0_0.mp4").shape == (33, 64, 64, 3)
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
def test_same_seed_same_bits_and_samples_do_not_depend_on_the_batch(pipe):
    one = pipe("a red circle", seed=3, **SMALL)
    two = pipe("a red circle", seed=3, num_samples=2, **SMALL)
    assert one.frames.dtype == np.uint8 and one.frames.shape == (1, 5, 32, 32, 3)
    assert np.array_equal(one.latents[0], two.latents[0]) and np.array_equal(
        one.frames[0], two.frames[0]
    )
    assert not np.array_equal(two.latents[0], two.latents[1])
    assert all(
        array.flags.writeable for result in (one, two) for array in (result.latents, result.frames)
    )
    assert not np.array_equal(one.latents, pipe("a red circle", seed=4, **SMALL).latents)
    assert np.array_equal(one.latents, pipe("a red circle", key=jax.random.key(3), **SMALL).latents)


def test_nothing_is_compiled_again_for_another_prompt_seed_or_weights(pipe):
    pipe("a red circle", seed=0, **SMALL)
    before = len(pipe.programs.compiled)
    pipe("blue squares, drifting", seed=9, **SMALL)
    pipe.free()
    pipe("blue squares, drifting", seed=9, **SMALL)
    assert len(pipe.programs.compiled) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        {},
        {"sampler": "ode", "num_steps": 2},
        {"sampler": "unipc", "num_steps": 4, "guidance_scale": 3.0},
    ],
)
def test_the_loop_in_steps_is_the_loop_in_one(model, pipe, sampler):
    """Progress runs one step a call; the video must be the same to the bit."""
    steps = tdjax.load(model, stages=Stages(show=True))
    a, b = pipe("a red circle", **sampler, **SMALL), steps("a red circle", **sampler, **SMALL)
    assert np.array_equal(a.latents, b.latents)
    assert any("step 2 of" in name for name in b.timings) and not any(
        "step" in name for name in a.timings
    )


@pytest.mark.slow
def test_guidance_uses_the_negative_prompt(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")
    dit_folder(folder / "dit", dataclasses.replace(random_model.DIT, layers=1, attention="dense"))
    pipe = tdjax.load(folder)
    call = lambda **kw: (
        pipe(
            "a red circle", sampler="euler", num_steps=2, output_type="latent", **kw, **SMALL
        ).latents
    )
    plain = call(guidance_scale=1.0)
    assert np.abs(plain - call(guidance_scale=4.0)).max() > 1e-4
    same = call(
        guidance_scale=4.0, negative_prompt="a red circle"
    )  # both halves alike: guidance changes nothing
    assert np.abs(plain - same).max() < 1e-4
    assert np.abs(same - call(guidance_scale=4.0, negative_prompt="green")).max() > 1e-5


@pytest.mark.slow
def test_embeddings_saved_and_given(pipe, model, tmp_path, capsys):
    path = tmp_path / "e.safetensors"
    assert (
        generate.main(
            [
                "--model",
                str(model),
                "--prompt",
                "a red circle",
                "--save_prompt_embeds",
                str(path),
                *FLAGS,
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{path}\n"
    out = tmp_path / "v.npy"
    argv = [
        "--model",
        str(model),
        "--prompt_embeds",
        str(path),
        "--save_path",
        str(out),
        "--seed",
        "3",
        *FLAGS,
    ]
    assert generate.main(argv) == 0
    assert np.array_equal(np.load(out), pipe("a red circle", seed=3, **SMALL).frames[0])


@pytest.mark.slow
def test_start_noise_can_be_given(pipe):
    size = VideoSize(frames=5, height=32, width=32)
    noise = np.asarray(
        compilation.start_noise(
            jax.random.fold_in(jax.random.key(0), 0), 1, (1, *size.latent_grid, 8)
        )
    )[0]
    kwargs = {"sampler": "ode", "num_steps": 2, "output_type": "latent", **SMALL}
    assert np.array_equal(
        pipe("a", seed=0, **kwargs).latents, pipe("a", seed=5, latents=noise, **kwargs).latents
    )


@pytest.mark.slow
def test_formats(pipe, tmp_path):
    result = pipe("a red circle", **SMALL)
    for name in ("v.mp4", "v.gif", "v.npy", "v.safetensors", "v.mkv"):
        assert result.save(tmp_path / name, metadata=False).exists()
    assert np.array_equal(np.load(tmp_path / "v.npy"), result.frames[0])
    assert "<video" in result._repr_html_() and "seed 0" in repr(result)
    assert result.frame(2).size == (32, 32)
    assert pipe("a", output_type="float", **SMALL).frames.max() <= 1.0
    with pytest.raises(UsageError, match="no frames"):
        pipe("a", output_type="latent", **SMALL).pixels()


# -- image to video, experts -----------------------------------------------------------------------


@pytest.mark.slow
def test_image_to_video_with_two_experts(i2v_model):
    pipe = tdjax.load(i2v_model)
    assert pipe.task == "i2v" and pipe.sampler.sigma_max == 200.0
    call = lambda image, **kw: pipe("a", image=image, output_type="latent", **kw, **SMALL).latents
    image = photograph()
    four = call(image)
    assert np.isfinite(four).all()
    assert np.abs(four - call(image[::-1].copy())).max() > 1e-3  # the image matters
    assert np.abs(four - call(image, fit="pad")).max() > 1e-4
    assert np.abs(four - call(image, boundary=0.5)).max() > 1e-4  # so does the low-noise expert
    lean = tdjax.load(i2v_model, low_memory=True)
    assert np.array_equal(four, lean("a", image=image, output_type="latent", **SMALL).latents)
    assert all(each.module is None for each in lean.components.values())


@pytest.mark.slow
def test_two_steps_never_reach_the_low_noise_expert(i2v_model, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    argv = [
        "--model",
        str(i2v_model),
        "--image_path",
        str(tmp_path / "photo.png"),
        "--num_steps",
        "2",
        "--prompt",
        "a",
        *FLAGS,
    ]
    assert generate.main([*argv, "--save_path", str(tmp_path / "v.mp4"), "--timings"]) == 0
    err = capsys.readouterr().err
    assert (
        "low-noise expert is not used" in err and "load dit_low" not in err and "vae encode" in err
    )


def test_adaptive_size_follows_the_image(i2v_model):
    pipe = tdjax.load(i2v_model)
    size = pipe.request("a", image=photograph(40, 80), fit="adaptive", width=64, height=64).size
    assert (size.width, size.height) == (96, 48)


# -- devices and memory ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "sp=2", "fsdp=2"])
def test_a_mesh_gives_the_same_video(model, pipe, mesh):
    call = {"attention": "dense"}
    one, many = tdjax.load(model, **call), tdjax.load(model, mesh=mesh, **call)
    kwargs = {"output_type": "latent", "num_steps": 2, **SMALL}
    assert np.allclose(
        one("a red circle", **kwargs).latents, many("a red circle", **kwargs).latents, atol=1e-5
    )


def test_mesh_messages(model):
    with pytest.raises(UsageError, match=r"legal sizes of sp .*: 1, 2$"):
        tdjax.load(model, mesh="sp=3")
    with pytest.raises(UsageError, match="AXIS=SIZE"):
        tdjax.load(model, mesh="four")
    cfg = dataclasses.replace(random_model.DIT, heads=8, dim=128)
    from tdjax.parallel.mesh import make_mesh

    with pytest.raises(UsageError, match="needs 8 devices"):
        make_mesh("tp=8", cfg)


def test_dry_run_loads_nothing(model, capsys, monkeypatch):
    monkeypatch.setattr(Component, "load", lambda self: pytest.fail("weights were loaded"))
    assert generate.main(["--model", str(model), "--dry_run", *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "vae decode" in out and "peak" in out and "5 frames" in out
    assert generate.main(["--model", str(model), "--dry_run", "--json", *FLAGS]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * 4 * 4


@pytest.mark.slow
def test_warmup_compiles_what_the_call_runs(model):
    pipe = tdjax.load(model)
    pipe.warmup(**SMALL)
    before = len(pipe.programs.compiled)
    pipe("a red circle", **SMALL)
    assert (
        len(pipe.programs.compiled) == before == 7
    )  # text; start noise and the loop, whole and in single steps; decoder: first and later


@pytest.mark.slow
def test_warmup_of_two_experts_and_an_image(i2v_model):
    pipe = tdjax.load(i2v_model)
    pipe.warmup(num_steps=2, **SMALL)
    before = len(pipe.programs.compiled)
    pipe("a red circle", image=np.full((32, 32, 3), 99, np.uint8), num_steps=2, **SMALL)
    assert len(pipe.programs.compiled) == before


@pytest.mark.slow
def test_another_schedule_or_seed_compiles_nothing(model):
    pipe = tdjax.load(model)
    before = None
    for change in (
        {},
        {"sigma_max": 100.0},
        {"boundary": 0.5},
        {"mid_t": (1.45, 1.3, 0.9)},
        {"seed": 7},
    ):
        pipe("a red circle", output_type="latent", **change, **SMALL)
        before = before or set(pipe.programs.compiled)
        assert set(pipe.programs.compiled) == before


def test_the_reference_needs_no_kernel_in_any_part(model):
    """--attention_impl reference is for GPUs without our kernels: the VAE follows it."""
    pipe = tdjax.load(model, impl="reference")
    assert pipe.config.impl == pipe.components["vae"].config.impl == "reference"
    assert tdjax.load(model).components["vae"].config.impl == "auto"


@pytest.mark.slow
def test_a_plan_needs_no_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    argv = ["--model", "turbowan2.2-i2v-a14b-720p-quant", "--dry_run", "--offline"]
    assert generate.main(argv) == 0
    out = capsys.readouterr()
    assert "is not downloaded" in out.err
    assert "denoise (low noise)" in out.out and "1280x720, 81 frames: 75600 tokens" in out.out


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_defaults_to_its_own_size(name):
    pipe = plan_pipeline(name, PipelineOptions())
    image = {"image": np.zeros((90, 160, 3), np.uint8)} if pipe.task == "i2v" else {}
    size = pipe.request("a", **image).size
    assert (size.width, size.height, size.frames) == {
        "480p": (832, 480, 81),
        "720p": (1280, 720, 81),
    }[PRESETS[name].resolution]


@pytest.mark.slow
def test_quantised_at_load_and_back(model, pipe, tmp_path, capsys):
    call = {"output_type": "latent", "num_steps": 2, **SMALL}
    exact, int8 = pipe("a red circle", **call).latents, tdjax.load(model, quant="int8")
    far = lambda pipe: (
        np.linalg.norm(pipe("a red circle", **call).latents - exact) / np.linalg.norm(exact)
    )
    assert 1e-5 < far(int8) < 0.05
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")
    orbax.save(folder / "dit", int8.components["dit"].load(), kind="dit", cfg=int8.config)
    back = tdjax.load(folder, quant="none")
    assert "dequantised at load" in capsys.readouterr().err and back.config.linear == "float"
    assert 1e-5 < far(back) < 0.05
    tdjax.load(folder)
    assert "running as W8A8 (`quant` none dequantises at load)" in capsys.readouterr().err
    channel = tdjax.load(folder, quant="int8_channel")
    assert "int8 weights in the blocks, made int8_channel at load" in capsys.readouterr().err
    assert 1e-5 < far(channel) < 0.05


# -- files of many prompts -------------------------------------------------------------------------


@pytest.mark.slow
def test_prompt_file_resumes(model, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,seed,out\na red circle,1,a.npy\na blue square,2,b.npy\n")
    monkeypatch.chdir(tmp_path)
    argv = ["--model", str(model), "--prompt_file", str(rows), *FLAGS]
    assert generate.main(argv) == 0
    assert capsys.readouterr().out == "a.npy\nb.npy\n"
    first = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").unlink()
    assert generate.main(argv) == 0
    out = capsys.readouterr()
    assert out.out == "b.npy\n" and "a.npy is there already: skipped" in out.err
    assert (tmp_path / "b.npy").read_bytes() == first


@pytest.mark.slow
def test_samples_are_files_and_grid_is_one(model, tmp_path, capsys):
    argv = [
        "--model",
        str(model),
        "--num_samples",
        "2",
        "--save_path",
        str(tmp_path / "v.npy"),
        *FLAGS,
    ]
    assert generate.main(argv) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "v_0.npy"), str(tmp_path / "v_1.npy")]
    assert generate.main([*argv[: -len(FLAGS) - 1], str(tmp_path / "g.npy"), "--grid", *FLAGS]) == 0
    assert np.load(tmp_path / "g.npy").shape == (5, 32, 64, 3)


@pytest.mark.slow
def test_serving_keeps_weights_and_survives_a_bad_line(model, tmp_path, monkeypatch, capsys):
    lines = (
        "a red circle\n:set num_steps 9\n:set seed abc\n:sett x\n:set num_steps 2\na blue"
        " square\n:quit\nnever\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--model", str(model), "--serve", *FLAGS]) == 0
    out = capsys.readouterr()
    assert out.out.split() == ["output/random_0_0.mp4", "output/random_0_0-2.mp4"]
    assert "num_steps is 9" in out.err


@pytest.mark.slow
def test_rows_of_one_prompt_are_different_files(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("红色的圆\n蓝色的圆\n红色的圆\n")
    assert (
        generate.main(["--model", str(model), "--prompt_file", "p.txt", "--format", "npy", *FLAGS])
        == 0
    )
    assert len(set(capsys.readouterr().out.split())) == 3
    (tmp_path / "same.csv").write_text("prompt,out\na,v.npy\nb,v.npy\n")
    assert generate.main(["--model", str(model), "--prompt_file", "same.csv", *FLAGS]) == 2
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
    assert generate.main(["--model", str(model), "--prompt", "a", *argv, *FLAGS]) == 2
    assert "error:" in capsys.readouterr().err
    assert all(
        (tmp_path / name).read_text() == "mine"
        for name in ("t_0.npy", "s_1.npy", "o.npy.json", "here")
    )


# -- what goes wrong -------------------------------------------------------------------------------


def failing(model, tmp_path, capsys, code, *argv):
    assert (
        generate.main(
            [
                "--model",
                str(model),
                "--save_path",
                str(tmp_path / "v.mp4"),
                "--prompt",
                "a",
                *FLAGS,
                *argv,
            ]
        )
        == code
    )
    assert not list(tmp_path.glob("v*")) and not list(tmp_path.glob(".v*"))
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


def test_task_and_image_must_agree(model, i2v_model, tmp_path, capsys):
    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.fromarray(photograph()).save(photo)
    message = failing(model, tmp_path, capsys, 2, "--image_path", str(photo))
    assert "16 channels" in message and "36" in message
    assert "need an image" in failing(i2v_model, tmp_path, capsys, 2)
    assert "these are t2v weights" in failing(model, tmp_path, capsys, 2, "--task", "i2v")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert "bad.png" in failing(
        i2v_model, tmp_path, capsys, 2, "--image_path", str(tmp_path / "bad.png")
    )


def test_sla_needs_its_projection(model, tmp_path, capsys):
    folder = tmp_path / "dense"
    dit_folder(folder, dataclasses.replace(random_model.DIT, attention="dense", layers=1))
    argv = [
        "--dit_path",
        str(folder),
        "--vae_path",
        str(model / "vae"),
        "--text_encoder_path",
        str(model / "text"),
    ]
    argv += ["--tokenizer_path", str(model / "tokenizer.json"), "--attention_type", "sla"]
    message = failing(model, tmp_path, capsys, 3, *argv)
    assert "proj_l" in message and "--attention_type original" in message and "--merge" in message


def test_parts_of_another_kind(model, tmp_path, capsys):
    assert "is a umT5 text encoder, not a video VAE" in failing(
        model, tmp_path, capsys, 3, "--vae_path", str(model / "text")
    )
    cfg = dataclasses.replace(random_model.DIT, in_channels=16, out_channels=16, layers=1)
    dit_folder(tmp_path / "wide", cfg)
    message = failing(model, tmp_path, capsys, 3, "--dit_path", str(tmp_path / "wide"))
    assert "8 latent channels, the transformer 16" in message and "48" in message
    cfg = dataclasses.replace(random_model.DIT, text_dim=48, layers=1)
    dit_folder(tmp_path / "text48", cfg)
    assert "vectors of 64, the transformer takes 48" in failing(
        model, tmp_path, capsys, 3, "--dit_path", str(tmp_path / "text48")
    )


def test_official_model_name_is_checked(model, tmp_path, capsys):
    argv = [
        "--model",
        "Wan2.1-1.3B",
        "--dit_path",
        str(model / "dit"),
        "--vae_path",
        str(model / "vae"),
    ]
    argv += [
        "--text_encoder_path",
        str(model / "text"),
        "--tokenizer_path",
        str(model / "tokenizer.json"),
    ]
    assert generate.main([*argv, *FLAGS]) == 2
    assert "of width 128" in capsys.readouterr().err


@pytest.mark.slow
def test_not_finite_names_the_step(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")

    dit_folder(
        folder / "dit", dataclasses.replace(random_model.DIT, layers=1), head__proj__bias=np.nan
    )
    message = failing(folder, tmp_path, capsys, 5)
    assert "step 1 of 4" in message and "--attention_type original" in message
    assert (
        generate.main(
            [
                "--model",
                str(folder),
                "--prompt",
                "a",
                "--save_path",
                str(tmp_path / "n.npy"),
                "--check",
                "none",
                *FLAGS,
            ]
        )
        == 0
    )
    with pytest.raises(NotFinite):
        tdjax.load(folder)("a", **SMALL)


@pytest.mark.slow
def test_the_decoder_is_checked_too(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "vae")
    leaves = random_model.random_leaves("vae", random_model.VAE, 0)
    leaves["decoder.conv_out.bias"][...] = np.nan
    orbax.save(folder / "vae", leaves, kind="vae", cfg=random_model.VAE)
    assert "VAE decoder gave NaN" in failing(folder, tmp_path, capsys, 5)


@pytest.mark.slow
def test_weights_are_freed_after_a_failure(model, monkeypatch):
    pipe = tdjax.load(model, low_memory=True)
    stop = lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
    monkeypatch.setattr(pipe.vae_coding, "run", stop)
    with pytest.raises(RuntimeError, match="stop"):
        pipe("a red circle", **SMALL)
    assert all(each.module is None for each in pipe.components.values())


def test_a_second_call_traces_nothing(pipe):
    """A warm call is the work itself: nothing is traced or compiled on the way."""
    pipe("a red circle", seed=1, **SMALL)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "eval_shape", lambda *_, **__: pytest.fail("shapes were traced again"))
        pipe("a blue square", seed=2, **SMALL)


@pytest.mark.slow
def test_the_callers_noise_survives(pipe):
    size = VideoSize(frames=5, height=32, width=32)
    noise = jax.random.normal(jax.random.key(1), (1, *size.latent_grid, 8))
    pipe(
        "a",
        latents=noise,
        sampler="euler",
        num_steps=2,
        guidance_scale=1.0,
        num_samples=2,
        output_type="latent",
        **SMALL,
    )
    assert np.isfinite(np.asarray(noise)).all()


def exhausted(*args, **kwargs):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9999 bytes."
    )


@pytest.mark.slow
def test_out_of_memory_names_the_stage(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Component, "load", exhausted)
    message = failing(model, tmp_path, capsys, 4)
    assert "stage 'load text'" in message and "estimated need" in message
    assert message.index("low_memory") < message.index("int8") < message.index("480p")
    with pytest.raises(OutOfMemory):
        tdjax.load(model)("a", **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "label", "stage"),
    [("text", "load text", "text"), ("dit", "load dit", "dit"), ("vae", "load vae", "vae decode")],
)
def test_the_need_told_is_that_of_the_stage_which_failed(model, monkeypatch, name, label, stage):
    """Whatever the stage is called on the screen: "load dit" is the transformer's, though no row of
    the plan has such a name."""
    pipe = tdjax.load(model, prompt_cache=False)
    plan = pipe.plan(pipe.request("a", **SMALL))
    sizes = [plan_stage.total for plan_stage in plan]
    assert len(set(sizes)) == len(sizes)
    told = []
    tell = lambda label, row, limit: told.append((label, row)) or OutOfMemory("told")
    monkeypatch.setattr(memory, "out_of_memory", tell)
    monkeypatch.setattr(pipe.components[name], "load", exhausted)
    with pytest.raises(OutOfMemory, match="told"):
        pipe("a red circle", **SMALL)
    assert told == [(label, plan.of(stage))]


@pytest.mark.slow
def test_a_program_too_large_to_compile_names_its_stage(model, monkeypatch):
    pipe = tdjax.load(model, prompt_cache=False, low_memory=True, text_encoder_device="device")
    monkeypatch.setattr(compilation, "decode_first", exhausted)
    with pytest.raises(OutOfMemory, match="stage 'compile vae decode'"):
        pipe("a red circle", **SMALL)


@pytest.mark.slow
def test_a_call_plans_once(model, i2v_model, monkeypatch):
    made, plan = [], memory.make_plan
    monkeypatch.setattr(memory, "make_plan", lambda *a, **kw: made.append(1) or plan(*a, **kw))
    call = {"num_steps": 1, "num_samples": 2, **SMALL}
    tdjax.load(model)("a red circle", **call)
    tdjax.load(model, low_memory=True)("a red circle", **call)
    image = np.full((32, 32, 3), 99, np.uint8)
    tdjax.load(i2v_model, low_memory=True)("a red circle", image=image, **call)
    assert len(made) == 3


@pytest.mark.slow
def test_interrupt_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tdjax.media.video.encode", interrupted)
    assert "nothing was left half-written" in failing(model, tmp_path, capsys, 130)


@pytest.mark.slow
def test_compile_cache_that_cannot_be_written(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = ["--model", str(model), "--prompt", "a", "--save_path", str(tmp_path / "v.npy"), *FLAGS]
    argv[argv.index("none")] = str(tmp_path / "file" / "cache")
    assert generate.main(argv) == 0
    err = capsys.readouterr().err
    assert "not writable" in err and "--compile_cache_dir" in err and str(tmp_path / "file") in err


def test_python_arguments(pipe):
    with pytest.raises(UsageError, match="did you mean 'num_steps'"):
        pipe("a", nun_steps=3)
    with pytest.raises(UsageError, match="guidance built in"):
        pipe("a", guidance_scale=5.0)
    with pytest.raises(UsageError, match=r"latents have shape \(1, 2\)"):
        pipe("a", latents=np.zeros((1, 2)))
    with pytest.raises(UsageError, match="prompt_embeds have shape"):
        pipe("a", prompt_embeds=np.zeros((1, 3, 64)))
    with pytest.raises(UsageError, match="no prompt"):
        pipe()
    for seed in (-1, 2**32, "3"):
        with pytest.raises(UsageError, match="seed is"):
            pipe("a", seed=seed)
    with pytest.raises(UsageError, match="key is 3"):
        pipe("a", key=3)
    with pytest.raises(UsageError, match="NaN"):
        pipe("a", latents=np.full((1, 2, 4, 4, 8), np.nan), **SMALL)
    with pytest.raises(UsageError, match="output_type is 'pil'"):
        pipe("a", output_type="pil")
    assert (
        pipe.request("a", num_inference_steps=2, num_videos_per_prompt=3, **SMALL).sampler.num_steps
        == 2
    )


def test_load_arguments(model, tmp_path):
    with pytest.raises(UsageError, match="cuDNN attention runs on NVIDIA GPUs"):
        tdjax.load(model, impl="cudnn")
    with pytest.raises(UsageError, match="Triton kernels run on NVIDIA GPUs"):
        tdjax.load(model, impl="triton")
    with pytest.raises(UsageError, match="attention is 'spares'"):
        tdjax.load(model, attention="spares")
    with pytest.raises(UsageError, match="allowed: auto, none, int8, int8_channel, fp8"):
        tdjax.load(model, quant="int4")
    with pytest.raises(CheckpointError):
        tdjax.load(tmp_path / "nowhere.pth")


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


def test_load_refuses_what_it_does_not_know(model):
    with pytest.raises(UsageError, match="vae_dtype is 'float64'"):
        tdjax.load(model, vae_dtype="float64")
    with pytest.raises(UsageError, match="did you mean 'tokenizer_path'"):
        tdjax.load(model, tokeniser_path="x")
    with pytest.raises(UsageError, match="8192"):
        tdjax.load(model).request("a", width=16000, height=16000)
