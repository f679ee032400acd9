"""XLA's count of a training step's memory on each of several GPUs that are only described (H100,
80 GB): nothing is run, and no GPU is needed.

    JAX_PLATFORMS=cpu python tests/gpu/train_memory.py rcm-14b fsdp=2,sp=4 student
    loss.offload=true --json rows.jsonl

Settings are those of python -m tdjax.train; latents are those of 480p, or others: --latents 21 90
160. A row of --json (JSON lines) has GiB of a device: what the step is given, what it works with,
and both together; under loss.offload what is not used is on the host. Takes one to two minutes on
two cores, for 64 GPUs as for 4. Needs jax 0.11 or newer with the CUDA plugin (`.ci/run`, last
step). cuDNN cannot be called here: our own attention kernel stands for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from cuda_aot import described
from gpu.train_step import LATENTS, conditioned, counted
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.flash_attention import cudnn, triton
from tdjax.checkpoints import orbax
from tdjax.parallel.mesh import AXES, parse_mesh
from tdjax.presets import PRESETS as MODELS
from tdjax.train import networks, partial, placement, plan
from tdjax.train.__main__ import resolve
from tdjax.train.methods import method
from tdjax.train.presets import PRESETS
from tdjax.train.settings import build
from tdjax.train.state import Teacher
from tdjax.train.turns import TEACHER


def fused(q, k, v, scale=None, return_residual=False):
    """Our kernel in the place of cuDNN's."""
    o = triton.attention(q, k, v, scale=scale)
    return (o, jnp.zeros(q.shape[:3], q.dtype)) if return_residual else o


def given(name: str, config: dict, latents: tuple[int, int, int], mesh, phase: str):
    """(step, state, teacher, batch) of a phase as shapes over a mesh."""
    model, data = config["model"], config["data"]
    stored = MODELS[model.weights].config
    student = networks.trained(stored, model)
    chosen = partial.select(student, config["optimizer"].train, model.lora)
    groups = plan.groups(dict(mesh.shape))
    parts = plan.accumulate(data.batch, groups, data.per_device)
    config = config | {"loss": plan.with_parts(config["loss"], parts)}
    way = method(name, config)
    state = jax.eval_shape(way.create, partial.shapes(student, chosen))
    frozen = partial.weight_only(orbax.abstract("dit", networks.frozen(stored, model)))
    shapes = lambda: conditioned(stored, data.batch, latents, jax.random.key(0))
    batch, negative = jax.eval_shape(shapes)
    teacher = Teacher(model=frozen, negative=negative)
    unused = way.unused.get(phase, ())
    if TEACHER in unused and chosen is None:
        teacher = dataclasses.replace(teacher, model=None)
    own = {part: None for part in unused if part != TEACHER}
    state = dataclasses.replace(state, **own)
    first = plan.RULES["batch"]
    over = tuple(axis for axis in first if mesh.shape.get(axis, 1) > 1)
    apart = NamedSharding(mesh, PartitionSpec(over or None))
    lay = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=apart)
    batch = jax.tree.map(lay, batch)
    return way.steps[phase], *(placement.abstract(x, mesh) for x in (state, teacher)), batch


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("mesh", help="fsdp=4")
    parser.add_argument("phase", help="student, critic or sla")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--latents", nargs=3, type=int, default=LATENTS)
    parser.add_argument("--json", type=Path, help="a row is added to this file")
    args = parser.parse_intermixed_args()
    cudnn.fused = fused
    jax.default_backend = lambda: "gpu"
    sizes = {AXES[axis]: size for axis, size in parse_mesh(args.mesh).items()}
    mesh = described("sm90", sizes)
    config = {key: build(tree) for key, tree in resolve(args.preset, args.settings).items()}
    start = time.perf_counter()
    step, *arrays = given(
        PRESETS[args.preset].method, config, tuple(args.latents), mesh, args.phase
    )
    with jax.set_mesh(mesh):
        out = (jax.tree.map(lambda x: x.sharding, arrays[0]), NamedSharding(mesh, PartitionSpec()))
        lowered = jax.jit(step, donate_argnums=0, out_shardings=out).lower(*arrays)
        program = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
    device = mesh.devices.flat[0].device_kind
    row = {"device": f"{device}, described", "jax": jax.__version__}
    row |= {"python": platform.python_version(), "date": str(datetime.date.today())}
    row |= {"stage": "train memory", "preset": args.preset, "mesh": args.mesh}
    row |= {"phase": args.phase, "settings": args.settings, "latents": args.latents}
    row |= {"gib": counted(program)}
    row["compile_s"] = round(time.perf_counter() - start, 1)
    print(json.dumps(row), flush=True)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
