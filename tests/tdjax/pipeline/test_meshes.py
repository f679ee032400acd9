"""Guided steps in halves, and several videos at a time: those of one device, up to rounding."""

import math
import re

import jax
import numpy as np
import pytest
from random_model import SMALL, photograph
from tolerances import assert_close

import tdjax
from tdjax.errors import Cancelled, NotFinite
from tdjax.progress import Stages

LATENT = {"output_type": "latent", **SMALL}
FEW = {"num_steps": 2}
ODE = {"sampler": "ode", **FEW}
GUIDED = {
    "sampler": "unipc",
    "num_steps": 3,
    "guidance_scale": 3.0,
    "negative_prompt": "a gray square",
}
PROMPTS = ["a red circle", "blue squares, drifting"]
EXCHANGE = re.compile(r"= \(?(\w+)\[([\d,]*)\].*? (all-[\w-]+|collective-permute|reduce-scatter)\(")


@pytest.fixture(scope="module")
def one(dense_model):
    """A pipeline on one device."""
    return tdjax.load(dense_model)


@pytest.fixture(scope="module")
def two(dense_model):
    """A pipeline of two copies."""
    return tdjax.load(dense_model, mesh="dp=2")


@pytest.fixture(scope="module")
def halves(dense_model):
    """A pipeline of two halves of a guided step."""
    return tdjax.load(dense_model, mesh="cfg=2")


@pytest.fixture(scope="module")
def of_8_bits(dense_model):
    """Pipelines of int8 layers: on one device, and of two copies."""
    return tdjax.load(dense_model, quant="int8"), tdjax.load(dense_model, mesh="dp=2", quant="int8")


@pytest.fixture(scope="module")
def experts(i2v_model):
    """A pipeline of two image-to-video experts on one device."""
    return tdjax.load(i2v_model)


def compare(many, one, prompt, frames=False, **call):
    """Latents, frames and the order of both. frames: False for the latents alone: the decoder reads
    them from the host, and knows of its mesh how many devices there are."""
    kind = "float" if frames else "latent"
    made, alone = (pipe(prompt, output_type=kind, **call, **SMALL) for pipe in (many, one))
    assert_close(made.latents, alone.latents, "float32", "latents")
    if frames:
        assert_close(made.frames, alone.frames, "vae", "frames")
    assert made.seed == alone.seed and made.metadata["prompts"] == alone.metadata["prompts"]
    return made


def idle(result) -> list[str]:
    """What was told of devices that have nothing of their own to do."""
    return [line for line in result.warnings if "of `mesh`" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["cfg=2", "cfg=2,sp=2", "cfg=2,tp=2", "cfg=2,fsdp=2", "dp=2,cfg=2"]
)
def test_guided_steps_in_halves(dense_model, one, halves, mesh):
    """Also of another prompt, for which nothing is compiled."""
    many = halves if mesh == "cfg=2" else tdjax.load(dense_model, mesh=mesh)
    made = compare(many, one, PROMPTS, seed=[1, 2], **GUIDED)
    assert not idle(made)
    before = set(many.programs.compiled)
    compare(many, one, "a green triangle", seed=3, **GUIDED)
    assert set(many.programs.compiled) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "frames", "call"),
    [("dp=2,sp=2", True, FEW), ("dp=2,tp=2", False, ODE), ("dp=4", False, GUIDED)],
)
def test_several_videos_at_a_time(dense_model, one, mesh, frames, call):
    """Two prompts of two samples, each with its seed."""
    many = tdjax.load(dense_model, mesh=mesh)
    made = compare(many, one, PROMPTS, frames, seed=[1, 2], num_samples=2, **call)
    assert len(made) == 4 and not idle(made)
    rows = [name for name in made.timings if name.startswith("denoise")]
    assert rows == ["denoise"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, call", [("dp=2", FEW), ("dp=2,tp=2", FEW), ("dp=2", GUIDED)])
def test_tiles_of_8_bits_are_those_of_a_video_alone(dense_model, of_8_bits, mesh, call):
    """A scale of 128 tokens is no other video's; a last bit may move a value over an edge."""
    call = {**call, "seed": [1, 2], **LATENT}
    one, two = of_8_bits
    many = two if mesh == "dp=2" else tdjax.load(dense_model, mesh=mesh, quant="int8")
    made, alone = (pipe(PROMPTS, **call) for pipe in (many, one))
    for many, one in zip(made.latents, alone.latents, strict=True):
        assert np.linalg.norm(many - one) < 1e-2 * np.linalg.norm(one)


@pytest.mark.slow
def test_a_last_group_that_is_not_full(two, one):
    """Three videos: two, and one beside a copy of itself. Nothing is compiled for it."""
    compare(two, one, PROMPTS[0], num_samples=2, **FEW)
    before = set(two.programs.compiled)
    made = compare(two, one, PROMPTS[0], num_samples=3, seed=5, **FEW)
    assert len(made) == 3 and set(two.programs.compiled) == before
    lone = compare(two, one, PROMPTS[1], seed=6, **FEW)
    assert set(two.programs.compiled) == before
    (line,) = idle(lone)
    assert line.startswith("dp=2 of `mesh` has no effect")


@pytest.mark.slow
def test_warmup_compiles_what_several_videos_run(dense_model):
    pipe = tdjax.load(dense_model, mesh="dp=2")
    pipe.warmup(**FEW, **SMALL)
    before = set(pipe.programs.compiled)
    pipe(PROMPTS, **FEW, **SMALL)
    pipe(PROMPTS, **FEW, **SMALL, on_step=lambda *_: None)
    assert set(pipe.programs.compiled) == before


@pytest.mark.slow
def test_noise_embeddings_and_keys_that_were_given(two, one):
    noise = np.random.default_rng(0).normal(size=one.latent_shape(one.request("a", **SMALL)))
    compare(two, one, PROMPTS, latents=noise.astype(np.float32), **FEW)
    compare(two, one, None, prompt_embeds=one.embed(PROMPTS), num_samples=2, **FEW)
    compare(two, one, PROMPTS[0], key=jax.random.key(3, impl="rbg"), num_samples=2, **FEW)


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_two_experts_and_an_image(i2v_model, experts, low_memory):
    many = tdjax.load(i2v_model, mesh="dp=2,cfg=2", low_memory=low_memory)
    image = photograph()
    compare(many, experts, PROMPTS[0], image=image, num_samples=3)
    compare(many, experts, PROMPTS, image=image, boundary=0.9, **GUIDED)
    assert low_memory == all(each.module is None for each in many.components.values())


@pytest.mark.slow
def test_halves_exchange_the_velocity_alone(one, halves):
    """Keys and values, the stream and the latents stay; each half sends what it predicts."""
    found = exchanges(halves, "denoise_guided", **GUIDED)
    shape = one.latent_shape(one.request("a", **SMALL))
    kinds, sizes = zip(*found, strict=True)
    assert len({*kinds}) == 1 and max(sizes) <= 2 * math.prod(shape)


@pytest.mark.slow
def test_copies_exchange_nothing_but_whether_all_is_well(two):
    found = exchanges(two, "denoise", **FEW)
    assert all(size == 1 for _, size in found), found
    assert all(size == 1 for _, size in exchanges(two, "denoise_guided", **GUIDED))


def exchanges(pipe, name: str, **call) -> list[tuple[str, int]]:
    """(kind, values) of each exchange in the programs of the loop."""
    pipe.warmup(**call, **LATENT)
    programs = [run for key, run in pipe.programs.compiled.items() if key[0].__name__ == name]
    text = "\n".join(program.as_text() for program in programs)
    assert text
    return [
        (kind, math.prod(int(n) for n in shape.split(",") if n))
        for _, shape, kind in EXCHANGE.findall(text)
    ]


# -- what is told ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_is_told_once_for_all_that_are_made_together(two):
    steps, chunks, previews = [], [], []
    made = two(
        PROMPTS[0],
        num_samples=3,
        on_step=lambda *told: steps.append(told),
        on_frames=lambda index, chunk: chunks.append(index),
        on_preview=lambda step, frames: previews.append((step, frames.copy())),
        **FEW,
        **SMALL,
    )
    assert steps == 2 * [(1, 2), (2, 2)]
    assert chunks == [0, 0, 1, 1, 2, 2]
    assert [step for step, _ in previews] == [1, 2, 1, 2]
    for (_, frames), index in ((previews[1], 0), (previews[3], 2)):  # the first of its group
        assert np.abs(frames.astype(int) - made.frames[index]).max() <= 1
    with pytest.raises(Cancelled, match="after step 1 of 2"):
        two(PROMPTS, on_step=lambda *_: False, **FEW, **SMALL)


@pytest.mark.slow
def test_steps_are_timed_for_the_group(dense_model):
    shown = tdjax.load(dense_model, mesh="dp=2", stages=Stages(show=True))
    made = shown(PROMPTS, **FEW, **LATENT)
    assert [name for name in made.timings if "step" in name] == [
        "denoise: step 1 of 2",
        "denoise: step 2 of 2",
    ]


@pytest.mark.slow
def test_a_bad_step_of_one_video_is_named(dense_model, two):
    """Its embeddings hold NaN after the text encoder: the first video of the group is well."""
    bad = two.embed(PROMPTS)
    text = np.concatenate([bad[:1], np.full_like(bad[:1], 3e38)])
    with pytest.raises(NotFinite, match="step 1 of 2"):
        two(prompt_embeds=text, **FEW, **LATENT)
    made = two(prompt_embeds=text, check="none", **FEW, **LATENT)
    assert np.isfinite(made.latents[0]).all() and not np.isfinite(made.latents[1]).all()


@pytest.mark.slow
def test_an_axis_without_guidance_is_told(dense_model, one):
    many = tdjax.load(dense_model, mesh="dp=2,cfg=2")
    made = compare(many, one, PROMPTS, **FEW)
    (line,) = idle(made)
    assert line.startswith("cfg=2 of `mesh` has no effect: distilled weights")
