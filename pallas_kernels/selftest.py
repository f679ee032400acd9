"""Every kernel against its reference at small ragged shapes, on the device at hand: `python -m
tdjax.env --selftest`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic, norm_modulate, qk_prep, sage_attention, sparse_attention
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.flash_attention import attention
from pallas_kernels.int8_matmul import (
    SCHEMES,
    quantize_activations,
    quantize_weight,
    quantized_linear,
)
from pallas_kernels.inventory import OPS
from pallas_kernels.temporal_unfold import temporal_unfold

BF16 = 1e-2  # relative L2: a bfloat16 rounding of operands and of the result
EXACT = 0.0
# relative L2 of int8 values, of which a last bit of float32 takes some to their neighbour
INT8_MAP = 3e-3
# relative L2 of float8 values, whose steps are 6 to 12 %: 3.9e-3 where XLA's 448/amax is 448
# (1/amax), a last bit off
FP8_MAP = 1e-2

BOUNDS = {
    "sparse-linear attention": BF16,
    "its gradient (sparse)": BF16,
    "its block map": EXACT,
    "with int8 scores": BF16,
    "dense with int8 scores": BF16,
    "dense attention": BF16,
    "its tangent": BF16,
    "its gradient (dense)": BF16,
    "block128 linear": BF16,
    "block128 quantisation": INT8_MAP,
    "channel linear": BF16,
    "channel quantisation": INT8_MAP,
    "fp8 linear": BF16,
    "fp8 quantisation": FP8_MAP,
    "norm and residual": BF16,
    "gelu to int8": INT8_MAP,
    "norm, rotation and means": BF16,
    "int8 keys": INT8_MAP,
    "norm, SiLU and taps": BF16,
    "sparse-linear attention (Mosaic)": BF16,
    "with int8 scores (Mosaic)": BF16,
    "dense with int8 scores (Mosaic)": BF16,
    "channel linear (Mosaic)": BF16,
    "fp8 linear (Mosaic)": BF16,
    "causal convolution (Mosaic)": BF16,
}
MOSAIC = " (Mosaic)"  # ends the name of a check of the same op's kernel for Hopper


@dataclasses.dataclass(frozen=True)
class Check:
    """One kernel: error is the relative L2 of its output to the reference's, bound what is allowed;
    failure if it did not run."""

    name: str
    error: float
    bound: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.bound


def _normal(seed: int, *shape: int, dtype=jnp.bfloat16):
    """The barrier keeps the compiler from computing references by itself, from constants."""
    return lax.optimization_barrier(
        jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    )


def cases() -> Iterator[tuple[str, tuple[str, ...], Callable]]:
    """(name, ops of the inventory, function of impl) in the order of BOUNDS."""
    yield from _attention_cases()
    yield from _linear_cases()
    yield from _row_cases()
    yield from _mosaic_cases()


def _attention_cases():
    """200 tokens of two heads: no block divides them."""
    q, k, v, t = (_normal(seed, 1, 200, 2, 64) for seed in range(4))
    w, b = _normal(4, 64, 64, dtype=jnp.float32) / 8, _normal(5, 64, dtype=jnp.float32)
    sage = sage_attention.sage_sparse_linear_attention

    def sla(q, k, v, w, b, impl):
        return sparse_attention.sparse_linear_attention(q, k, v, w, b, topk=0.5, impl=impl)

    def dense(q, k, v, impl):
        return attention(q, k, v, impl=impl)

    def gradient(op, *args):
        """Of the variance of the output, by every argument."""
        total = lambda *args, impl: op(*args, impl=impl).astype(jnp.float32).var()
        return lambda impl: jax.grad(total, tuple(range(len(args))))(*args, impl=impl)

    sparse = "sparse_attention", "sparse_linear_attention"
    yield "sparse-linear attention", sparse, lambda impl: sla(q, k, v, w, b, impl)
    yield "its gradient (sparse)", sparse, gradient(sla, q, k, v, w, b)
    block_map = partial(sparse_attention.block_map, q, k, topk=0.5)
    yield "its block map", ("block_map",), lambda impl: block_map(impl=impl)
    int8 = "sage_sparse_attention", "sage_sparse_linear_attention"
    yield "with int8 scores", int8, lambda impl: sage(q, k, v, w, b, topk=0.5, impl=impl)
    dense_int8 = partial(sage_attention.sage_attention, q, k, v)
    yield "dense with int8 scores", ("sage_attention",), lambda impl: dense_int8(impl=impl)
    yield "dense attention", ("attention",), lambda impl: dense(q, k, v, impl)
    tangent = lambda impl: jax.jvp(lambda *args: dense(*args, impl), (q, k, v), (t, v, q))[1]
    yield "its tangent", ("attention",), tangent
    yield "its gradient (dense)", ("attention",), gradient(dense, q, k, v)


def _linear_cases():
    x, weight, bias = _normal(6, 200, 256), _normal(8, 384, 256), _normal(9, 384)
    for scheme in SCHEMES:
        yield (
            f"{scheme} linear",
            (f"quantized_linear {scheme}",),
            partial(_linear, x, weight, bias, scheme),
        )
        yield (
            f"{scheme} quantisation",
            (f"quantize_activations {scheme}",),
            partial(_quantised, x, scheme),
        )


def _linear(x, weight, bias, scheme, impl):
    """The product, and in the schemes whose kernels add themselves to a stream that as well."""
    table = OPS[f"quantized_linear {scheme}"]
    if impl not in table:  # of fp8 there is no Triton kernel
        impl = "reference" if impl == "interpret" else "xla"
    x = quantize_activations(x, scheme, impl="reference")
    weight = quantize_weight(weight, scheme)
    options = {"scheme": scheme, "out_dtype": jnp.bfloat16, "impl": impl}
    product = partial(quantized_linear, x, weight, bias, **options)
    if scheme == "block128":
        return product()
    # as large as the product, so that a part that is lost shows
    stream, gate = 16 * _normal(18, 200, 384), _normal(19, 384, dtype=jnp.float32)
    return product(), product(stream=stream, gate=gate)


def _quantised(x, scheme, impl):
    return quantize_activations(x, scheme, impl=impl).values.astype(jnp.float32)


def _row_cases():
    x, y, rows = (
        _normal(6, 1, 200, 256),
        _normal(7, 1, 200, 256),
        _normal(10, 1, 1, 256, dtype=jnp.float32),
    )

    def norm(impl):
        out = norm_modulate.norm(x, 1 + rows, rows, y=y, gate=rows, eps=1e-6, impl=impl)
        return out.x, out.h

    def gelu(impl):
        return norm_modulate.gelu(x, scheme="channel", impl=impl).values.astype(jnp.float32)

    yield "norm and residual", ("norm",), norm
    yield "gelu to int8", ("gelu",), gelu
    angles, weight = _normal(11, 200, 32, dtype=jnp.float32), _normal(9, 384)[:256]
    tables = jnp.cos(angles), jnp.sin(angles)
    prep = partial(qk_prep.rms_norm_rope_pool, x, weight, *tables, eps=1e-6, block=64)
    ops = "rms_norm_rope", "rms_norm_rope_pool"
    yield "norm, rotation and means", ops, lambda impl: prep(impl=impl)
    k = _normal(1, 1, 200, 2, 64)
    keys = partial(sage_attention.quantize_keys, k, k.astype(jnp.float32).mean(1), block=64)
    yield "int8 keys", ("quantize_keys",), lambda impl: keys(impl=impl)[0].astype(jnp.float32)
    frames, past, gain = _normal(12, 1, 4, 8, 10, 96), _normal(13, 1, 2, 8, 10, 96), _normal(14, 96)
    unfold = partial(temporal_unfold, frames, past, gain)
    yield "norm, SiLU and taps", ("temporal_unfold",), lambda impl: unfold(impl=impl)


def _mosaic_cases():
    """What the kernels for Hopper take: heads 128 wide. They run for any impl but "reference"."""
    q, k, v = (_normal(seed, 1, 200, 2, 128) for seed in range(3))
    w, b = _normal(4, 128, 128, dtype=jnp.float32) / 11, _normal(5, 128, dtype=jnp.float32)
    sla = partial(sparse_attention.sparse_linear_attention, q, k, v, w, b, topk=0.5)
    sage = partial(sage_attention.sage_sparse_linear_attention, q, k, v, w, b, topk=0.5)
    dense = partial(sage_attention.sage_attention, q, k, v)
    operands = _normal(6, 200, 256), _normal(8, 384, 256), _normal(9, 384)

    # rows and columns that no tile divides
    frames, past, plus = (_normal(15, 2, t, 40, 12, 96) for t in (4, 2, 4))
    kernel, gain = _normal(16, 3, 3, 3, 96, 96) / 51, _normal(17, 96)

    def product(scheme):
        return lambda impl: _linear(*operands, scheme, impl)

    def convolution(impl):
        return causal_conv(frames, past, gain, kernel, gain, plus, impl=impl)

    checks = {
        "sparse-linear attention": (("sparse_linear_attention",), lambda impl: sla(impl=impl)),
        "with int8 scores": (("sage_sparse_linear_attention",), lambda impl: sage(impl=impl)),
        "dense with int8 scores": (("sage_attention",), lambda impl: dense(impl=impl)),
        "channel linear": (("quantized_linear channel",), product("channel")),
        "fp8 linear": (("quantized_linear fp8",), product("fp8")),
        "causal convolution": (("causal_conv",), convolution),
    }
    chosen = lambda impl: "reference" if impl == "reference" else "mosaic"
    for name, (ops, function) in checks.items():
        yield name + MOSAIC, ops, lambda impl, function=function: function(chosen(impl))


def _runs(name: str, impl: str) -> bool:
    """Whether a check runs here: the kernels for Hopper are compiled there, and not interpreted."""
    return not name.endswith(MOSAIC) or (impl == "triton" and mosaic.at_hand())


def outputs(impl: str, names: Collection[str]) -> dict[str, tuple]:
    """{name: (the kernel's, the reference's)} of some cases, from one program that makes its own
    inputs."""
    return jax.jit(
        lambda: {
            name: (function(impl), function("reference"))
            for name, _, function in cases()
            if name in names
        }
    )()


def run(impl: str, only: Collection[str] | None = None) -> Iterator[Check]:
    """Every case, or those named in `only`, with `impl`: "triton" on a GPU, "interpret"
    anywhere."""
    for name, bound in BOUNDS.items():
        if (only is not None and name not in only) or not _runs(name, impl):
            continue
        try:
            yield Check(name, _distance(*outputs(impl, (name,))[name]), bound)
        except Exception as error:  # noqa: BLE001
            # whatever a backend raises is a failed check, and the others still run
            lines = str(error).splitlines()
            failure = f"{type(error).__name__}: {lines[0][:160]}" if lines else repr(error)
            yield Check(name, float("nan"), bound, failure)


def together(impl: str, names: Collection[str]) -> list[Check]:
    """The same of these cases from one program, which the persistent cache of compiled programs
    keeps where it leaves out small ones. Where that does not run, case by case: what it fails in
    has no name."""
    names = {name for name in names if _runs(name, impl)}
    try:
        found = outputs(impl, names)
        checks = [
            Check(name, _distance(*found[name]), bound)
            for name, bound in BOUNDS.items()
            if name in found
        ]
    except Exception:  # noqa: BLE001  (`run` says which case raises it)
        checks = []
    return checks or list(run(impl, names))


def _distance(made, expected) -> float:
    """The largest relative L2 of any output; NaN is infinitely far."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error = np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30)
        worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def table(checks: list[Check]) -> str:
    lines = [f"{'kernel':34} {'error':>9} {'bound':>9}"]
    for c in checks:
        verdict = "pass" if c.passed else f"FAIL {c.failure}"
        lines.append(f"{c.name:34} {c.error:9.2e} {c.bound:9.2e}  {verdict}")
    return "\n".join(lines)
