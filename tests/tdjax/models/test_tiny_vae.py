"""The small decoder against the same convolutions in torch, from a file of its published names."""

import dataclasses

import jax
import numpy as np
import pytest
import random_model
from arrays import put
from tolerances import assert_close

import tdjax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.config import TinyVAEConfig
from tdjax.errors import CheckpointError
from tdjax.models import tiny_vae
from tdjax.precision import FLOAT32

WIDTHS, LATENT = (24, 12, 8, 6), 16


def published(widths=WIDTHS, latent=LATENT, seed=0):
    """Numbers under the names of taew2_1.pth, the encoder's among them."""
    rng, state = np.random.default_rng(seed), {}

    def conv(name, outputs, inputs, side=3, bias=True):
        scale = (inputs * side * side) ** -0.5
        state[f"{name}.weight"] = rng.normal(0, scale, (outputs, inputs, side, side))
        if bias:
            state[f"{name}.bias"] = rng.normal(0, 0.1, outputs)

    conv("decoder.1", widths[0], latent)
    for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        begin = 3 + 6 * stage
        for block in range(begin, begin + 3):
            for part, width in ((0, 2 * inputs), (2, inputs), (4, inputs)):
                conv(f"decoder.{block}.conv.{part}", inputs, width)
        conv(f"decoder.{begin + 4}.conv", inputs * (1 if stage == 0 else 2), inputs, 1, False)
        conv(f"decoder.{begin + 5}", outputs, inputs, bias=False)
    conv("decoder.22", 3, widths[-1])
    conv("encoder.0", 8, 3)
    conv("encoder.4.conv.0", 8, 16)
    return {key: value.astype(np.float32) for key, value in state.items()}


def by_torch(state, latents):  # [t z h w] -> [4t-3 3 8h 8w], 0..1
    """All frames of one clip, each memory block fed with the frame before."""
    torch = pytest.importorskip("torch")
    weights = {key: torch.from_numpy(value) for key, value in state.items()}
    conv = lambda x, name: torch.nn.functional.conv2d(
        x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same"
    )
    x = torch.tanh(torch.from_numpy(latents) / 3) * 3
    x = conv(x, "decoder.1").relu()
    for stage in range(3):
        begin = 3 + 6 * stage
        for block in range(begin, begin + 3):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            y = conv(torch.cat([x, before], 1), f"decoder.{block}.conv.0").relu()
            y = conv(y, f"decoder.{block}.conv.2").relu()
            x = (conv(y, f"decoder.{block}.conv.4") + x).relu()
        x = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        x = conv(x, f"decoder.{begin + 4}.conv").reshape(-1, channels, *x.shape[2:])
        x = conv(x, f"decoder.{begin + 5}")
    return conv(x.relu(), "decoder.22")[3:].numpy()


@pytest.fixture
def opened(tmp_path, write_safetensors):
    return lambda state: open_checkpoint(write_safetensors(tmp_path / "taew2_1.safetensors", state))


@pytest.mark.slow
def test_frames_are_those_of_torch(opened):
    """A clip a latent frame at a time: one frame, then four for each."""
    state = published()
    file = opened(state)
    assert file.kind == "tiny_vae"
    assert file.config == TinyVAEConfig(widths=WIDTHS, temporal_up=(False, True, True))
    vae = file.load(dataclasses.replace(file.config, policy=FLOAT32))
    latents = np.random.default_rng(1).normal(0, 2, (3, LATENT, 4, 6)).astype(np.float32)
    step = jax.jit(lambda vae, x, cache: vae.decode_chunk(x, cache))
    frames, cache = [], None
    for frame in latents:
        x = put(frame.transpose(1, 2, 0)[None, None])
        chunk, cache = step(vae, x, cache)
        frames.append(np.asarray(chunk[0]))
    assert [len(chunk) for chunk in frames] == [1, 4, 4]
    shapes = tiny_vae.cache_shapes(vae.cfg, 32, 48)
    assert jax.tree.map(lambda x: x.shape, cache) == jax.tree.map(lambda x: x.shape, shapes)
    ours = (np.concatenate(frames).transpose(0, 3, 1, 2) + 1) / 2
    assert_close(ours, by_torch(state, latents), "float32")


def test_a_layer_for_more_frames_than_are_made_is_cut(opened):
    """The last rows are those of the one frame, as the published code takes them."""
    state, key = published(), "decoder.7.conv.weight"
    file = opened(state | {key: np.concatenate([np.full_like(state[key], 9), state[key]])})
    assert file.config.temporal_up == (False, True, True)
    vae = file.load(dataclasses.replace(file.config, policy=FLOAT32))
    kernel = vae.decoder.stages[0].grow.kernel[...][0, 0]
    np.testing.assert_array_equal(kernel, state[key][:, :, 0, 0].T)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"decoder.1.weight": np.zeros((24, 48, 3, 3), np.float32)}, "TI2V-5B"),
        (lambda s: {k: v for k, v in s.items() if k != "decoder.22.bias"}, "missing"),
        (lambda s: s | {"decoder.7.conv.weight": np.zeros(4, np.float32)}, "impossible size"),
        (lambda s: s | {"decoder.7.conv.weight": np.zeros((0, 0), np.float32)}, "different"),
        (lambda s: s | {"decoder.23.weight": np.zeros(3, np.float32)}, "unexpected"),
    ],
)
def test_other_files_are_refused(opened, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(change(published()))


@pytest.mark.slow
def test_a_pipeline_takes_it_for_the_vae(tmp_path, write_safetensors, model):
    """Given as vae_path; latents and seeds are those of the whole VAE, the frames its own."""
    cfg = dataclasses.replace(random_model.DIT, in_channels=LATENT, out_channels=LATENT, layers=1)
    random_model.dit_folder(tmp_path / "dit", cfg)
    file = write_safetensors(tmp_path / "taew2_1.safetensors", published())
    paths = {"text_encoder_path": model / "text", "tokenizer_path": model / "tokenizer.json"}
    pipe = tdjax.load(tmp_path / "dit", vae_path=file, **paths)
    call = {"num_frames": 9, "width": 32, "height": 32, "num_steps": 1, "sampler": "sde"}
    made = pipe("a red circle", output_type="float", check="none", **call)
    expected = by_torch(published(), made.latents[0].transpose(0, 3, 1, 2))
    frames = np.clip(expected.transpose(0, 2, 3, 1), 0, 1)
    np.testing.assert_allclose(made.frames[0], frames, atol=1e-5)
    assert pipe.plan(pipe.request("a", **call)).of("vae decode").weights > 0


def test_image_to_video_needs_the_encoder(tmp_path, write_safetensors, i2v_model):
    file = write_safetensors(tmp_path / "taew2_1.safetensors", published())
    with pytest.raises(CheckpointError, match="latent channels|decoder alone"):
        tdjax.load(i2v_model, vae_path=file)
