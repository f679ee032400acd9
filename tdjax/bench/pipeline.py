"""Rows of the bench for a whole pipeline with random weights: compiling all of it, then runs from
prompt to frames and to mp4."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from tdjax.bench.stages import (
    Row,
    host_peak,
    label,
    mesh_label,
    placed,
    random_weights,
    row_of,
    timed,
    variants,
)
from tdjax.checkpoints import orbax
from tdjax.checkpoints.compiled import WORTH_KEEPING
from tdjax.checkpoints.locate import Located
from tdjax.config import DiTConfig, TextConfig, VAEConfig, VideoSize, to_dict
from tdjax.errors import UsageError
from tdjax.media.video import Writer
from tdjax.pipeline import memory
from tdjax.pipeline.components import Component, PlannedComponent
from tdjax.pipeline.options import PipelineOptions
from tdjax.pipeline.pipeline import Pipeline
from tdjax.pipeline.result import Result
from tdjax.progress import Stages
from tdjax.text.tokenizer import Tokens

# The component that runs in a stage of the pipeline, and the stage's programs.
USES = {
    "text": ("text", ("encode_text",)),
    "vae encode": ("vae", ("encode_first", "encode_later")),
    "denoise": ("dit", ("denoise",)),
    "vae decode": ("vae", ("decode_first", "decode_later")),
}


class RandomComponent(PlannedComponent):
    """A component without files: loading it draws its weights."""

    def read(self) -> Any:
        return placed(random_weights(orbax.abstract(self.kind, self.config)), self.mesh)

    def fingerprint(self) -> dict:
        return {"name": None, "source": "random weights"}


def e2e_rows(
    dit: DiTConfig,
    vae: VAEConfig,
    text: TextConfig,
    size: VideoSize,
    args,
    mesh: Mesh | None = None,
) -> Iterator[Row]:
    """For each of `variants` what compiling takes, before there are weights; then its runs, all
    weights resident.

    Two experts are represented by one of them for all steps: they are alike, run the same program,
    and need not both fit.
    """
    shared: dict[str, Component] = {
        "vae": RandomComponent("vae", "vae", vae),
        "text": RandomComponent("text", "text", text),
    }
    call: dict[str, Any] = {"num_steps": args.num_steps}
    if dit.task == "i2v":
        call["image"] = np.full((size.height, size.width, 3), 127, np.uint8)
    pipes = []
    for cfg in variants(dit, args):
        make = functools.partial(opened, cfg, shared, size, args.model, mesh)
        pipe, cold, again = compiled(make, call)
        pipes.append(pipe)
        for what, seconds in (("cold", cold), ("from the persistent cache", again)):
            yield row_of(
                "compile",
                f"all stages, {what}, {label(cfg)}",
                [1e3 * seconds],
                mesh=mesh_label(mesh),
                **counted_memory(pipe),
            )
    for pipe in pipes:
        yield from run_rows(pipe, call, args)
        pipe.free("dit")
    for component in shared.values():
        component.free()


def opened(
    cfg: DiTConfig,
    shared: dict[str, Component],
    size: VideoSize,
    name: str,
    mesh: Mesh | None = None,
) -> Pipeline:
    """A pipeline without files, tokenizer and prompt cache, whose text encoder and VAE others
    share."""
    located = Located(name=name, layout="published", preset=None, facts=to_dict(size))
    components = {"dit": RandomComponent("dit", "dit", cfg), **shared}
    options = PipelineOptions(mesh=mesh_label(mesh))
    return Pipeline(located, components, options, stages=Stages(show=False))


# -- compiling -------------------------------------------------------------------------------------


def compiled(make: Callable[[], Pipeline], call: dict) -> tuple[Pipeline, float, float]:
    """(pipeline, seconds to compile its programs with an empty persistent cache, seconds for a
    second one that finds them there).

    Shapes of the networks, which both need and a process makes once, are not counted.
    """
    seconds = []
    with empty_cache():
        for pipe in (first := make(), make()):
            request = pipe.request("bench", **call)
            plan = pipe.plan(request)
            if not plan.keep_resident or plan.stream_transformer:
                raise UsageError(
                    "stage e2e with weights that do not stay on the device",
                    plan.table(),
                    "use --linear int8, or --stage text, vae or dit, which hold one component each",
                )
            jax.clear_caches()
            start = time.perf_counter()
            pipe.preparation.compile(request, plan, (False,))
            seconds.append(time.perf_counter() - start)
    return first, *seconds


@contextlib.contextmanager
def empty_cache():
    """The persistent cache of compiled programs in a new folder, as `tdjax.generate` sets it; then
    as it was before."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]

    def use(*values) -> None:
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it opens its folder once

    with tempfile.TemporaryDirectory() as folder:
        use(folder, WORTH_KEEPING)
        try:
            yield
        finally:
            use(*before)


def counted_memory(pipe: Pipeline, *stages: str) -> dict[str, int | None]:
    """Bytes of the weights of these stages (or of all), and of the largest program beside its own
    weights."""
    counted = pipe.memory()
    weights, working = {}, []
    for name, functions in (USES[stage] for stage in stages or USES):
        used = [counted[function] for function in functions if function in counted]
        if used:
            weights[name] = memory.weight_bytes(name, pipe.components[name].config, pipe.mesh)
            working.append(max(used) - weights[name])
    return {
        "weights": sum(weights.values()),
        "working": max(working),
        "host_peak": host_peak(pipe.stages),
    }


# -- running ---------------------------------------------------------------------------------------


def run_rows(pipe: Pipeline, call: dict, args) -> Iterator[Row]:
    """Each stage by the pipeline's own clock, and the whole by the wall's; every run has another
    seed."""
    for name, component in pipe.components.items():
        with pipe.stages(f"random weights of {name}"):
            component.load()
    seeds, kind, mesh = itertools.count(), label(pipe.config), mesh_label(pipe.mesh)
    clip(pipe, call, next(seeds))  # the warm-up, in which kernels are checked too
    first = len(pipe.stages.rows)
    times = timed(lambda: clip(pipe, call, next(seeds)), args.repeats)
    stages: dict[str, list[float]] = {}
    for row in pipe.stages.rows[first:]:
        stages.setdefault(row.name, []).append(1e3 * row.seconds)
    for name, each in stages.items():
        counted = counted_memory(pipe, name)
        yield row_of(name, f"in the pipeline, {kind}", each, mesh=mesh, **counted)
    what, counted = f"prompt to frames on the host, {kind}", counted_memory(pipe)
    yield row_of("end to end", what, times, mesh=mesh, **counted)
    if args.save:
        path = args.save / f"{pipe.name}-{pipe.config.attention}-{pipe.config.linear}.mp4"
        times = timed(lambda: clip_to_file(pipe, call, next(seeds), path), args.repeats)
        what, counted = f"prompt to mp4, {kind}", counted_memory(pipe)
        yield row_of("end to end", what, times, mesh=mesh, **counted)


def clip(pipe: Pipeline, call: dict, seed: int, **more) -> Result:
    """Tokens of a prompt, as many as there may be, to uint8 frames on the host."""
    ones = np.ones((1, pipe.info.text_len), np.int32)
    plan = pipe.plan(pipe.request("bench", **call))
    (row,) = pipe.text_encoding.encode(Tokens(ones, ones), plan)
    return pipe(prompt_embeds=row[None], seed=seed, **call, **more)


def clip_to_file(pipe: Pipeline, call: dict, seed: int, path: Path) -> None:
    """The same to a complete file, encoded while frames are decoded, as `tdjax.generate` does it.
    Random weights make noise, the worst case for an encoder."""
    writer = Writer(path, overwrite=True)
    try:
        clip(pipe, call, seed, on_frames=lambda _, frames: writer.put(frames))
        writer.close()
    finally:
        writer.cancel()  # of no effect on one that is closed
