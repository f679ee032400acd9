"""LoRA files added to published weights: float32 inside, cast back to the base's dtype of 16 or
32 bits.

Tensors are matched by the leaf and layer that they fill, so prefixes and naming (Wan's, diffusers'
or kohya's) do not matter. What a file has for other networks (a text encoder, the other expert,
an image branch that this base lacks) is left out and counted; only where nothing fits it is an
error. LoRA: arXiv:2106.09685 section 4.1; rank-stabilised: arXiv:2312.03732; DoRA:
arXiv:2402.09353 equation 5; LoKr and LoHa: arXiv:2309.14859 section 3 (KohakuBlueleaf/LyCORIS).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tdjax.checkpoints.published import detect
from tdjax.checkpoints.published.files import Source, open_source
from tdjax.checkpoints.published.rules import Row, slots
from tdjax.checkpoints.published.tensor import changed
from tdjax.config.parsing import json_object, mismatch
from tdjax.errors import CheckpointError

Slot = tuple[str, int | None]

# Parts of LyCORIS: each of w1 and w2 whole, or a product of two.
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
PARTS = (  # suffix of a LoRA key -> what it is
    (r"[._]lora(_A|_down|\.down|_linear_layer\.down)(\.default\w*)?(\.weight)?$", "down"),
    (r"[._]lora(_B|_up|\.up|_linear_layer\.up)(\.default\w*)?(\.weight)?$", "up"),
    (r"\.lora_B(\.default\w*)?\.bias$", "up_bias"),
    (r"\.(dora_scale|lora_magnitude_vector(\.default\w*)?(\.weight)?)$", "magnitude"),
    (r"\.alpha$", "alpha"),
    (r"\.diff$", "weight"),
    (r"\.diff_b$", "bias"),
    (r"\.diff_m$", "modulation"),
    *((rf"\.{part}$", part) for part in (*KRONECKER, *HADAMARD)),
)
OWN = ("weight", "bias", "modulation")  # parts that are whole differences
PREFIX = re.compile(
    r"(base_model\.model\.|pipe\.dit\.|(diffusion_)?model\.|unet\.|transformer\.|lycoris_+|"
    r"lora_unet_+|lora_transformer_+)+"
)
SECOND = re.compile(r"(base_model\.model\.)*(lora_)?transformer_2[._]+")  # the low-noise expert's
CONFIG = "adapter_config.json"  # what peft writes beside the file
IN_FILE = "lora_adapter_metadata"  # where diffusers keeps the same, in the file's metadata


def floats_only(tensors: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError for 8-bit weights with scales, to which nothing can be added."""
    key = next((k for k in tensors if k.endswith((".int8_weight", ".weight_scale"))), None)
    if key is not None:
        raise CheckpointError(
            f"{name} holds 8-bit weights ({key})",
            "weights are added in floating point",
            "merge the float file, then python -m convert.quantize",
        )


@dataclasses.dataclass
class _Module:
    """The parts of one layer's change: {kind: tensor}, and whether they are for the low-noise
    expert alone."""

    name: str
    second: bool
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shown(self) -> str:
        return f"transformer_2.{self.name}" if self.second else self.name

    def changed(self) -> list[tuple[str, bool]]:
        """(which tensor of the base it changes, whether by a whole difference); one tensor may be
        changed both ways."""
        products = {"down", *KRONECKER, *HADAMARD}
        low_rank = [("weight", False)] if products & self.parts.keys() else []
        bias = [("bias", False)] if "up_bias" in self.parts else []
        return low_rank + bias + [(kind, True) for kind in OWN if kind in self.parts]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What scales the factors and does not lie among them. where: the file that says it."""

    where: str = ""
    alpha: float | None = None
    rank_stabilised: bool = False
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    rank: int | None = None

    def scale(self, module: str, own_alpha: float | None, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank); 1 where nobody says an alpha."""
        alpha = own_alpha
        if alpha is None:
            alpha = _by_suffix(self.alphas, module, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class _Adapter(TypedDict, total=False):
    """The fields of peft's configuration that change what is added."""

    peft_type: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Change:
    """What a LoRA does to one tensor.

    key:   of the tensor. step: float32 values -> changed ones; CheckpointError for NaN and
           infinity. factors: of a change that is a plain product of two matrices, else None; see
           `_Factors.pair`. rank: of these.
    """

    key: str
    step: Callable[[np.ndarray], np.ndarray]
    factors: Callable[[], tuple[np.ndarray, np.ndarray, np.float32]] | None = None
    rank: int = 0


def add_lora(
    tensors: Mapping[str, Any],
    found: detect.Detected,
    file,
    weight: float,
    low_noise: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tensors with a LoRA added, counts); see `changes_of`."""
    changes, counts = changes_of(tensors, found, file, weight, low_noise)
    out = dict(tensors)
    for change in changes:
        out[change.key] = changed(out[change.key], change.step)
    return out, counts


def changes_of(
    tensors: Mapping[str, Any],
    found: detect.Detected,
    file,
    weight: float,
    low_noise: bool = False,
) -> tuple[list[Change], dict[str, Any]]:
    """(what a LoRA changes of a base's tensors, counts). tensors: anything with a shape. low_noise:
    the base is the low-noise one of two experts, for which a file can have changes of its own
    (transformer_2).

    Raises CheckpointError where nothing fits, or what fits is damaged or of another size.
    """
    path = Path(file)
    source = open_source(path)
    modules, unknown = _modules(source.tensors)
    settings = _settings(path, source, low_noise)
    own_second = low_noise and any(module.second for module in modules)
    index = _index(found, tuple(tensors))
    out = []
    counts: dict[str, Any] = {
        "lora": source.path.name,
        "weight": weight,
        "low_rank": 0,
        "full": 0,
        "tensors": len(source.tensors),
    }
    left_out, total = list(unknown), len(unknown)
    for module in modules:
        fits = module.second == own_second
        total += max(1, len(module.changed()))
        if not module.changed():
            left_out.append(f"{module.shown}: only {', '.join(module.parts)}")
        for kind, whole in module.changed():
            key = index.find(module.name, kind) if fits else None
            if key is None or (whole and _size(module.parts[kind]) != _size(tensors[key])):
                left_out.append(f"{module.shown} ({kind})")
            elif whole:
                where = f"{file}: {module.name}"
                add = functools.partial(_add_full, module.parts[kind], weight, where)
                out.append(Change(key, add))
                counts["full"] += 1
            else:
                shape = tuple(tensors[key].shape)
                out.append(_of_factors(module, kind, key, shape, weight, settings, str(file)))
                counts["low_rank" if kind == "weight" else "full"] += 1
    if not counts["low_rank"] + counts["full"]:
        raise _nothing_fits(str(file), left_out, total, modules, low_noise)
    if settings.where:
        counts["scaled_by"] = settings.where
    if left_out:
        counts |= {"left_out": len(left_out), "left_out_keys": sorted(left_out)}
    return out, counts


def left_out_note(counts: Mapping[str, Any]) -> str | None:
    """A line for the user about the parts of a LoRA that were not added."""
    if not counts.get("left_out"):
        return None
    names = counts["left_out_keys"]
    more = ", ..." if len(names) > 3 else ""
    return (
        f"{counts['lora']}: {len(names)} parts have no tensor in this model and were left out"
        f" ({', '.join(names[:3])}{more})"
    )


def _nothing_fits(
    name: str, left_out: list[str], total: int, modules: list[_Module], low_noise: bool
) -> CheckpointError:
    listed = "\n".join(f"  {line}" for line in left_out)
    if not any(module.changed() for module in modules):
        lines = left_out or ["it holds no tensors"]
        return CheckpointError(
            f"{name} is not a LoRA that is understood: {len(lines)} odd keys",
            f"first: {', '.join(lines[:3])}",
            "known keys end in lora_A/lora_B or lora_up/lora_down .weight, .alpha, .dora_scale,"
            f" .diff, .diff_b, .diff_m, .lokr_*, .hada_*\n{listed}",
        )
    if not low_noise and all(module.second for module in modules):
        return CheckpointError(
            f"{name} is for the low-noise expert (transformer_2)",
            "the base model is another transformer",
            "give it as lora_low",
        )
    return CheckpointError(
        f"{name}: {len(left_out)} of {total} changes have no tensor in the base model",
        f"first: {', '.join(left_out[:3])}",
        f"all:\n{listed}",
    )


def _modules(tensors: Mapping[str, Any]) -> tuple[list[_Module], list[str]]:
    """The changes in a LoRA file, and the keys that are no part of one."""
    modules: dict[tuple[str, bool], _Module] = {}
    unknown = []
    for key, tensor in tensors.items():
        hits = ((kind, re.search(pattern, key)) for pattern, kind in PARTS)
        kind, hit = next(((kind, hit) for kind, hit in hits if hit), ("", None))
        if hit is None:
            unknown.append(key)
            continue
        name = key[: hit.start()]
        second = SECOND.match(name)
        prefix = second or PREFIX.match(name)
        name = name[prefix.end() :] if prefix else name
        place = name, second is not None
        modules.setdefault(place, _Module(*place)).parts[kind] = tensor
    return list(modules.values()), unknown


def _size(tensor) -> int:
    return math.prod(tensor.shape)


def _of_factors(
    module: _Module,
    kind: str,
    key: str,
    shape: tuple[int, ...],
    weight: float,
    settings: _Settings,
    name: str,
) -> Change:
    """The change of one tensor of the base, of this shape, by factors or by their bias."""
    parts = module.parts
    made = _Factors
    if "down" not in parts and parts.keys() & {*KRONECKER, *HADAMARD}:
        made = _Kronecker if parts.keys() & set(KRONECKER) else _Hadamard
    factors = made(parts, settings, module.name, name)
    if kind == "bias":
        factors.check_bias(shape)
        return Change(key, functools.partial(factors.add_bias, weight))
    factors.check(shape)
    plain = made is _Factors and "magnitude" not in parts
    pair = functools.partial(factors.pair, weight) if plain else None
    return Change(key, functools.partial(factors.add, weight), pair, factors.rank or 0)


# Settings
# --------------------------------------------------------------------------------------------------


def _settings(path: Path, source: Source, low_noise: bool) -> _Settings:
    """What adapter_config.json beside the file says (peft), else the file's own metadata. Raises
    CheckpointError for settings that are damaged, and for those that are not read."""
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file():
        where, text = str(folder / CONFIG), (folder / CONFIG).read_bytes()
        return _from_adapter(where, _table(where, text))
    where = f"the metadata of {source.path.name}"
    if IN_FILE in source.metadata:
        values = _table(where, source.metadata[IN_FILE])
        prefix = "transformer_2." if low_noise and "transformer_2.r" in values else "transformer."
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        return _from_adapter(where, own or values)
    kohya = any(key.startswith("lora_unet") for key in source.tensors)
    names = ("lora_alpha", *(("ss_network_alpha",) if kohya else ()))
    given = next((source.metadata[name] for name in names if name in source.metadata), None)
    stabilised = source.metadata.get("use_rslora", "").lower() == "true"
    if given is None:
        return _Settings(where if stabilised else "", rank_stabilised=stabilised)
    try:
        alpha = float(given)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise _bad_settings(where, f"alpha is {given[:60]!r}")
    return _Settings(where, alpha, stabilised)


def _table(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise _bad_settings(where, str(error)) from error


def _from_adapter(where: str, values: dict[str, Any]) -> _Settings:
    wrong = mismatch(values, _Adapter)
    if wrong:
        raise _bad_settings(where, wrong)
    if values.get("peft_type") not in (None, "LORA") or values.get("fan_in_fan_out"):
        kind = values.get("peft_type")
        raise CheckpointError(
            f"{where} describes another adapter ({kind or 'fan_in_fan_out'})",
            "only LoRA in the usual orientation is added",
            "save it as a LoRA, or merge it with the library that made it",
        )
    return _Settings(
        where,
        values.get("lora_alpha"),
        values.get("use_rslora", False),
        values.get("rank_pattern", {}),
        values.get("alpha_pattern", {}),
        values.get("r"),
    )


def _bad_settings(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is damaged: {why}",
        "it says how strongly the LoRA acts",
        "download it again",
    )


def _by_suffix(patterns: Mapping[str, Any], module: str, default):
    """The value for a module, by the last of its names; they are compared, not run as patterns."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or module.endswith(f".{name}"):
            return value
    return default


# Values
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Factors:
    """The low-rank change of one module: up [out, rank], down [rank, in], and what scales it."""

    parts: dict[str, Any]
    settings: _Settings
    module: str
    name: str

    @property
    def where(self) -> str:
        return f"{self.name}: {self.module}"

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where alpha has no say."""
        return self.parts["down"].shape[0]

    def product(self) -> np.ndarray:
        """The change [out in], before it is scaled."""
        up, down = self.values("up"), self.values("down")
        return up.reshape(len(up), -1) @ down.reshape(len(down), -1)

    def check_factors(self, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless all factors are there and fit a tensor of `shape`."""
        self.check_complete({"up", "down"} <= self.parts.keys())
        up, down = self.parts["up"].shape, self.parts["down"].shape
        self.check_shapes(
            len(up) >= 2
            and len(down) >= 2
            and up[0] == shape[0]
            and up[1] == down[0] > 0
            and math.prod(up[2:]) == 1
            and math.prod(down[1:]) == math.prod(shape[1:]),
            shape,
        )

    def check_complete(self, complete: bool) -> None:
        """Raises CheckpointError for a change of which a part is missing."""
        if not complete:
            raise CheckpointError(
                f"{self.where} has only {', '.join(self.parts)}",
                "a change is the product of two factors, and one of them is missing",
                "download it again",
            )

    def check_shapes(self, fit: bool, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError, naming the factors, unless they fit."""
        if not fit:
            known = ("up", "down", *KRONECKER, *HADAMARD)
            factors = [str(list(x.shape)) for name, x in self.parts.items() if name in known]
            raise CheckpointError(
                f"{self.where} has factors {' and '.join(factors)}",
                f"the tensor is {list(shape)}",
                "it is a LoRA of another model size",
            )

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the factors fit a tensor of `shape`, the settings the
        factors, and a magnitude the outputs or the inputs."""
        self.check_factors(shape)
        inputs = math.prod(shape[1:])
        rank = _by_suffix(self.settings.ranks, self.module, self.settings.rank)
        if rank is not None and self.rank is not None and rank != self.rank:
            raise CheckpointError(
                f"{self.where} has rank {self.rank}, {self.settings.where} says {rank}",
                "they do not belong together, and the rank scales the change",
                "put the LoRA and its own settings into one folder",
            )
        size = _size(self.parts["magnitude"]) if "magnitude" in self.parts else inputs
        if size not in (shape[0], inputs):
            raise CheckpointError(
                f"{self.where}: dora_scale has {size} values",
                f"the tensor is {list(shape)}",
                "it is a LoRA of another model size",
            )
        if math.prod(self.parts["alpha"].shape if "alpha" in self.parts else ()) != 1:
            raise CheckpointError(
                f"{self.where}: alpha is {list(self.parts['alpha'].shape)}",
                "it is one number",
                "download it again",
            )

    def check_bias(self, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the bias of the factors fits a tensor of `shape` and stands
        beside them: their rank scales it."""
        self.check_complete({"up", "down"} <= self.parts.keys())
        size = _size(self.parts["up_bias"])
        if size != math.prod(shape):
            raise CheckpointError(
                f"{self.where}: lora_B.bias has {size} values",
                f"the tensor is {list(shape)}",
                "it is a LoRA of another model size",
            )

    def values(self, kind: str) -> np.ndarray:
        return _finite(self.parts[kind], self.where)

    def scale(self) -> float:
        """The factor of the product."""
        if self.rank is None:
            return 1.0
        alpha = float(self.values("alpha").reshape(())) if "alpha" in self.parts else None
        return self.settings.scale(self.module, alpha, self.rank)

    def pair(self, weight: float) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """Returns (up [out rank], down [rank in], the scale of their product), the factors as the
        file has them: of any dtype, and perhaps not finite."""
        up, down = (self.parts[kind].read() for kind in ("up", "down"))
        scale = np.float32(weight * self.scale())
        return up.reshape(len(up), -1), down.reshape(len(down), -1), scale

    def add(self, weight: float, x: np.ndarray) -> np.ndarray:
        """x + weight * scale * product; with a magnitude, x and the product together are brought
        to its length for every output. Raises CheckpointError where that is beyond float32."""
        with np.errstate(over="ignore", invalid="ignore"):
            changed = self._added(weight, x)
        if not np.isfinite(changed).all():
            raise CheckpointError(
                f"{self.where}: its values are too large",
                "what they make of the weights is beyond float32",
                "download it again, or train it anew",
            )
        return changed

    def _added(self, weight: float, x: np.ndarray) -> np.ndarray:
        product = self.product().reshape(x.shape)
        if "magnitude" not in self.parts:
            return x + np.float32(weight * self.scale()) * product
        whole = (x + np.float32(self.scale()) * product).reshape(x.shape[0], -1)
        magnitude = self.values("magnitude")
        by_input = magnitude.size != x.shape[0] or magnitude.shape[:1] == (1,)
        axis = 0 if by_input and magnitude.size == whole.shape[1] else 1
        length = np.linalg.norm(whole, axis=axis, keepdims=True)
        tiny = np.finfo(np.float32).tiny
        decomposed = magnitude.reshape(length.shape) * whole / np.maximum(length, tiny)
        return x + np.float32(weight) * (decomposed.reshape(x.shape) - x)

    def add_bias(self, weight: float, x: np.ndarray) -> np.ndarray:
        return x + np.float32(weight * self.scale()) * self.values("up_bias").reshape(x.shape)


class _Kronecker(_Factors):
    """LoKr: the change is the Kronecker product of w1 [a b] and w2 [c d], for a tensor
    [a c, b d]."""

    @property
    def rank(self) -> int | None:
        """That of the factor which is a product; None where both are whole."""
        inner = [self.parts[p].shape[0] for p in ("lokr_w2_b", "lokr_w1_b") if p in self.parts]
        return inner[0] if inner else None

    def factor(self, name: str) -> np.ndarray:
        if name in self.parts:
            return self.values(name)
        return self.values(f"{name}_a") @ self.values(f"{name}_b")

    def product(self) -> np.ndarray:
        return np.kron(self.factor("lokr_w1"), self.factor("lokr_w2"))

    def check_factors(self, shape: tuple[int, ...]) -> None:
        sizes = []
        for name in ("lokr_w1", "lokr_w2"):
            pair = f"{name}_a", f"{name}_b"
            whole = name in self.parts
            self.check_complete(whole or set(pair) <= self.parts.keys())
            names = (name,) if whole else pair
            shapes = [tuple(self.parts[part].shape) for part in names]
            self.check_shapes(
                all(len(s) == 2 for s in shapes) and shapes[0][-1] == shapes[-1][whole], shape
            )
            sizes.append((shapes[0][0], shapes[-1][1]))
        (a, b), (c, d) = sizes
        self.check_shapes((a * c, b * d) == (shape[0], math.prod(shape[1:])), shape)


class _Hadamard(_Factors):
    """LoHa: the change is the product of two low-rank matrices, element by element."""

    @property
    def rank(self) -> int | None:
        return self.parts["hada_w1_b"].shape[0]

    def product(self) -> np.ndarray:
        first, second = (
            self.values(f"hada_{w}_a") @ self.values(f"hada_{w}_b") for w in ("w1", "w2")
        )
        return first * second

    def check_factors(self, shape: tuple[int, ...]) -> None:
        self.check_complete(set(HADAMARD) <= self.parts.keys())
        for w in ("w1", "w2"):
            up, down = (tuple(self.parts[f"hada_{w}_{x}"].shape) for x in "ab")
            fit = len(up) == len(down) == 2 and up[0] == shape[0] and up[1] == down[0] > 0
            self.check_shapes(fit and down[1] == math.prod(shape[1:]), shape)


def _add_full(difference, weight: float, where: str, x: np.ndarray) -> np.ndarray:
    return x + np.float32(weight) * _finite(difference, where).reshape(x.shape)


def _finite(tensor, where: str) -> np.ndarray:
    """The values in float32. Raises CheckpointError for NaN and infinity."""
    values = tensor.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{where} holds NaN or infinity",
            "it would spoil every weight that it is added to",
            "download it again, or train it anew",
        )
    return values


# Names
# --------------------------------------------------------------------------------------------------


class _Index:
    """Finds the base's key for a module named as in Wan, in diffusers, or with underscores for dots
    (kohya)."""

    def __init__(self, found: detect.Detected, targets: dict[Slot, str]):
        others = [n for n in detect.NAMINGS[found.kind].ROWS if n != found.naming]
        rows = [found.rows, *(detect.rows(found.kind, n, found.config) for n in others)]
        # {name: key} in each naming, and {name with underscores: key} in all of them
        self.namings = [_names(each, targets) for each in rows]
        self.flat: dict[str, str] = {}
        for names in self.namings:
            for name, key in names.items():
                self.flat.setdefault(name.replace(".", "_"), key)

    def find(self, module: str, kind: str) -> str | None:
        """The base's key of a module's tensor. A module may also be a tensor by its own name, such
        as blocks.0.modulation."""
        names = [f"{module}.{kind}", module] if kind == "weight" else [f"{module}.{kind}"]
        for naming in self.namings:
            for name in names:
                if name in naming:
                    return naming[name]
        flat = (self.flat.get(name.replace(".", "_")) for name in names)
        return next((key for key in flat if key is not None), None)


@functools.lru_cache(maxsize=4)
def _index(found: detect.Detected, keys: tuple[str, ...]) -> _Index:
    """That of a base with these keys; the next LoRA is for the same one, as a rule."""
    return _Index(found, {slot: key for slot, (_, key) in slots(keys, found.rows)[0].items()})


def _names(rows: tuple[Row, ...], targets: dict[Slot, str]) -> dict[str, str]:
    """{name by these rows: key} of the tensors at some slots. A row is compared with a leaf once,
    not for each of its layers."""
    layers: dict[str, dict[int | None, str]] = {}
    for (leaf, layer), key in targets.items():
        layers.setdefault(leaf, {})[layer] = key
    out = {}
    for leaf, keys in layers.items():
        for row in rows:
            if row.path is not None and row.path_pattern.fullmatch(leaf):
                out |= {row.key(leaf, layer): key for layer, key in keys.items()}
    return out
