"""Frames over four devices: every layer of the VAE that sees its neighbours, and the whole decoder,
against one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
from arrays import put
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tolerances import assert_close

from tdjax.checkpoints import orbax
from tdjax.config import VAEConfig
from tdjax.models import causal_conv, wan_vae
from tdjax.parallel import space
from tdjax.pipeline import compilation
from tdjax.precision import FLOAT32

SMALL = VAEConfig(
    dim=8,
    latent_channels=4,
    multipliers=(1, 2),
    res_blocks=1,
    temporal_down=(True,),
    mean=(0.0,) * 4,
    std=(1.0,) * 4,
    policy=FLOAT32,
)


def devices(count=4):
    names = (AxisType.Auto,)
    return Mesh(np.array(jax.devices()[:count]), ("seq",), axis_types=names)


def noise(*shape, seed=0):
    return put(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    "height, width, shape, axes",
    [
        (60, 104, (4, 1), "rows"),
        (90, 160, (4, 1), "columns"),
        (90, 14, (2, 2), "rows"),
        (7, 9, (1, 4), "rows"),
        (7, 8, (4, 1), "columns"),
    ],
)
def test_devices_go_where_they_divide(height, width, shape, axes):
    mesh = space.space_mesh(devices(), height, width)
    assert mesh.devices.shape == shape and mesh.axis_names == (axes, space.COPIES)
    assert [d.id for d in mesh.devices.ravel()] == [d.id for d in jax.devices()[:4]]


def over(op, x, *, inputs=1):
    """op(x) with x divided over four devices, by rows and by columns."""
    for height, width in ((4, 1), (1, 4)):
        mesh = space.space_mesh(devices(), height, width)
        divided = space.over_space(op, mesh, (True,) * inputs, (True,))
        with jax.set_mesh(mesh):
            yield jax.jit(divided)(x)[0] if inputs == 1 else jax.jit(divided)(*x)[0]


KERNEL, BIAS = noise(3, 3, 5, 6), noise(6, seed=1)
LAYERS = {
    "convolution": lambda x: causal_conv.conv2d(x, KERNEL, BIAS),
    "stride 2": lambda x: causal_conv.conv2d(x, KERNEL, BIAS, stride=2),
    "upsampled": lambda x: causal_conv.conv2d_upsampled(x, KERNEL, BIAS),
    "pointwise": lambda x: causal_conv.conv2d(x, KERNEL[:1, :1], BIAS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    x = noise(1, 2, 8, 16, 5)
    whole = jax.jit(LAYERS[name])(x)
    for y in over(lambda x: (LAYERS[name](x),), x):
        assert y.shape == whole.shape
        assert_close(y, whole, "float32", name)


def test_attention_sees_the_whole_frame():
    layer = wan_vae.Attention(8, SMALL, rngs=nnx.Rngs(0))
    x = noise(1, 2, 8, 4, 8)
    whole = jax.jit(lambda x: layer(x, None)[0])(x)
    for y in over(lambda x: (layer(x, None)[0],), x):
        assert_close(y, whole, "float32")


def test_layers_know_whether_frames_are_divided():
    asked = []

    def op(x):
        asked.append(space.is_divided())
        return (x,)

    for count in (4, 1):  # one device has the whole frame
        mesh = space.space_mesh(devices(count), 8, 8)
        jax.eval_shape(space.over_space(op, mesh, (True,), (True,)), noise(1, 1, 8, 8, 3))
    jax.eval_shape(op, noise(1, 1, 8, 8, 3))
    assert asked == [True, False, False]


def test_what_is_not_finite_anywhere_is_told_everywhere():
    mesh = space.space_mesh(devices(), 4, 1)
    finite = lambda x: (space.on_every_device(jnp.isfinite(x).all()),)
    run = jax.jit(space.over_space(finite, mesh, (True,), (False,)))
    x = np.zeros((1, 1, 4, 2, 3), np.float32)
    with jax.set_mesh(mesh):
        assert bool(run(x)[0])
        x[0, 0, 3, 1, 2] = np.nan
        assert not bool(run(x)[0])


@pytest.mark.slow
def test_the_decoder_and_what_it_sends(grid=(6, 8)):
    """Two latent frames through the bodies of the pipeline: the frames of one device, with edges
    sent to neighbours and nothing gathered but the tokens of the middle attention."""
    leaves = jax.tree.map(jnp.asarray, random_model.random_leaves("vae", SMALL, 0))
    vae = orbax.assemble(orbax.abstract("vae", SMALL), leaves)
    mesh = space.space_mesh(devices(), *grid)
    first, later = (noise(1, 1, *grid, 4, seed=s) for s in (0, 1))
    decode = functools.partial(compilation.decode_first, output="float")
    _, _, cache = jax.jit(decode)(vae, first)
    body = functools.partial(compilation.decode_later, output="float")
    whole, _, _ = jax.jit(body)(vae, cache, later)
    outputs = (True, False, True)
    begin = compilation.OverSpace(compilation.decode_first, mesh, (False, True), outputs)
    go_on = compilation.OverSpace(compilation.decode_later, mesh, (False, True, True), outputs)
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        vae = jax.device_put(vae, everywhere)
        _, _, cache = jax.jit(begin, static_argnames="output")(vae, first, output="float")
        lies = jax.tree.leaves(cache)[0].sharding
        run = jax.jit(go_on, static_argnames="output").lower(vae, cache, later, output="float")
        program = run.compile()
        frames, finite, cache = program(
            vae, cache, jax.device_put(later, NamedSharding(mesh, space.part(mesh)))
        )
    assert_close(frames, whole, "float32")
    assert bool(finite) and all(x.sharding == lies for x in jax.tree.leaves(cache))
    assert lies.spec == space.part(mesh)
    text = program.as_text()
    gathered = re.findall(r"= (\S+) all-gather\(", text)
    assert len(gathered) == 2  # keys and values
    assert all(str(SMALL.dim * SMALL.multipliers[-1]) in shape for shape in gathered)
    assert "collective-permute" in text and "all-to-all" not in text
