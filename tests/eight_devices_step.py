"""One call of a tiny network over eight fake devices, and over one: prints as JSON how far apart
they are, and what the program of the eight exchanges. With the flags of a test in the
environment."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import random_model
from jax.sharding import NamedSharding, PartitionSpec

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, SLAConfig
from tdjax.parallel.mesh import make_mesh
from tdjax.precision import FLOAT32

# three heads are filled up to eight, 45 tokens to 48
CFG = DiTConfig(
    dim=96,
    heads=3,
    ffn_dim=128,
    layers=2,
    freq_dim=32,
    text_dim=24,
    text_len=8,
    attention="sla",
    policy=FLOAT32,
    sla=SLAConfig(topk=0.5),
)
EXCHANGE = re.compile(r"= \(?f32\[([\d,]+)\].*? (all-[\w-]+|collective-permute|reduce-scatter)\(")


def main() -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, text, time = draw(1, 5, 6, 6, 16), draw(1, 8, 24), jnp.full(1, 500.0)
    abstract = orbax.abstract("dit", CFG)
    leaves = random_model.random_leaves("dit", CFG, 0)
    leaves["head.proj.kernel"] = draw(*leaves["head.proj.kernel"].shape)
    model = orbax.assemble(abstract, jax.tree.map(jnp.asarray, leaves))
    step = lambda model, x, time, text: model.velocity(x, time, model.text_kv(text))
    one = jax.jit(step)(model, x, time, text)
    mesh = make_mesh("sp=8", CFG)
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.device_put((model, x, time, text), whole)
    with jax.set_mesh(mesh):
        program = jax.jit(step, out_shardings=whole).lower(*args).compile()
    eight = program(*args)
    found = [
        (kind, math.prod(map(int, shape.split(","))))
        for shape, kind in EXCHANGE.findall(program.as_text())
    ]
    error = float(np.linalg.norm(eight - one) / np.linalg.norm(one))
    print(json.dumps({"error": error, "exchanges": sorted(found)}))


if __name__ == "__main__":
    main()
