"""Dotted keys: types, objects inside objects, what the classes say of themselves."""

import dataclasses

import pytest
from run_cases import built

from tdjax.train import settings
from tdjax.train.configs import DCM, SCM, LogNormal
from tdjax.train.presets import METHODS
from tdjax.train.settings import Tree
from tdjax.train.tiny import settings as tiny


def test_values_have_their_types():
    config = built(
        "rcm-1.3b",
        "run.steps=7",
        "optimizer.learning_rate=1e-3",
        "optimizer.clip=2",
        "loss.dmd_limit=5",
        "model.offline=True",
    )
    assert config["run"].steps == 7
    assert config["model"].offline is True
    assert config["loss"].dmd_limit == 5.0
    assert (config["optimizer"].learning_rate, config["optimizer"].clip) == (1e-3, 2.0)
    config = built("fm-tiny", "model.dit.patch=(1,2,2)", "optimizer.clip=none")
    assert config["model"].dit.patch == (1, 2, 2)
    assert config["optimizer"].clip is None
    assert built("sla-14b", "data.path=a=b.c")["data"].path == "a=b.c"


def test_objects_inside_objects():
    time = built("sla-14b", "loss.time.deviation=2")["loss"].time
    assert time == LogNormal(mean=1.5, deviation=2.0)  # the mean is this loss's default
    assert built("sla-14b", "loss.time=uniformshift", "loss.time.shift=3")["loss"].time.shift == 3.0
    loss = built("rcm-14b", "loss.consistency=DCM", "loss.consistency.steps=50")["loss"]
    assert loss.consistency == DCM(steps=50)
    assert built("rcm-14b", "loss.consistency=none")["loss"].consistency is None
    loss = built("rcm-14b", "loss.consistency.kappa=0.3")["loss"]
    assert loss.consistency == SCM(kappa=0.3, time=LogNormal(mean=1.5))
    assert built("sla-14b", "model.sla.topk=0.2")["model"].sla.block_q == 64


def configurations():
    """Every class that keys reach."""
    found = [cls for parts in METHODS.values() for cls in parts.values()]
    found += tiny.STAGES.values()
    for cls in found:  # grows while it is read
        inner = (kind for field in settings.fields(cls).values() for kind in field.classes)
        found += [kind for kind in inner if kind not in found]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("cls", configurations(), ids=lambda cls: cls.__name__)
def test_every_field_can_be_given_as_a_word(cls):
    """A default that is written out comes back as it was."""
    usual = cls()
    for name, field in settings.fields(cls).items():
        value = getattr(usual, name)
        if dataclasses.is_dataclass(value):
            assert type(value) in field.classes, name
            continue
        parts = {"part": Tree(cls)}
        (line,) = (w for w in settings.lines("part", usual) if w.startswith(f"part.{name}="))
        settings.put(parts, *line.split("=", 1))
        assert parts["part"].values == {name: value}, name
        assert type(parts["part"].values[name]) is type(value), name


def test_notes_stand_beside_their_fields():
    """No field of ours is without a word but those whose names say all."""
    silent = {
        f"{cls.__name__}.{name}"
        for cls in configurations()
        if cls.__module__ == "tdjax.train.configs"
        for name, field in settings.fields(cls).items()
        if not field.note and not field.classes
    }
    rates = {f"OptimizerConfig.{name}" for name in ("learning_rate", "b1", "b2", "eps")}
    assert silent == rates | {"LogNormal.deviation"}
