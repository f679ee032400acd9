"""What is computed once: 8-bit activations for all that read them, keys and values of the text for
all steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jaxprs import equations
from tolerances import assert_close

from tdjax.config import LINEAR, DiTConfig, SLAConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.rope import rope
from tdjax.models.wan_dit import DiT, with_linear
from tdjax.pipeline import compilation
from tdjax.precision import FLOAT32
from tdjax.presets import TEACHER_SAMPLER
from tdjax.sampling import few_step, unipc

CFG = DiTConfig(
    dim=128,
    heads=2,
    ffn_dim=256,
    layers=2,
    in_channels=4,
    out_channels=4,
    freq_dim=16,
    text_dim=6,
    text_len=8,
    attention="sla",
    sla=SLAConfig(topk=0.67, block_q=64, block_k=64),
    policy=FLOAT32,
)
run = jax.jit(lambda model, *args: model(*args))


def floats(**changes):
    """A float model whose every leaf is random."""
    draw = np.random.default_rng(0).normal
    abstract = as_shapes(DiT, dataclasses.replace(CFG, **changes))
    width = lambda leaf: leaf.shape[-2] ** 0.5 if leaf.ndim > 1 and leaf.shape[-2] > 6 else 3
    return jax.tree.map(lambda leaf: put(draw(size=leaf.shape) / width(leaf), leaf.dtype), abstract)


def normal(seed, *shape):
    return put(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(b=1):
    """160 tokens: three blocks, the last one half full."""
    return (
        normal(0, b, 2, 16, 20, 4),
        put(np.linspace(977.0, 104.0, b), jnp.float32),
        normal(1, b, 8, 6),
    )


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def rounded(jaxpr, dtype):
    """How often a float array of many elements is made one of 8 bits."""
    casts = (e for e in equations(jaxpr) if e.primitive.name == "convert_element_type")
    return sum(e.params["new_dtype"] == dtype and e.invars[0].aval.size > 1000 for e in casts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "linear, dtype", [("int8", "int8"), ("int8_channel", "int8"), ("fp8", "float8_e4m3fn")]
)
def test_activations_are_quantised_once(linear, dtype):
    """In a block: before q k v, o, the cross-attention's q and o, up, down. The text rows: once for
    all blocks."""
    model, (x, timestep, _) = with_linear(floats(attention="dense"), linear), inputs()
    text = normal(1, 1, 40, 6)
    block, kv = jax.eval_shape(
        lambda model, text: jax.tree.map(lambda leaf: leaf[0], (model.blocks, model.text_kv(text))),
        model,
        text,
    )
    one = jax.make_jaxpr(lambda block, *a: block(*a))(
        block, normal(2, 1, 160, 128), normal(3, 1, 6, 128), kv, rope((2, 8, 10), 64)
    )
    assert rounded(one.jaxpr, dtype) == 6
    assert rounded(jax.make_jaxpr(model.text_kv)(text).jaxpr, dtype) == 1
    assert rounded(jax.make_jaxpr(model)(x, timestep, text).jaxpr, dtype) == 7


@pytest.mark.slow
@pytest.mark.parametrize("linear", LINEAR)
def test_text_read_beforehand_gives_the_plain_call(linear):
    model = with_linear(
        floats(attention="dense", in_channels=24, out_channels=4, image_dim=12), linear
    )
    x, timestep, text = inputs(2)
    image, features = normal(4, 2, 2, 16, 20, 20), normal(5, 2, 9, 12)
    kv = jax.jit(lambda model, *a: model.text_kv(*a))(model, text, features)
    assert [a.shape for a in kv] == [(2, 2, 8, 2, 64)] * 2 + [(2, 2, 9, 2, 64)] * 2
    v = jax.jit(lambda model, *a: model.velocity(*a))(model, x, timestep, kv, image)
    expected = np.asarray(run(model, x, timestep, text, image, features))
    if linear == "float":
        assert_close(v, expected, "dit")
    assert relative(v, expected) < 5e-3  # two programs: last bits move values of 8 bits over edges
    assert np.abs(expected).max() > 0.1


def loops(function, *args):
    """The jaxprs of the loop bodies over steps."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [e.params["body_jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "while"]


@pytest.mark.slow
def test_steps_do_not_read_the_text_again():
    """No product in the loop of a sampler has the text's rows times the width; and its latents are
    those of the plain call."""
    model, (x, _, text), times = floats(), inputs(), put([0.99, 0.8, 0.0])
    noise = normal(6, 2, *x.shape)
    few = lambda model, x, text: compilation.denoise(
        model, x, text, None, (noise, times), sampler="sde"
    )
    rows = jax.tree.map(
        jnp.asarray, unipc.step_coefficients(dataclasses.replace(TEACHER_SAMPLER, num_steps=2))
    )
    state, both = few_step.teacher_start(x), jnp.concatenate([text, -text])
    many = lambda model, state, text: compilation.denoise_guided(
        model, state, text, None, rows, guidance_scale=5.0
    )
    for function, *args in ((few, model, x, text), (many, model, state, both)):
        (body,) = loops(function, *args)
        products = [e for e in equations(body) if e.primitive.name == "dot_general"]
        assert products and not [e for e in products if e.invars[0].aval.shape[-2:] == (8, 128)]
    latents, finite = jax.jit(few)(model, x, text)
    plain = lambda model, x, text: few_step.sample_from(
        lambda x, t: model(x, t, text), x, noise, times, "sde"
    )
    assert finite.all()
    assert_close(latents, jax.jit(plain)(model, x, text)[0], "dit")
