"""Meshes by their names: how many devices they need."""

import pytest

from tdjax.config import DiTConfig
from tdjax.errors import UsageError
from tdjax.parallel.mesh import make_mesh


def test_more_devices_than_there_are():
    with pytest.raises(UsageError, match="needs 8 devices"):
        make_mesh("tp=8", DiTConfig(heads=8, dim=128))
