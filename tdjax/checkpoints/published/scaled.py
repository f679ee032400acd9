"""8-bit weights that a file keeps with their scales beside them: kept as they are where the
network has layers of that kind, else multiplied out as they are read.

Layouts: Comfy-Org/ComfyUI comfy/utils.py and comfy/quant_ops.py (a scale for each tensor),
ModelTC/LightX2V tools/convert (a scale for each output channel).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tdjax.checkpoints.published.files import without_wrappers
from tdjax.checkpoints.published.tensor import is_float
from tdjax.config.parsing import json_object
from tdjax.errors import CheckpointError

TILE = 128  # side of the tiles of the official -quant files
MARK = "scaled_fp8"  # ComfyUI's earlier layout: its dtype is that of the weights
TABLE = "_quantization_metadata"  # text field of a file that says what "comfy_quant" tensors say
PART = re.compile(
    r"(?P<module>.*)\.(?P<part>scale_weight|weight_scale|weight_scale_2|scale_input|input_scale"
    r"|comfy_quant|input_global_scale|weight_global_scale|input_absmax|pre_quant_scale)"
)
SCALES = ("weight_scale", "scale_weight")
# kind of linear layer by the dtype of its weights, where every layer of the blocks has it
KINDS = {
    np.dtype(np.int8): "int8_channel",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8",
}
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
PLAIN = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # formats that are values and one scale
REFUSED = (  # (how a format begins, what it is)
    ("nvfp4", "NVFP4 weights (4-bit floats in groups of 16)"),
    ("mxfp8", "MXFP8 weights (8-bit floats in groups of 32)"),
    ("mxfp4", "MXFP4 weights (4-bit floats in groups of 32)"),
    ("convrot", "rotated 4-bit weights (convrot)"),
    ("asym_w4", "4-bit weights"),
    ("awq", "4-bit AWQ weights"),
    ("int4", "4-bit weights"),
)
# What libraries put beside weights that they have packed, by the end of its key.
PACKED = (
    (re.compile(r".*\.(SCB|weight\.(absmax|quant_map|quant_state\..*))"), "bitsandbytes weights"),
    (re.compile(r".*\.weight\.(_data|_scale|_packed.*)"), "quanto weights"),
    (re.compile(r".*\._weight_(qdata|scale|zero_point)"), "torchao weights"),
    (re.compile(r".*\.(qweight|qzeros|wscales)"), "packed 4-bit weights (GPTQ, AWQ or SVDQuant)"),
)
INSTEAD = "give the fp8_scaled, int8 or bf16 file of the same model"


@dataclasses.dataclass(frozen=True)
class RowScales:
    """The scales of a weight [o i] as a float32 column [o 1], whatever shape the file has them
    in."""

    scale: Any
    outputs: int
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.outputs, 1)

    @property
    def nbytes(self) -> int:
        return 4 * self.outputs

    def read(self) -> np.ndarray:
        column = self.scale.read().astype(np.float32).reshape(-1, 1)
        return np.ascontiguousarray(np.broadcast_to(column, self.shape))


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A weight times its scale, in float32, made when it is read."""

    values: Any
    scale: RowScales
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        values = self.values.read().astype(np.float32)
        column = self.scale.read()
        return values * column.reshape(-1, *(1 for _ in values.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Untiled:
    """An int8 weight [o i] times the scales of its tiles [o/128 i/128], in float32, made when it is
    read."""

    values: Any
    scale: Any
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        values, scale = self.values.read(), self.scale.read()
        rows, columns = values.shape
        grid = np.repeat(np.repeat(scale.astype(np.float32), TILE, 0), TILE, 1)
        return values.astype(np.float32) * grid[:rows, :columns]


def untiled(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors with the int8 tiles of the official -quant files as float weights."""
    out = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part == "int8_weight" and f"{module}.scale" in tensors:
            out[f"{module}.weight"] = Untiled(tensor, tensors[f"{module}.scale"])
        elif not (part == "scale" and f"{module}.int8_weight" in tensors):
            out[key] = tensor
    return out


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A file's weights with their scales.

    tensors: all tensors of the file but marks and scales. scales: {module: RowScales}.
    exact:   the file asks for products in full precision.
    """

    tensors: dict[str, Any]
    scales: dict[str, RowScales]
    exact: bool

    def dequantized(self) -> dict[str, Any]:
        """Returns the tensors with every scale multiplied in."""
        out = dict(self.tensors)
        for module, scale in self.scales.items():
            out[f"{module}.weight"] = Dequantized(out[f"{module}.weight"], scale)
        return out

    def resolved(self, layers: list[str]) -> tuple[dict[str, Any], str, str | None]:
        """Returns (tensors, kind of the linear layers of blocks, a note or None).

        layers: modules of the blocks that a network can hold in 8 bits. Where all of them are int8,
        or all float8_e4m3fn, they stay so, with their scales as "<module>.weight_scale" [o 1].
        """
        out = self.dequantized()
        if not self.scales:
            return out, "float", None
        stored = {self._dtype(module) for module in layers if module in self.scales}
        count = sum(module in self.scales for module in layers)
        kind = KINDS.get(next(iter(stored))) if len(stored) == 1 else None
        if kind is None or self.exact or count < len(layers):
            return out, "float", self._note(layers, count)
        for module in layers:
            out[f"{module}.weight"] = self.tensors[f"{module}.weight"]
            out[f"{module}.weight_scale"] = self.scales[module]
        return out, kind, None

    def _note(self, layers: list[str], count: int) -> str:
        if self.exact:
            return "8-bit weights that ask for products in full precision: dequantised at load"
        if layers and count < len(layers):
            what = f"{count} of {len(layers)} linear layers of the blocks are of 8 bits"
            return f"{what}: dequantised at load"
        return f"{len(self.scales)} weights of 8 bits with scales: dequantised at load"

    def _dtype(self, module: str) -> np.dtype:
        return np.dtype(self.tensors[f"{module}.weight"].dtype)


def separate(tensors: Mapping[str, Any], metadata: Mapping[str, str], name: str) -> Scaled:
    """Returns a file's tensors with 8-bit weights and their scales told apart.

    Raises CheckpointError for formats that are not read, naming them, and for scales that do not
    fit.
    """
    _refuse_packed(tensors, name)
    parts: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    mark = None
    for key, tensor in tensors.items():
        if key == MARK:
            mark = tensor
        elif match := PART.fullmatch(key):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            plain[key] = tensor
    formats = _table(metadata, name)
    scales = {}
    exact = mark is not None and mark.shape == (2,)
    for module, found in parts.items():
        about = formats.get(module, {}) | _about(found, f"{module}.comfy_quant", name)
        _refuse_format(module, found, about, name)
        exact |= bool(about.get("full_precision_matrix_mult"))
        scale = next((found[part] for part in SCALES if part in found), None)
        if scale is not None:
            scales[module] = _fitting(module, scale, plain, name)
    return Scaled(plain, scales, exact)


def _refuse_packed(tensors: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError for weights that a library has packed in a way of its own."""
    for pattern, what in PACKED:
        key = next(filter(pattern.fullmatch, tensors), None)
        if key is not None:
            raise CheckpointError(
                f"{name} holds {what}",
                f"recognised by {key}; read are 8-bit values with plain scales, and floats",
                INSTEAD,
            )


def _fitting(module: str, scale, plain: Mapping[str, Any], name: str) -> RowScales:
    """The scales of a weight; CheckpointError unless there is one for it or for each output."""
    weight = plain.get(f"{module}.weight")
    if weight is None:
        raise CheckpointError(
            f"{name} has a scale for {module}, and no weight",
            "a scale stands beside the weight that it is for",
            "the file is incomplete: download it again",
        )
    outputs, size = weight.shape[0] if weight.shape else 1, int(np.prod(scale.shape))
    by_row = size == outputs and scale.shape in ((outputs,), (outputs, 1))
    if not (by_row or size == 1) or not is_float(scale.dtype):
        raise CheckpointError(
            f"{name}: the scale of {module} is {np.dtype(scale.dtype).name} {list(scale.shape)}",
            f"read are one float scale, or one for each of its {outputs} outputs",
            INSTEAD,
        )
    return RowScales(scale, outputs)


def _table(metadata: Mapping[str, str], name: str) -> dict[str, dict[str, Any]]:
    """{module, under its clean name as the tensors are: what the file's metadata says of its
    format}."""
    if TABLE not in metadata:
        return {}
    layers = _json(metadata[TABLE], f"{TABLE} in the metadata", name).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise CheckpointError(
            f"{name}: {TABLE} in its metadata has no table of layers",
            "it says in which format each layer is",
            "download the file again",
        )
    return {without_wrappers(module)[0]: about for module, about in layers.items()}


def _about(found: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """What a layer's own tensor of JSON bytes says of its format."""
    tensor = found.get("comfy_quant")
    if tensor is None:
        return {}
    if np.dtype(tensor.dtype) != np.uint8 or int(np.prod(tensor.shape)) > 2**16:
        raise CheckpointError(
            f"{name}: {key} is {np.dtype(tensor.dtype).name} {list(tensor.shape)}",
            "it is a short text in bytes that names the format",
            "download the file again",
        )
    return _json(tensor.read().tobytes(), key, name)


def _json(text: str | bytes, where: str, name: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: {where} is damaged", str(error)[:200], "download the file again"
        ) from error


def _refuse_format(module: str, found: Mapping[str, Any], about: dict, name: str) -> None:
    """Raises CheckpointError for a format that is not values and scales."""
    kind = str(about.get("format", ""))
    scale = found.get("weight_scale")
    if {"weight_scale_2", "input_global_scale", "weight_global_scale"} & found.keys():
        kind = "nvfp4"
    elif not kind and scale is not None and np.dtype(scale.dtype) in (E8M0, np.uint8):
        kind = "mxfp8"
    what = next((what for start, what in REFUSED if kind.startswith(start)), None)
    if what is None and about.get("convrot"):
        what = "rotated int8 weights (convrot), whose activations must be rotated too"
    if what is None and kind and kind not in PLAIN:
        what = f"weights in the format {kind!r}"
    if what is not None:
        raise CheckpointError(
            f"{name} holds {what}",
            f"recognised by what stands beside {module}.weight; read are {', '.join(PLAIN)}",
            INSTEAD,
        )
