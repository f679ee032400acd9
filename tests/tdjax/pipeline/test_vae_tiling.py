"""Tiles cover a frame, their weights add up to one, and a decode in tiles has small and smooth
seams."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import random_model

import tdjax
from tdjax.checkpoints import orbax
from tdjax.config import VideoSize
from tdjax.pipeline import compilation, memory, vae_tiling
from tdjax.pipeline.components import open_component
from tdjax.pipeline.vae_coding import VAECoding
from tdjax.pipeline.vae_tiling import Tiling, starts
from tdjax.progress import Stages


@pytest.mark.parametrize(
    ("length", "tile", "overlap"),
    [(60, 40, 8), (104, 40, 8), (90, 40, 8), (160, 40, 8), (41, 40, 8), (9, 5, 4)],
)
def test_tiles_cover_and_overlap(length, tile, overlap):
    places = starts(length, tile, overlap)
    assert places[0] == 0 and places[-1] + tile == length
    assert all(a + tile - b >= overlap for a, b in zip(places, places[1:], strict=False))
    fewer = len(places) - 1
    assert fewer == 0 or fewer * (tile - overlap) + overlap < length  # one less would not do
    assert starts(tile, tile, overlap) == starts(tile - 1, tile, overlap) == [0]


@pytest.mark.parametrize("size", [(60, 104), (20, 104), (33, 41), (12, 9)])
def test_weights_add_up_to_one(size):
    tiling, scale = Tiling(*size, tile=32, overlap=8), 4
    total = np.zeros((size[0] * scale, size[1] * scale, 1))
    h, w = (n * scale for n in tiling.size)
    for (top, left), weight in zip(tiling.corners, tiling.weights(scale), strict=True):
        assert weight.shape == (h, w, 1) and weight.min() > 0
        total[top * scale : top * scale + h, left * scale : left * scale + w] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_impossible_tiles():
    with pytest.raises(ValueError, match="cannot overlap by 8"):
        Tiling(60, 104, tile=8, overlap=8)


def vae_of(model) -> VAECoding:
    stages = Stages(show=False)
    return VAECoding(compilation.Programs(stages), open_component(model / "vae", "vae"), stages)


def smooth(h: int, w: int, t: int = 2) -> np.ndarray:
    """Latents as of a clip that changes slowly from place to place: f32 [1 t h w 8]"""
    y, x, c = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), np.arange(8), indexing="ij")
    return np.stack([np.sin(2 * y + 3 * x + c + 0.3 * i) for i in range(t)])[None].astype(
        np.float32
    )


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-12))


def local(vae):
    """Without the attention over whole frames, which a tile cuts short and random weights make as
    strong as all else."""
    leaves = orbax.named_leaves(vae)
    leaves |= {
        name: jnp.zeros_like(leaf) for name, leaf in leaves.items() if "middle.1.proj" in name
    }
    return orbax.assemble(orbax.abstract("vae", random_model.VAE), leaves)


@pytest.mark.slow
def test_seams(model, monkeypatch):
    """What a tile's edge disturbs is small, smaller with more overlap, and passes smoothly from
    tile to tile. The weights are random: the influence of an edge hardly fades with distance, as it
    would in a trained decoder."""
    coder = vae_of(model)
    z, found, step = smooth(16, 24), {}, {}
    monkeypatch.setattr(vae_tiling, "TILE", 12)
    for name, vae, overlaps in (
        ("local", local(coder.component.load()), (1, 6)),
        ("as it is", coder.component.load(), (6,)),
    ):
        whole = np.concatenate([chunk for chunk, _ in coder.decode(vae, z, "uint8")]).astype(float)
        for overlap in overlaps:
            monkeypatch.setattr(vae_tiling, "OVERLAP", overlap)
            chunks = list(coder.decode(vae, z, "uint8", tiled=True))
            tiled = np.concatenate([chunk for chunk, _ in chunks])
            assert (
                [len(chunk) for chunk, _ in chunks] == [1, 4]
                and tiled.dtype == np.uint8
                and tiled.shape == whole.shape
            )
            found[name, overlap] = psnr(tiled, whole)
            edges = [left * 8 for left in starts(24, 12, overlap)[1:]]
            error = tiled - whole
            step[name, overlap] = max(
                np.abs(error[..., x, :] - error[..., x - 1, :]).mean() for x in edges
            )
    assert found["local", 6] > 30 and found["local", 6] > found["local", 1] + 3, found
    assert found["as it is", 6] > 16, found
    assert step["local", 6] < 0.7 * step["local", 1], step


@pytest.mark.slow
def test_one_tile_is_the_whole(model):
    coder = vae_of(model)
    vae, z = coder.component.load(), smooth(4, 4)
    whole, tiled = coder.decode(vae, z, "uint8"), coder.decode(vae, z, "uint8", tiled=True)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(whole, tiled, strict=True))


@pytest.mark.slow
def test_a_tile_that_is_not_finite_is_told(model, monkeypatch):
    monkeypatch.setattr(vae_tiling, "TILE", 4)
    monkeypatch.setattr(vae_tiling, "OVERLAP", 2)
    coder = vae_of(model)
    z = smooth(4, 8)
    z[:, 1, :, -1] = np.nan
    assert [
        finite for _, finite in coder.decode(coder.component.load(), z, "uint8", tiled=True)
    ] == [
        True,
        False,
    ]


def test_the_plan_of_tiles():
    policy = tdjax.Policy(param="bfloat16", compute="bfloat16")
    configs = {"vae": tdjax.VAEConfig(policy=policy), "dit": tdjax.DiTConfig(policy=policy)}
    size = VideoSize(frames=81, height=720, width=1280)
    decode = lambda tiled, size=size: memory.make_plan(
        configs, size, guided=False, tiled_vae=tiled
    ).of("vae decode")
    assert decode(True).working < 0.15 * decode(False).working
    assert decode(False, dataclasses.replace(size, frames=161)) == decode(False)


def test_who_decodes_in_tiles(model, monkeypatch):
    call = {"num_frames": 5, "width": 640, "height": 640}
    pipe, whole = tdjax.load(model), tdjax.load(model, vae="full")
    request = pipe.request("a", **call)
    assert not pipe.plan(request).tiled_vae
    assert tdjax.load(model, vae="tiled").plan(request).tiled_vae
    full = pipe.plan(request).of("vae decode").total
    monkeypatch.setattr(memory, "memory_limit", lambda: full)
    plan = pipe.plan(request)
    assert plan.tiled_vae and plan.of("vae decode").total < full / 2
    assert not whole.plan(request).tiled_vae
    monkeypatch.setattr(memory, "memory_limit", lambda: 2 * full)
    assert not pipe.plan(request).tiled_vae


@pytest.mark.slow
def test_the_pipeline_decodes_in_tiles(model, monkeypatch):
    monkeypatch.setattr(vae_tiling, "TILE", 4)
    monkeypatch.setattr(vae_tiling, "OVERLAP", 2)
    call = {"num_frames": 1, "width": 64, "height": 32, "num_steps": 1}
    whole, tiled = (tdjax.load(model, vae=vae)("a red circle", **call) for vae in ("full", "tiled"))
    assert np.array_equal(whole.latents, tiled.latents) and whole.frames.shape == tiled.frames.shape
    assert 10 < psnr(whole.frames, tiled.frames) < 100
