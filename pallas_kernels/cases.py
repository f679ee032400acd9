"""What the bench measures: for each op its implementations, its real shapes, and the function that
its error is taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import norm_modulate, qk_prep, sage_attention, sparse_attention
from pallas_kernels.flash_attention import attention, cudnn
from pallas_kernels.flash_attention import workloads as dense_shapes
from pallas_kernels.int8_matmul import quantize_activations, quantize_weight, quantized_linear
from pallas_kernels.int8_matmul import workloads as linear_shapes
from pallas_kernels.norm_modulate import workloads as row_shapes
from pallas_kernels.qk_prep import workloads as prep_shapes
from pallas_kernels.sage_attention import triton as sage_kernels
from pallas_kernels.sage_attention import workloads as sage_shapes
from pallas_kernels.sparse_attention import linear
from pallas_kernels.sparse_attention import workloads as sparse_shapes
from pallas_kernels.sparse_attention.forward import attend, kernel_name
from pallas_kernels.temporal_unfold import temporal_unfold
from pallas_kernels.temporal_unfold import workloads as tap_shapes
from pallas_kernels.tuning import tile
from pallas_kernels.workload import Workload

TOPK, BLOCK_Q, BLOCK_K = sparse_shapes.TOPK, sparse_shapes.BLOCK_Q, sparse_shapes.BLOCK_K
SELF = {name: work for name, work in dense_shapes.WORKLOADS.items() if "text" not in name}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """run(impl, *args) is timed; prepare(impl, *args), where given, makes its arguments from the
    workload's, untimed.

    exact(*args of the workload) is what the output should be. narrow: the share of the
    operations that 8-bit units could do, by implementation ("" for all others).
    """

    name: str
    impls: tuple[str, ...]
    workloads: Mapping[str, Workload]
    run: Callable
    exact: Callable
    prepare: Callable | None = None
    narrow: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def eight_bit(self, impl: str) -> float:
        return self.narrow.get(impl, self.narrow.get("", 0.0))


def wide(args):
    """Floating-point arguments in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, args
    )


def exactly(run: Callable) -> Callable:
    """The reference on float32 arguments."""
    return lambda *args: run("reference", *wide(args))


def plainly(run: Callable) -> Callable:
    """The reference on the arguments as they are: for ops whose outputs are whole numbers or 8
    bits."""
    return partial(run, "reference")


def sla(impl, *args):
    return sparse_attention.sparse_linear_attention(
        *args, topk=TOPK, block_q=BLOCK_Q, block_k=BLOCK_K, impl=impl
    )


def sagesla(impl, *args):
    return sage_attention.sage_sparse_linear_attention(
        *args, topk=TOPK, block_q=BLOCK_Q, block_k=BLOCK_K, impl=impl
    )


def sparse(impl, *args):
    return sparse_attention.sparse_attention(*args, block_q=BLOCK_Q, block_k=BLOCK_K, impl=impl)


def block_map(impl, q, k, *_):
    return sparse_attention.block_map(q, k, topk=TOPK, block_q=BLOCK_Q, block_k=BLOCK_K, impl=impl)


def dense(impl, q, k, v):
    return attention(q, k, v, impl=impl)


def int8_operands(impl, q, k, v, blocks):
    """The operands of the loop alone: queries and keys already quantised."""
    make = lambda q, k: sage_kernels.operands(
        q, k, k.mean(1, dtype=jnp.float32), BLOCK_Q, BLOCK_K, interpret=False
    )
    return jax.jit(make)(q, k), v, blocks


def int8_loop(impl, operands, v, blocks):
    at = tile("sage_attention", kernel_name(BLOCK_Q))
    return attend(
        sage_kernels.int8_scores, *operands, v, blocks, BLOCK_Q, BLOCK_K, interpret=False, at=at
    )


def summaries(impl, q, k, v, *_):
    if impl == "triton":
        return linear.summaries(k, v, interpret=False)
    phi = sparse_attention.reference.feature(k)
    return jnp.einsum("blhi,blhj->bhij", phi, v, preferred_element_type=jnp.float32), phi.sum(
        1, dtype=jnp.float32
    )


def pullback(run: Callable) -> dict[str, Callable]:
    """The gradient alone: residuals are made beforehand, the cotangent of o is v. "cudnn" is that
    of JAX's own op, which saves its output and statistics, where ours runs cuDNN's forward pass
    again.
    """

    def prepare(impl, *args):
        forward = partial(cudnn.fused, scale=None) if impl == "cudnn" else partial(run, impl)
        return *jax.jit(lambda *args: jax.vjp(forward, *args)[1:])(*args), args[2]

    def exact(*args):
        args = wide(args)
        return jax.vjp(partial(run, "reference"), *args)[1](args[2])

    return {"run": lambda impl, pull, g: pull(g), "prepare": prepare, "exact": exact}


def tangent(impl, q, k, v):
    """The tangent along (v, q, k), and the output."""
    return jax.jvp(partial(dense, impl), (q, k, v), (v, q, k))[1]


def linear_layer(impl, x, weight, bias):
    """A linear layer with the quantisation of its activations; "channel+triton" is the product by
    our kernel, "bf16" XLA's."""
    if impl in ("bf16", "reference"):
        return x @ weight.T + bias
    scheme, _, product = impl.partition("+")
    kernel = "triton" if scheme == "block128" else product or "xla"
    x8 = quantize_activations(x, scheme, impl="triton")
    return quantized_linear(x8, weight, bias, scheme=scheme, out_dtype=jnp.bfloat16, impl=kernel)


def product(impl, x, weight, bias):
    """The product of activations that are quantised already."""
    if impl == "bf16":
        return x @ weight.T + bias
    scheme, _, kernel = impl.partition("+")
    kernel = "triton" if scheme == "block128" else kernel or "xla"
    return quantized_linear(x, weight, bias, scheme=scheme, out_dtype=jnp.bfloat16, impl=kernel)


def quantised_weight(impl, x, weight, bias):
    return (
        (x, weight, bias)
        if impl == "bf16"
        else (x, jax.jit(partial(quantize_weight, scheme=impl.partition("+")[0]))(weight), bias)
    )


def quantised_both(impl, x, weight, bias):
    if impl == "bf16":
        return x, weight, bias
    return (
        quantize_activations(x, impl.partition("+")[0], impl="triton"),
        *quantised_weight(impl, x, weight, bias)[1:],
    )


def float_layer(x, weight, bias):
    x, weight, bias = wide((x, weight, bias))
    return jnp.matmul(x, weight.T, precision="highest") + bias


def norm(impl, x, factor, shift, y, gate):
    out = norm_modulate.norm(
        x, factor, shift, y=y, gate=gate, eps=1e-6, floats=False, scheme="channel", impl=impl
    )
    return out.x, out.q


def gelu(impl, x):
    return norm_modulate.gelu(x, scheme="channel", impl=impl)


def rows(impl, x):
    return quantize_activations(x, "channel", impl=impl)


def prep(impl, *args):
    return qk_prep.rms_norm_rope_pool(*args, eps=1e-6, block=prep_shapes.BLOCK, impl=impl)


def keys(impl, *args):
    return qk_prep.quantize_keys(*args, block=prep_shapes.BLOCK, impl=impl)


def taps(impl, x, past, gain):
    return temporal_unfold(x, past, gain, impl=impl)


LINEARS = ("bf16", "block128", "channel", "channel+triton", "fp8")
LINEAR_BITS = {"bf16": 0.0, "": 1.0}
KERNEL = ("reference", "triton")
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(name="sla", impls=KERNEL, workloads=sparse_shapes.WORKLOADS, run=sla, exact=exactly(sla)),
        Case(name="sagesla", impls=KERNEL, workloads=sage_shapes.WORKLOADS, run=sagesla, exact=exactly(sla), narrow={"": 0.5}),
        Case(name="sparse", impls=("triton",), workloads=sparse_shapes.SPARSE, run=sparse, exact=exactly(sparse)),
        Case(
            name="sage_sparse", impls=("triton",), workloads=sage_shapes.SPARSE, run=int8_loop, exact=exactly(sparse),
            prepare=int8_operands, narrow={"": 0.5},
        ),
        Case(name="block_map", impls=KERNEL, workloads=sparse_shapes.MAPS, run=block_map, exact=plainly(block_map)),
        Case(name="summaries", impls=KERNEL, workloads=sparse_shapes.SUMMARIES, run=summaries, exact=exactly(summaries)),
        Case(name="attention", impls=("cudnn", "triton"), workloads=dense_shapes.WORKLOADS, run=dense, exact=exactly(dense)),
        Case(
            name="sage_attention", impls=("triton",), workloads=sage_shapes.DENSE, narrow={"": 0.5}, exact=exactly(dense),
            run=lambda impl, *args: sage_attention.sage_attention(*args, impl=impl),
        ),
        Case(name="sla_gradient", impls=KERNEL, workloads=sparse_shapes.WORKLOADS, **pullback(sla)),
        Case(name="attention_gradient", impls=("cudnn", "triton"), workloads=SELF, **pullback(dense)),
        Case(name="attention_tangent", impls=("cudnn+triton", "triton"), workloads=SELF, run=tangent, exact=exactly(tangent)),
        Case(
            name="linear", impls=LINEARS, workloads=linear_shapes.WORKLOADS, run=linear_layer, exact=float_layer,
            prepare=quantised_weight, narrow=LINEAR_BITS,
        ),
        Case(
            name="product", impls=LINEARS, workloads=linear_shapes.WORKLOADS, run=product, exact=float_layer,
            prepare=quantised_both, narrow=LINEAR_BITS,
        ),
        Case(name="norm", impls=KERNEL, workloads=row_shapes.NORM, run=norm, exact=plainly(norm)),
        Case(name="gelu", impls=KERNEL, workloads=row_shapes.GELU, run=gelu, exact=plainly(gelu)),
        Case(name="quantize_rows", impls=KERNEL, workloads=row_shapes.QUANTIZE, run=rows, exact=plainly(rows)),
        Case(name="qk_prep", impls=KERNEL, workloads=prep_shapes.WORKLOADS, run=prep, exact=exactly(prep)),
        Case(name="temporal_unfold", impls=KERNEL, workloads=tap_shapes.WORKLOADS, run=taps, exact=exactly(taps)),
        Case(name="quantize_keys", impls=KERNEL, workloads=prep_shapes.KEYS, run=keys, exact=plainly(keys)),
    )
}  # fmt: skip
