"""Training some of a network: low-rank adapters on its linear layers (LoRA, arXiv 2106.09685
section 4.1), or some of its weights as they are, over a frozen base in the compute dtype or in 8
bits.

The trained arrays are a pytree of their own, `Trained`, which is the model of a training state:
only they have a gradient, moments and an average. A loss puts them over the base (`Trained.over`)
and calls what comes out. A layer with an adapter computes x W + scale (x down) up, so that no array
of the size of W is made for the change or its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tdjax.checkpoints.orbax import DENSE_DROPS, named_leaves
from tdjax.checkpoints.published import detect
from tdjax.checkpoints.published.checkpoint import arrange
from tdjax.checkpoints.published.rules import Row, row_of
from tdjax.config import DiTConfig
from tdjax.errors import UsageError
from tdjax.files import near, written
from tdjax.models.abstract import as_shapes
from tdjax.models.linear import LINEAR, AdaptedLinear, WeightOnlyLinear
from tdjax.models.wan_dit import DiT
from tdjax.parallel import hosts
from tdjax.parallel.sharding import leaf_name
from tdjax.precision import Policy
from tdjax.train.configs import LoRA

_KERNEL = ".kernel"
# ComfyUI's prefix; diffusers (loaders/lora_conversion_utils.py) and the other loaders know it too.
_PREFIX = "diffusion_model."


# -- the frozen base -------------------------------------------------------------------------------


def weight_only(model: DiT) -> DiT:
    """Returns a network of 8-bit layers (or its shapes) as one that computes in floating point on
    the same arrays; one of floating point as it is."""
    kind = model.cfg.linear
    if kind == "float":
        return model
    cfg = dataclasses.replace(model.cfg, linear="float")
    out = _copied(as_shapes(DiT, cfg))
    last = f".{LINEAR[kind].leaves[0]}"
    leaves = named_leaves(model)
    for name in leaves:
        if name.endswith(last):
            stem = name.removesuffix(last)
            _put(out, stem, WeightOnlyLinear(_at(model, stem), kind))
    return _filled(out, leaves)


def _copied(module):
    """The same arrays in modules that may be changed."""
    return jax.tree.map(lambda x: x, module)


def _filled(module, leaves: dict[str, Any]):
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], module)


def _at(module, stem: str):
    return functools.reduce(getattr, stem.split("."), module)


def _put(module, stem: str, layer) -> None:
    parent, _, last = stem.rpartition(".")
    setattr(_at(module, parent), last, layer)


# -- what is trained -------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained arrays of a network, all float32.

    weights: {leaf name: array}, in place of the base's or beside them. down, up: {name of a linear
    layer: factors [n i r] and [n r o]}, n layers. scale: of their product. cfg: of the network.
    """

    weights: dict[str, jax.Array]
    down: dict[str, jax.Array]
    up: dict[str, jax.Array]
    cfg: DiTConfig = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})

    def over(self, base: DiT, compute: str | None = None) -> DiT:
        """Returns the network: the base's frozen arrays with these. compute: the dtype between
        layers, by default that of the config."""
        policy = Policy(param=self.cfg.policy.param, compute=compute or self.cfg.policy.compute)
        out = _copied(as_shapes(DiT, dataclasses.replace(self.cfg, policy=policy)))
        for stem, layer in _weight_only_layers(base).items():
            _put(out, stem, layer)
        out = _filled(out, named_leaves(base) | self.weights)
        for stem, down in self.down.items():
            _put(out, stem, AdaptedLinear(_at(out, stem), down, self.up[stem], self.scale))
        return out

    def merged(self, name: str, frozen: Callable[[str], np.ndarray | None]) -> np.ndarray | None:
        """Returns one leaf of the network with its change added, f32, on the host: that of the
        first process, None in the others, which give it what their devices hold. frozen: gives the
        base's leaf of a name that is not trained whole."""
        stem = name.removesuffix(_KERNEL)
        trained, factors = self.weights.get(name), ()
        if trained is not None:
            trained = hosts.whole(trained)
        elif stem != name and stem in self.down:
            factors = tuple(hosts.whole(x[stem]) for x in (self.down, self.up))
        if not hosts.first():
            return None
        if trained is not None:
            return trained
        out = frozen(name).astype(np.float32)
        if not factors:
            return out
        down, up = factors
        return out + np.float32(self.scale) * (down @ up)


def _weight_only_layers(base: DiT) -> dict[str, WeightOnlyLinear]:
    lasts = tuple(f".{LINEAR[kind].leaves[0]}" for kind in LINEAR if kind != "float")
    stems = {n.rpartition(".")[0] for n in named_leaves(base) if n.endswith(lasts)}
    return {stem: _at(base, stem) for stem in sorted(stems)}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a network is trained, by name; `create` makes it.

    weights: leaves trained whole. layers: linear layers that get an adapter.
    """

    cfg: DiTConfig
    weights: tuple[str, ...]
    layers: tuple[str, ...]
    lora: LoRA | None

    def create(self, weights: dict[str, jax.Array], key) -> Trained:
        """Returns the arrays that training begins with: the factors `up` are zero, so that the
        network is its base at first. weights: f32, all that `weights` names."""
        shapes = named_leaves(as_shapes(DiT, self.cfg))
        rank = 0 if self.lora is None else self.lora.rank
        down, up = {}, {}
        for number, stem in enumerate(self.layers):
            n, i, o = shapes[stem + _KERNEL].shape
            own = jax.random.fold_in(key, number)
            # uniform with the deviation of 1/sqrt(3 i): microsoft/LoRA loralib/layers.py
            down[stem] = jax.random.uniform(own, (n, i, rank), minval=-1, maxval=1) * i**-0.5
            up[stem] = jnp.zeros((n, rank, o))
        scale = 1.0 if self.lora is None else self.lora.scale
        return Trained(weights=dict(weights), down=down, up=up, cfg=self.cfg, scale=scale)


def select(cfg: DiTConfig, train: str | None, lora: LoRA | None) -> Selection | None:
    """Returns what is trained of a network, or None where all of it is.

    train: pattern of whole leaf names. None: all of them, or beside adapters only the projections
    of sparse-linear attention, which begin at zero and would stay there.
    Raises UsageError for a pattern that no name matches, and for a layer chosen in both ways.
    """
    shapes = named_leaves(as_shapes(DiT, cfg))
    linear = [
        name.removesuffix(_KERNEL)
        for name in shapes
        if name.startswith("blocks.") and name.endswith(_KERNEL) and DENSE_DROPS not in name
    ]
    layers = () if lora is None else _matching(linear, lora.layers, "linear layer")
    if train is None:
        if lora is None:
            return None
        weights = tuple(name for name in shapes if DENSE_DROPS in name)
    else:
        weights = _matching(shapes, train, "weight")
    if len(weights) == len(shapes) and lora is None:
        return None
    both = [stem for stem in layers if stem + _KERNEL in weights]
    if both:
        raise UsageError(
            f"optimizer.train is {train!r} and model.lora has adapters on {both[0]}",
            "a layer is trained whole or by an adapter",
            "leave optimizer.train away, or name other weights, such as '.*norm.*'",
        )
    return Selection(cfg=cfg, weights=weights, layers=layers, lora=lora)


def shapes(cfg: DiTConfig, selection: Selection | None) -> DiT | Trained:
    """Returns what is trained of a network as shapes."""
    whole = as_shapes(DiT, cfg)
    if selection is None:
        return whole
    leaves = named_leaves(whole)
    weights = {name: leaves[name] for name in selection.weights}
    return jax.eval_shape(selection.create, weights, jax.random.key(0))


def _matching(names, pattern: str, what: str) -> tuple[str, ...]:
    """The names that a pattern matches as a whole. Raises UsageError if there is none, or the
    pattern cannot be read."""
    try:
        found = tuple(name for name in names if re.fullmatch(pattern, name))
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is no pattern: {error}",
            "it is a regular expression for whole names",
            r"use e.g. '.*self_attn\.core\.proj\..*'",
        ) from error
    if not found:
        close = near(pattern, names, cutoff=0)
        raise UsageError(
            f"no {what} matches {pattern!r}",
            f"the {what}s are {', '.join(names)}",
            f"use e.g. '.*{re.escape(close[0].rpartition('.')[2])}'",
        )
    return found


# -- the file of a LoRA ----------------------------------------------------------------------------


def save_lora(path: str | Path, trained: Trained, frozen: dict[str, np.ndarray]) -> Path:
    """Writes the change as a LoRA in float32, over a file of before, under the names that ComfyUI,
    diffusers and tdjax read. Their scale is in the factors, so that no alpha is needed and all
    loaders agree on it. Every process of a run takes part, and the first one writes.

    frozen: the base's values of the weights that were trained whole; a difference is written for
    each (`.diff`). Projections of sparse-linear attention, which a dense base lacks, are left out.
    """
    rows = detect.rows("dit", "wan", trained.cfg)
    tensors: dict[str, np.ndarray] = {}
    for stem in trained.down:
        down, up = (hosts.whole(x[stem]) for x in (trained.down, trained.up))
        if hosts.first():
            tensors |= _factors(_keys(stem + _KERNEL, rows, len(down)), down, trained.scale * up)
    for leaf, before in frozen.items():
        after = hosts.whole(trained.weights[leaf])
        if hosts.first():
            change = after - before.astype(np.float32)
            tensors |= _differences(leaf, change, rows, trained.cfg.patch)

    def write() -> str:
        size = sum(x.nbytes for x in tensors.values())
        with written(path, overwrite=True, size=size) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        return str(path)

    return Path(hosts.agreed(write))


def _factors(keys: list[str], down: np.ndarray, up: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a layer's factors [n i r] and [n r o]. keys: of its layers in files."""
    tensors = {}
    for key, a, b in zip(keys, down, up, strict=True):
        name = _PREFIX + key.removesuffix(".weight")
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
    return tensors


def _differences(
    leaf: str, change: np.ndarray, rows: tuple[Row, ...], patch: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The tensors of the change of a leaf that was trained whole."""
    row = row_of(leaf, rows)
    layers = change if row.stacked else change[None]
    sizes = dict(zip("thw", patch, strict=True)) if "(" in row.layout else {}
    place = lambda layer: arrange(layer, row.inverse_layout, np.dtype("float32"), **sizes)
    keys = _keys(leaf, rows, len(layers))
    return {
        _PREFIX + _difference(key): place(layer) for key, layer in zip(keys, layers, strict=True)
    }


def _keys(leaf: str, rows: tuple[Row, ...], layers: int) -> list[str]:
    """The names of a leaf's layers in published files."""
    row = row_of(leaf, rows)
    return [str(row.key(leaf, layer)) for layer in range(layers)]


def _difference(key: str) -> str:
    """The name of a difference that is added to a tensor: the loaders know those of weights, of
    biases and of a block's modulation."""
    for end, other in ((".weight", ".diff"), (".bias", ".diff_b")):
        if key.endswith(end):
            return key.removesuffix(end) + other
    if key.startswith("blocks.") and key.endswith(".modulation"):
        return key.removesuffix("modulation") + "diff_m"
    return key + ".diff"
