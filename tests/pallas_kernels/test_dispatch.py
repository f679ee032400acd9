import dataclasses
from functools import partial
from types import SimpleNamespace

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic, tuning
from pallas_kernels.dispatch import automatic, bound, choose, implementations, on_cuda
from pallas_kernels.int8_matmul import quantize_activations, quantize_weight, quantized_linear
from pallas_kernels.inventory import OPS
from pallas_kernels.sage_attention import (
    sage_attention,
    sage_sparse_attention,
    sage_sparse_linear_attention,
)
from pallas_kernels.sparse_attention import sparse_attention, sparse_linear_attention

TABLE = {"reference": jnp.cos, "triton": jnp.sin, "mosaic": jnp.tanh, "plain": jnp.exp2}


def test_unknown_name_lists_what_is_allowed():
    with pytest.raises(
        ValueError,
        match=(
            r"matmul: impl is 'refrence'; allowed: auto, reference, cudnn; did you mean"
            r" 'reference'\?"
        ),
    ):
        choose("matmul", "refrence", {"reference": abs, "cudnn": abs}, abs)
    with pytest.raises(ValueError, match=r"impl is 'zz'; allowed: auto, reference$"):
        choose("matmul", "zz", {"reference": abs}, abs)


def test_names_are_taken_literally():
    assert choose("op", "reference", {"reference": min, "cudnn": max}, abs) is min
    assert choose("op", "auto", {"reference": min, "cudnn": max}, abs) is abs


def test_platform_is_chosen_at_lowering():
    f = jax.jit(on_cuda(jnp.sin, jnp.cos))
    assert f(0.0) == 1.0
    traced = f.trace(jnp.float32(0))
    assert "cosine" in traced.lower(lowering_platforms=("cpu",)).as_text()
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "sine" in cuda and "cosine" not in cuda


def lowered(op):
    return jax.jit(op).trace(jnp.float32(0)).lower(lowering_platforms=("cuda",)).as_text()


def test_auto_is_decided_at_lowering_and_its_derivative_by_the_default_device(monkeypatch):
    assert automatic(TABLE, "it is too wide") is jnp.cos
    op = automatic(TABLE, None)
    assert op(0.0) == 1.0 and jax.grad(op)(0.0) == 0.0
    assert "stablehlo.sine" in lowered(op)
    assert "stablehlo.tanh" in lowered(automatic(TABLE, None, kernel="mosaic"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jax.grad(automatic(TABLE, None))(0.0) == 1.0
    assert jax.grad(automatic(TABLE, None, derivative="plain"))(0.0) == np.float32(np.log(2))


def test_a_described_gpu_is_the_one_that_is_compiled_for():
    if jax.__version_info__ < (0, 11):
        pytest.skip("older versions of jax describe no GPU")
    mesh = lambda kind: jax.sharding.AbstractMesh(
        (), (), abstract_device=dataclasses.replace(described.H100, device_kind=kind)
    )
    kinds = {
        "NVIDIA H200": "sm90",
        "NVIDIA A100-SXM4-80GB": "sm80",
        "NVIDIA GeForce RTX 4090": "sm89",
        "NVIDIA B200": "sm100",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition": "sm120",
    }
    for kind, family in kinds.items():
        with jax.sharding.use_abstract_mesh(mesh(kind)):
            assert tuning.known_family() == tuning.family() == family
            assert mosaic.at_hand() == (mosaic.unavailable() is None) == (family == "sm90")
    assert tuning.known_family() is None and tuning.family() == tuning.DEFAULT
    assert not mosaic.at_hand()


def attend(op, *, width=128, dtype=jnp.bfloat16, **options):
    """An attention op of one head and 128 tokens, by "auto"."""
    q = jnp.ones((1, 128, 1, width), dtype)
    if op in (sage_sparse_linear_attention, sparse_linear_attention):
        return op(q, q, q, jnp.eye(width), jnp.zeros(width), topk=0.5, **options)
    if op is sage_attention:
        return op(q, q, q, **options)
    return op(q, q, q, jnp.zeros((1, 1, 1, 1), jnp.int32), **options)


LOW_RANK = (np.ones((128, 16), jnp.bfloat16),) * 2


def multiply(scheme, **options):
    x = jnp.ones((128, 128), jnp.bfloat16)
    return quantized_linear(
        quantize_activations(x, scheme),
        quantize_weight(x, scheme),
        scheme=scheme,
        out_dtype=options.pop("out_dtype", x.dtype),
        **options,
    )


AUTO = {  # name of an op: what runs it, and other arguments that its kernel for Hopper refuses
    "sage_sparse_linear_attention": (
        partial(attend, sage_sparse_linear_attention),
        ({"width": 64}, {"block_q": 64}, {"dtype": jnp.float32}),
    ),
    "sage_sparse_attention": (
        partial(attend, sage_sparse_attention),
        ({"width": 64}, {"dtype": jnp.float32}),
    ),
    "sage_attention": (
        partial(attend, sage_attention),
        ({"width": 64}, {"block_k": 32}, {"dtype": jnp.float32}),
    ),
    "sparse_linear_attention": (
        partial(attend, sparse_linear_attention),
        ({"width": 64}, {"block_k": 32}, {"dtype": jnp.float32}),
    ),
    "sparse_attention": (
        partial(attend, sparse_attention),
        ({"width": 64}, {"dtype": jnp.float32}),
    ),
    **{
        f"quantized_linear {scheme}": (
            partial(multiply, scheme),
            ({"out_dtype": jnp.float32}, {"low_rank": LOW_RANK}),
        )
        for scheme in ("channel", "fp8")
    },
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_is_the_kernel_for_hopper_where_that_runs(monkeypatch, name):
    run, refused = AUTO[name]
    seen = []

    def kernel(*args, **options):
        seen.append(name)
        return OPS[name]["reference"](*args, **options)

    monkeypatch.setitem(OPS[name], "mosaic", kernel)
    traced = lambda **options: jax.eval_shape(lambda: run(**options))
    traced()
    assert not seen  # no such GPU is at hand
    monkeypatch.setattr(mosaic, "at_hand", lambda: True)
    for options in refused:
        traced(**options)
        assert not seen, options
    traced(impl="reference")
    assert not seen
    traced()
    assert seen


def test_every_op_with_a_kernel_for_hopper_has_a_case():
    others = {"causal_conv"}  # whose "auto" is tested with it
    assert {op for op, table in OPS.items() if "mosaic" in table} - others == set(AUTO)


def test_implementations_by_name():
    table = implementations(min, lambda a, b, *, interpret: (a, b, interpret), mosaic=max)
    assert list(table) == ["reference", "mosaic", "triton", "interpret"]
    assert table["triton"](1, 2) == (1, 2, False) and table["interpret"](1, 2) == (1, 2, True)
    assert bound({"power": pow}, mod=5)["power"](2, 3) == 3


def test_every_op_has_a_reference_and_a_kernel():
    for op, table in OPS.items():
        assert next(iter(table)) == "reference" and len(table) > 1, op
        assert "triton" not in table or "interpret" in table, op
        assert "interpret" not in table or {"triton", "mosaic"} & set(table), op


def test_a_gpu_that_jax_does_not_name_is_known_by_its_capability(monkeypatch):
    """jax 0.11.2 and newer; 0.10 asks for the capability of every device, and the versions between
    are excluded."""
    gpu_info = pytest.importorskip(
        "jax._src.pallas.triton.gpu_info", reason="jax 0.10 has no table of names"
    )
    card = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA GeForce RTX 5090", compute_capability="12.0"
    )
    monkeypatch.setattr(gpu_info.pxla, "get_default_device", lambda: card)
    gpu_info.get_gpu_info.cache_clear()
    assert gpu_info.get_gpu_info().compute_capability == 120
    gpu_info.get_gpu_info.cache_clear()
