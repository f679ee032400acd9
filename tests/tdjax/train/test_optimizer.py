import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import put
from flax import nnx
from tolerances import assert_close

from tdjax.train import optimizer
from tdjax.train.configs import OptimizerConfig
from tdjax.train.optimizer import adamw


class Two(nnx.Module):
    def __init__(self):
        draw = np.random.default_rng(0).normal
        self.a = nnx.Param(put(draw(size=(3, 5)), jnp.float32))
        self.b = nnx.Param(put(draw(size=7), jnp.float32))


def gradients(n, model):
    draw = np.random.default_rng(1).normal
    return [jax.tree.map(lambda x: put(draw(size=x.shape), jnp.float32), model) for _ in range(n)]


def run(config, model, grads):
    """The models after each update."""
    transform, out = adamw(config), []
    opt = transform.init(model)
    for g in grads:
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = transform.update(g, opt, model)
            model = optax.apply_updates(model, updates)
        out.append(model)
    return out, opt


@pytest.mark.slow
@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_torch_takes_the_same_steps(b1):
    """AdamW with its linear warm-up, as the published runs are configured."""
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=0.1, b1=b1, warmup=3, weight_decay=0.2)
    model = Two()
    grads = gradients(6, model)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(model)]
    adam = torch.optim.AdamW(theirs, lr=0.1, betas=(b1, 0.999), eps=1e-8, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda n: min(1.0, 1e-6 + (1 - 1e-6) * n / 3)
    )
    for g, ours in zip(grads, run(config, model, grads)[0], strict=True):
        for p, leaf in zip(theirs, jax.tree.leaves(g), strict=True):
            p.grad = torch.tensor(np.asarray(leaf))
        adam.step()
        schedule.step()
        for p, leaf in zip(theirs, jax.tree.leaves(ours), strict=True):
            assert_close(leaf, p.detach().numpy(), "float32")


def test_without_momentum_one_moment_is_stored():
    model = Two()
    size = lambda config: sum(x.size for x in jax.tree.leaves(run(config, model, [])[1]) if x.ndim)
    assert size(OptimizerConfig()) == 22 and size(OptimizerConfig(b1=0.9)) == 44


@pytest.mark.slow
def test_bad_entries_count_as_zero():
    config, model = OptimizerConfig(learning_rate=0.1, warmup=0, clip=1.0), Two()
    good = gradients(1, model)[0]
    good.a = nnx.Param(good.a[...].at[0, 0].set(0).at[1, 1].set(0).at[2, 2].set(0))
    bad = jax.tree.map(lambda x: x, good)
    bad.a = nnx.Param(
        good.a[...].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2, 2].set(-jnp.inf)
    )
    for a, b in zip(
        jax.tree.leaves(run(config, model, [bad])[0][0]),
        jax.tree.leaves(run(config, model, [good])[0][0]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_clipping():
    model = Two()
    grads = gradients(1, model)
    clipped = jax.tree.map(lambda g: g * (0.5 / float(optax.tree.norm(grads[0]))), grads[0])
    config = OptimizerConfig(
        learning_rate=0.1, warmup=0, eps=1.0
    )  # a large eps, or Adam would not see the scale
    ours = run(dataclasses.replace(config, clip=0.5), model, grads)[0][0]
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(run(config, model, [clipped])[0][0]), strict=True
    ):
        assert_close(a, b, "float32")


def test_learning_rates():
    rate = lambda **kw: [
        float(optimizer.learning_rate(OptimizerConfig(learning_rate=1.0, **kw))(n))
        for n in (0, 5, 10, 20, 25, 30, 40)
    ]
    np.testing.assert_allclose(rate(warmup=10), [1e-6, 0.5, 1, 1, 1, 1, 1], rtol=1e-5, atol=1e-7)
    linear = rate(warmup=10, decay="linear", steps=30, decay_from=2 / 3)
    np.testing.assert_allclose(linear, [1e-6, 0.5, 1, 1, 0.5, 0, 0], rtol=1e-5, atol=1e-7)
    cosine = rate(warmup=10, decay="cosine", steps=30, final=0.2)
    np.testing.assert_allclose(
        cosine,
        [1e-6, 0.5, 1, 0.6, 0.2 + 0.4 * (1 + np.cos(0.75 * np.pi)), 0.2, 0.2],
        rtol=1e-5,
        atol=1e-7,
    )
    assert rate(warmup=0) == [1.0] * 7


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("learning_rate is 0; it must be positive", {"learning_rate": 0}),
        ("b1 1.0 and b2 0.999 must be", {"b1": 1.0}),
        ("weight_decay is -0.1; it must not be negative", {"weight_decay": -0.1}),
        ("decay is 'step'; allowed: constant, linear, cosine", {"decay": "step", "steps": 1000}),
        ("decay 'linear' with steps None; only a decay has steps", {"decay": "linear"}),
        ("decay 'constant' with steps 5", {"steps": 5}),
        ("warmup 100 must be less than steps 50", {"decay": "cosine", "steps": 50}),
        ("decay_from is 1.0; it is a share", {"decay_from": 1.0}),
        ("clip is 0.0; it must be positive, or None", {"clip": 0.0}),
    ],
)
def test_refusals(message, wrong):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**wrong)
