"""Convolutions over frames that see only the past, with the past as an explicit cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from pallas_kernels import causal_conv
from pallas_kernels.norm_silu import norm_silu
from pallas_kernels.temporal_unfold import temporal_unfold
from tdjax.config import VAEConfig
from tdjax.models.abstract import drawn
from tdjax.parallel.space import is_divided, lines_beyond


def conv2d(x, kernel, bias, stride: int = 1, plus=None):
    """The same 2-D convolution of every frame: x [b t h w i], kernel [h w i o], bias [o] -> [b t h
    w o]. Odd kernels, zeros outside; stride 2 needs even h and w. plus: what else is added.

    One zero stands on every side at stride 1, and one at the right and bottom only at stride 2, as
    the network was trained; between devices it is the neighbour's line. Frames are images until all
    is added: so cuDNN does it as it writes.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1:
        y = jnp.einsum("bthwi,io->bthwo", x, kernel[0, 0]) + bias
        return y if plus is None else y + plus
    reach = kernel.shape[0] // 2
    pads = (reach if stride == 1 else 0, reach)
    y = _conv(_images(x), kernel, (stride, stride), (pads, pads)) + bias
    y = y if plus is None else y + _images(plus)
    y = _with_lines_beyond(y, x, kernel, stride, pads)
    return rearrange(y, "(b t) h w o -> b t h w o", b=x.shape[0])


def _conv(x, kernel, strides, pads):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout)


def _with_lines_beyond(y, x, kernel, stride: int, pads: tuple[int, int]):
    """y [n h w o], for which frames x [b t h w i] ended in zeros, with what the outermost taps see
    of the devices beside. The rest of a convolution need not wait for those lines, and x is not
    copied to stand between them."""
    for axis, line, after in lines_beyond(x):
        first, last = (lax.index_in_dim(kernel, end, axis - 2, keepdims=False) for end in (0, -1))
        tap = jnp.where(after, last, first if pads[0] else 0)
        line = jnp.squeeze(_images(line), axis - 1)
        change = _along(line, tap, stride, pads).astype(y.dtype)
        at, axis = jnp.where(after, y.shape[axis - 1] - 1, 0), axis - 1
        change = jnp.expand_dims(change, axis) + lax.dynamic_slice_in_dim(y, at, 1, axis)
        y = lax.dynamic_update_slice_in_dim(y, change, at, axis)
    return y


def _along(line, taps, stride: int, pads: tuple[int, int]):  # [n m i], [k i o] -> f32 [n m o]
    """The convolution along a line, every `stride`-th output of it, as one product with all taps:
    cuDNN takes longer to begin than the product takes, and what runs before and after cannot be in
    one graph with it."""
    k, out = len(taps), (line.shape[1] + sum(pads) - len(taps)) // stride + 1
    products = jnp.einsum("nmi,kio->nmko", line, taps, preferred_element_type=jnp.float32)
    products = jnp.pad(products, ((0, 0), pads, (0, 0), (0, 0)))
    reach = (out - 1) * stride + 1
    return sum(products[:, i : i + reach : stride, i] for i in range(k))


def _images(x):  # [b t h w c] -> [(b t) h w c]
    return rearrange(x, "b t h w c -> (b t) h w c")


def conv2d_upsampled(x, kernel, bias):  # x [b t h w i], kernel [3 3 i o], bias [o] -> [b t 2h 2w o]
    """conv2d(x, kernel, bias) of frames of twice the height and width, every pixel of x repeated 2
    x 2: those are never made.

    An output row 2r + p sees the rows r - 1 + p and r + p of x, one of them through two taps, whose
    sum is one tap. So there are four kernels of 2 x 2 taps, one for each place in a 2 x 2 block of
    the output: 16 products where there were 36.
    """
    rows = _folded(kernel.astype(jnp.float32))
    taps = rearrange(_folded(jnp.moveaxis(rows, 2, 0)), "q b p a i o -> a b i (p q o)")
    taps = taps.astype(kernel.dtype)
    y = _conv(_images(x), taps, (1, 1), ((1, 1), (1, 1))) + jnp.tile(bias, 4)
    y = _with_lines_beyond(y, x, taps, 1, (1, 1))
    y = _interleaved(rearrange(y, "n h w (p q o) -> n h w p q o", p=2, q=2))
    return rearrange(y, "(b t) h p w q o -> b t (h p) (w q) o", b=x.shape[0])


@jax.custom_jvp
def _interleaved(y):  # [n h+1 w+1 2 2 o] -> [n h 2 w 2 o]
    """Each place of its kernel's output. XLA moves an element at a time: words of two 16-bit
    numbers take half the time."""
    if y.dtype.itemsize != 2 or y.shape[-1] % 2:
        return _placed(y)
    pairs = rearrange(y, "... (o two) -> ... o two", two=2)
    words = _placed(lax.bitcast_convert_type(pairs, jnp.uint32))
    return rearrange(lax.bitcast_convert_type(words, y.dtype), "... o two -> ... (o two)")


# words have no derivative
_interleaved.defjvp(lambda primals, tangents: (_interleaved(*primals), _placed(*tangents)))


def _placed(y):
    h, w = (n - 1 for n in y.shape[1:3])
    row = lambda p: jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in range(2)], axis=3)
    return jnp.stack([row(0), row(1)], axis=2)


def _folded(taps):  # [3 ...] -> [2 2 ...]
    """The taps upon the two inputs that an output at each of two places sees."""
    first, middle, last = taps
    return jnp.stack([jnp.stack([first, middle + last]), jnp.stack([first + middle, last])])


class Conv(nnx.Module):
    """Convolution of every frame by itself. `size` is (h, w), or (1, 1, 1) for the pointwise ones
    stored as 3-D."""

    def __init__(
        self, size: tuple[int, ...], inputs: int, outputs: int, cfg: VAEConfig, *, rngs: nnx.Rngs
    ):
        init, dtype = jax.nn.initializers.lecun_normal(), cfg.policy.param_dtype
        self.kernel = nnx.Param(drawn(init, rngs, (*size, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype))

    def __call__(self, x, stride: int = 1):  # [b t h w i] -> [b t h/stride w/stride o]
        kernel = self.kernel[...].astype(x.dtype)
        kernel = kernel[0] if kernel.ndim == 5 else kernel
        return conv2d(x, kernel, self.bias[...].astype(x.dtype), stride)

    def upsampled(self, x):  # [b t h w i] -> [b t 2h 2w o]
        """The convolution of every pixel repeated 2 x 2; of kernels 3 x 3."""
        return conv2d_upsampled(x, self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype))


class CausalConv(Conv):
    """3-D convolution of time width 3 whose output frame sees its own and the two earlier input
    frames.

    The frames that the time taps see stand side by side in the channels of one 2-D convolution. XLA
    runs that faster than its own convolution over three dimensions, on CUDA and on CPU, at the
    price of an input three times as wide.
    """

    def __init__(
        self, size: tuple[int, ...], inputs: int, outputs: int, cfg: VAEConfig, *, rngs: nnx.Rngs
    ):
        super().__init__(size, inputs, outputs, cfg, rngs=rngs)
        self.impl = cfg.impl

    def __call__(self, x, past=None, gain=None, plus=None):
        """Returns the convolution [b t h w o] of x [b t h w i], or of silu(unit_norm(x, gain)), and
        the next past.

        past [b 2 h w i]: what is convolved of the two frames before; None: x is the beginning, the
        past is zeros. gain [i]; plus [b t h w o]: what is added to the output.
        """
        if self.impl == "auto" and not is_divided():
            kernel, bias = self.kernel[...], self.bias[...]
            if causal_conv.refusal(x, past, kernel) is None:
                return causal_conv.causal_conv(x, past, gain, kernel, bias, plus)
        wide, past = temporal_unfold(x, past, gain, impl=self.impl)
        return self.of_taps(wide, plus), past

    def halving(self, x, past):  # [b t h w i], [b 1 h w i] -> [b t/2 h w o], the next past
        """Every second output, from the one that sees the frame before x and the first two of x."""
        x = jnp.concatenate([past, x], axis=1)
        taps = [x[:, i : i + x.shape[1] - 2 : 2] for i in range(3)]
        return self.of_taps(jnp.concatenate(taps, axis=-1)), x[:, -1:]

    def of_taps(self, wide, plus=None):  # [b t h w 3i], [b t h w o] -> [b t h w o]
        kernel = rearrange(self.kernel[...].astype(wide.dtype), "t h w i o -> h w (t i) o")
        return conv2d(wide, kernel, self.bias[...].astype(wide.dtype), plus=plus)


class NarrowCausalConv(CausalConv):
    """The same for much fewer outputs than inputs: every tap of time by itself, of which outputs of
    three frames are added, in float32.

    A frame is read once and not three times over, and what is remembered are two frames of outputs
    of the taps.
    """

    def __call__(self, x, past=None, gain=None):
        """[b t h w i], past [b 2 h w 3o], gain [i] -> [b t h w o], the next past."""
        y = x if gain is None else norm_silu(x, gain)
        kernel = rearrange(self.kernel[...].astype(x.dtype), "t h w i o -> h w i (t o)")
        bias = self.bias[...].astype(jnp.float32)
        y = conv2d(y, kernel, jnp.zeros(kernel.shape[-1], x.dtype))
        y = jnp.concatenate([zero_past(y) if past is None else past, y], axis=1)
        taps = enumerate(jnp.split(y.astype(jnp.float32), 3, axis=-1))
        return sum((tap[:, i : i + x.shape[1]] for i, tap in taps), bias).astype(x.dtype), y[:, -2:]


def zero_past(x):  # [b t h w c] -> [b 2 h w c]
    """What stands before the first frame."""
    b, _, h, w, c = x.shape
    return jnp.zeros((b, 2, h, w, c), x.dtype)
