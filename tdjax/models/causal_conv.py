"""Convolutions over frames that see only the past, with the past as an explicit cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from tdjax.config import VAEConfig


def conv2d(x, kernel, stride: int = 1):  # x [b t h w i], kernel [h w i o] -> [b t h w o]
    """The same 2-D convolution of every frame. Odd kernels, zeros outside; stride 2 needs even h and w.

    "SAME" is then what the network was trained with: one zero on every side at stride 1, one zero at the right and
    bottom only at stride 2.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return jnp.einsum("bthwi,io->bthwo", x, kernel[0, 0])
    b = x.shape[0]
    x = rearrange(x, "b t h w i -> (b t) h w i")
    x = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return rearrange(x, "(b t) h w o -> b t h w o", b=b)


def conv3d(x, kernel, stride: int = 1):  # x [b t h w i], kernel [t h w i o] -> [b (t-kt)//stride+1 h w o]
    """3-D convolution: zeros around each frame, none before or after in time; `stride` is in time.

    The frames that the time taps see stand side by side in the channels of one 2-D convolution. XLA runs that faster than
    its own convolution over three dimensions, on CUDA and on CPU, at the price of a copy of `x` three times as wide.
    """
    width = kernel.shape[0]
    last = x.shape[1] - width
    x = jnp.concatenate([x[:, i : i + last + 1 : stride] for i in range(width)], axis=-1)
    return conv2d(x, rearrange(kernel, "t h w i o -> h w (t i) o"))


class Conv(nnx.Module):
    """Convolution of every frame by itself. `size` is (h, w), or (1, 1, 1) for the pointwise ones stored as 3-D."""

    def __init__(self, size: tuple[int, ...], inputs: int, outputs: int, cfg: VAEConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (*size, inputs, outputs), cfg.policy.param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), cfg.policy.param_dtype))

    def __call__(self, x, stride: int = 1):  # [b t h w i] -> [b t h/stride w/stride o]
        kernel = self.kernel[...].astype(x.dtype)
        kernel = kernel[0] if kernel.ndim == 5 else kernel
        return conv2d(x, kernel, stride) + self.bias[...].astype(x.dtype)


class CausalConv(Conv):
    """3-D convolution of time width 3 whose output frame sees its own and the two earlier input frames."""

    def __call__(self, x, past=None):  # [b t h w i], [b 2 h w i] -> [b t h w o], the next past
        """`past` is the last two input frames before `x`; None: `x` is the beginning, the past is zeros."""
        x = jnp.concatenate([zero_past(x) if past is None else past, x], axis=1)
        return self.valid(x), x[:, -2:]

    def valid(self, x, stride: int = 1):  # [b t h w i] -> [b (t-3)//stride+1 h w o]
        """Without padding in time: the caller has put the past in front."""
        return conv3d(x, self.kernel[...].astype(x.dtype), stride) + self.bias[...].astype(x.dtype)


def zero_past(x):  # [b t h w c] -> [b 2 h w c]
    """What stands before the first frame."""
    b, _, h, w, c = x.shape
    return jnp.zeros((b, 2, h, w, c), x.dtype)
