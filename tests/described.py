"""A GPU that is only described: jax 0.11 and newer lower kernels for CUDA for a GPU that is there,
or for one like this."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def trace(function, *args):
    """function.trace(*args) of a jitted function, to be lowered for CUDA. The mesh has no axes:
    nothing is divided over it."""
    if jax.__version_info__ < (0, 11):
        return function.trace(*args)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return function.trace(*args)


def lower(traced):
    """What `trace` gave, lowered for CUDA."""
    return traced.lower(lowering_platforms=("cuda",))
