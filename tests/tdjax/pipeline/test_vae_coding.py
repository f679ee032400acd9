"""The VAE a chunk at a time: the bits of the whole decode and encode, and memory that does not grow
with the clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
from arrays import put
from tolerances import assert_close

import tdjax
from tdjax.checkpoints import orbax
from tdjax.config import VideoSize
from tdjax.errors import UsageError
from tdjax.parallel.mesh import make_mesh
from tdjax.parallel.space import latents_at_once
from tdjax.pipeline import compilation, executables
from tdjax.pipeline.components import open_component
from tdjax.pipeline.vae_coding import IN_FLIGHT, VAECoding, arriving
from tdjax.presets import WAN_1_3B
from tdjax.progress import Stages

SIZE = VideoSize(
    frames=13, height=32, width=32
)  # shared with other tests, so that programs are compiled once
CALL = {"width": 32, "height": 32, "num_steps": 1}


@pytest.fixture(scope="module")
def coder(model):
    stages = Stages(show=False)
    return VAECoding(compilation.Programs(stages), open_component(model / "vae", "vae"), stages)


def latents(frames: int, scale: float = 1.0) -> np.ndarray:
    grid = VideoSize(frames=frames, height=SIZE.height, width=SIZE.width).latent_grid
    return np.random.default_rng(0).normal(size=(1, *grid, 8)).astype(np.float32) * np.float32(
        scale
    )


@pytest.mark.slow
@pytest.mark.parametrize(("output", "frames"), [("uint8", 13), ("float", 1)])
def test_streamed_decode_is_the_whole_decode(coder, output, frames):
    vae, z = coder.component.load(), latents(frames)
    chunks = list(coder.decode(vae, z, output))
    assert [len(c) for c, _ in chunks] == [1] + [4] * ((frames - 1) // 4) and all(
        finite for _, finite in chunks
    )
    whole, finite = jax.jit(lambda vae, z: compilation.pixels(vae.decode(z), output))(vae, z)
    got = np.concatenate([c for c, _ in chunks])
    assert bool(finite) and got.dtype == whole.dtype and np.array_equal(got, whole[0])


@pytest.mark.slow
def test_streamed_encode_is_the_whole_encode(coder):
    image = (
        np.random.default_rng(1)
        .uniform(-1, 1, (1, 1, SIZE.height, SIZE.width, 3))
        .astype(np.float32)
    )
    vae, whole = coder.component.load(), jax.jit(lambda vae, x: vae.encode(x))
    for frames in (13, 1):
        size = VideoSize(frames=frames, height=SIZE.height, width=SIZE.width)
        video = np.pad(image, ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0)))
        assert np.array_equal(coder.encode(vae, image, size), whole(vae, video))
        shape = (frames, SIZE.height, SIZE.width, 3)
        pixels = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
        video = (pixels.astype(np.float32) / 127.5 - 1)[None]
        assert np.array_equal(coder.encode_frames(vae, pixels, size), whole(vae, video))


def divided(model, mesh: str) -> VAECoding:
    """The same over a mesh."""
    component, stages = open_component(model / "vae", "vae"), Stages(show=False)
    component.mesh = make_mesh(mesh, WAN_1_3B)
    return VAECoding(compilation.Programs(stages, component.mesh), component, stages)


@pytest.mark.slow
def test_devices_take_two_latent_frames_at_once(model, coder):
    """Where their number is even: the frames and latents of one device. One at a time are in
    test_meshes.py."""
    two, size = divided(model, "sp=2"), dataclasses.replace(SIZE, frames=17)
    whole, vae = coder.component.load(), two.component.load()
    chunks = list(two.decode(vae, latents(17), "float"))
    assert [len(c) for c, _ in chunks] == [1, 8, 8] and all(finite for _, finite in chunks)
    made, once = (
        np.concatenate([c for c, _ in each])
        for each in (chunks, coder.decode(whole, latents(17), "float"))
    )
    assert_close(made, once, "float32")
    pixels = np.random.default_rng(2).integers(0, 256, (17, 32, 32, 3), np.uint8)
    assert_close(
        two.encode_frames(vae, pixels, size), coder.encode_frames(whole, pixels, size), "float32"
    )


def test_meshes_of_the_same_devices_have_the_same_programs(model, tmp_path, monkeypatch):
    """Another mesh finds them on disk."""
    monkeypatch.setattr(executables, "folder", lambda: tmp_path)

    def entries(mesh):
        coding, asked = divided(model, mesh), []
        monkeypatch.setattr(coding.compiler, "compile", asked.append)
        coding.compiler.wait([*coding.decoder(latents(13).shape, "uint8"), *coding.encoder(SIZE)])
        return [executables._path(each) for each in asked]

    rows = entries("sp=2")
    assert len({*rows}) == 4 and None not in rows
    assert entries("dp=2") == entries("cfg=2") == rows


@pytest.mark.parametrize(
    ("mesh", "size", "later", "latents"),
    [
        ("sp=2", (6, 8), 4, 2),
        ("sp=4", (6, 8), 4, 2),
        ("sp=2", (6, 8), 3, 1),
        ("sp=2", (3, 5), 4, 1),
    ],
)
def test_latents_at_once(mesh, size, later, latents):
    """Nothing is gained where the devices do not divide the frames."""
    assert latents_at_once(make_mesh(mesh, WAN_1_3B), *size, later) == latents
    assert latents_at_once(None, *size, later) == 1


@pytest.mark.slow
def test_programs_do_not_depend_on_the_length(coder):
    """One pair of programs, so one peak of memory, for 81 frames and for 161; the cache is donated,
    not copied."""
    pairs = [coder.decoder(latents(frames).shape, "uint8") for frames in (81, 161)]
    assert pairs[0] == pairs[1]
    encoders = [
        coder.encoder(VideoSize(frames=frames, height=32, width=32)) for frames in (81, 161)
    ]
    assert encoders[0] == encoders[1]
    for later in (pairs[0][1], encoders[0][1]):
        memory = later.wait().memory_analysis()
        assert memory.alias_size_in_bytes > 0.8 * memory.output_size_in_bytes


def test_a_frame_that_is_not_finite_is_told(coder):
    leaves = random_model.random_leaves("vae", random_model.VAE, 1)
    leaves["decoder.conv_out.bias"][...] = np.nan
    bad = orbax.assemble(
        orbax.abstract("vae", random_model.VAE), {n: put(x) for n, x in leaves.items()}
    )
    assert [finite for _, finite in coder.decode(bad, latents(5), "uint8")] == [False, False]


def test_few_chunks_are_in_flight():
    """The host asks for a chunk only when an earlier one has left."""
    made, left = [], []

    def chunks():
        for i in range(7):
            assert len(made) - len(left) <= IN_FLIGHT
            made.append(i)
            yield (jnp.full((2,), i),)

    for (chunk,) in arriving(chunks()):
        left.append(int(chunk[0]))
    assert left == list(range(7))


@pytest.mark.slow
def test_frames_are_handed_out_as_they_come(model):
    pipe, seen = tdjax.load(model), []
    result = pipe(
        "a",
        num_samples=2,
        num_frames=9,
        on_frames=lambda index, frames: seen.append((index, frames.copy())),
        **CALL,
    )
    assert [(index, len(frames)) for index, frames in seen] == [
        (i, n) for i in range(2) for n in (1, 4, 4)
    ]
    for i in range(2):
        assert np.array_equal(
            np.concatenate([frames for index, frames in seen if index == i]), result.frames[i]
        )
    for wrong in (
        {"on_frames": 3},
        {"on_frames": lambda x: x},
        {"on_frames": print, "output_type": "latent"},
    ):
        with pytest.raises(UsageError, match="on_frames"):
            pipe("a", num_frames=9, **wrong, **CALL)
