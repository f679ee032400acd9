"""Short videos whose motion is known: a bright square that moves by whole pixels over grey."""

from pathlib import Path

import numpy as np

from tdjax.media import video

SIDE = 32
MOTIONS = {"right": (2, 0), "left": (-2, 0), "down": (0, 2), "up": (0, -2)}
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "white": (240,) * 3}


def moving(frames: int, colour="red", motion="right", side=SIDE, offset=0) -> np.ndarray:
    """uint8 [T H W 3]: a square of a quarter of the side, which comes in again where it leaves."""
    out = np.full((frames, side, side, 3), 96, np.uint8)
    dx, dy = MOTIONS[motion]
    square = np.full((side // 4, side // 4, 3), COLOURS[colour], np.uint8)
    for t in range(frames):
        rows = (np.arange(side // 4) + 12 + t * dy + offset) % side
        columns = (np.arange(side // 4) + 12 + t * dx + offset) % side
        out[t][np.ix_(rows, columns)] = square
    return out


def caption(colour: str, motion: str) -> str:
    """In the words of the demo model."""
    size = "a small " if colour != "orange" else "a large "
    return f"{size}{colour} square moves {motion} slowly on a gray background"


def folder_of_clips(folder: Path, count: int, frames: int = 5, suffix=".mp4") -> Path:
    """`count` videos with their captions beside them, in all colours and directions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = list(COLOURS)[i % 4]
        motion = list(MOTIONS)[i // 4 % 4]
        path = folder / f"clip_{i:02}{suffix}"
        video.write(path, moving(frames, colour, motion, offset=i), fps=16)
        path.with_suffix(".txt").write_text(caption(colour, motion) + "\n")
    return folder
