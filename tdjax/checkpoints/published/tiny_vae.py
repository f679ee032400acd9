"""Rows of the small video decoder. Names: madebyollin/taehv taehv.py, numbers of one flat list; its
encoder is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdjax.checkpoints.published.rules import Row
from tdjax.checkpoints.published.tensor import Tensor
from tdjax.config import TinyVAEConfig

CONV = "o i h w -> h w i o"
FIRST, PER_STAGE = 3, 6  # where the stages begin, and how many layers each has
GROW, CONV_AT = 4, 5  # of a stage: the layer that makes more frames, and the last one


def _conv(source: str, path: str, bias: bool = True) -> tuple[Row, ...]:
    rows = (Row(f"{source}.weight", f"{path}.kernel", CONV),)
    return (*rows, Row(f"{source}.bias", f"{path}.bias")) if bias else rows


def _rows(cfg: TinyVAEConfig) -> tuple[Row, ...]:
    rows = list(_conv("decoder.1", "decoder.conv_in"))
    for stage in range(len(cfg.widths) - 1):
        begin, path = FIRST + PER_STAGE * stage, f"decoder.stages.{stage}"
        for block in range(3):
            for number, part in enumerate((0, 2, 4), 1):
                source = f"decoder.{begin + block}.conv.{part}"
                rows += _conv(source, f"{path}.blocks.{block}.conv{number}")
        rows += _conv(f"decoder.{begin + GROW}.conv", f"{path}.grow", bias=False)
        rows += _conv(f"decoder.{begin + CONV_AT}", f"{path}.conv", bias=False)
    last = FIRST + PER_STAGE * (len(cfg.widths) - 1) + 1
    rows += _conv(f"decoder.{last}", "decoder.conv_out")
    dropped = [
        Row(f"encoder.{'.'.join(f'{{p{n}}}' for n in range(depth))}", None) for depth in (2, 3, 4)
    ]
    return (*rows, *dropped)


ROWS = {"taehv": _rows}


def trimmed(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a file's tensors with the first stage's layer that makes frames cut to one frame, the
    last: some files have it for two, as of a decoder that doubles three times."""
    key = f"decoder.{FIRST + GROW}.conv.weight"
    weight = tensors.get(key)
    if not isinstance(weight, Tensor) or len(weight.shape) < 2:
        return tensors
    if weight.shape[0] != 2 * weight.shape[1]:
        return tensors
    return {**tensors, key: weight.rows(weight.shape[1], weight.shape[0])}


def naming(shapes: dict) -> str:
    """Whose names the keys are."""
    return "taehv"
