"""The whole path on tiny models: bits, seeds, experts, images, devices, and what is compiled."""

import jax
import numpy as np
import pytest
from random_model import SMALL, photograph

import tdjax
from tdjax.errors import UsageError
from tdjax.pipeline import memory

LATENT = {"output_type": "latent", **SMALL}


@pytest.fixture(scope="module")
def pipe(model):
    return tdjax.load(model, prompt_cache=False)  # so that the text encoder runs in every test


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
    assert not np.array_equal(one.latents, pipe("a red circle", seed=4, **LATENT).latents)
    keyed = pipe("a red circle", key=jax.random.key(3), **LATENT)
    assert np.array_equal(one.latents, keyed.latents)


# -- what is compiled ------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_compiled_again_for_another_prompt_seed_or_weights(pipe):
    pipe("a red circle", seed=0, **SMALL)
    before = len(pipe.programs.compiled)
    pipe("blue squares, drifting", seed=9, **SMALL)
    pipe.free()
    pipe("blue squares, drifting", seed=9, **SMALL)
    assert len(pipe.programs.compiled) == before


@pytest.mark.slow
def test_another_schedule_or_seed_compiles_nothing(pipe):
    pipe("a red circle", **LATENT)
    before = set(pipe.programs.compiled)
    for change in (
        {"sigma_max": 100.0},
        {"boundary": 0.5},
        {"mid_t": (1.45, 1.3, 0.9)},
        {"seed": 7},
    ):
        pipe("a red circle", **change, **LATENT)
        assert set(pipe.programs.compiled) == before


@pytest.mark.slow
def test_a_second_call_traces_nothing(pipe, caplog):
    """A warm call is the work itself: nothing is traced or compiled on the way."""
    pipe("a red circle", seed=1, **SMALL)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "eval_shape", lambda *_, **__: pytest.fail("shapes were traced again"))
        pipe("a blue square", seed=2, **SMALL)
    assert "XLA compilation" not in caplog.text


@pytest.mark.slow
def test_warmup_compiles_what_the_call_runs(model):
    pipe = tdjax.load(model)
    pipe.warmup(**SMALL)
    before = len(pipe.programs.compiled)
    pipe("a red circle", **SMALL)
    assert (
        len(pipe.programs.compiled) == before == 7
    )  # text; start noise and the loop, whole and in single steps; decoder: first and later


# -- devices and memory ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(model):
    """Latents of one device."""
    return tdjax.load(model, attention="dense")("a red circle", **LATENT).latents


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "sp=2", "fsdp=2"])
def test_a_mesh_gives_the_same_video(model, dense, mesh):
    many = tdjax.load(model, mesh=mesh, attention="dense")
    assert np.allclose(dense, many("a red circle", **LATENT).latents, atol=1e-5)


@pytest.mark.slow
def test_weights_are_freed_after_a_failure(model, monkeypatch):
    pipe = tdjax.load(model, low_memory=True)
    stop = lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
    monkeypatch.setattr(pipe.vae_coding, "run", stop)
    with pytest.raises(RuntimeError, match="stop"):
        pipe("a red circle", **SMALL)
    assert all(each.module is None for each in pipe.components.values())


@pytest.mark.slow
def test_what_stayed_of_a_smaller_call_goes_before_one_that_needs_its_place(
    model, tmp_path, monkeypatch
):
    """A prompt from the cache needs no text encoder, and decoding no transformer: none is beside
    the stage that runs."""
    pipe = tdjax.load(model, cache_dir=tmp_path, transformer_device="device")
    limit, seen = None, []
    monkeypatch.setattr(memory, "memory_limit", lambda: limit)
    for stage in (pipe.text_encoding, pipe.denoising, pipe.vae_coding):
        ready = lambda *args, _ready=stage.ready: (_ready(*args), seen.append(there(pipe)))[0]
        monkeypatch.setattr(stage, "ready", ready)
    whole = pipe("a red circle", **SMALL)
    assert seen[-1] == there(pipe) == {"text", "dit", "vae"}
    seen.clear()
    limit = 2**20
    assert np.array_equal(pipe("a red circle", **SMALL).latents, whole.latents)
    assert seen == [{"dit"}, {"vae"}] and not there(pipe)
    limit = None
    pipe("a red circle", **SMALL)
    assert there(pipe) == {"dit", "vae"}
    limit = 2**20
    seen.clear()
    pipe.decode(whole)
    assert seen == [{"vae"}] and not there(pipe)


def there(pipe) -> set[str]:
    """The components whose weights are on the device."""
    return {name for name, each in pipe.components.items() if each.module is not None}


@pytest.mark.slow
def test_a_call_plans_once(model, i2v_model, monkeypatch):
    made, plan = [], memory.make_plan
    monkeypatch.setattr(memory, "make_plan", lambda *a, **kw: made.append(1) or plan(*a, **kw))
    tdjax.load(model)("a red circle", num_samples=2, **SMALL)
    image = np.full((32, 32, 3), 99, np.uint8)
    tdjax.load(i2v_model, low_memory=True)("a red circle", image=image, num_samples=2, **SMALL)
    assert len(made) == 2


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


# -- image to video, experts; last, as `as_users` holds for the rest of the module -----------------


@pytest.fixture(scope="module")
def experts(i2v_model):
    return tdjax.load(i2v_model)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users")  # bits of programs are compared
def test_image_to_video_with_two_experts(i2v_model, experts):
    assert experts.task == "i2v" and experts.sampler.sigma_max == 200.0
    call = lambda image, **kw: experts("a", image=image, **kw, **LATENT).latents
    image = photograph()
    four = call(image)
    assert np.isfinite(four).all()
    assert np.abs(four - call(image[::-1].copy())).max() > 1e-3  # the image matters
    assert np.abs(four - call(image, fit="pad")).max() > 1e-4
    assert np.abs(four - call(image, boundary=0.5)).max() > 1e-4  # so does the low-noise expert
    lean = tdjax.load(i2v_model, low_memory=True)
    assert np.array_equal(four, lean("a", image=image, **LATENT).latents)
    assert all(each.module is None for each in lean.components.values())


@pytest.mark.slow
def test_warmup_of_two_experts_and_an_image(experts):
    experts.warmup(**SMALL)
    before = len(experts.programs.compiled)
    experts("a red circle", image=np.full((32, 32, 3), 99, np.uint8), **SMALL)
    assert len(experts.programs.compiled) == before
