"""Dtypes of one network: how weights are stored, what flows between layers, what the float32
islands use."""

from __future__ import annotations

import dataclasses

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Names of dtypes (strings, so that a policy is hashable and can be written as JSON).

    param:   storage of weights.
    compute: what flows between layers and enters matrix products (accumulation is float32 in every
             case).
    island:  norms and modulation, softmax statistics, rotation, time embedding, sampler state.
    """

    param: str = "bfloat16"
    compute: str = "bfloat16"
    island: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value not in FLOATS:
                raise ValueError(f"Policy.{field.name} is {value!r}; allowed: {', '.join(FLOATS)}")

    @property
    def param_dtype(self):
        return np.dtype(self.param)

    @property
    def compute_dtype(self):
        return np.dtype(self.compute)

    @property
    def island_dtype(self):
        return np.dtype(self.island)


BF16 = Policy()
FLOAT32 = Policy(param="float32", compute="float32")
