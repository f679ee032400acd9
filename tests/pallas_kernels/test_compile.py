"""Every Triton kernel at every tile of `tiles.json`, compiled ahead of time for five families of
GPUs, and every Mosaic GPU kernel for Hopper, on a machine without one.

Runs where the CUDA compiler wheels are installed: with JAX_PLATFORMS=cpu, `pytest
tests/pallas_kernels/test_compile.py`.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_aot
import jax
import jax.numpy as jnp
import pytest
import sass

import pallas_kernels
from pallas_kernels import (
    attention,
    causal_conv,
    norm_modulate,
    qk_prep,
    sage_attention,
    sparse_attention,
    temporal_unfold,
    tuning,
)
from pallas_kernels.causal_conv.triton import frame_pairs
from pallas_kernels.causal_conv.winograd import in_strips
from pallas_kernels.int8_matmul import QTensor, quantize_activations, quantized_linear
from pallas_kernels.int8_matmul.schemes import SCHEMES
from pallas_kernels.inventory import OPS

pytestmark = pytest.mark.optimized

SHARED = {arch: 1024 * block for arch, (*_, block, _) in cuda_aot.TARGETS.items()}
S8 = {
    "sm80": "mma.sync.aligned.m16n8k32",
    "sm89": "mma.sync.aligned.m16n8k32",
    "sm90": "k32.s32.s8.s8",
}
S8 |= {"sm100": "tcgen05.mma.cta_group::1.kind::i8", "sm120": "mma.sync.aligned.m16n8k32"}
SIZES = {
    "480p": (32760, 1536, 8960, 12),
    "720p": (75600, 5120, 13824, 40),
}  # tokens, width, MLP width, heads
spec = jax.ShapeDtypeStruct


def frames(size, t=4, parts=1, c=96, dtype=jnp.bfloat16):
    """A chunk of the VAE at a part of the full height and width."""
    h, w = {"480p": (480, 832), "720p": (720, 1280)}[size]
    return spec((1, t, h // parts, w // parts, c), dtype)


def unfold(size, dtype):
    """The VAE's widest activations."""
    run = lambda *args: temporal_unfold.temporal_unfold(*args, impl="triton")
    return run, (frames(size, dtype=dtype), frames(size, 2, dtype=dtype), spec((96,), dtype))


def conv(parts=1, c=96, t=4, plus=True):
    x, past = (frames("480p", t, parts, c) for t in (t, 2))
    kernel, vector = spec((3, 3, 3, c, c), jnp.bfloat16), spec((c,), jnp.bfloat16)
    run = lambda *args: causal_conv.causal_conv(*args, impl="mosaic")
    return run, (x, past, vector, kernel, vector, *((x,) if plus else ()))


def qkv(size):
    l, d, _, h = SIZES[size]
    return (spec((1, l, h, d // h), jnp.bfloat16),) * 3


def projection():
    return spec((128, 128), jnp.float32), spec((128,), jnp.float32)


def sla(op, block_q=128, block_k=64, impl="triton", **more):
    return lambda *args: op(*args, topk=0.1, block_q=block_q, block_k=block_k, impl=impl, **more)


def filled_up(size):
    """Heads of one of two devices in whole blocks, and how many tokens count."""
    l, _, _, h = SIZES[size]
    return (spec((1, -(-l // 256) * 256, h // 2, 128), jnp.bfloat16),) * 3, {"keys": l}


def gradient(op, *sizes):
    total = lambda *args: op(*args).astype(jnp.float32).sum()
    return jax.grad(total, argnums=tuple(range(*sizes)))


def weights(scheme, m, k, n):
    made = SCHEMES[scheme]
    values = lambda rows: spec((rows, k), made.dtype)
    return QTensor(values(m), spec(made.scale_shape((m, k)), jnp.float32)), QTensor(
        values(n), spec(made.scale_shape((n, k)), jnp.float32)
    )


def linear(scheme, impl="triton", groups=1):
    return lambda x, w, bias: quantized_linear(
        x, w, bias, scheme=scheme, out_dtype=jnp.bfloat16, groups=groups, impl=impl
    )


def onto(impl):
    return lambda x, w, bias, stream, gate: quantized_linear(
        x, w, bias, stream=stream, gate=gate, scheme="channel", out_dtype=stream.dtype, impl=impl
    )


def stream(l, d):
    """Bias, stream and gate."""
    return spec((d,), jnp.bfloat16), spec((l, d), jnp.bfloat16), spec((d,), jnp.float32)


def quantized(scheme, impl="triton", groups=1):
    return lambda x: quantize_activations(x, scheme, groups=groups, impl=impl)


def case(name, size):
    """(function, arguments) of a case at one of SIZES."""
    l, d, f, h = SIZES[size]
    rows, vector = spec((1, l, d), jnp.bfloat16), spec((1, 1, d), jnp.float32)
    angles = spec((l, d // h // 2), jnp.float32)
    sparse, sage = (
        sparse_attention.sparse_linear_attention,
        sage_attention.sage_sparse_linear_attention,
    )
    dense = lambda q, k, v: attention(q, k, v, impl="triton")
    return {
        "sla": (sla(sparse), (*qkv(size), *projection())),
        "sla 64x64": (sla(sparse, 64, 64), (*qkv(size), *projection())),
        "sla 64x128": (sla(sparse, 64, 128), (*qkv(size), *projection())),
        "sla gradient": (gradient(sla(sparse), 5), (*qkv(size), *projection())),
        "sla gradient 64x64": (gradient(sla(sparse, 64, 64), 5), (*qkv(size), *projection())),
        "sagesla": (sla(sage), (*qkv(size), *projection())),
        "sagesla 64x64": (sla(sage, 64, 64), (*qkv(size), *projection())),
        "sagesla 64x128": (sla(sage, 64, 128), (*qkv(size), *projection())),
        "sagesla filled up": (
            sla(sage, **filled_up(size)[1]),
            (*filled_up(size)[0], *projection()),
        ),
        "sage dense": (
            lambda q, k, v: sage_attention.sage_attention(q, k, v, impl="triton"),
            qkv(size),
        ),
        "dense": (dense, qkv(size)),
        "dense tangent": (
            lambda *args: jax.jvp(dense, args[:3], args[3:])[1],
            (*qkv(size), *qkv(size)),
        ),
        "dense gradient": (gradient(dense, 3), qkv(size)),
        "block128": (linear("block128"), (*weights("block128", l, d, f), spec((f,), jnp.bfloat16))),
        "channel": (linear("channel"), (*weights("channel", l, d, f), spec((f,), jnp.bfloat16))),
        "channel and a LoRA": (
            lambda x, w, bias, *low_rank: quantized_linear(
                x, w, bias, low_rank=low_rank, scheme="channel", out_dtype=bias.dtype, impl="triton"
            ),
            (
                *weights("channel", l, d, f),
                *(spec(shape, jnp.bfloat16) for shape in ((f,), (l, 64), (f, 64))),
            ),
        ),
        "channel onto a stream": (onto("triton"), (*weights("channel", l, f, d), *stream(l, d))),
        "channel in groups": (
            linear("channel", groups=2),
            (*weights("channel", l, d, d), spec((d,), jnp.bfloat16)),
        ),
        "quantize groups": (
            quantized("channel", groups=2),
            (spec((2, l, d // 2), jnp.bfloat16),),
        ),
        "quantize block128": (quantized("block128"), (spec((l, d), jnp.bfloat16),)),
        "quantize channel": (quantized("channel"), (spec((l, f), jnp.bfloat16),)),
        "quantize fp8": (quantized("fp8"), (spec((l, f), jnp.bfloat16),)),
        "norm": (
            lambda x, factor, shift, y, gate: norm_modulate.norm(
                x, factor, shift, y=y, gate=gate, eps=1e-6, scheme="channel", impl="triton"
            ),
            (rows, vector, vector, rows, vector),
        ),
        "gelu": (
            lambda x: norm_modulate.gelu(x, scheme="channel", impl="triton"),
            (spec((1, l, f), jnp.bfloat16),),
        ),
        "norm and rope": (
            lambda x, w, cos, sin: qk_prep.rms_norm_rope_pool(
                x, w, cos, sin, eps=1e-6, block=64, impl="triton"
            ),
            (rows, spec((d,), jnp.bfloat16), angles, angles),
        ),
        "norm and rope in groups": (
            lambda x, w, cos, sin: qk_prep.rms_norm_rope_pool(
                x, w, cos, sin, eps=1e-6, block=64, groups=2, impl="triton"
            ),
            (rows, spec((d,), jnp.bfloat16), angles, angles),
        ),
        "frame pairs": (
            lambda x, *more: frame_pairs(in_strips(x), *more, interpret=False),
            (frames(size), frames(size, 2), spec((96,), jnp.bfloat16)),
        ),
        "temporal unfold": unfold(size, jnp.bfloat16),
        "temporal unfold in float32": unfold(size, jnp.float32),
        "keys": (
            lambda k, mean: sage_attention.quantize_keys(k, mean, block=64, impl="triton"),
            (qkv(size)[0], spec((1, h, 128), jnp.float32)),
        ),
    }[name]


def mosaic_case(name):
    """(function, arguments) of a case of MOSAIC."""
    (l, d, f, _), sparse = SIZES["480p"], sparse_attention.sparse_linear_attention
    sage = sage_attention.sage_sparse_linear_attention
    bias = spec((f,), jnp.bfloat16)
    return {
        "sla": (sla(sparse, impl="mosaic"), (*qkv("480p"), *projection())),
        "sagesla": (sla(sage, impl="mosaic"), (*qkv("480p"), *projection())),
        "sagesla filled up": (
            sla(sage, impl="mosaic", **filled_up("480p")[1]),
            (*filled_up("480p")[0], *projection()),
        ),
        "sage dense": (
            lambda q, k, v: sage_attention.sage_attention(q, k, v, impl="mosaic"),
            qkv("480p"),
        ),
        "channel": (linear("channel", "mosaic"), (*weights("channel", l, d, f), bias)),
        "channel in groups": (
            linear("channel", "mosaic", groups=2),
            (*weights("channel", l // 2 + 4, d, d), spec((d,), jnp.bfloat16)),
        ),
        "channel, few rows": (
            linear("channel", "mosaic"),
            (*weights("channel", 512, d, d), spec((d,), jnp.bfloat16)),
        ),
        "channel onto a stream": (
            onto("mosaic"),
            (*weights("channel", l, f, d), *stream(l, d)),
        ),
        "fp8": (linear("fp8", "mosaic"), (*weights("fp8", l, d, f), bias)),
        "causal convolution": conv(),
        "causal convolution, nothing added": conv(plus=False),
        "causal convolution, two frames": conv(4, 384, 2),
    }[name]


# case -> kernels that must be in it, the ops of the inventory that they are, and bytes that all of
# them may spill: float scores leave no registers for the paths that look for a maximum, nor do a
# convolution's sums for reading what is added to them; int8 scores of two blocks leave none for
# addresses, which dense attention reads back before its loop, not in it
MOSAIC = {
    "sla": (3, ("sparse_linear_attention", "sparse_attention"), 300),
    "sagesla": (3, ("sage_sparse_linear_attention", "sage_sparse_attention"), 0),
    "sagesla filled up": (3, ("sage_sparse_linear_attention", "sage_sparse_attention"), 0),
    "sage dense": (3, ("sage_attention",), 116),
    "channel": (1, ("quantized_linear channel",), 0),
    "channel in groups": (1, ("quantized_linear channel",), 0),
    "channel, few rows": (1, ("quantized_linear channel",), 0),
    "channel onto a stream": (1, ("quantized_linear channel",), 0),
    "fp8": (1, ("quantized_linear fp8",), 0),
    "causal convolution": (1, ("causal_conv",), 128),
    "causal convolution, nothing added": (1, ("causal_conv",), 0),
    "causal convolution, two frames": (1, ("causal_conv",), 128),
}
# case -> kernels that must be in it, and the ops of the inventory that they are
SLA = "sparse_linear_attention", "sparse_attention", "block_map"
SAGE = "sage_sparse_linear_attention", "sage_sparse_attention", "quantize_keys"
QK_PREP = "rms_norm_rope_pool", "rms_norm_rope"
CASES = {
    "sla": (5, SLA),
    "sla 64x64": (5, SLA),
    "sla 64x128": (5, SLA),
    "sla gradient": (5, SLA),
    "sla gradient 64x64": (5, SLA),
    "sagesla": (6, SAGE),
    "sagesla 64x64": (6, SAGE),
    "sagesla 64x128": (6, SAGE),
    "sagesla filled up": (5, SAGE),
    "sage dense": (2, ("sage_attention",)),
    "dense": (1, ("attention",)),
    "dense tangent": (2, ("attention",)),
    "dense gradient": (3, ("attention",)),
    "block128": (1, ("quantized_linear block128",)),
    "channel": (1, ("quantized_linear channel",)),
    "channel and a LoRA": (1, ("quantized_linear channel",)),
    "channel onto a stream": (1, ("quantized_linear channel",)),
    "channel in groups": (1, ("quantized_linear channel",)),
    "quantize groups": (1, ("quantize_activations channel",)),
    "quantize block128": (1, ("quantize_activations block128",)),
    "quantize channel": (1, ("quantize_activations channel",)),
    "quantize fp8": (1, ("quantize_activations fp8",)),
    "norm": (1, ("norm",)),
    "gelu": (1, ("gelu",)),
    "norm and rope": (1, QK_PREP),
    "norm and rope in groups": (1, QK_PREP),
    "keys": (1, ("quantize_keys",)),
    "frame pairs": (1, ()),
    "temporal unfold": (1, ("temporal_unfold",)),
    "temporal unfold in float32": (1, ("temporal_unfold",)),
}
INT8 = ("sagesla", "sagesla 64x64", "sagesla 64x128", "sage dense", "block128", "channel")
# Bytes that a kernel may spill, by kernel and family: the linear branch beside the loop's
# accumulators and, on sm80 and sm89 with int8 scores, what one of the two loops needs while the
# other runs (8 and 48 with a single loop). On sm90 eight warps do not spill, four are what a
# measurement found faster; on the others there is no better tile.
SPILLS = {
    ("attend_kernel", "sm90"): 1224,
    ("attend_kernel", "sm80"): 64,
    ("attend_kernel", "sm89"): 64,
    ("attend_kernel", "sm120"): 16,
}
# Of a product onto a stream, which is read beside all accumulators, once for a tile: on an H200 a
# step is faster with it all the same (docs/performance.md).
ONTO_A_STREAM = {"sm90": 16, "sm100": 24}
REFUSED = [("quantize fp8", "sm80")]  # Ampere has no instruction that rounds to float8
WITHOUT_SPILLS = ("sage dense", "sla 64x64")  # the same kernel, where it fits


@pytest.mark.skipif(cuda_aot.available() is not None, reason=str(cuda_aot.available()))
@pytest.mark.parametrize(
    ("name", "arch"), [(n, a) for n in CASES for a in cuda_aot.TARGETS if (n, a) not in REFUSED]
)
def test_compiles(monkeypatch, name, arch):
    monkeypatch.setattr(tuning, "family", lambda: arch)
    jax.clear_caches()
    found = []
    for size in SIZES if arch == "sm90" else ("480p",):
        function, args = case(name, size)
        found += cuda_aot.compile_for(arch, function, *args)
    for kernel in found:
        print(
            f"{arch} {name}: {kernel.name} {kernel.registers} registers, {kernel.spills} spilled,"
            f" {kernel.shared} shared"
        )
        allowed = 0 if name in WITHOUT_SPILLS else SPILLS.get((kernel.name, arch), 0)
        if name == "channel onto a stream":
            allowed = ONTO_A_STREAM.get(arch, 0)
        assert kernel.spills <= allowed, kernel.name
        assert kernel.shared <= SHARED[arch], kernel.name
        assert not kernel.serialized, kernel.name
    assert len(found) >= CASES[name][0]
    if name in INT8:
        assert any(S8[arch] in kernel.ptx for kernel in found)


@pytest.mark.skipif(cuda_aot.available() is not None, reason=str(cuda_aot.available()))
@pytest.mark.parametrize(("name", "arch"), REFUSED)
def test_a_family_without_the_instruction_is_refused_and_auto_is_the_reference(name, arch):
    function, args = case(name, "480p")
    with pytest.raises(ValueError, match="float8_e4m3fn needs compute capability 8.9"):
        cuda_aot.compile_for(arch, function, *args)
    assert not cuda_aot.compile_for(arch, quantized("fp8", "auto"), *args)


@pytest.mark.skipif(cuda_aot.available() is not None, reason=str(cuda_aot.available()))
def test_xla_does_not_leave_out_the_rounding_to_float8():
    """Of the reference, where its values are float32 again in the same program."""
    x = jax.ShapeDtypeStruct(
        (200, 256),
        jnp.bfloat16,
        sharding=jax.NamedSharding(cuda_aot.mesh("sm90"), jax.P()),
    )
    run = lambda x: quantized("fp8", "reference")(x).values.astype(jnp.float32)
    with jax.set_mesh(cuda_aot.mesh("sm90")):
        program = jax.jit(run).lower(x).compile(compiler_options={"xla_gpu_autotune_level": 0})
    assert "f8e4m3fn" in program.as_text()


@pytest.mark.skipif(cuda_aot.available() is not None, reason=str(cuda_aot.available()))
@pytest.mark.parametrize("name", MOSAIC)
def test_mosaic_compiles(tmp_path, name):
    environment = os.environ | cuda_aot.mosaic_environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    read = "MOSAIC_GPU_DUMP_SASS" in environment  # nvdisasm is installed
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [cuda_aot.Compiled(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    for kernel in kernels:
        print(f"{name}: {kernel.name} {kernel.registers} registers, {kernel.spills} spilled")
        assert "wgmma" in kernel.ptx or "pass_over_tokens" in kernel.name
        assert not kernel.serialized, kernel.name
        assert ("GMMA" in kernel.sass) == ("wgmma" in kernel.ptx and read), kernel.name
        assert not sass.overwritten(kernel.sass), kernel.name
    assert len(kernels) == MOSAIC[name][0]
    assert sum(kernel.spills for kernel in kernels) <= MOSAIC[name][2]


def test_every_op_with_a_kernel_has_a_case():
    for impl, cases in {"triton": CASES, "mosaic": MOSAIC}.items():
        compiled = {op for op, table in OPS.items() if impl in table}
        assert {op for _, ops, *_ in cases.values() for op in ops} == compiled


def test_every_tile_has_every_family():
    for path in Path(pallas_kernels.__file__).parent.glob("**/tiles.json"):
        for kernel, families in json.loads(path.read_text()).items():
            assert list(families) == list(cuda_aot.TARGETS), f"{path.parent.name}: {kernel}"
            assert all({"warps", "stages"} <= set(tile) for tile in families.values())


if __name__ == "__main__":  # a process for `test_mosaic_compiles`
    function, args = mosaic_case(sys.argv[1])
    print(json.dumps([dataclasses.asdict(k) for k in cuda_aot.compile_mosaic(function, *args)]))
