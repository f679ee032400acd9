"""Steps of the training presets at real size, from random weights, latents and embeddings: seconds
and device memory of each.

    python tests/gpu/train_step.py sla rcm --json FILE      the 1.3B network, one clip at 480p
    latents; under 5 minutes python tests/gpu/train_step.py rcm data.batch=2         settings are
    those of python -m tdjax.train; sizes too: model.dit.layers=2 python tests/gpu/train_step.py sla
    --latents 20 34 60   other latents: frames, rows, columns

Every method runs in a process of its own, so that the peak of memory is its own. rCM begins where
its warm-up ends: a step of the student has both terms. Its samples are made in 1, 2, ...
loss.max_steps steps in turn, which a step's seconds show.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig
from tdjax.models.wan_dit import DiT
from tdjax.parallel.sharding import leaf_name
from tdjax.pipeline.memory import memory_limit
from tdjax.progress import GIB, device_bytes
from tdjax.train import loop, methods, networks, placement
from tdjax.train.__main__ import resolve
from tdjax.train.presets import PRESETS
from tdjax.train.settings import build
from tdjax.train.state import Batch, Teacher

PRESET = {"sla": "sla-1.3b", "rcm": "rcm-1.3b"}
FIRST = [
    "model.weights=",
    "data.batch=1",
]  # settings before those of the command line: the preset's network, without its file
LATENTS = (21, 60, 104)


def configured(name: str, settings: list[str]) -> dict:
    """The objects of a preset's settings, by the first word of their keys."""
    return {
        first: build(tree) for first, tree in resolve(PRESET[name], [*FIRST, *settings]).items()
    }


# Random numbers, made where they stay
# -------------------------------------------------------------------------------------


def network(cfg: DiTConfig, key) -> DiT:
    """Random weights. The head and the sparse projection would begin at zero, and what is before
    them without a gradient."""

    def filled(path, leaf):
        if not leaf_name(path).endswith(("head.proj.kernel", "core.proj.kernel")):
            return leaf
        return leaf.shape[-2] ** -0.5 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(filled, DiT(cfg, rngs=nnx.Rngs(key)))


def dense(cfg: DiTConfig, student: DiT) -> DiT:
    """The teacher: where the student begins, in the teacher's dtype and without a sparse
    projection."""
    wanted, leaves = orbax.abstract("dit", cfg), orbax.named_leaves(student)
    return orbax.assemble(
        wanted,
        {name: leaves[name].astype(x.dtype) for name, x in orbax.named_leaves(wanted).items()},
    )


def conditioned(
    cfg: DiTConfig, size: int, latents: tuple[int, int, int], key
) -> tuple[Batch, jax.Array]:
    """(batch, embedding of the negative prompt): normal numbers."""
    keys, text = jax.random.split(key, 3), (cfg.text_len, cfg.text_dim)
    batch = Batch(
        latents=jax.random.normal(keys[0], (size, *latents, cfg.out_channels)),
        text=jax.random.normal(keys[1], (size, *text), jnp.bfloat16),
    )
    return batch, jax.random.normal(keys[2], text, jnp.bfloat16)


def beginning(config: dict, method: methods.Method, latents: tuple[int, int, int]):
    """(state, teacher, batch) as the first step of a run takes them."""
    model = config["model"]
    student = placement.created(
        functools.partial(network, networks.trained(model.dit, model)), jax.random.key(1)
    )
    batch, negative = jax.jit(
        functools.partial(conditioned, model.dit, config["data"].batch, latents)
    )(jax.random.key(2))
    teacher = Teacher(
        model=placement.created(
            functools.partial(dense, networks.frozen(model.dit, model)), student
        ),
        negative=negative,
    )
    return placement.created(method.create, student), teacher, batch


# One method
# -------------------------------------------------------------------------------------------------


def measured(name: str, config: dict, latents: tuple[int, int, int], count: int) -> Iterator[dict]:
    """A row for each phase, as soon as there is one: compilation, XLA's count, seconds and numbers
    of `count` steps after a first one.

    The peak is that of the process so far, so rCM's critic, which needs less than its student, goes
    first.
    """
    method = methods.method(PRESETS[PRESET[name]].method, config)
    state, teacher, batch = jax.block_until_ready(beginning(config, method, latents))
    held = device_bytes()
    for phase, step in reversed(method.steps.items()):
        row = {"method": name, "phase": phase, "batch": config["data"].batch, "latents": latents}
        start = time.perf_counter()
        program = jax.jit(step, donate_argnums=0).lower(state, teacher, batch).compile()
        row |= {"compile_s": since(start), "gib": counted(program)}
        if held:
            row["gib"] |= {"held": gib(held[0]), "peak_compiled": gib(device_bytes()[1])}
        numbers, seconds, metrics = turns(method, phase, count), [], []
        for number in (numbers[0], *numbers):
            state, start = dataclasses.replace(state, step=jnp.int32(number)), time.perf_counter()
            state, values = jax.block_until_ready(program(state, teacher, batch))
            seconds.append(since(start))
            metrics.append({key: float(value) for key, value in values.items()})
        row |= {"first_s": seconds[0], "seconds": seconds[1:], "metrics": metrics[1:]}
        if held:
            row["gib"] |= {"peak": gib(device_bytes()[1]), "limit": gib(memory_limit())}
        row["finite"] = bool(loop.finite(state)) and all(
            math.isfinite(x) for m in metrics for x in m.values()
        )
        yield row


def turns(method: methods.Method, phase: str, count: int) -> list[int]:
    """The numbers of the first `count` steps of a phase after the warm-up."""
    after = itertools.count(method.schedule.warmup)
    return list(itertools.islice((n for n in after if method.schedule.phase(n) == phase), count))


def counted(program) -> dict[str, float]:
    """XLA's count of a program's memory; whole: all that is held while it runs, the state given to
    it once."""
    sizes = program.memory_analysis()
    parts = {
        part: getattr(sizes, f"{part}_size_in_bytes")
        for part in ("argument", "output", "temp", "alias")
    }
    whole = parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]
    return {part: gib(size) for part, size in (parts | {"whole": whole}).items()}


def gib(size: int) -> float:
    return round(size / GIB, 2)


def since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


# Report
# -------------------------------------------------------------------------------------------------


def show(row: dict) -> str:
    g, bad = row["gib"], sum(m["bad_samples"] + m["bad_gradients"] for m in row["metrics"])
    memory = (
        f"peak {g['peak']:.1f} GiB of {g['limit']:.1f}, held between steps {g['held']:.1f}, "
        if "peak" in g
        else ""
    )
    steps = ", ".join(f"{seconds:.2f}" for seconds in row["seconds"])
    losses = ", ".join(f"{m['loss']:.4g}" for m in row["metrics"])
    latents = " x ".join(map(str, row["latents"]))
    finite = "finite" if row["finite"] else "NOT FINITE"
    counted = f"{g['argument']:.1f} + {g['temp']:.1f} working = {g['whole']:.1f} GiB"
    lines = [
        f"{row['method']} {row['phase']}, batch {row['batch']}, latents {latents}",
        f"  compile {row['compile_s']:.1f} s, first step {row['first_s']:.2f} s, then {steps} s",
        f"  {memory}XLA counts {counted}",
        f"  losses {losses}; not finite: {bad:g} samples and gradient entries; {finite}",
    ]
    return "\n".join(lines)


def apart(name: str, args) -> list[dict]:
    """The rows of one method, from a process of its own; it prints them. Those of an unfinished one
    are the phases that ran."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [
            sys.executable,
            __file__,
            name,
            *args.settings,
            "--steps",
            str(args.steps),
            "--json",
            str(file),
        ]
        done = subprocess.run([*command, "--latents", *map(str, args.latents)])
        rows = json.loads(file.read_text()) if file.exists() else []
        return (
            rows
            if done.returncode == 0
            else [*rows, {"method": name, "rc": done.returncode, "finite": False}]
        )


def alone(name: str, args) -> list[dict]:
    """The same from this process, written after each phase."""
    rows, facts = [], {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(f"{facts['device']}, jax {facts['jax']}", flush=True)
    for row in measured(name, configured(name, args.settings), tuple(args.latents), args.steps):
        rows.append(facts | row)
        print(show(row), flush=True)
        write(args.json, rows)
    return rows


def write(file: Path | None, rows: list[dict]) -> None:
    if file:
        file.write_text(json.dumps(rows, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="sla | rcm | key=value")
    parser.add_argument("--latents", nargs=3, type=int, default=LATENTS)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each phase")
    parser.add_argument("--json", type=Path)
    args = parser.parse_intermixed_args()
    methods = [word for word in args.words if word in PRESET]
    args.settings = [word for word in args.words if word not in PRESET]
    if not methods:
        parser.error(f"name a method: {', '.join(PRESET)}")
    rows = (
        alone(methods[0], args)
        if len(methods) == 1
        else [row for name in methods for row in apart(name, args)]
    )
    write(args.json, rows)
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
