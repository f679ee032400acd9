"""The Mosaic GPU kernels at real size on one Hopper GPU, beside the others: error and time.

    python tests/gpu/mosaic.py [--match TEXT] [--json FILE]

All programs are compiled first, in threads; then they are timed one after another, with nothing
else on the GPU: the median of 20 samples of back-to-back calls. Products are compared with exact
sums of 512 rows; the loop of attention with a float32 softmax over the listed blocks of 40 blocks
of queries; whole ops with the Triton kernels. What fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import linear_branch, sage_attention, sparse_attention
from pallas_kernels.block_map import block_map_and_mean, pool
from pallas_kernels.int8_matmul import QTensor, quantized_linear
from pallas_kernels.int8_matmul.mosaic import SMALL, WIDE, row_product
from pallas_kernels.norm_modulate import norm
from pallas_kernels.online_softmax import attend, kernel_name
from pallas_kernels.sage_attention import mosaic as sage_mosaic
from pallas_kernels.sage_attention import triton as sage_triton
from pallas_kernels.token_pass_mosaic import query_pass, token_pass
from pallas_kernels.tuning import tile

PRODUCTS = {  # m, k, n
    "1.3B up": (32760, 1536, 8960),
    "1.3B down": (32760, 8960, 1536),
    "1.3B square": (32760, 1536, 1536),
    "1.3B text": (512, 1536, 1536),
    "14B up": (75600, 5120, 13824),
    "14B down": (75600, 13824, 5120),
    "14B square": (75600, 5120, 5120),
    "14B text": (512, 5120, 5120),
}
ATTENTION = {"1.3B 480p": (32760, 12), "14B 720p": (75600, 40)}  # tokens, heads
GOALS = {  # milliseconds at most
    "1.3B up int8": 2e-9 * 32760 * 1536 * 8960 / 1250,
    "1.3B down int8": 2e-9 * 32760 * 1536 * 8960 / 1250,
    "1.3B square int8": 2e-9 * 32760 * 1536 * 1536 / 1250,
    "14B up int8": 2e-9 * 75600 * 5120 * 13824 / 1400,
    "14B down int8": 2e-9 * 75600 * 5120 * 13824 / 1400,
    "14B square int8": 2e-9 * 75600 * 5120 * 5120 / 1400,
    "1.3B 480p sagesla": 1.25,
    "14B 720p sagesla": 18.0,
}
TOPK = 0.1
THREADS = 12


@dataclasses.dataclass(kw_only=True)
class Job:
    """make: key -> arguments. error: None, or (output, *arguments) -> a relative L2, which is right
    below `bound`. operations: of one call."""

    shape: str
    impl: str
    run: Callable
    make: Callable
    error: Callable | None = None
    bound: float = 5e-3
    operations: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.shape} | {self.impl}"

    def lower(self) -> list:
        """The functions of arguments, lowered here and compiled elsewhere."""
        given = jax.eval_shape(self.make, jax.random.key(0))
        lowered = [jax.jit(self.run).lower(*given)]
        if self.error:
            out = jax.eval_shape(self.run, *given)
            lowered.append(jax.jit(self.error).lower(out, *given))
        return lowered


# ------------------------------------------------------------------ products of 8-bit rows
def products():
    for name, shape in PRODUCTS.items():
        run = lambda impl, scheme: partial(
            quantized_linear, scheme=scheme, out_dtype=jnp.bfloat16, impl=impl
        )
        impls = {"triton": run("triton", "channel"), "mosaic": run("mosaic", "channel")}
        if "text" in name:
            tiles = {"mosaic small": SMALL, "mosaic wide": WIDE}
            impls |= {
                label: partial(row_product, out_dtype=jnp.bfloat16, tile=tile)
                for label, tile in tiles.items()
            }
            del impls["mosaic"]
        yield from product_jobs(f"{name} int8", shape, impls)
    for name in ("1.3B up", "1.3B down", "1.3B square", "1.3B text"):
        impls = {impl: run(impl, "fp8") for impl in ("xla", "mosaic")}
        yield from product_jobs(f"{name} fp8", PRODUCTS[name], impls)


def onto_a_stream():
    """Products added to a stream, in the kernel and after it; and with the norm that follows."""
    for name in ("1.3B down", "1.3B square", "14B down", "14B square"):
        m, k, n = shape = PRODUCTS[name]
        make = partial(operands_onto, shape=shape)
        common = {"make": make, "operations": 2.0 * m * k * n, "bound": 4e-3}
        run = partial(quantized_linear, scheme="channel", out_dtype=jnp.bfloat16, impl="mosaic")
        within = lambda stream, gate, *rest, run=run: run(*rest, stream=stream, gate=gate)
        after = lambda stream, gate, *rest, run=run: stream + run(*rest) * gate.astype(stream.dtype)
        for impl, each in {"mosaic, added within": within, "mosaic, added after": after}.items():
            yield Job(shape=f"{name} onto", impl=impl, run=each, error=onto_error, **common)
        for impl, each in {"norm of x": within, "norm of x + y": None}.items():
            yield Job(
                shape=f"{name} onto, norm",
                impl=f"mosaic, {impl}",
                run=partial(with_norm, run=run, within=each),
                **common,
            )


def with_norm(stream, gate, *rest, run, within):
    """The stream and the norm of it after the product, added by the one or by the other."""
    vector, options = gate, {"eps": 1e-6, "floats": False, "scheme": "channel"}
    if within:
        x = within(stream, gate, *rest)
        return x, norm(x[None], vector, vector, **options).q
    y = run(*rest)[None]
    gate = gate[None, None]
    return norm(stream[None], vector, vector, y=y, gate=gate, **options)[::2]


def operands_onto(key, *, shape):
    (m, _, n), (one, two, three) = shape, jax.random.split(key, 3)
    stream = jax.random.normal(one, (m, n)).astype(jnp.bfloat16)
    gate = jax.random.normal(two, (n,))
    return stream, gate, *operands_of_product(three, shape=shape, int8=True)


def onto_error(y, stream, gate, *operands):
    return product_error(y, *operands, stream=stream, gate=gate)


def product_jobs(name, shape, impls):
    m, k, n = shape
    int8 = name.endswith("int8")
    make = partial(operands_of_product, shape=shape, int8=int8)
    common = {"make": make, "error": product_error, "operations": 2.0 * m * k * n}
    for impl, run in impls.items():
        yield Job(shape=name, impl=impl, run=run, bound=3e-3 if int8 else 1e-2, **common)


def operands_of_product(key, *, shape, int8):
    """x, weight and bias: values of deviation 36 (int8) or 100 (float8), rows of unit deviation."""
    (m, k, n), keys = shape, jax.random.split(key, 5)
    dtype, size, top = (jnp.int8, 36.0, 127) if int8 else (jnp.float8_e4m3fn, 100.0, 448)
    rounded = jnp.round if int8 else lambda x: x

    def values(key, rows):
        x = jnp.clip(size * jax.random.normal(key, (rows, k)), -top, top)
        return rounded(x).astype(dtype)

    scales = lambda key, n: jax.random.uniform(key, (n,), minval=0.5, maxval=1.5) / size
    x = QTensor(values(keys[0], m), scales(keys[1], m))
    weight = QTensor(values(keys[2], n), scales(keys[3], n) * k**-0.5)
    return x, weight, jax.random.normal(keys[4], (n,))


def product_error(y, x, weight, bias, *, stream=None, gate=None):
    m = x.values.shape[0]
    random = np.random.default_rng(0).integers(0, m, 128)
    ends = np.arange(192)
    rows = np.unique(np.concatenate([ends, m - 1 - ends, random]))
    dims = (((1,), (1,)), ((), ()))
    if x.values.dtype == jnp.int8:
        exact = partial(lax.dot_general, preferred_element_type=jnp.int32)
        total = exact(x.values[rows], weight.values, dims).astype(jnp.float32)
    else:
        wide = [a.astype(jnp.float32) for a in (x.values[rows], weight.values)]
        total = lax.dot_general(*wide, dims, precision="highest")
    expected = total * x.scale[rows][:, None] * weight.scale[None] + bias[None]
    if stream is not None:
        expected = stream[rows].astype(jnp.float32) + expected * gate[None]
    return distance(y[rows], expected) * finite(y)


# ------------------------------------------------------------------ attention
def attention():
    for name, (tokens, heads) in ATTENTION.items():
        chosen = sparse_attention.chosen_blocks(tokens, TOPK, 64)
        operations = 4.0 * heads * 128 * -(-tokens // 128) * 128 * 64 * chosen
        make = partial(qkv, tokens=tokens, heads=heads)
        pooled = lambda key, make=make: with_means(*make(key))
        yield from whole(name, make, pooled, operations)
        yield from parts(name, make, pooled, chosen)
        for impl, run in {"triton": triton_loop, "mosaic": sage_mosaic.int8_attention}.items():
            common = {
                "impl": impl,
                "make": partial(loop_operands, make=make, chosen=chosen, impl=impl),
                "operations": operations,
            }
            plain = lambda queries, keys, v, blocks, linear, run=run: run(queries, keys, v, blocks)
            yield Job(shape=f"{name} int8 loop", run=plain, error=softmax_error, **common)
            if impl == "mosaic":  # whose linear branch was made before and is added
                both = lambda queries, keys, v, blocks, linear, run=run: run(
                    queries, keys, v, blocks, plus=v
                )
            else:
                both = lambda queries, keys, v, blocks, linear, run=run: run(
                    queries, keys, v, blocks, linear=linear
                )
            yield Job(shape=f"{name} int8 loop linear", run=both, **common)


def whole(name, make, pooled, operations):
    """sagesla and sla from q k v; and sagesla with the means of blocks at hand, as in a network."""
    ops = {
        "sagesla": sage_attention.sage_sparse_linear_attention,
        "sla": sparse_attention.sparse_linear_attention,
    }
    for label, op in ops.items():
        op = partial(op, topk=TOPK)
        error = lambda o, *args, op=op: distance(o, op(*args, impl="triton"))
        for impl in ("triton", "mosaic"):
            common = {"impl": impl, "operations": operations}
            far = error if impl == "mosaic" else None
            run = partial(op, impl=impl)
            yield Job(shape=f"{name} {label}", run=run, make=make, error=far, **common)
            given = lambda *args, run=run: run(*args[:-1], means=args[-1])
            if label == "sagesla":
                yield Job(shape=f"{name} {label} means", run=given, make=pooled, **common)


def parts(name, make, pooled, chosen):
    """What stands before the loop."""

    def mean(k):
        return k.mean(1, dtype=jnp.float32)

    def map_of_means(q, k, v, kernel, bias, means):
        return block_map_and_mean(q, k, chosen, 128, 64, means, interpret=False)

    runs = {
        "map": lambda q, k, *_: block_map_and_mean(q, k, chosen, 128, 64, interpret=False),
        "triton operands": lambda q, k, *_: sage_triton.operands(
            q, k, mean(k), 128, 64, interpret=False
        ),
        "triton sums": lambda q, k, v, *_: linear_branch.summaries(k, v, interpret=False),
        "mosaic queries": lambda q, *_: fields(token_pass(q, rounds=True)),
        "mosaic queries and linear branch": lambda q, k, v, kernel, bias: fields(
            query_pass(q, *linear_of(q, kernel, bias), rounds=True)
        ),
        "mosaic keys and sums": lambda q, k, v, *_: fields(
            token_pass(k, v, mean=k[:, 0].astype(jnp.float32), rounds=True)
        ),
        "mosaic sums": lambda q, k, v, *_: token_pass(k, v, rounds=False)[1],
    }
    for impl, run in runs.items():
        yield Job(shape=f"{name} part", impl=impl, run=run, make=make)
    yield Job(shape=f"{name} part", impl="map of means", run=map_of_means, make=pooled)


def fields(passed):
    rounded, other = passed
    return rounded.values, rounded.scale, rounded.length, other


def linear_of(q, kernel, bias):
    """What the pass over queries takes, of some keys' sums: its time does not depend on them."""
    b, _, h, k = q.shape
    sums = jnp.broadcast_to(jnp.eye(k), (b, h, k, k)), jnp.ones((b, h, k))
    return linear_branch.operand(q, sums, kernel, bias)[1:]


def qkv(key, *, tokens, heads):
    """q k v as a network's are, keys with a common part; and the projection."""
    keys = jax.random.split(key, 6)
    q, k, v = (jax.random.normal(key, (1, tokens, heads, 128)) for key in keys[:3])
    k = k + jax.random.normal(keys[3], (1, 1, heads, 128))
    kernel = jax.random.normal(keys[4], (128, 128)) * 128**-0.5
    return *(x.astype(jnp.bfloat16) for x in (q, k, v)), kernel, jax.random.normal(keys[5], (128,))


def with_means(q, k, v, kernel, bias):
    return q, k, v, kernel, bias, (pool(q, 128, interpret=False), pool(k, 64, interpret=False))


def loop_operands(key, *, make, chosen, impl):
    """Queries, keys, values, random lists (the last block is in half of them), and what the linear
    branch takes."""
    q, k, v, kernel, bias = make(key)
    (_, tokens, heads, _), mean = q.shape, k.mean(1, dtype=jnp.float32)
    shape = 1, heads, -(-tokens // 128), -(-tokens // 64)
    scores = jax.random.uniform(key, shape).at[..., ::2, -1].set(2.0)
    blocks = jnp.sort(lax.top_k(scores, chosen)[1], -1).astype(jnp.int32)
    _, linear = linear_branch.operands(q, k, v, kernel, bias, interpret=False)
    if impl == "mosaic":
        given = sage_mosaic.operands(q, k, mean)
    else:
        given = sage_triton.operands(q, k, mean, 128, 64, interpret=False)
    return *given, v, blocks, linear


def triton_loop(queries, keys, v, blocks, *, linear=None):
    at = tile("sage_attention", kernel_name(128))
    options = {"linear": linear, "interpret": False, "at": at}
    return attend(sage_triton.int8_scores, queries, keys, v, blocks, 128, 64, **options)


def softmax_error(o, queries, keys, v, blocks, linear):
    """Over 40 blocks of queries, those at the ends among them."""
    (q, q_scale, _), (k, k_scale) = queries, keys
    (_, l, h, d), n = q.shape, blocks.shape[2]
    q_scale = jnp.repeat(q_scale, 128 * n // q_scale.shape[2], 2)  # of each query
    pick = np.random.default_rng(1)
    pairs = [(0, 0), (0, n - 1), (h - 1, 0), (h - 1, n - 1)]
    pairs += [(int(pick.integers(h)), int(pick.integers(n))) for _ in range(36)]

    def one(pair):
        head, block = pair[0], pair[1]
        near, rows = blocks[0, head, block], block * 128 + jnp.arange(128)
        tokens = (near[:, None] * 64 + jnp.arange(64)).reshape(-1)

        def get(x, at):
            rows = x[0, jnp.minimum(at, l - 1), head].astype(jnp.float32)
            return jnp.where((at < l)[:, None], rows, 0)

        s = jnp.dot(get(q, rows), get(k, tokens).T, precision="highest") * d**-0.5
        s = s * q_scale[0, head, rows][:, None] * jnp.repeat(k_scale[0, head, near], 64)[None]
        p = jax.nn.softmax(jnp.where((tokens < l)[None], s, -jnp.inf), -1)
        exact = jnp.dot(p, get(v, tokens), precision="highest")
        exact = jnp.where((rows < l)[:, None], exact, 0)
        return ((get(o, rows) - exact) ** 2).sum(), (exact**2).sum()

    far, size = lax.map(one, jnp.asarray(pairs))
    return jnp.sqrt(far.sum() / size.sum()) * finite(o)


def distance(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sqrt(((a - b) ** 2).sum() / (b**2).sum())


def finite(x):
    return jnp.where(jnp.isfinite(x).all(), 1.0, jnp.nan)


# ------------------------------------------------------------------ measuring
def timed(call, samples=20, target=0.012) -> dict:
    """Milliseconds of a call: median, fastest and slowest of samples, each of enough calls."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    number = max(1, min(64, round(target / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(number):
            out = call()
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / number)
        del out
    return {"ms": statistics.median(times), "low": min(times), "high": max(times)}


def attempt(function, *args):
    """function(*args), or the error."""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001  (one kernel must not end the others)
        return error


def measure(job: Job, programs) -> dict:
    """Times and error of a job; programs: those being compiled, or why they are not."""
    if isinstance(programs, Exception):
        raise programs
    make, run, *error = (program.result() for program in programs)
    args = jax.block_until_ready(make(jax.random.key(0)))
    found = {"error": float(error[0](run(*args), *args))} if error else {}
    return found | timed(lambda: run(*args))


def described(job: Job, row) -> str:
    if isinstance(row, Exception):
        lines = [line for line in str(row).splitlines() if line.strip()] or [""]
        return f"{job.label:46} FAILED {type(row).__name__}: {lines[0][:160]}"
    text = f"{job.label:46} {row['ms']:8.3f} ms ({row['low']:.3f}-{row['high']:.3f})"
    if job.operations:
        text += f" {1e-9 * job.operations / row['ms']:6.0f} T/s"
    if "error" in row:
        verdict = "" if row["error"] < job.bound else "  WRONG"
        text += f" error {row['error']:.1e}{verdict}"
    if job.shape in GOALS and job.impl == "mosaic":
        goal = GOALS[job.shape]
        text += f"  goal {goal:.3f} {'met' if row['ms'] <= goal else 'MISSED'}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only jobs whose name contains this")
    parser.add_argument("--json", default=os.path.join(os.environ.get("OUT", "."), "mosaic.jsonl"))
    options = parser.parse_args()
    jobs = [*products(), *onto_a_stream(), *attention()]
    jobs = [job for job in jobs if options.match in job.label]
    start = time.time()
    with ThreadPoolExecutor(THREADS) as pool:
        waiting, made = [], {}
        for job in jobs:
            if job.make not in made:  # jobs of one shape have one
                lowered = jax.jit(job.make).lower(jax.random.key(0))
                made[job.make] = pool.submit(lowered.compile)
            lowered = attempt(job.lower)
            if not isinstance(lowered, Exception):
                lowered = [made[job.make], *(pool.submit(program.compile) for program in lowered)]
            waiting.append(lowered)
        print(f"{len(jobs)} jobs lowered in {time.time() - start:.0f} s", flush=True)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    wrong = 0
    with open(options.json, "w") as out:
        for job, programs in zip(jobs, waiting, strict=True):
            row = attempt(measure, job, programs)
            bad = isinstance(row, Exception) or not row.get("error", 0.0) < job.bound
            wrong += bad
            print(described(job, row), flush=True)
            line = {"failure": str(row)} if isinstance(row, Exception) else row
            out.write(json.dumps({"shape": job.shape, "impl": job.impl, **line}) + "\n")
            out.flush()
    print(f"{len(jobs)} jobs, {wrong} failed or wrong, {time.time() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
