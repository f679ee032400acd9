"""The steps of the 1.3B presets at 480p, without a GPU: the script that runs them on one, and the
kernels that they lower to."""

import math
import re

import described
import jax
import jax.numpy as jnp
import pytest
from gpu import train_step

from pallas_kernels.flash_attention import cudnn, triton
from tdjax.train import run
from tdjax.train.presets import PRESETS

TOKENS = 21 * 30 * 52
DENSE = {"forward_kernel", "query_kernel", "key_kernel"}
# (method, phase) -> kernels. Of rCM the student's step, in which is all that the critic's has, with
# fewer forward passes
KERNELS = {
    ("rcm", "student"): DENSE | {"tangent_kernel"},
    ("sla", "sla"): (
        DENSE | {"attend_kernel", "choose_kernel", "summaries_kernel", "query_sums_kernel"}
    ),
}
FEWER = {"rcm": ["loss.guidance=1", "loss.warmup=0"], "sla": []}


def abstract(name, settings=(), latents=train_step.LATENTS):
    """(method, abstract state, teacher and batch) of a preset."""
    config = train_step.configured(name, list(settings))
    method = run.method(PRESETS[train_step.PRESET[name]].method, config)
    return method, jax.eval_shape(lambda: train_step.beginning(config, method, latents))


@pytest.mark.slow
@pytest.mark.parametrize("name, phase", KERNELS)
def test_every_attention_is_a_kernel(monkeypatch, name, phase):
    def fused(q, k, v, scale, return_residual=False):
        """cuDNN cannot be called here; our kernels stand for it, so that the choice of "auto" on a
        GPU stays what it is."""
        o = triton.attention(q, k, v, scale=scale)
        return (o, jnp.zeros(q.shape[:3], q.dtype)) if return_residual else o

    monkeypatch.setattr(cudnn, "fused", fused)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    method, (state, teacher, batch) = abstract(name, FEWER[name])
    assert (
        state.model.cfg.remat
        and state.model.cfg.layers == 30
        and batch.latents.shape == (1, 21, 60, 104, 16)
    )
    text = described.lower(
        described.trace(jax.jit(method.steps[phase], donate_argnums=0), state, teacher, batch)
    ).as_text()
    assert KERNELS[name, phase] <= set(re.findall(r'name = "(\w+_kernel)"', text))
    shapes = {
        tuple(map(int, found.split("x")))
        for found in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", text)
    }
    assert any(TOKENS in shape for shape in shapes)
    assert not [
        shape for shape in shapes if shape[-1] == TOKENS and math.prod(shape) > 100 * TOKENS
    ]  # scores, or a chunk of them
    largest = (
        30,
        1,
        TOKENS,
        1536,
    )  # what the blocks read, which is all that a network keeps for its gradient
    assert max(map(math.prod, shapes)) == math.prod(largest)


def test_turns_are_those_of_the_loop():
    method, (state, teacher, _) = abstract("rcm", latents=(2, 4, 4))
    assert train_step.turns(method, "student", 3) == [1000, 1005, 1010]
    assert train_step.turns(method, "critic", 5) == [1001, 1002, 1003, 1004, 1006]
    assert {x.dtype for x in jax.tree.leaves(state.model)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(teacher.model)} == {jnp.dtype("bfloat16")}
