"""What the bench measures: for each op its implementations, its real shapes, and the function that
its error is taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import (
    linear_branch,
    mosaic,
    norm_modulate,
    qk_prep,
    sage_attention,
    sparse_attention,
)
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv import workloads as conv_shapes
from pallas_kernels.flash_attention import attention, cudnn
from pallas_kernels.flash_attention import workloads as dense_shapes
from pallas_kernels.int8_matmul import (
    SCHEMES,
    quantize_activations,
    quantize_weight,
    quantized_linear,
)
from pallas_kernels.int8_matmul import workloads as linear_shapes
from pallas_kernels.inventory import compiled
from pallas_kernels.norm_modulate import workloads as row_shapes
from pallas_kernels.online_softmax import attend, kernel_name
from pallas_kernels.qk_prep import workloads as prep_shapes
from pallas_kernels.sage_attention import triton as sage_kernels
from pallas_kernels.sage_attention import workloads as key_shapes
from pallas_kernels.sparse_attention import workloads as sparse_shapes
from pallas_kernels.temporal_unfold import temporal_unfold
from pallas_kernels.temporal_unfold import workloads as frame_shapes
from pallas_kernels.tuning import tile
from pallas_kernels.workload import Workload

__all__ = ["CASES", "Case"]

TOPK, BLOCK_Q, BLOCK_K = sparse_shapes.TOPK, sparse_shapes.BLOCK_Q, sparse_shapes.BLOCK_K
BLOCKS = {"block_q": BLOCK_Q, "block_k": BLOCK_K}
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
    return sparse_attention.sparse_linear_attention(*args, topk=TOPK, **BLOCKS, impl=impl)


def sagesla(impl, *args):
    return sage_attention.sage_sparse_linear_attention(*args, topk=TOPK, **BLOCKS, impl=impl)


def sparse(impl, *args):
    return sparse_attention.sparse_attention(*args, **BLOCKS, impl=impl)


def block_map(impl, q, k, *_):
    return sparse_attention.block_map(q, k, topk=TOPK, **BLOCKS, impl=impl)


def sage_dense(impl, q, k, v):
    return sage_attention.sage_attention(q, k, v, impl=impl)


def dense(impl, q, k, v):
    return attention(q, k, v, impl=impl)


def int8_operands(impl, q, k, v, blocks):
    """The operands of the loop alone: queries and keys already quantised."""

    @jax.jit
    def make(q, k):
        mean = k.mean(1, dtype=jnp.float32)
        if impl == "mosaic":
            return mosaic.imported("sage_attention", "operands")(q, k, mean)
        return sage_kernels.operands(q, k, mean, BLOCK_Q, BLOCK_K, interpret=False)

    return make(q, k), v, blocks


def int8_loop(impl, operands, v, blocks):
    if impl == "mosaic":
        return mosaic.imported("sage_attention", "int8_attention")(*operands, v, blocks)
    options = {"interpret": False, "at": tile("sage_attention", kernel_name(BLOCK_Q))}
    return attend(sage_kernels.int8_scores, *operands, v, blocks, BLOCK_Q, BLOCK_K, **options)


def summaries(impl, q, k, v, *_):
    if impl == "triton":
        return linear_branch.summaries(k, v, interpret=False)
    if impl == "mosaic":
        return mosaic.imported("sparse_attention", "token_pass")(k, v, rounds=False)[1]
    phi = linear_branch.feature(k)
    product = jnp.einsum("blhi,blhj->bhij", phi, v, preferred_element_type=jnp.float32)
    return product, phi.sum(1, dtype=jnp.float32)


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
    """A linear layer with the quantisation of its activations, its `impl` one of LINEARS."""
    if impl == "bf16":
        return x @ weight.T + bias
    x8 = quantize_activations(x, LINEARS[impl][0], impl="triton")
    return product(impl, x8, weight, bias)


def product(impl, x, weight, bias):
    """The product of activations that are quantised already."""
    if impl == "bf16":
        return x @ weight.T + bias
    scheme, kernel = LINEARS[impl]
    return quantized_linear(x, weight, bias, scheme=scheme, out_dtype=jnp.bfloat16, impl=kernel)


def quantised_weight(impl, x, weight, bias):
    if impl == "bf16":
        return x, weight, bias
    scheme, _ = LINEARS[impl]
    return x, jax.jit(partial(quantize_weight, scheme=scheme))(weight), bias


def quantised_both(impl, x, weight, bias):
    if impl == "bf16":
        return x, weight, bias
    scheme, _ = LINEARS[impl]
    return quantize_activations(x, scheme, impl="triton"), *quantised_weight(impl, x, weight, bias)[
        1:
    ]


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
    return sage_attention.quantize_keys(*args, block=key_shapes.BLOCK, impl=impl)


def unfold(impl, x, past, gain):
    return temporal_unfold(x, past, gain, impl=impl)


def conv(impl, *args):
    return causal_conv(*args, impl=impl)


def linears() -> dict[str, tuple[str, str]]:
    """Names of linear layers of 8 bits -> scheme and implementation of the product: "channel" is
    XLA's product, "channel+triton" our kernel's; the first one of a scheme has its name alone."""
    out = {}
    for scheme, made in SCHEMES.items():
        kernels = [name for name in made.products if name not in ("reference", "interpret")]
        kernels.sort(key=lambda name: name != "xla")
        out[scheme] = scheme, kernels[0]
        out |= {f"{scheme}+{name}": (scheme, name) for name in kernels[1:]}
    return out


def of(op: str, *leave_out: str) -> tuple[str, ...]:
    """The implementations of an op that run on a GPU."""
    return tuple(name for name in compiled(op) if name not in leave_out)


LINEARS = linears()
LINEAR_IMPLS = ("bf16", *LINEARS)
LINEAR_BITS = {"bf16": 0.0, "": 1.0}
SCORES = {"": 0.5}  # int8 products of queries and keys, and float ones with the values
DENSE = of("attention", "reference", "cudnn+triton")  # the reference takes minutes at these sizes
TABLE = (
    Case(
        name="sla",
        impls=of("sparse_linear_attention"),
        workloads=sparse_shapes.WORKLOADS,
        run=sla,
        exact=exactly(sla),
    ),
    Case(
        name="sagesla",
        impls=of("sage_sparse_linear_attention"),
        workloads=sparse_shapes.WORKLOADS,
        run=sagesla,
        exact=exactly(sla),
        narrow=SCORES,
    ),
    Case(
        name="sparse",
        impls=of("sparse_attention", "reference"),
        workloads=sparse_shapes.SPARSE,
        run=sparse,
        exact=exactly(sparse),
    ),
    Case(
        name="sage_sparse",
        impls=of("sage_sparse_attention", "reference"),
        workloads=sparse_shapes.SPARSE,
        run=int8_loop,
        exact=exactly(sparse),
        prepare=int8_operands,
        narrow=SCORES,
    ),
    Case(
        name="block_map",
        impls=of("block_map"),
        workloads=sparse_shapes.MAPS,
        run=block_map,
        exact=plainly(block_map),
    ),
    Case(
        name="summaries",
        impls=("reference", "triton", "mosaic"),
        workloads=sparse_shapes.SUMMARIES,
        run=summaries,
        exact=exactly(summaries),
    ),
    Case(
        name="attention",
        impls=DENSE,
        workloads=dense_shapes.WORKLOADS,
        run=dense,
        exact=exactly(dense),
    ),
    Case(
        name="sage_attention",
        impls=of("sage_attention", "reference"),
        workloads=SELF,
        run=sage_dense,
        exact=exactly(dense),
        narrow=SCORES,
    ),
    Case(
        name="sla_gradient",
        impls=of("sparse_linear_attention", "mosaic"),  # whose derivatives are Triton's
        workloads=sparse_shapes.WORKLOADS,
        **pullback(sla),
    ),
    Case(name="attention_gradient", impls=DENSE, workloads=SELF, **pullback(dense)),
    Case(
        name="attention_tangent",
        impls=of("attention", "reference", "cudnn"),
        workloads=SELF,
        run=tangent,
        exact=exactly(tangent),
    ),
    Case(
        name="linear",
        impls=LINEAR_IMPLS,
        workloads=linear_shapes.WORKLOADS,
        run=linear_layer,
        exact=float_layer,
        prepare=quantised_weight,
        narrow=LINEAR_BITS,
    ),
    Case(
        name="product",
        impls=LINEAR_IMPLS,
        workloads=linear_shapes.WORKLOADS,
        run=product,
        exact=float_layer,
        prepare=quantised_both,
        narrow=LINEAR_BITS,
    ),
    Case(
        name="norm",
        impls=of("norm"),
        workloads=row_shapes.NORM,
        run=norm,
        exact=plainly(norm),
    ),
    Case(
        name="gelu",
        impls=of("gelu"),
        workloads=row_shapes.GELU,
        run=gelu,
        exact=plainly(gelu),
    ),
    Case(
        name="quantize_rows",
        impls=of("quantize_activations channel", "xla"),
        workloads=row_shapes.QUANTIZE,
        run=rows,
        exact=plainly(rows),
    ),
    Case(
        name="qk_prep",
        impls=of("rms_norm_rope_pool"),
        workloads=prep_shapes.WORKLOADS,
        run=prep,
        exact=exactly(prep),
    ),
    Case(
        name="temporal_unfold",
        impls=of("temporal_unfold"),
        workloads=frame_shapes.WORKLOADS,
        run=unfold,
        exact=exactly(unfold),
    ),
    Case(
        name="causal_conv",
        impls=of("causal_conv"),
        workloads=conv_shapes.WORKLOADS,
        run=conv,
        exact=exactly(conv),
    ),
    Case(
        name="quantize_keys",
        impls=of("quantize_keys"),
        workloads=key_shapes.KEYS,
        run=keys,
        exact=plainly(keys),
    ),
)
CASES: dict[str, Case] = {case.name: case for case in TABLE}
