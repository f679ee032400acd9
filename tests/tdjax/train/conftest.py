"""Files of a tiny network to train."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import random_model
from run_cases import TINY

from tdjax.checkpoints import orbax
from tdjax.precision import Policy
from tdjax.train.shards import torch_bytes, write_shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, a negative embedding, and weights of a tiny network in our layout and with a sparse
    projection."""
    out, rng = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    samples = [
        (rng.normal(size=(3, 4, 4, 4)), rng.normal(size=(7, 6)), f"prompt {i}") for i in range(5)
    ]
    for number in range(2):
        write_shard(
            out / "shards" / f"shard_{number:06}.tar",
            samples[3 * number : 3 * number + 3],
            3 * number,
        )
    (out / "negative.pt").write_bytes(
        torch_bytes(rng.normal(size=(7, 6)).astype(ml_dtypes.bfloat16))
    )
    bf16 = dataclasses.replace(TINY, policy=Policy())
    orbax.save(out / "dense", random_model.random_leaves("dit", bf16, 1), "dit", bf16)
    sparse = dataclasses.replace(bf16, attention="sla")
    orbax.save(out / "sparse", random_model.random_leaves("dit", sparse, 2), "dit", sparse)
    return out
