"""One server, and one PostgreSQL, for the tests of a module."""

import postgres_server
import pytest
from server_cases import serving


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server for the tests of a module, which leave it as they found it."""
    limits = {"frames": 81, "pixels": 100 * 100, "steps": 4, "body": 100_000, "body_seconds": 0.8}
    with serving(tmp_path_factory.mktemp("server"), **limits) as server:
        yield server


@pytest.fixture(scope="module")
def postgresql():
    """The address of a database."""
    if reason := postgres_server.missing():
        pytest.skip(reason)
    with postgres_server.running() as url:
        yield url
