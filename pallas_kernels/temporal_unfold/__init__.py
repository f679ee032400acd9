"""What a convolution over three frames that sees only the past reads: norm, SiLU, and the taps of
time side by side in the channels.

A convolution over time and space of y is then one over space of `wide`, which cuDNN runs faster.
The VAE of Wan2.1 has it before every convolution (Wan-Video/Wan2.1 wan/modules/vae.py, `RMS_norm`,
SiLU and `CausalConv3d`); in XLA it takes four passes over memory.
"""

from __future__ import annotations

from einops import rearrange

from pallas_kernels.dispatch import automatic, choose, implementations
from pallas_kernels.temporal_unfold import reference, triton

__all__ = ["IMPLEMENTATIONS", "temporal_unfold"]

IMPLEMENTATIONS = {
    "temporal_unfold": implementations(reference.temporal_unfold, triton.temporal_unfold)
}


def temporal_unfold(x, past=None, gain=None, *, impl: str = "auto"):
    """(wide [b t h w 3c], the next past [b 2 h w c]): y = norm_silu(x, gain), or x without a gain;
    wide[:, f] = y of frames f-2, f-1 and f, in the channels.

    x [b t h w c]; past [b 2 h w c]: y of the two frames before x; None: zeros. gain [c]. float32
    inside and one rounding of y to x.dtype. impl: "auto" (the kernel on CUDA for the shapes that it
    takes, `triton.refusal`; the reference elsewhere, and wherever it is differentiated),
    "reference", "triton", "interpret". ValueError for shapes that do not fit each other.
    """
    before = (x.shape[0], 2, *x.shape[2:])
    if x.ndim != 5 or (past is not None and (past.shape, past.dtype) != (before, x.dtype)):
        given = "" if past is None else f", past {past.dtype} {past.shape}"
        raise ValueError(
            f"temporal_unfold: x {x.dtype} {x.shape}{given}; expected [b t h w c] and [b 2 h w c]"
            " of one dtype"
        )
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ValueError(f"temporal_unfold: gain {gain.shape}; expected {x.shape[-1:]}")
    _, t, h, w, c = x.shape
    table = IMPLEMENTATIONS["temporal_unfold"]
    auto = automatic(table, triton.refusal(t, h * w, c), derivative="reference")
    flat = lambda a: None if a is None else rearrange(a, "b t h w c -> b t (h w) c")
    out = choose("temporal_unfold", impl, table, auto)(flat(x), flat(past), gain)
    return tuple(rearrange(a, "b t (h w) c -> b t h w c", h=h) for a in out)
