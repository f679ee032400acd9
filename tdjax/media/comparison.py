"""Clips compared in a notebook, or in a page made of one: two chosen by name, their difference, and
a slider over the frames. Plain HTML: it needs no kernel and no other file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from tdjax.config.values import shown
from tdjax.errors import UsageError

WIDTH = 288  # pixels of a picture in the page; larger frames are stored at this width
GAIN = 4  # of the difference
_PAGE = Path(__file__).with_name("comparison.html")


class Comparison:
    """A widget that shows two of several clips and what is between them.

    clips: uint8 [T H W 3] by name, all of one shape. The first two are shown at the beginning.
    fps:   frames a second while it plays.
    The last of the three pictures is the absolute difference, times GAIN. Frames wider than WIDTH
    are made smaller; all others are kept exactly. Raises UsageError.
    """

    def __init__(self, clips: Mapping[str, np.ndarray], fps: float = 16):
        if not clips:
            raise UsageError("no clips are given", "one or more by name", 'give {"a": frames}')
        self.clips = {str(name): np.asarray(clip) for name, clip in clips.items()}
        self.fps = fps
        for name, clip in self.clips.items():
            if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8:
                raise UsageError(
                    f"{shown(name)} is {clip.dtype} {list(clip.shape)}",
                    "a clip is uint8 [T H W 3]",
                    "take result.pixels()",
                )
        if len({clip.shape for clip in self.clips.values()}) > 1:
            shapes = {name: list(clip.shape) for name, clip in self.clips.items()}
            raise UsageError(
                f"the clips have different shapes: {shapes}",
                "frames are compared one by one",
                "make them with one size and number of frames",
            )

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.clips)})"

    def _repr_html_(self) -> str:
        """The widget as HTML of its own."""
        frames, height, width, _ = next(iter(self.clips.values())).shape
        side = min(width, WIDTH), round(height * min(width, WIDTH) / width)
        columns = math.ceil(math.sqrt(frames))
        sheets = {name: _sheet(clip, side, columns) for name, clip in self.clips.items()}
        about = {
            "names": list(sheets),
            "sheets": list(sheets.values()),
            "frames": frames,
            "columns": columns,
            "width": side[0],
            "height": side[1],
            "fps": self.fps,
            "gain": GAIN,
        }
        text = json.dumps(about).replace("<", "\\u003c")
        values = {
            "MARK": hashlib.sha256(text.encode()).hexdigest()[:16],
            "ALL": str(3 * WIDTH),
            "LAST": str(frames - 1),
            "GAIN": str(GAIN),
            "ABOUT": text,
        }
        page = _PAGE.read_text()
        for name, value in values.items():
            page = page.replace(f"@{name}@", value)
        return page


def _sheet(clip: np.ndarray, side: tuple[int, int], columns: int) -> str:
    """All frames of a clip in one picture, row after row, as an address that holds it."""
    width, height = side
    sheet = Image.new("RGB", (columns * width, math.ceil(len(clip) / columns) * height))
    for i, frame in enumerate(clip):
        image = Image.fromarray(frame)
        if image.size != side:
            image = image.resize(side, Image.Resampling.LANCZOS)
        sheet.paste(image, (i % columns * width, i // columns * height))
    data = io.BytesIO()
    sheet.save(data, "webp", lossless=True, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
