"""How inputs that hypothesis draws are tried: how long that takes says something of the machine."""

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """A decorator: so many inputs, each in whatever time."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
