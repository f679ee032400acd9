"""The Mosaic GPU kernels at real size on one Hopper GPU: right, and how fast beside the others.

    python tests/gpu/mosaic.py [--only products|attention] [--seconds 280] [--json FILE]

Each line is one implementation at one shape: error, and the median of 20 samples of back-to-back
calls. Products are compared with exact int32 sums (float32 sums for float8) of 512 rows; attention
with a float32 softmax over the listed blocks of some 40 blocks of queries; whole ops with the
Triton kernels. Kernels are compiled in several processes, which take turns on the GPU; one that
fails or hangs is reported, and its process started again. The table of the fastest comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from functools import cache, partial

WORKERS = 6
COMPILES, RUNS = 150, 40  # seconds that a job may take to compile, and to run
PRODUCTS = {  # m, k, n
    "1.3B up": (32760, 1536, 8960),
    "1.3B down": (32760, 8960, 1536),
    "1.3B square": (32760, 1536, 1536),
    "1.3B qkv": (32760, 1536, 4608),
    "1.3B text": (512, 1536, 3072),
    "14B up": (75600, 5120, 13824),
    "14B down": (75600, 13824, 5120),
    "14B square": (75600, 5120, 5120),
    "14B qkv": (75600, 5120, 15360),
    "14B text": (512, 5120, 10240),
}
ATTENTION = {"1.3B 480p": (32760, 12), "14B 720p": (75600, 40)}  # tokens, heads
WIDE = {}
SQUARE = {"rows": 128, "columns": 128, "across": True}
SMALL = {"columns": 128, "stages": 6, "cluster": 1}
DEFERRED = {"pairs": True, "deferred": True}
LIMITS = {"int8": 3e-3, "float8": 1e-2, "loop": 5e-3, "whole": 5e-3}  # relative L2


def jobs(only: str | None) -> list[dict]:
    """What is run, the most important first."""
    made = []
    products = ("triton", WIDE, SQUARE, {"group": 16}, SQUARE | {"group": 16})
    goals = [name for name in PRODUCTS if name.split()[1] in ("up", "down", "square")]
    for name in goals if only != "attention" else ():
        made += [product(name, impl) for impl in products]
    for name in ATTENTION if only != "products" else ():
        for linear in (False, True):
            loop = partial(attention, name, "int8 loop", linear=linear)
            made += [loop("triton"), loop({}), loop(DEFERRED), loop(DEFERRED | {"shifted": True})]
            if not linear:
                made += [loop({"pairs": True}), loop({"pairs": True, "early": True})]
                made += [loop({"registers": False}), loop({"query_buffers": 2})]
        made += [attention(name, "int8 whole", impl) for impl in ("triton", {}, DEFERRED)]
        made += [attention(name, "int8 parts", part) for part in ("map", "sums", "operands")]
        floats = partial(attention, name, "bf16 loop")
        made += [floats("triton"), floats({"query_buffers": 1})]
        made += [floats({}, bounded=True), floats(DEFERRED, bounded=True)]
        made += [attention(name, "bf16 whole", impl) for impl in ("triton", {}, DEFERRED)]
        if name.startswith("1.3B"):
            made += [attention(name, "int8 dense", impl) for impl in ("triton", {}, DEFERRED)]
    if only != "attention":
        for name in PRODUCTS:
            made += [product(name, impl, "float8") for impl in ("xla", WIDE)]
        for name in sorted(PRODUCTS.keys() - goals):
            made += [product(name, impl) for impl in ("triton", WIDE, SMALL)]
    return made


def product(shape, impl, kind="int8"):
    return {"op": "product", "shape": shape, "kind": kind, "impl": impl}


def attention(shape, kind, impl, **more):
    return {"op": "attention", "shape": shape, "kind": kind, "impl": impl, **more}


def label(job) -> str:
    more = [key for key in ("linear", "bounded") if job.get(key)]
    impl = job["impl"]
    if not isinstance(impl, str):
        impl = " ".join(["mosaic", *(f"{name}={value}" for name, value in impl.items())])
    return " ".join([job["shape"], job["kind"], *more, "|", impl])


# ------------------------------------------------------------------ worker: one job after another
def work() -> None:
    """Answers each line of standard input: "ready" once compiled, and after a second line the
    result."""
    say = lambda answer: print("@@" + json.dumps(answer), flush=True)
    for line in sys.stdin:
        try:
            run = {"product": compile_product, "attention": compile_attention}[
                json.loads(line)["op"]
            ](json.loads(line))
            say("ready")
            sys.stdin.readline()
            say(run())
        except Exception as error:  # one kernel must not end the others
            traceback.print_exc()
            lines = [x for x in str(error).splitlines() if x.strip() and not x.startswith("---")]
            text = next((x for x in lines if "JAX_TRACEBACK" not in x), "")
            say({"error": f"{type(error).__name__}: {text[:200]}"})


def timed(call, samples=20, target=0.012) -> dict:
    """Milliseconds of a call: median, fastest and slowest of samples, each of enough calls."""
    import jax

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


def compiled(function, *shapes):
    import jax

    return jax.jit(function).lower(*shapes).compile()


@cache
def operands_of_product(shape: tuple, kind: str):
    """The function that makes x, weight and bias, compiled, and their shapes."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.int8_matmul import QTensor

    m, k, n = shape
    dtype = jnp.int8 if kind == "int8" else jnp.float8_e4m3fn
    size = 36.0 if kind == "int8" else 100.0
    top = 127 if kind == "int8" else 448

    def make(key):
        keys = jax.random.split(key, 5)
        values = lambda key, shape: jnp.clip(size * jax.random.normal(key, shape), -top, top)
        rounded = jnp.round if kind == "int8" else lambda x: x
        scales = lambda key, n: jax.random.uniform(key, (n,), minval=0.5, maxval=1.5) / size
        x = QTensor(rounded(values(keys[0], (m, k))).astype(dtype), scales(keys[1], m))
        weight = rounded(values(keys[2], (n, k))).astype(dtype)
        return x, QTensor(weight, scales(keys[3], n) * k**-0.5), jax.random.normal(keys[4], (n,))

    key = jax.random.key(sum(shape))
    run = compiled(make, key)
    return lambda: run(key), jax.eval_shape(make, key)


@cache
def product_error(shape: tuple, kind: str):
    """(y, x, weight, bias) -> relative L2, and the worst element in units of 2^-8 of it."""
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    m = shape[0]
    random = np.random.default_rng(0).integers(0, m, 128)
    rows = np.unique(np.concatenate([np.arange(192), np.arange(m - 192, m), random]))

    def measured(y, x, weight, bias):
        dims = (((1,), (1,)), ((), ()))
        if kind == "int8":
            total = lax.dot_general(
                x.values[rows], weight.values, dims, preferred_element_type=jnp.int32
            ).astype(jnp.float32)
        else:
            wide = lambda x: x.astype(jnp.float32)
            total = lax.dot_general(
                wide(x.values[rows]), wide(weight.values), dims, precision="highest"
            )
        expected = total * x.scale[rows][:, None] * weight.scale[None] + bias[None]
        error = jnp.abs(y[rows].astype(jnp.float32) - expected)
        finite = jnp.where(jnp.isfinite(y).all(), 1.0, jnp.nan)
        worst = (error / (jnp.abs(expected) + 1e-2)).max() * 2**8
        return finite * jnp.sqrt((error**2).sum() / (expected**2).sum()), worst

    shapes = operands_of_product(shape, kind)[1]
    y = shapes[0].values.update(shape=(m, shape[2]), dtype=jnp.bfloat16)
    return compiled(measured, y, *shapes)


def compile_product(job):
    import jax.numpy as jnp

    from pallas_kernels.int8_matmul import mosaic, quantized_linear

    shape, kind, impl = PRODUCTS[job["shape"]], job["kind"], job["impl"]
    make, shapes = operands_of_product(shape, kind)
    if isinstance(impl, str):
        scheme = "channel" if kind == "int8" else "fp8"
        function = partial(quantized_linear, scheme=scheme, out_dtype=jnp.bfloat16, impl=impl)
    else:
        tile = mosaic.Tile(**impl)
        function = lambda x, w, bias: mosaic.row_product(x, w, bias, jnp.bfloat16, tile=tile)
    function, error = compiled(function, *shapes), product_error(shape, kind)

    def run():
        args = make()
        y = function(*args)
        far, worst = error(y, *args)
        del y
        found = {"error": float(far), "worst": float(worst)}
        return (
            found
            | timed(lambda: function(*args))
            | {"operations": 2.0 * shape[0] * shape[1] * shape[2]}
        )

    return run


@dataclasses.dataclass(frozen=True)
class Attention:
    """The functions of one shape, from what the Triton path is made of."""

    tokens: int
    heads: int

    @property
    def chosen(self) -> int:
        from pallas_kernels.sparse_attention import chosen_blocks

        return chosen_blocks(self.tokens, 0.1, 64)

    def make(self, key):
        """q k v as a network's are: keys with a common part; and the projection."""
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(key, 6)
        shape = (1, self.tokens, self.heads, 128)
        q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
        k = k + jax.random.normal(keys[3], (1, 1, self.heads, 128))
        kernel = jax.random.normal(keys[4], (128, 128)) * 128**-0.5
        bias = jax.random.normal(keys[5], (128,))
        return *(x.astype(jnp.bfloat16) for x in (q, k, v)), kernel, bias

    def map(self, q, k, v, kernel, bias):
        from pallas_kernels.sparse_attention.block_map import block_map_and_mean

        return block_map_and_mean(q, k, self.chosen, 128, 64, None, interpret=False)

    def sums(self, q, k, v, kernel, bias):
        from pallas_kernels.sparse_attention.triton import summed

        return summed(q, k, v, kernel, bias, interpret=False)[1]

    def operands(self, q, k, v, kernel, bias, mean=None):
        import jax.numpy as jnp

        from pallas_kernels.sage_attention.triton import operands

        mean = k.mean(1, dtype=jnp.float32) if mean is None else mean
        return operands(q, k, mean, 128, 64, interpret=False)

    def bound(self, q, k):
        """Of float scores: Cauchy-Schwarz."""
        import jax.numpy as jnp

        length = lambda x: jnp.sqrt((x.astype(jnp.float32) ** 2).sum(-1)).transpose(0, 2, 1)
        queries = jnp.pad(length(q), ((0, 0), (0, 0), (0, -self.tokens % 128)))
        queries = queries.reshape(*queries.shape[:2], -1, 128).max(-1)
        return queries * length(k).max(-1, keepdims=True) * (1.4427 * 128**-0.5)

    def lists(self, key):
        """Random blocks of keys; the last one is in many lists."""
        import jax
        import jax.numpy as jnp

        n, m = -(-self.tokens // 128), -(-self.tokens // 64)
        scores = jax.random.uniform(key, (1, self.heads, n, m)).at[..., ::2, -1].set(2.0)
        return jnp.sort(jax.lax.top_k(scores, self.chosen)[1], -1).astype(jnp.int32)


def compile_attention(job):
    import jax

    from pallas_kernels.sage_attention import sage_sparse_linear_attention
    from pallas_kernels.sage_attention.triton import int8_scores
    from pallas_kernels.sparse_attention import forward, mosaic, sparse_linear_attention
    from pallas_kernels.tuning import tile as triton_tile

    at, impl, kind = Attention(*ATTENTION[job["shape"]]), job["impl"], job["kind"]
    key = jax.random.key(at.tokens)
    make, shapes = compiled(at.make, key), jax.eval_shape(at.make, key)
    int8, dense = kind.startswith("int8"), kind.endswith("dense")
    operations = 4.0 * at.heads * 128 * -(-at.tokens // 128) * 128 * 64 * at.chosen
    if dense:
        operations = 4.0 * at.heads * 128 * at.tokens**2
    tile = (
        None
        if isinstance(impl, str)
        else mosaic.Tile(
            **({} if int8 else {"stages": 3, "query_buffers": 2, "registers": False}) | impl
        )
    )

    if kind.endswith("parts"):
        run = compiled(getattr(at, impl), *shapes)

        def measure():
            args = make(key)
            return timed(lambda: run(*args))

        return measure

    if kind.endswith("whole"):
        plain = sage_sparse_linear_attention if int8 else sparse_linear_attention
        triton = partial(plain, topk=0.1, impl="triton")

        def whole(q, k, v, kernel, bias):
            blocks, mean = at.map(q, k, v, kernel, bias)
            linear = at.sums(q, k, v, kernel, bias)
            if not int8:
                bound = at.bound(q, k)
                return mosaic.attend(q, k, v, blocks, bound=bound, linear=linear, tile=tile)
            (q8, q_scale, bound), (k8, k_scale) = at.operands(q, k, v, kernel, bias, mean)
            scales = (q_scale, k_scale)
            return mosaic.attend(
                q8, k8, v, blocks, scales=scales, bound=bound, linear=linear, tile=tile
            )

        function = compiled(triton if impl == "triton" else whole, *shapes)
        other = compiled(triton, *shapes)
        distance = compiled(relative, shapes[0], shapes[0])

        def measure():
            args = make(key)
            error = float(distance(function(*args), other(*args)))
            found = {"error": error, "operations": operations}
            return found | timed(lambda: function(*args))

        return measure

    def prepare(key):
        q, k, v, kernel, bias = at.make(key)
        lists = None if dense else at.lists(key)
        linear = at.sums(q, k, v, kernel, bias) if job.get("linear") else None
        if int8:
            (q8, q_scale, bound), (k8, k_scale) = at.operands(q, k, v, kernel, bias)
            return (q8, k8, v, lists, (q_scale, k_scale), bound, linear), (q, k)
        bound = at.bound(q, k) if job.get("bounded") else None
        return (q, k, v, lists, None, bound, linear), (q, k)

    def by_triton(q, k, v, lists, scales, bound, linear):
        if not int8:
            return forward.forward(q, k, v, lists, 128, 64, linear=linear)
        name = "dense" if dense else "forward_q128"
        queries, keys = (q, scales[0], bound), (k, scales[1])
        return forward.attend(
            int8_scores,
            queries,
            keys,
            v,
            lists,
            128,
            64,
            linear=linear,
            interpret=False,
            at=triton_tile("sage_attention", name),
        )

    def by_mosaic(q, k, v, lists, scales, bound, linear):
        return mosaic.attend(q, k, v, lists, scales=scales, bound=bound, linear=linear, tile=tile)

    given, (args_shape, _) = compiled(prepare, key), jax.eval_shape(prepare, key)
    function = compiled(by_triton if impl == "triton" else by_mosaic, *args_shape)
    if job.get("linear"):  # beside a softmax that other lines compare
        other, distance = compiled(by_triton, *args_shape), compiled(relative, shapes[0], shapes[0])

    def measure():
        args, _ = given(key)
        o = function(*args)
        if job.get("linear"):
            found = {"error": float(distance(o, other(*args)))}
        else:
            found = softmax_error(o, *args[:5])
        if args[5] is not None:
            found["bound"] = float(args[5].max())
        del o
        return found | timed(lambda: function(*args)) | {"operations": operations}

    return measure


def relative(a, b):
    import jax.numpy as jnp

    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sqrt(((a - b) ** 2).sum() / (b**2).sum())


def softmax_error(o, q, k, v, lists, scales) -> dict:
    """Relative L2 over some blocks of queries, and of the worst of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    (_, l, h, d), n = q.shape, -(-q.shape[1] // 128)
    every = jnp.arange(-(-l // 64), dtype=jnp.int32)

    @jax.jit
    def one(o, q, k, v, lists, scales, head, block):
        near = every if lists is None else lists[0, head, block]
        rows = block * 128 + jnp.arange(128)
        tokens = (near[:, None] * 64 + jnp.arange(64)).reshape(-1)
        get = lambda x, at: jnp.where(
            (at < l)[:, None], x[0, :, head][jnp.minimum(at, l - 1)].astype(jnp.float32), 0
        )
        s = jnp.dot(get(q, rows), get(k, tokens).T, precision="highest") * d**-0.5
        if scales is not None:
            s = s * scales[0][0, head, block] * jnp.repeat(scales[1][0, head, near], 64)[None]
        p = jax.nn.softmax(jnp.where((tokens < l)[None], s, -jnp.inf), -1)
        exact = jnp.dot(p, get(v, tokens), precision="highest")
        exact = jnp.where((rows < l)[:, None], exact, 0)
        return ((get(o, rows) - exact) ** 2).sum(), (exact**2).sum()

    pick = np.random.default_rng(1)
    pairs = [(int(pick.integers(h)), int(pick.integers(n))) for _ in range(36)]
    pairs += [(0, 0), (0, n - 1), (h - 1, 0), (h - 1, n - 1)]
    sums = np.array([[float(x) for x in one(o, q, k, v, lists, scales, *p)] for p in pairs])
    finite = 1.0 if bool(jnp.isfinite(o).all()) else float("nan")
    sums = np.sqrt(sums)
    far = np.sqrt((sums[:, 0] ** 2).sum() / (sums[:, 1] ** 2).sum())
    return {"error": float(far) * finite, "worst": float((sums[:, 0] / sums[:, 1]).max())}


# ------------------------------------------------------------------ parent: no jax here
class Worker:
    """A process that may die or hang."""

    def __init__(self, log):
        self.log, self.process, self.lines = log, None, None

    def start(self):
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.lines = queue.Queue()
        threading.Thread(target=self.pump, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def pump(process, lines):
        for line in process.stdout:
            if line.startswith("@@"):
                lines.put(json.loads(line[2:]))
        lines.put({"error": "the process ended"})

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, line: str, seconds: float):
        """The answer to a line; an error if none comes, and then the process is ended."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.lines.get(timeout=max(seconds, 0.1))
        except (OSError, queue.Empty) as error:
            answer = {"error": f"no answer in {seconds:.0f} s ({type(error).__name__})"}
            self.stop()
        if self.process is not None and self.process.poll() is not None:
            self.stop()
        return answer


class Clock:
    """The GPU's clock and power while a kernel runs, as nvidia-smi says."""

    def __init__(self):
        query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
        self.samples = []
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", *query], stdout=subprocess.PIPE, text=True
            )
            threading.Thread(target=self.pump, daemon=True).start()
        except OSError:
            self.process = None

    def pump(self):
        for line in self.process.stdout:
            try:
                clock, power = (float(x) for x in line.split(","))
                self.samples.append((clock, power))
            except ValueError:
                continue

    def since(self, start: int) -> dict:
        """Clock and power at the highest power since the start-th sample."""
        highest = sorted(self.samples[start:], key=lambda sample: sample[1])[-2:]
        return {"MHz": highest[0][0], "W": highest[0][1]} if highest else {}

    def stop(self):
        if self.process is not None:
            self.process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("products", "attention"))
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--json", default=os.path.join(os.environ.get("OUT", "."), "mosaic.jsonl"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--match", default="", help="only jobs whose name contains this")
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    end = time.time() + options.seconds
    waiting = [job for job in jobs(options.only) if options.match in label(job)]
    rows, gpu, take, clock = [], threading.Lock(), threading.Lock(), Clock()
    out, log = open(options.json, "w"), open(options.json + ".log", "w")  # noqa: SIM115

    def serve(worker):
        while time.time() < end - 5:
            with take:
                if not waiting:
                    break
                job = waiting.pop(0)
            answer = worker.ask(json.dumps(job), min(COMPILES, end - time.time()))
            if answer == "ready":
                with gpu:
                    start = len(clock.samples)
                    answer = worker.ask("go", min(RUNS, end - time.time()))
                    answer |= clock.since(start)
                    if "error" in answer and "ms" not in answer:
                        worker.stop()  # what the GPU has refused once may stay broken
            row = {**job, "label": label(job), **answer}
            with take:
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(described(row), flush=True)
        worker.stop()

    threads = [threading.Thread(target=serve, args=(Worker(log),)) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.stop()
    table(rows)
    if waiting:
        print(f"time was up before {len(waiting)} jobs: {'; '.join(map(label, waiting))}")
    return 0


def right(row) -> bool:
    if "ms" not in row:
        return False
    kind = "whole" if row["kind"].endswith("whole") or row.get("linear") else "loop"
    limit = LIMITS[row["kind"] if row["op"] == "product" else kind]
    return "error" not in row or row["error"] < limit


def described(row) -> str:
    if "ms" not in row:
        return f"{row['label']:60} FAILED {row.get('error')}"
    text = f"{row['label']:60} {row['ms']:8.3f} ms ({row['low']:.3f}-{row['high']:.3f})"
    if "operations" in row:
        text += f" {1e-9 * row['operations'] / row['ms']:6.0f} T/s"
    if "error" in row:
        text += f" error {row['error']:.1e}"
    text += "".join(f" {key} {row[key]:.3g}" for key in ("worst", "bound") if key in row)
    text += f" {row['MHz']:.0f} MHz {row['W']:.0f} W" if "MHz" in row else ""
    return text + ("" if right(row) else "  WRONG")


def table(rows) -> None:
    """The fastest right line of each implementation at each shape."""
    print("\nfastest that are right: ms (T operations/s, error)")
    groups = {}
    for row in rows:
        if right(row):
            groups.setdefault(row["label"].split(" | ")[0], []).append(row)
    for name, mine in sorted(groups.items()):
        line = f"{name:28}"
        for other in ("triton", "xla", "mosaic"):
            of = [r for r in mine if r["label"].split(" | ")[1].startswith(other)]
            if of:
                row = min(of, key=lambda row: row["ms"])
                speed = 1e-9 * row.get("operations", 0) / row["ms"]
                text = f"{row['ms']:.3f} ({speed:.0f}, {row.get('error', 0):.1e})"
                line += f"  {row['label'].split(' | ')[1]} {text}"
        print(line)
    wrong = [row["label"] for row in rows if not right(row)]
    print(f"{len(rows)} lines; failed or wrong: {'; '.join(wrong) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
