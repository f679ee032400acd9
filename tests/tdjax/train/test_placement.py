"""Averages, moments and critics lie over a mesh as their weights do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from train_cases import OPTIMIZER, mesh, same_bits

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.wan_dit import DiT
from tdjax.precision import FLOAT32
from tdjax.train import checkpoints, placement
from tdjax.train.configs import LoRA, OptimizerConfig
from tdjax.train.optimizer import adamw
from tdjax.train.partial import select, shapes
from tdjax.train.state import DistillState, TrainState


def test_averages_moments_and_critics_lie_as_their_weights_do():
    cfg = DiTConfig(
        dim=32,
        heads=2,
        ffn_dim=48,
        layers=2,
        in_channels=4,
        out_channels=4,
        freq_dim=16,
        text_dim=6,
        policy=FLOAT32,
    )
    model = as_shapes(DiT, cfg)
    key, optimizer = jax.random.key(0), adamw(OptimizerConfig(b1=0.9))
    part = select(cfg, r"blocks\..*", None)
    named = orbax.named_leaves(model)
    some = jax.eval_shape(part.create, {name: named[name] for name in part.weights}, key)
    for trained in (model, some):
        state = jax.eval_shape(
            lambda m: DistillState.create(m, optimizer, key, critic=m, critic_optimizer=optimizer),
            trained,
        )
        found = orbax.named_leaves(placement.shardings(state, mesh(fsdp=2, tensor=2)))
        kernels = [name for name in found if name.endswith("blocks.self_attn.q.kernel")]
        assert len(kernels) == 7  # model, ema, critic, two moments of two optimizers
        assert {found[name].spec for name in kernels} == {P(None, "fsdp", "tensor")}
        assert found["step"].spec == found["key"].spec == P()


@pytest.mark.parametrize(
    ("stem", "down", "up"),
    [
        ("blocks.self_attn.q", P(None, "fsdp", None), P(None, None, ("tensor", "fsdp"))),
        ("blocks.cross_attn.o", P(None, ("tensor", "fsdp"), None), P(None, None, "fsdp")),
        ("blocks.up", P(None, "fsdp", None), P(None, None, ("tensor", "fsdp"))),
        ("blocks.down", P(None, ("tensor", "fsdp"), None), P(None, None, "fsdp")),
    ],
)
def test_adapters_are_divided(stem, down, up):
    """Their factors, moments and averages: the axis of a factor that is not the rank."""
    cfg = DiTConfig(dim=32, heads=2, ffn_dim=48, layers=2, policy=FLOAT32)
    adapters = shapes(cfg, select(cfg, None, LoRA(rank=3)))
    optimizer = adamw(OptimizerConfig(b1=0.9))
    state = jax.eval_shape(lambda m: TrainState.create(m, optimizer, jax.random.key(0)), adapters)
    found = orbax.named_leaves(placement.shardings(state, mesh(fsdp=2, tensor=2)))
    for factor, wanted in (("down", down), ("up", up)):
        own = [x.spec for name, x in found.items() if name.endswith(f".{factor}.{stem}")]
        assert own == [wanted] * 4, (factor, own)  # model, ema, two moments


@pytest.mark.slow
def test_a_state_is_made_and_restored_over_a_mesh(tmp_path):
    """Leaves named like a network's, so that the table lays them out."""
    w = jnp.arange(64.0).reshape(2, 4, 8)
    create = lambda w: TrainState.create(
        {"blocks": {"up": {"kernel": w}}}, OPTIMIZER, jax.random.key(1)
    )
    over = mesh(fsdp=2, tensor=2)
    laid, plain = placement.created(create, w, mesh=over), placement.created(create, w)
    same_bits(laid, plain)
    kernel = lambda state: state.model["blocks"]["up"]["kernel"]
    assert (
        kernel(laid).sharding.spec == P(None, "fsdp", "tensor")
        and kernel(plain).sharding.is_fully_replicated
    )
    path = checkpoints.save(tmp_path, 1, laid, {})
    back = checkpoints.restore(path, placement.abstract(jax.eval_shape(create, w), over))
    same_bits(back, plain)
    assert (
        kernel(back).sharding == kernel(laid).sharding
        and back.opt[0].mu["blocks"]["up"]["kernel"].sharding == kernel(laid).sharding
    )
    assert not kernel(laid).is_deleted() and w.shape == (2, 4, 8)
