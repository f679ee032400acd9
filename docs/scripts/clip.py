"""The clip on the README's first page: eight prompts through the embedded model, side by side.
`python docs/scripts/clip.py`."""

from pathlib import Path

import numpy as np
from einops import rearrange, repeat

import tdjax
from tdjax.media.video import write

PROMPTS = (
    "a small red circle moves left slowly on a gray background",
    "a large green square moves right quickly on a black background",
    "a small white cross moves up quickly on a navy background",
    "a large blue triangle moves down slowly on an olive background",
    "a small cyan square bounces horizontally quickly on a gray background",
    "a large magenta circle bounces vertically slowly on a black background",
    "a small yellow triangle moves right slowly on a navy background",
    "a large orange cross moves left quickly on a black background",
)
SCALE, GAP = 2, 4  # screen pixels for a pixel; white between clips

if __name__ == "__main__":
    made = tdjax.load("demo")(list(PROMPTS), seed=0)
    frames = repeat(made.frames, "n t h w c -> n t (h a) (w b) c", a=SCALE, b=SCALE)
    frames = np.pad(frames, ((0, 0), (0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)
    folder = Path(__file__).resolve().parent.parent / "images"
    folder.mkdir(exist_ok=True)
    print(
        write(
            folder / "demo.gif",
            rearrange(frames, "(y x) t h w c -> t (y h) (x w) c", x=4),
            fps=made.fps,
            overwrite=True,
        )
    )
