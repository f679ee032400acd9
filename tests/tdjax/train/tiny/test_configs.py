"""The sizes of the recipe: parameters counted without allocating them, bytes of the package, one
block to a latent frame."""

import dataclasses

import jax
import numpy as np
import pytest

from tdjax.checkpoints import orbax
from tdjax.train.tiny import configs

KINDS = {"vae": configs.VAE, "text": configs.TEXT, "dense": configs.DIT, "sla": configs.DIT_SLA}


def leaves(name, **changes):
    cfg = dataclasses.replace(configs.stored(KINDS[name]), **changes)
    return jax.tree.leaves(orbax.abstract(name if name in ("vae", "text") else "dit", cfg))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vae", 807_899),  # as many as diffusers' AutoencoderKLWan of these sizes
        ("text", 256 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 256 + 32 * 4 + 2 * 128) + 128),
        ("dense", 6_172_680),
        ("sla", 6_172_680 + 6 * (64 * 64 + 64)),
    ],
)
def test_parameters(name, parameters):
    assert sum(x.size for x in leaves(name)) == parameters


def test_everything_fits_in_ten_megabytes():
    """VAE 1.62, text 0.72, transformer with int8 layers and sparse attention 6.94: 9.28 MB."""
    parts = leaves("vae") + leaves("text") + leaves("sla", linear="int8")
    total = sum(x.size * x.dtype.itemsize for x in parts)
    assert total == 1_615_798 + 722_688 + 6_941_520 < 10_000_000
    assert {x.dtype for x in leaves("vae") + leaves("text")} == {np.dtype("bfloat16")}


def test_a_block_is_a_latent_frame():
    t, h, w = configs.SIZE.latent_grid
    assert (t, h, w) == (9, 8, 8) and configs.SIZE.tokens(configs.DIT.patch) == 576
    sla = configs.DIT_SLA.sla
    assert sla.block_q == sla.block_k == h * w
    assert max(1, int(sla.topk * t)) == 3


def test_widths_suit_the_kernels_and_each_other():
    dit = configs.DIT
    assert all(width % 128 == 0 for width in (dit.dim, dit.ffn_dim)) and dit.head_dim == 64
    assert (
        dit.out_channels == configs.VAE.latent_channels
        and dit.embed_channels == 11
        and dit.task == "t2v"
    )
    assert (dit.text_dim, dit.text_len) == (configs.TEXT.dim, configs.TEXT.text_len)


def test_stored_changes_the_storage_alone():
    cfg = configs.stored(configs.DIT)
    assert (cfg.policy.param, cfg.policy.compute) == ("bfloat16", "float32")
    assert dataclasses.replace(cfg, policy=configs.DIT.policy) == configs.DIT
