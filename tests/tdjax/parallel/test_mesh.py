"""Meshes by their names: how many devices they need."""

import jax
import pytest
from jax.sharding import AxisType

from tdjax.config import DiTConfig
from tdjax.errors import UsageError
from tdjax.parallel.mesh import every_device, make_mesh, parse_mesh, refuse_axis


def test_more_devices_than_there_are():
    with pytest.raises(UsageError, match="needs 8 devices"):
        make_mesh("tp=8", DiTConfig(heads=8, dim=128))


CFG = DiTConfig(heads=8, dim=128)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_number_is_that_of_sp(count):
    mesh = make_mesh(count, CFG)
    assert mesh == make_mesh(f"sp={count}", CFG) and dict(mesh.shape) == {"seq": count}


def test_a_mesh_of_jax():
    devices = jax.devices()[::-1]
    mesh = make_mesh(jax.make_mesh((2, 2), ("tp", "sp"), devices=devices), CFG)
    assert dict(mesh.shape) == {"tensor": 2, "seq": 2} and list(mesh.devices.ravel()) == devices
    assert set(mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(UsageError, match="has an axis 'x'(.|\n)*dp, cfg, fsdp, tp, sp"):
        make_mesh(jax.make_mesh((4,), ("x",)), CFG)
    with pytest.raises(UsageError, match="divides 6 attention heads by 4"):
        make_mesh(jax.make_mesh((4,), ("tp",)), DiTConfig(heads=6, dim=96))
    assert make_mesh("sp=4", DiTConfig(heads=6, dim=96)).size == 4  # filled up to eight


@pytest.mark.parametrize("given", [2.5, True, "sp", [4], object()])
def test_other_meshes_are_refused(given):
    with pytest.raises(UsageError, match="mesh"):
        make_mesh(given, CFG)


def test_every_device(monkeypatch):
    """Fake devices of a CPU are the same cores: they are no mesh unless one is asked for."""
    assert every_device("sp") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert every_device("sp") == f"sp={len(jax.devices())}"
    monkeypatch.setattr(jax, "devices", lambda: [None])
    assert every_device("fsdp") is None


def test_axes_have_one_order_and_their_place():
    """Devices that exchange most lie beside each other, whatever the order of the words."""
    devices = make_mesh("sp=2,dp=2", CFG)
    assert list(devices.shape) == ["data", "seq"]
    assert [d.id for d in devices.devices[0]] == [d.id for d in jax.devices()[:2]]
    assert list(make_mesh("cfg=2,dp=2", CFG).shape) == ["data", "guidance"]


def test_an_axis_of_others_is_refused():
    with pytest.raises(UsageError, match="has the axis cfg=2(.|\n)*because"):
        refuse_axis("cfg", parse_mesh("sp=2,cfg=2"), "because")
    refuse_axis("cfg", parse_mesh("sp=2"), "because")


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_guided_step_has_two_halves(size):
    with pytest.raises(UsageError, match=f"divides a guided step by {size}(.|\n)*use cfg=2"):
        make_mesh(f"cfg={size}", CFG)
