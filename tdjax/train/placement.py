"""Where the arrays of a training state lie: each of a network's averages and moments as the weight
that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.parallel.sharding import TRAINING_RULES, axes_of, leaf_name, spec

# A factor has one axis that can be divided, so that takes all that divides weights.
_FACTOR_RULES = TRAINING_RULES | {
    axis: (*TRAINING_RULES[axis], *TRAINING_RULES["embed"]) for axis in ("heads", "mlp")
}


def specs(state, sizes: Mapping[str, int]):
    """Returns how every leaf of an (abstract) state or teacher is divided over a mesh with axes of
    these sizes, a PartitionSpec each, as the same pytree.

    Whatever ends in the name of a network's leaf (its average, its moments) lies as that leaf does,
    the factors of an adapter as the axis that they share with its layer; the rest is whole on every
    device.
    """

    def lies(path, leaf):
        words = leaf_name(path).split(".")
        for i in range(len(words)):
            axes, rules = _known_axes(".".join(words[i:])), TRAINING_RULES
            if axes is None:
                axes, rules = _factor_axes(words[i], ".".join(words[i + 1 :])), _FACTOR_RULES
            if axes is not None and len(axes) <= leaf.ndim:
                return spec(leaf.shape, axes, dict(sizes), rules)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(lies, state)


def shardings(state, mesh: Mesh):
    """Returns a NamedSharding for every leaf of an (abstract) state or teacher, as `specs`."""
    over = lambda lies: NamedSharding(mesh, lies)
    return jax.tree.map(over, specs(state, dict(mesh.shape)))


def _known_axes(name: str) -> tuple[str | None, ...] | None:
    try:
        return axes_of(name)
    except ValueError:
        return None


def _factor_axes(factor: str, stem: str) -> tuple[str | None, ...] | None:
    """Axis names of a factor of a layer's adapter, "down" [n i r] or "up" [n r o]
    (`partial.Trained`): those of the layer's kernel [n i o], with None for the rank."""
    kernel = _known_axes(f"{stem}.kernel")
    if kernel is None or len(kernel) != 3 or factor not in ("down", "up"):
        return None
    n, i, o = kernel
    return (n, i, None) if factor == "down" else (n, None, o)


def created(create: Callable, *models, mesh: Mesh | None = None):
    """Returns create(*models), a state, laid out over the mesh from the start: it is never whole on
    one device."""
    where = None if mesh is None else shardings(jax.eval_shape(create, *models), mesh)
    return jax.jit(create, out_shardings=where)(*models)


def abstract(state, mesh: Mesh | None):
    """Returns the shapes of a state, with shardings under a mesh, for `checkpoints.restore`."""
    if mesh is None:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )
