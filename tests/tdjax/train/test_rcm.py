"""Distillation through the video transformer with kernels that declare their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import put
from dit_cases import clip, difference, dit, jit, norm

from pallas_kernels import flash_attention
from pallas_kernels.derivatives import with_derivatives
from tdjax.train import rcm, step
from tdjax.train.configs import RCMConfig
from tdjax.train.state import DistillState, Teacher

PLAIN = optax.sgd(1e-2)  # the update shows the gradient


def opaque(q, k, v, scale=None):
    """Attention that JAX cannot look into, as kernels are: derivatives are what is declared."""
    run = flash_attention.reference.attention
    return with_derivatives(
        lambda *args: (run(*args), None),
        tangent=lambda args, _, tangents: jax.jvp(run, args, tangents)[1],
        grad=lambda args, _, cotangent: jax.vjp(run, *args)[1](cotangent),
    )(q, k, v)


@pytest.mark.slow
def test_kernels_with_declared_derivatives_can_be_distilled(monkeypatch):
    """Tangent outside the loss, gradient inside, blocks scanned and recomputed: as with attention
    that JAX differentiates itself.

    The whole step, with microbatches and both terms, is traced; the consistency term, which has the
    tangent, is also computed.
    """
    monkeypatch.setitem(flash_attention.IMPLEMENTATIONS["attention"], "opaque", opaque)
    data, teacher = clip(1, 4, 4), lambda impl: Teacher(dit(2, impl=impl), jnp.ones((4, 5)))
    config = RCMConfig(warmup=1, accumulate=2)
    student = dit(0, impl="opaque")
    key, critic = jax.random.key(0), {"critic": student, "critic_optimizer": PLAIN}
    state = jax.eval_shape(lambda: DistillState.create(student, PLAIN, key, **critic))
    for make in (rcm.make_student_step, rcm.make_critic_step):
        after, _ = jax.eval_shape(make(config, PLAIN), state, teacher("opaque"), data)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    noise = put(np.random.default_rng(5).normal(size=data.latents.shape), jnp.float32)
    draws = {"data_noise": noise, "data_time": put([0.2, 1.7])}
    run = jit(lambda model, teacher: rcm.scm_gradient(config, model, teacher, data, draws, 1.0))
    (expected, one), (actual, two) = (
        run(dit(0, impl=impl), teacher(impl)) for impl in ("reference", "opaque")
    )
    expected, actual = jax.tree.leaves(expected), jax.tree.leaves(actual)
    assert norm(expected) > 1e-3 and one["ok"].all()
    assert norm(difference(actual, expected)) < 1e-4 * norm(expected)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4)


@pytest.mark.slow
def test_draws_belong_to_their_samples():
    """A microbatch draws what it would have drawn in the whole batch; fixed times take the place of
    drawn ones, in radians of TrigFlow (NVlabs/rcm, backward_timesteps)."""
    state = DistillState(jnp.int32(3), *[None] * 5, jax.random.key(0))
    config = RCMConfig(rollout=(1.5, 1.4, 1.0))
    keys = step.sample_keys(state, 4, "noise", "time", "renoise", "renoise_time")
    draw = jit(lambda keys: rcm._sample_draws(config, keys, (1, 2, 2, 3)))
    whole, part = draw(keys), draw(jax.tree.map(lambda x: x[1::2], keys))
    for name, values in part.items():
        np.testing.assert_array_equal(values, whole[name][1::2], name)
    assert whole["noise"].shape == (4, 4, 1, 2, 2, 3)
    assert len(np.unique(whole["noise"])) == whole["noise"].size
    assert np.isinf(whole["time"][:, 0]).all()
    np.testing.assert_allclose(np.arctan(np.exp(whole["time"][2, 1:])), [1.5, 1.4, 1.0], rtol=1e-5)
