"""Every kernel against its reference at small ragged shapes, on the device at hand: `python -m
tdjax.env --selftest`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import norm_modulate, qk_prep, sage_attention, sparse_attention
from pallas_kernels.flash_attention import attention
from pallas_kernels.int8_matmul import quantize_activations, quantize_weight, quantized_linear
from pallas_kernels.temporal_unfold import temporal_unfold

BF16 = 1e-2  # relative L2: a bfloat16 rounding of operands and of the result
EXACT = 0.0
INT8_MAP = (
    3e-3  # relative L2 of int8 values, of which a last bit of float32 takes some to their neighbour
)
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
}


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


def normal(seed: int, *shape: int, dtype=jnp.bfloat16):
    """The barrier keeps the compiler from computing references by itself, from constants."""
    return lax.optimization_barrier(
        jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    )


def cases() -> Iterator[tuple[str, Callable]]:
    """(name, function of impl) in the order of BOUNDS; 200 tokens of two heads: no block divides
    them."""
    q, k, v, t = (normal(seed, 1, 200, 2, 64) for seed in range(4))
    w, b = normal(4, 64, 64, dtype=jnp.float32) / 8, normal(5, 64, dtype=jnp.float32)
    sla = lambda q, k, v, w, b, impl: sparse_attention.sparse_linear_attention(
        q, k, v, w, b, topk=0.5, impl=impl
    )
    dense = lambda q, k, v, impl: attention(q, k, v, impl=impl)
    total = lambda op: lambda *a, impl: op(*a, impl=impl).astype(jnp.float32).var()
    yield "sparse-linear attention", lambda impl: sla(q, k, v, w, b, impl)
    yield (
        "its gradient (sparse)",
        lambda impl: jax.grad(total(sla), (0, 1, 2, 3, 4))(q, k, v, w, b, impl=impl),
    )
    yield "its block map", lambda impl: sparse_attention.block_map(q, k, topk=0.5, impl=impl)
    sage = sage_attention.sage_sparse_linear_attention
    yield "with int8 scores", lambda impl: sage(q, k, v, w, b, topk=0.5, impl=impl)
    yield "dense with int8 scores", lambda impl: sage_attention.sage_attention(q, k, v, impl=impl)
    yield "dense attention", lambda impl: dense(q, k, v, impl)
    yield "its tangent", lambda impl: jax.jvp(lambda *a: dense(*a, impl), (q, k, v), (t, v, q))[1]
    yield "its gradient (dense)", lambda impl: jax.grad(total(dense), (0, 1, 2))(q, k, v, impl=impl)
    x, y, weight, bias = (
        normal(6, 1, 200, 256),
        normal(7, 1, 200, 256),
        normal(8, 384, 256),
        normal(9, 384),
    )
    product = {
        "fp8": {"triton": "xla", "interpret": "reference"}
    }  # of fp8 there is no kernel of ours
    for scheme in ("block128", "channel", "fp8"):
        q_weight = quantize_weight(weight, scheme)
        yield (
            f"{scheme} linear",
            lambda impl, scheme=scheme, q_weight=q_weight: quantized_linear(
                quantize_activations(x[0], scheme, impl="reference"),
                q_weight,
                bias,
                scheme=scheme,
                out_dtype=jnp.bfloat16,
                impl=product.get(scheme, {}).get(impl, impl),
            ),
        )
        yield (
            f"{scheme} quantisation",
            lambda impl, scheme=scheme: quantize_activations(x[0], scheme, impl=impl).values.astype(
                jnp.float32
            ),
        )
    rows = normal(10, 1, 1, 256, dtype=jnp.float32)
    norm = lambda impl: norm_modulate.norm(x, 1 + rows, rows, y=y, gate=rows, eps=1e-6, impl=impl)
    yield "norm and residual", lambda impl: (norm(impl).x, norm(impl).h)
    yield (
        "gelu to int8",
        lambda impl: norm_modulate.gelu(x, scheme="channel", impl=impl).values.astype(jnp.float32),
    )
    angles = normal(11, 200, 32, dtype=jnp.float32)
    prep = lambda impl: qk_prep.rms_norm_rope_pool(
        x, bias[:256], jnp.cos(angles), jnp.sin(angles), eps=1e-6, block=64, impl=impl
    )
    yield "norm, rotation and means", prep
    mean = k.astype(jnp.float32).mean(1)
    yield (
        "int8 keys",
        lambda impl: qk_prep.quantize_keys(k, mean, block=64, impl=impl)[0].astype(jnp.float32),
    )
    frames, past, gain = normal(12, 1, 4, 8, 10, 96), normal(13, 1, 2, 8, 10, 96), normal(14, 96)
    yield "norm, SiLU and taps", lambda impl: temporal_unfold(frames, past, gain, impl=impl)


def outputs(impl: str, names: Collection[str]) -> dict[str, tuple]:
    """{name: (the kernel's, the reference's)} of some cases, from one program that makes its own
    inputs."""
    return jax.jit(
        lambda: {
            name: (function(impl), function("reference"))
            for name, function in cases()
            if name in names
        }
    )()


def run(impl: str, only: Collection[str] | None = None) -> Iterator[Check]:
    """Every case, or those named in `only`, with `impl`: "triton" on a GPU, "interpret"
    anywhere."""
    for name, bound in BOUNDS.items():
        if only is not None and name not in only:
            continue
        try:
            yield Check(name, distance(*outputs(impl, (name,))[name]), bound)
        except Exception as error:  # noqa: BLE001  (whatever a backend raises is a failed check, and the others still run)
            yield Check(
                name,
                float("nan"),
                bound,
                (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                    if str(error)
                    else repr(error)
                ),
            )


def together(impl: str, names: Collection[str]) -> list[Check]:
    """The same of these cases from one program, which the persistent cache of compiled programs
    keeps where it leaves out small ones. Where that does not run, case by case: what it fails in
    has no name."""
    try:
        found = outputs(impl, names)
        checks = [
            Check(name, distance(*found[name]), bound)
            for name, bound in BOUNDS.items()
            if name in found
        ]
    except Exception:  # noqa: BLE001  (`run` says which case raises it)
        checks = []
    return checks or list(run(impl, names))


def distance(made, expected) -> float:
    """The largest relative L2 of any output; NaN is infinitely far."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error = np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30)
        worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def table(checks: list[Check]) -> str:
    lines = [f"{'kernel':26} {'error':>9} {'bound':>9}"]
    for c in checks:
        lines.append(
            f"{c.name:26} {c.error:9.2e} {c.bound:9.2e} "
            f" {'pass' if c.passed else 'FAIL ' + c.failure}"
        )
    return "\n".join(lines)
