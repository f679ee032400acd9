"""Samples of a run: what `tdjax generate` makes of the same weights, prompts and seed."""

import dataclasses

import hosts_cases
import jax
import numpy as np
import pytest
import random_model
from PIL import Image
from run_cases import TINY, fails, training_run
from tolerances import assert_close

import tdjax
from tdjax.checkpoints import orbax
from tdjax.media import video
from tdjax.presets import TEACHER_SAMPLER
from tdjax.text.embeds import save_embeds
from tdjax.train import page
from tdjax.train.shards import write_shard

PROMPTS = (
    "a large red circle moves right quickly on a gray background",
    "a small blue square moves left slowly on a black background",
    "a small white triangle stays on a navy background",
)
GRID = (2, 4, 6)  # of latents; the demo's VAE makes 5 frames of 32 x 48
SIZE = {"num_frames": 5, "width": 48, "height": 32}
# A network of the demo's latents and embeddings.
SMALL = dataclasses.replace(TINY, in_channels=8, out_channels=8, text_dim=128, text_len=32)
ALONE = ["loss.dmd_weight=0", "loss.warmup=0"]  # no critic: steps are traced and not run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards, weights, prompts, and the embedding of an empty negative prompt."""
    out, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    pipe = tdjax.load("demo", progress=False, prompt_cache=False)
    save_embeds(out / "prompts.safetensors", pipe.embed(list(PROMPTS)), list(PROMPTS))
    np.save(out / "negative.npy", pipe.embed([""])[0].astype(np.float32))
    rows = [(rng.normal(size=(*GRID, 8)), rng.normal(size=(32, 128)), "x") for _ in range(4)]
    write_shard(out / "shards" / "shard_000000.tar", rows)
    orbax.save(out / "dit", random_model.random_leaves("dit", SMALL, 1), "dit", SMALL)
    (out / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return out


def settings(data, folder, *more):
    own = ["data.frames=2", "data.batch=4", "data.per_device=none", "model.compute=float32"]
    own += [f"data.path={data / 'shards'}", f"model.weights={data / 'dit'}", "sample.model=demo"]
    own += [f"data.negative={data / 'negative.npy'}", f"sample.prompts={data / 'prompts.txt'}"]
    return [*own, "run.log_every=1", f"run.folder={folder}", "optimizer.learning_rate=1e-2", *more]


def kept(samples):
    """The arrays that samples hand to their decoder, in a list that is filled later."""
    given, decode = [], samples.pipe.decode
    samples.pipe.decode = lambda latents: given.append(latents) or decode(latents)
    return given


def generated(folder, **call):
    """Latents [n t h w c] of the prompts, as the pipeline makes them of weights in a folder."""
    pipe = tdjax.load("demo", dit_path=folder, progress=False, prompt_cache=False)
    return pipe(list(PROMPTS), output_type="latent", seed=3, **SIZE, **call).latents


@pytest.mark.slow
def test_a_student_is_seen_in_one_two_and_four_steps(data, tmp_path):
    """Over two groups of devices, where three prompts do not divide; at another time the noise is
    the same, so that with the same weights all is."""
    mesh = ["run.mesh=fsdp=2,sp=2", "sample.seed=3"]
    run = training_run("rcm-1.3b", *settings(data, tmp_path, *mesh, *ALONE))
    state, teacher, _ = run.start(resume=False)
    given = kept(run.samples)
    sheet = run.samples.make(state, teacher, 500)
    assert sheet == tmp_path / "samples" / "step_000500" / "sheet.png"
    names = [
        f"{i:03}_{w}_{n}.mp4" for i in range(3) for w in ("average", "current") for n in (1, 2, 4)
    ]
    assert sorted(path.name for path in sheet.parent.glob("*.mp4")) == names
    assert video.read_video(sheet.parent / names[0]).shape == (5, 32, 48, 3)
    for place, steps in enumerate((1, 2, 4)):
        call = {"sampler": "sde", "num_steps": steps, "mid_t": (1.5, 1.4, 1.0)[: steps - 1]}
        wanted = generated(data / "dit", **call)
        for prompt in range(3):
            for which in (0, 3):  # the average and the weights begin as one
                found = given[0][6 * prompt + which + place]
                assert_close(found, wanted[prompt], "float32", f"{prompt} {steps}")
    run.samples.make(state, teacher, 1000)
    assert given[1].tobytes() == given[0].tobytes()
    text = page.write(tmp_path, "run", {}).read_text()
    assert text.index("step_001000/sheet.png") < text.index("step_000500/sheet.png")


@pytest.mark.slow
def test_the_teacher_is_seen_once_in_all_of_its_steps(data, tmp_path):
    """Beside the student, which begins as it does."""
    own = ["sample.seed=3", "sample.num_steps=1"]
    run = training_run("rcm-1.3b", *settings(data, tmp_path, *own, *ALONE))
    state, teacher, _ = run.start(resume=False)
    given = kept(run.samples)
    sheet = run.samples.make(state, teacher, 0)
    count = TEACHER_SAMPLER.num_steps
    names = {path.name for path in sheet.parent.glob("*.mp4")}
    assert names >= {f"{i:03}_teacher_{count}.mp4" for i in range(3)} and len(names) == 9
    scale = TEACHER_SAMPLER.guidance_scale
    wanted = generated(data / "dit", sampler="unipc", num_steps=count, guidance_scale=scale)
    for prompt in range(3):  # average, current, teacher
        assert_close(given[0][3 * prompt + 2], wanted[prompt], "float32", f"{prompt}")
    later = run.samples.make(state, teacher, 1).parent
    assert len([*later.glob("*.mp4")]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["prompts.txt", "prompts.safetensors"])
def test_an_undistilled_network_is_seen_by_its_own_sampler(data, tmp_path, prompts):
    """In a run: before the first step and at the last, where the average is what is exported."""
    own = [f"sample.prompts={data / prompts}", "sample.every=2", "sample.num_steps=3"]
    own += ["run.steps=2", "sample.seed=3", "loss.ema.decay=0.5", "optimizer.warmup=0"]
    own += ["optimizer.decay=constant", "optimizer.steps=none"]
    run = training_run("fm-tiny", *settings(data, tmp_path, *own))
    given = kept(run.samples)
    run.export(run.train(resume=False))
    steps = [path.parent.name for path in sorted(tmp_path.glob("samples/*/sheet.png"))]
    assert steps == ["step_000000", "step_000002"]
    call = {"sampler": "unipc", "num_steps": 3, "guidance_scale": TEACHER_SAMPLER.guidance_scale}
    before, after = (generated(path / "dit", **call) for path in (data, tmp_path))
    for prompt in range(3):
        assert_close(given[0][2 * prompt], before[prompt], "float32", f"before {prompt}")
        assert_close(given[1][2 * prompt], after[prompt], "float32", f"after {prompt}")
    assert not np.allclose(given[1][0], given[1][1], atol=1e-2)  # the current weights are others
    assert not np.allclose(given[1][0], given[0][0], atol=1e-2)


@pytest.mark.slow
def test_samples_that_are_not_finite_do_not_end_a_run(data, tmp_path, capsys):
    run = training_run("rcm-1.3b", *settings(data, tmp_path, "sample.num_steps=1", *ALONE))
    state, teacher, _ = run.start(resume=False)
    bad = jax.tree.map(lambda x: x * np.nan, state.model)
    assert run.samples.make(dataclasses.replace(state, model=bad), teacher, 1).is_file()
    assert "samples of step 1 hold NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["sample.model="], ["sample.prompts", "without sample.model", "sample.model=demo"]),
        (["sample.prompts=no.txt"], ["no.txt does not exist"]),
        (["sample.prompts=no.safetensors"], ["no.safetensors does not exist"]),
        (["model.expert=high"], ["model.expert", "both experts"]),
        (
            ["sample.prompts=EMBEDS", "data.negative=", "loss.dropout=0"],
            ["data.negative is not given", "sample.guidance_scale=1"],
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(data, tmp_path, capsys, changes, expected):
    weights = ["model.weights="] if changes == ["sample.model="] else []
    given = [word.replace("EMBEDS", str(data / "prompts.safetensors")) for word in changes]
    err = fails(capsys, "fm-tiny", *settings(data, tmp_path, *weights, *given))
    assert all(word in err for word in expected), err


@pytest.mark.slow
def test_two_processes_show_what_one_shows(data, tmp_path):
    """Prompts encoded, sampled and decoded by both, written by the first: before the first step, at
    a step, and of the run that goes on."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    own = [f"sample.prompts={tmp_path / 'prompts.txt'}", "sample.num_steps=2", "sample.every=2"]
    own += ["run.mesh=dp=2,fsdp=2", "run.steps=2", "data.negative=", "loss.dropout=0"]
    own += ["optimizer.eps=1e-3", "optimizer.warmup=0", "optimizer.decay=constant"]
    own += ["optimizer.steps=none", "run.save_every=2", "optimizer.learning_rate=1e-3"]
    with hosts_cases.command("tdjax.train", tmp_path / "cache") as start:
        done = hosts_cases.ends(start("fm-tiny", *settings(data, tmp_path / "two", *own)))
    assert [code for code, *_ in done] == [0, 0], done
    training_run("fm-tiny", *settings(data, tmp_path / "one", *own)).train(resume=False)
    files = {
        which: sorted(path.relative_to(tmp_path / which) for path in where.rglob("*"))
        for which in ("one", "two")
        for where in [tmp_path / which / "samples"]
    }
    assert files["one"] == files["two"] and len(files["one"]) == 2 * (1 + 4 + 1)
    for name in files["one"]:
        if name.suffix == ".mp4":
            assert video.read_video(tmp_path / "two" / name).shape == (5, 32, 48, 3)
    for sheet in (name for name in files["one"] if name.suffix == ".png"):
        # Frames as they were before the video encoder, whose choices hang on a pixel.
        a, b = (np.asarray(Image.open(tmp_path / which / sheet), int) for which in ("one", "two"))
        assert a.shape == b.shape and np.abs(a - b).mean() < 0.1, sheet
        assert a.std() > 5  # it shows something
