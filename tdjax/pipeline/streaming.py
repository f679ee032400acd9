"""A transformer whose blocks wait in the host's memory and pass through the device one after
another, for devices that cannot hold it.

A step is one program before the blocks, one for every block alike, and one after them, called from
the host. The next block is on its way while one runs: its copy is asked for before the block is
called, as what is asked for after a call may wait for that call. Nothing is compiled anew for
another step, prompt or number of steps. Latents are those of the whole transformer to rounding
(tested), and not bit by bit: the compiler sees each block by itself here.

A scan with copies inside one program would leave their order, and how many blocks are on the device
at a time, to the compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax.checkpoints import orbax
from tdjax.config import SamplerConfig
from tdjax.models.wan_dit import HOST_MEMORY, rotation
from tdjax.pipeline.compilation import Program, Programs
from tdjax.sampling import few_step, flow

LABEL = "denoise"
BLOCKS = "blocks."  # how names of stacked leaves begin


class Streamed(NamedTuple):
    """outer: a transformer without the leaves of its blocks, on the device. blocks: each by itself,
    in page-locked memory of the host."""

    outer: Any
    blocks: tuple[Any, ...]


def waiting() -> jax.sharding.Sharding:
    """Page-locked memory of the host, beside the first device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind=HOST_MEMORY)


def with_one_block(outer, block) -> Any:
    """A transformer of one layer on the device: that block, wherever it is, and the leaves of
    `outer`."""
    abstract = orbax.abstract("dit", dataclasses.replace(outer.cfg, layers=1))
    leaves = orbax.named_leaves(on_device(block)).items()
    layer = {f"{BLOCKS}{name}": x[None] for name, x in leaves}
    known = orbax.named_leaves(abstract)  # without factors of LoRA files that were there before
    own = {name: x for name, x in layer.items() if name in known}
    return orbax.assemble(abstract, orbax.named_leaves(outer) | own)


def block_of(one, like) -> Any:
    """The block of a transformer of one layer. like: blocks of the transformer that it belongs to,
    or their shapes: its config, which programs depend on, has another number of layers."""
    return jax.tree.unflatten(
        jax.tree.structure(like), [leaf[0] for leaf in jax.tree.leaves(one.blocks)]
    )


def step_begin(outer, state, text, image, schedule, *, doubled: bool):
    """What comes before the blocks of a step: (stream [b l d], e [b d], e0 [b 6 d], the text as
    blocks read it [b s d]); arguments as those of `compilation.denoise` and `denoise_guided`.

    doubled: the batch holds the prompt and the negative prompt.
    """
    many = isinstance(state, few_step.TeacherState)
    x, u = (state.x, schedule.time[0]) if many else (state, schedule[1][0])
    timestep = jnp.full(x.shape[:1], flow.TIME_SCALE * u, jnp.float32)
    if doubled:
        twice = lambda a: None if a is None else jnp.concatenate([a, a])
        x, timestep, image = map(twice, (x, timestep, image))
    return *outer.begin(x, timestep, image), outer.embed_text(text)


def step_block(block, x, e0, text, *, grid: tuple[int, int, int]):
    """One block: x [b l d] -> [b l d]. grid: patches along t, h and w."""
    kv = block.cross_attn.text_kv(text)
    return block(x, e0, kv, rotation(grid, block.cfg))


def step_end(
    outer, x, e, state, schedule, *, grid: tuple[int, int, int], sampler: str, scale: float | None
):
    """What comes after the blocks of a step: (state, finite bool[1]). scale: of guidance, of a
    doubled batch; None without one."""
    v = outer.end(x, e, grid)
    if scale is not None:
        v = few_step.guide(*jnp.split(v, 2), scale)
    velocity = lambda x, timestep: v
    if isinstance(state, few_step.TeacherState):
        return few_step.teacher_from(velocity, state, schedule)
    noise, times = schedule
    return few_step.sample_from(velocity, state, noise, times, sampler)


def programs(
    compiler: Programs, model: Any, sampler: SamplerConfig, state, text, image, schedule
) -> list[Program]:
    """Returns the three programs of a step for these inputs or their shapes. model: shapes of a
    `Streamed`, of whose blocks one will do."""
    outer, block = model.outer, compiler.shapes_of(model.blocks[0])
    latents = state if sampler.few_step else state.x
    grid = outer.grid(latents)
    inputs = outer, state, text, image, schedule
    how = {"doubled": sampler.guided}
    x, e, e0, read = jax.eval_shape(lambda *args: step_begin(*args, **how), *inputs)
    x, e, e0, read = compiler.shapes_of((x, e, e0, read))
    scale = sampler.guidance_scale if sampler.guided else None
    last = {"grid": grid, "sampler": sampler.sampler, "scale": scale}
    return [
        compiler.request(LABEL, step_begin, *inputs, **how),
        compiler.request(LABEL, step_block, block, x, e0, read, donate=(1,), grid=grid),
        compiler.request(LABEL, step_end, outer, x, e, state, schedule, donate=(3,), **last),
    ]


def step(runs: Sequence[Any], model: Streamed, state, text, image, schedule):
    """One step of a sampler by the executables of `programs` -> (state, finite bool[1]).

    On the device are three blocks at most: one that runs, one that waits, one that arrives. The
    host waits for the one that will run next to be there, not for results.
    """
    begin, block, end = runs
    x, e, e0, read = begin(model.outer, state, text, image, schedule)
    coming = on_device(model.blocks[0])
    for following in (*model.blocks[1:], None):
        here = jax.block_until_ready(coming)
        coming = None if following is None else on_device(following)
        x = block(here, x, e0, read)
    return end(model.outer, x, e, state, schedule)


def on_device(block):
    """The block on its way to the device; returns at once."""
    there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.device_put(block, there)
