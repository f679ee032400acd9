"""What a phase does not use waits in the host's memory while it runs: the teacher and the student's
moments during the critic's turns, the critic's moments during the student's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from tdjax.models.wan_dit import HOST_MEMORY

TEACHER = "teacher"  # the name of a teacher's model beside those of a state's fields


class Turns:
    """Moves parts of a state and a teacher between devices and the host, each over its own devices:
    what leaves has left before what is needed comes.

    unused: {phase: fields of the state that its step does not use, or TEACHER}.
    """

    def __init__(self, unused: Mapping[str, tuple[str, ...]]):
        self.unused = unused
        self._waiting: dict[str, Any] = {}  # the parts, in the host's memory
        self._kinds: dict[str, str] = {}  # of memory, where they came from

    def begin(self, phase: str, state, teacher):
        """Returns (state, teacher) as the step of a phase takes them, None in place of what it does
        not use. Arrays that leave are consumed."""
        unused = self.unused.get(phase, ())
        parts = {name: part for name in unused if (part := _part(name, state, teacher)) is not None}
        away = {name: jax.tree.map(lambda x: _moved(x, HOST_MEMORY), parts[name]) for name in parts}
        jax.block_until_ready(away)
        for name, part in parts.items():
            self._kinds[name] = jax.tree.leaves(part)[0].sharding.memory_kind
            jax.tree.map(lambda x: x.delete(), part)
        back = {name: self._back(name) for name in [*self._waiting] if name not in unused}
        self._waiting |= away
        return _with(state, teacher, dict.fromkeys(parts) | back)

    def whole(self, state, teacher):
        """Returns (state, teacher) with all of their parts on the devices."""
        return _with(state, teacher, {name: self._back(name) for name in [*self._waiting]})

    def _back(self, name: str):
        kind = self._kinds[name]
        return jax.tree.map(lambda x: _moved(x, kind), self._waiting.pop(name))


def without(unused: tuple[str, ...], state, teacher):
    """Returns (state, teacher) with None in place of the parts of these names: what a step is given
    while they wait."""
    return _with(state, teacher, dict.fromkeys(unused))


def _part(name: str, state, teacher):
    return teacher.model if name == TEACHER else getattr(state, name)


def _with(state, teacher, parts: dict[str, Any]):
    """(state, teacher) with these parts in place of their own."""
    if TEACHER in parts:
        teacher = dataclasses.replace(teacher, model=parts[TEACHER])
    own = {name: part for name, part in parts.items() if name != TEACHER}
    return dataclasses.replace(state, **own) if own else state, teacher


def _moved(array: jax.Array, kind: str) -> jax.Array:
    """The same array in memory of another kind, piece by piece: those of other processes stay
    theirs."""
    place = lambda piece: SingleDeviceSharding(piece.device, memory_kind=kind)
    pieces = [jax.device_put(piece.data, place(piece)) for piece in array.addressable_shards]
    over = array.sharding.with_memory_kind(kind)
    return jax.make_array_from_single_device_arrays(array.shape, over, pieces)
