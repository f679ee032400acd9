"""What the stages of a pipeline have in common: they are timed, they are named where memory runs
out, and each has its programs and its weights when it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Program, Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.progress import Stages


class Stage:
    """Base of `TextEncoding`, `ImageEncoding`, `Denoising` and `VAECoding`.

    Each has `programs(request, plan)`, which it will run, and `run(request, plan, ...)`. Its name
    is that of its row of the plan: "text", "vae encode", "dit", "dit_low" or "vae decode".
    """

    def __init__(self, compiler: Programs, stages: Stages):
        self.compiler = compiler
        self.stages = stages

    @contextlib.contextmanager
    def timed(self, label: str, plan: ExecutionPlan, stage: str) -> Iterator[None]:
        """Times what runs within, as `label`; running out of memory becomes an OutOfMemory."""
        with memory.naming(label, plan, stage), self.stages(label):
            yield

    def compiled(self, programs: Sequence[Program], plan: ExecutionPlan, stage: str) -> list:
        """Returns the executables of programs, once they are there."""
        with memory.naming(f"compile {programs[0].label}", plan, stage):
            return self.compiler.wait(programs)

    def loaded(self, component: Component, plan: ExecutionPlan, stage: str) -> Any:
        """Returns the module of a component, which is loaded in a row of its own unless it is there
        already."""
        if component.module is None:
            with self.timed(f"load {plan.of(stage).component}", plan, stage):
                component.load()
        return component.module

    def ready(
        self, programs: Sequence[Program], component: Component, plan: ExecutionPlan, stage: str
    ) -> tuple[list[Callable], Any]:
        """Returns (executables, module): made side by side where memory is ample, else the programs
        first, as compiling takes memory too."""
        if plan.keep_resident:
            for program in programs:
                program.begin()
            module = self.loaded(component, plan, stage)
            return self.compiled(programs, plan, stage), module
        executables = self.compiled(programs, plan, stage)
        return executables, self.loaded(component, plan, stage)
