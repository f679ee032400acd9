import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from flax import nnx
from tolerances import assert_close

from pallas_kernels.qk_prep import rms_norm_rope
from tdjax.config import ATTENTION, DiTConfig, SLAConfig
from tdjax.models.attention import SELF_ATTENTION, CrossAttention, SelfAttention
from tdjax.models.rope import angles, rope, widths
from tdjax.precision import FLOAT32

CFG = DiTConfig(dim=48, heads=3, ffn_dim=40, layers=1, policy=FLOAT32, sla=SLAConfig(topk=0.5))
GRID = (2, 7, 11)  # 154 tokens: two query blocks, three key blocks
call = jax.jit(lambda module, *args: module(*args))
cross = jax.jit(lambda module, x, *context: module(x, module.text_kv(*context)))


def normal(*shape):
    return put(np.random.default_rng(0).normal(size=shape), jnp.float32)


def core(name, **changes):
    cfg = dataclasses.replace(CFG, attention=name, **changes)
    return SELF_ATTENTION[name](cfg, rngs=nnx.Rngs(0))


@pytest.fixture
def qkv():
    return normal(3, 2, 154, 3, 16)


def test_the_table_has_every_variant_of_the_config():
    assert set(SELF_ATTENTION) == set(ATTENTION)


@pytest.mark.slow
def test_sparse_linear_with_all_blocks_and_no_projection_is_dense(qkv):
    dense = call(core("dense"), *qkv)
    assert_close(call(core("sla", sla=SLAConfig(topk=1.0)), *qkv), dense, "float32")
    sage = np.asarray(call(core("sagesla", sla=SLAConfig(topk=1.0)), *qkv))
    assert np.linalg.norm(sage - dense) < 0.02 * np.linalg.norm(dense)


@pytest.mark.parametrize("name", ["sla", "sagesla"])
def test_projection_is_float32_whatever_the_policy_and_starts_at_zero(name):
    module = SELF_ATTENTION[name](DiTConfig(dim=48, heads=3, attention=name), rngs=nnx.Rngs(0))
    for leaf in jax.tree.leaves(module):
        assert leaf.dtype == jnp.float32 and not leaf.any()


@pytest.mark.parametrize("name", list(ATTENTION))
def test_bfloat16_runs_on_a_cpu(qkv, name):
    """Compiled, with its gradient where it has one: XLA lacks some products of bfloat16 there."""
    qkv = qkv.astype(jnp.bfloat16)
    wide = call(core(name), *qkv.astype(jnp.float32))
    error = np.asarray(call(core(name), *qkv).astype(jnp.float32) - wide)
    assert np.linalg.norm(error) < 2e-2 * np.linalg.norm(wide)
    if name != "sagesla":
        loss = lambda module, *qkv: jnp.square(module(*qkv).astype(jnp.float32)).sum()
        grads = jax.jit(jax.grad(loss, (0, 1, 2, 3), allow_int=True))(core(name), *qkv)
        assert all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(grads))


def test_int8_scores_cannot_be_trained(qkv):
    module = core("sagesla")
    with pytest.raises(NotImplementedError, match='Train with attention "sla" or "dense"'):
        jax.grad(lambda q: module(q, *qkv[1:]).sum())(qkv[0])


def test_impl_is_never_replaced_silently(qkv):
    with pytest.raises(
        ValueError,
        match="sparse_linear_attention: impl is 'cudnn'; allowed: auto, reference, mosaic, triton",
    ):
        core("sla", impl="cudnn")(*qkv)
    with pytest.raises(
        ValueError, match="attention: cuDNN attention takes bfloat16 and float16, not float32"
    ):
        core("dense", impl="cudnn")(*qkv)
    with pytest.raises(
        ValueError, match="attention: impl is 'fast'; allowed: auto, reference, cudnn"
    ):
        core("dense", impl="fast")(*qkv)


def test_queries_and_keys_are_normed_over_all_heads_together():
    module = jax.jit(lambda: SelfAttention(CFG, rngs=nnx.Rngs(0)))()
    q = module.queries(normal(2, 154, 48))
    assert q.shape == (2, 154, 3, 16)
    assert_close(jnp.square(q).mean((2, 3)), np.ones((2, 154)), "float32")
    assert np.ptp(np.square(q).mean(3)) > 0.1  # so not over each head


def test_cross_attention_sees_every_row_of_text():
    module = jax.jit(lambda: CrossAttention(CFG, rngs=nnx.Rngs(0)))()
    x, text = normal(2, 1, 9, 48)
    y = cross(module, x, text)
    assert_close(cross(module, x, text[:, ::-1]), y, "float32", "rows have no position")
    for i in (0, 8):
        assert np.abs(cross(module, x, text.at[:, i].set(0)) - y).max() > 1e-3


@pytest.mark.slow
def test_image_features_add_a_second_attention():
    module = jax.jit(
        lambda: CrossAttention(dataclasses.replace(CFG, image_dim=10), rngs=nnx.Rngs(0))
    )()
    x, text, features = normal(3, 1, 9, 48)
    y = cross(module, x, text, features)
    flat = jnp.zeros_like(features)  # features of zero give values of zero
    assert_close(cross(module, x, text, flat), cross(module, x, text), "float32")
    swapped = module.core(
        module.queries(x),
        module.heads(module.norm_k_img(module.k_img(features))),
        module.heads(module.v_img(features)),
    )
    assert_close(y - cross(module, x, text), module.merge(swapped), "float32")


@pytest.mark.parametrize("width, split", [(128, (44, 42, 42)), (20, (8, 6, 6)), (64, (24, 20, 20))])
def test_axes_share_the_channels(width, split):
    assert widths(width) == split


@pytest.mark.slow
def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin, _ = rope(GRID, 16)
    assert cos.shape == sin.shape == (154, 8)
    x = normal(1, 1, 32)
    x = x / jnp.sqrt(jnp.square(x).mean())
    y = np.asarray(
        rms_norm_rope(jnp.broadcast_to(x, (1, 154, 32)), jnp.ones(32), cos, sin, eps=0.0)
    )
    assert_close(
        (y * y).sum(-1),
        np.broadcast_to(np.square(x.reshape(2, 16)).sum(-1), (1, 154, 2)),
        "float32",
    )
    grid = y.reshape(2, 7, 11, 2, 16)
    dot = lambda a, b: float((grid[a][0] * grid[b][1]).sum())
    assert abs(dot((0, 1, 2), (1, 4, 9)) - dot((0, 3, 3), (1, 6, 10))) < 1e-4


def test_angles_at_the_far_end_are_exact():
    """Positions up to 128 an axis: host float64, so cos and sin are right to the last bit of
    float32."""
    cos, *_ = rope((21, 45, 80), 128)
    t, h, w = angles((21, 45, 80), 128)
    assert_close(cos[-1], np.cos(np.concatenate([t[-1], h[-1], w[-1]])), "float32")
    assert h[-1][0] == 44 and w[-1][0] == 79
