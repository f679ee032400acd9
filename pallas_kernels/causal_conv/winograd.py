"""Two output frames of a causal convolution of time width 3 from four products with frames, where
there were six: Winograd's F(2, 3) along time (Lavin and Gray, arXiv 1509.09308, section 4.1).

With frames d0 to d3 and taps g0 to g2, the outputs g0 d0 + g1 d1 + g2 d2 and g0 d1 + g1 d2 + g2 d3
are m0 + m1 + m2 and m1 - m2 + m3 of the products

    m0 = g0 (d0 - d2)                    m1 = (g0 + g1 + g2)/2 (d1 + d2)
    m2 = (g0 - g1 + g2)/2 (d2 - d1)      m3 = g2 (d3 - d1)

Combined frames and taps are rounded once more, to the dtype of the frames. A frame that the direct
form does not see does not enter an output here either.

How frames lie: rows are divided into eight strips, whose pixels lie side by side, as a row of a
tensor instruction's operand wants them. A neighbour is then a multiple of eight rows of the operand
away, in height and in width.
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.mosaic import FLOATS

STRIPS = 8
SLAB = 32  # channels that are copied at once
OUTPUTS = 96  # of a tile
FRAMES = 8  # of a chunk at most: a program holds them all in registers
PIXELS = 4  # columns are a multiple of so many
WIDEST = 1024  # channels at most
LARGEST = 2**31  # values of the combined frames: above it offsets are wider, which was never run


def refusal(x, past, kernel) -> str | None:
    """Returns why the kernels do not take frames x, their past and a kernel [t h w i o]; None if
    they do. Where they run is another question: `mosaic.unavailable`."""
    b, t, h, w, c = x.shape
    if jnp.dtype(x.dtype) not in FLOATS:
        return f"frames are {x.dtype}; allowed: {', '.join(map(str, FLOATS))}"
    if past is None or t % 2 or not 2 <= t <= FRAMES:
        return f"{t} frames{'' if past is not None else ' and no past'}; allowed: 2, 4, 6 or 8"
    if kernel.shape[:3] != (3, 3, 3):
        return f"the kernel is {kernel.shape[:3]}; allowed: (3, 3, 3)"
    sizes = {
        "rows": (h, STRIPS),
        "columns": (w, PIXELS),
        "inputs": (c, SLAB),
        "outputs": (kernel.shape[4], OUTPUTS),
    }
    for name, (size, step) in sizes.items():
        if size % step:
            return f"{size} {name} are not a multiple of {step}"
    if c > WIDEST:
        return f"{c} inputs are more than {WIDEST}"
    if 2 * b * t * c * (h + 2 * STRIPS) * (w + 2) >= LARGEST:
        return f"{b} x {t} frames of {h} x {w} and {c} inputs are {LARGEST} values or more"
    return None


def in_strips(x):  # [b t h w c] -> [b t h/8 8w c]
    return rearrange(x, "b t (s v) w c -> b t v (w s) c", s=STRIPS)


def from_strips(x):  # [b t h/8 8w c] -> [b t h w c]
    return rearrange(x, "b t v (w s) c -> b t (s v) w c", s=STRIPS)


def combined_frames(d):
    """Frames d0 to d3 combined in float32: what the four products read."""
    d = [frame.astype(jnp.float32) for frame in d]
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]


def combined_taps(kernel):  # [3 h w i o] -> f32 [4 h w i o]
    """Taps g0 to g2 combined in float32."""
    first, middle, last = kernel.astype(jnp.float32)
    halves = (first + middle + last) / 2, (first - middle + last) / 2
    return jnp.stack([first, *halves, last])


def weights(kernel, dtype):
    """Returns the combined taps of a kernel [3 3 3 i o] as the product reads them: [o/96 4 i/32 3
    288 32], for each tile of outputs, each product, each slab of inputs and each row of taps those
    of three columns."""
    taps = combined_taps(kernel).astype(dtype)
    return rearrange(taps, "n h w (p i) (q o) -> q n p h (w o) i", i=SLAB, o=OUTPUTS)
