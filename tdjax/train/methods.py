"""The methods: their step functions, whose turn it is, and the state that each begins with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tdjax.train import flow_matching, loop, rcm, sla
from tdjax.train.configs import RCMConfig
from tdjax.train.optimizer import adamw, learning_rate
from tdjax.train.state import DistillState, TrainState
from tdjax.train.turns import TEACHER

# What the turns of rCM do not use of the state's fields and the teacher.
UNUSED = {"student": ("critic_opt",), "critic": ("ema", "opt", TEACHER)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What a run repeats. steps: {phase: step function}, in the order of `schedule`.
    create(student) -> state at step 0. rates: {phase: learning rate of its update 0, 1, ...}.
    unused: what the step of a phase leaves as it is and does not read, as of `turns.Turns`; empty
    where all of it stays on the devices."""

    steps: dict[str, loop.Step]
    schedule: loop.Schedule
    create: Callable[[Any], Any]
    rates: dict[str, Callable[[int], Any]]
    unused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def method(name: str, config: dict[str, Any]) -> Method:
    """Returns the parts of a method: "flow", "sla" or "rcm".

    config: the objects of a configuration by the first word of their keys.
    """
    if name == "rcm":
        return _distillation(config)
    make = {"flow": flow_matching, "sla": sla}[name].make_step
    optimizer = adamw(config["optimizer"])
    key = jax.random.key(config["run"].seed)
    return Method(
        steps={name: make(config["loss"], optimizer)},
        schedule=loop.Schedule(cycle=(name,)),
        create=functools.partial(TrainState.create, optimizer=optimizer, key=key),
        rates={name: learning_rate(config["optimizer"])},
    )


def _distillation(config: dict[str, Any]) -> Method:
    loss = config["loss"]
    optimizer = adamw(config["optimizer"])
    create = functools.partial(
        DistillState.create, optimizer=optimizer, key=jax.random.key(config["run"].seed)
    )
    steps = {"student": rcm.make_student_step(loss, optimizer)}
    schedule = rcm_schedule(loss)
    rates = {"student": learning_rate(config["optimizer"])}
    if not loss.dmd_weight:
        return Method(steps=steps, schedule=schedule, create=create, rates=rates)
    second = adamw(config["critic"])
    steps["critic"] = rcm.make_critic_step(loss, second)
    both = lambda model: create(model, critic=model, critic_optimizer=second)
    rates["critic"] = learning_rate(config["critic"])
    unused = UNUSED if loss.offload else {}
    return Method(steps=steps, schedule=schedule, create=both, rates=rates, unused=unused)


def rcm_schedule(loss: RCMConfig) -> loop.Schedule:
    """Returns whose turn it is: after the warm-up the student's once in `frequency` steps, the
    critic's in the others; always the student's where there is no critic."""
    if not loss.dmd_weight:
        return loop.Schedule(cycle=("student",))
    turns = ("student", *["critic"] * (loss.frequency - 1))
    return loop.Schedule(cycle=turns, warmup=loss.warmup)
