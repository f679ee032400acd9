"""What a convolution over three frames that sees only the past reads: norm, SiLU, and the taps of
time side by side in the channels.

A convolution over time and space of y is then one over space of `wide`, which cuDNN runs faster.
The VAE of Wan2.1 has it before every convolution (Wan-Video/Wan2.1 wan/modules/vae.py, `RMS_norm`,
SiLU and `CausalConv3d`); in XLA it takes four passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange

from pallas_kernels.dispatch import automatic, choose
from pallas_kernels.temporal_unfold import reference, triton
from pallas_kernels.temporal_unfold.reference import norm_silu, unit_norm
from pallas_kernels.tuning import tile

__all__ = ["temporal_unfold", "norm_silu", "unit_norm"]


def temporal_unfold(
    x, past=None, gain=None, *, impl: str = "auto"
):  # [b t h w c], [b 2 h w c], [c] -> [b t h w 3c], [b 2 h w c]
    """(wide, the next past): y = norm_silu(x, gain), or x without a gain; wide[:, f] = y of frames
    f-2, f-1 and f, in the channels.

    past: y of the two frames before x; None: zeros. float32 inside and one rounding of y to
          x.dtype. impl: "auto" (the kernel on CUDA for
    the shapes that it takes, `triton.refusal`; the reference elsewhere, and wherever it is
    differentiated), "reference", "triton", "interpret". ValueError for shapes that do not fit each
    other.
    """
    if (
        x.ndim != 5
        or past is not None
        and (past.shape != (x.shape[0], 2, *x.shape[2:]) or past.dtype != x.dtype)
    ):
        given = "" if past is None else f", past {past.dtype} {past.shape}"
        raise ValueError(
            f"temporal_unfold: x {x.dtype} {x.shape}{given}; expected [b t h w c] and [b 2 h w c] of"
            " one dtype"
        )
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ValueError(f"temporal_unfold: gain {gain.shape}; expected {x.shape[-1:]}")
    _, t, h, w, c = x.shape
    refusal = triton.refusal(t, h * w, c)
    run = choose(
        "temporal_unfold",
        impl,
        TAPS,
        automatic(
            TAPS["triton"], reference.temporal_unfold, refusal, derivative=reference.temporal_unfold
        ),
    )
    flat = lambda a: None if a is None else rearrange(a, "b t h w c -> b t (h w) c")
    return tuple(
        rearrange(a, "b t (h w) c -> b t h w c", h=h) for a in run(flat(x), flat(past), gain)
    )


def kernel(interpret: bool) -> Callable:
    """The kernel with the tile of the device at hand, looked up when it is called."""
    return lambda *args: triton.temporal_unfold(
        *args, tile=tile("temporal_unfold", "taps"), interpret=interpret
    )


TAPS = {"reference": reference.temporal_unfold, "triton": kernel(False), "interpret": kernel(True)}
