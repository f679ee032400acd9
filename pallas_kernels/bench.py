"""`python -m pallas_kernels.bench`: every op at real shapes on the GPU at hand, with its error; a
table, and JSON lines.

A time is that of back-to-back calls of one compiled program, divided by their number: launches
overlap with the work before them, as they do inside a model. The median, 10th and 90th percentile
are over samples of such calls. The error is the relative L2 distance to the float32 reference on
the same inputs, quantisation included; for ops whose outputs are 8 bits or whole numbers, to those
of the reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic
from pallas_kernels.cases import CASES, Case
from pallas_kernels.workload import Workload

# Dense peak rates of data sheets: operations a second in bfloat16 and in 8 bits, bytes a second of
# device memory.
PEAKS = {
    "H100 80GB HBM3": (989e12, 1979e12, 3.35e12),
    "H200": (989e12, 1979e12, 4.8e12),
    "A100": (312e12, 624e12, 2.0e12),
    "RTX 4090": (165e12, 660e12, 1.0e12),
    "RTX 5090": (210e12, 838e12, 1.8e12),
    "B200": (2250e12, 4500e12, 8.0e12),
}
# calls are repeated until a sample takes about this long: a clock's tick and the first launch do
# not show
SAMPLE_MS = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. rate: 1e12 operations a second; bound: the least time the hardware's peaks
    allow over the time it took."""

    op: str
    impl: str
    workload: str
    ms: float
    p10: float
    p90: float
    rate: float
    bandwidth: float  # 1e9 bytes a second, of the bytes that must cross device memory
    bound: float | None  # None on a device without an entry in PEAKS
    error: float | None


def measure(case: Case, impl: str, workload: str, *, repeats: int, error: bool) -> Row:
    """Compile, check and time one implementation at one shape."""
    work = case.workloads[workload]
    given = jax.block_until_ready(jax.jit(work.make)(jax.random.key(0)))
    args = case.prepare(impl, *given) if case.prepare else given
    run = jax.jit(lambda *args: case.run(impl, *args)).lower(*args).compile()
    distance = relative(run(*args), jax.jit(case.exact)(*given)) if error else None
    times = _samples(lambda: run(*args), repeats)
    low, middle, high = np.percentile(times, (10, 50, 90))
    least = _least_seconds(work, case.eight_bit(impl), jax.devices()[0].device_kind)
    return Row(
        op=case.name,
        impl=impl,
        workload=workload,
        ms=middle,
        p10=low,
        p90=high,
        rate=work.flops / middle / 1e9,
        bandwidth=work.bytes / middle / 1e6,
        bound=None if least is None else 1e3 * least / middle,
        error=distance,
    )


def _least_seconds(work: Workload, narrow: float, device: str) -> float | None:
    """The least time that the peaks of a device allow, `narrow` of the operations done in 8 bits;
    None for a device without an entry in PEAKS."""
    for name, (wide, eight_bit, bandwidth) in PEAKS.items():
        if re.search(rf"\b{name}\b", device):
            seconds = work.flops * ((1 - narrow) / wide + narrow / eight_bit)
            return max(seconds, work.bytes / bandwidth)
    return None


def _samples(call, repeats: int) -> list[float]:
    """Milliseconds for one call, `repeats` times."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    number = max(1, min(64, round(SAMPLE_MS / 1e3 / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            out = call()
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / number)
    return times


def relative(made, expected) -> float:
    """The largest relative L2 distance of any output, summed in float32 on the device."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        worst = max(worst, float(_squares(a, e)) ** 0.5)
    return worst


@jax.jit
def _squares(made, expected):
    made, expected = made.astype(jnp.float32), expected.astype(jnp.float32)
    return ((made - expected) ** 2).sum() / (expected**2).sum()


def table(rows: list[Row]) -> str:
    lines = [
        f"{'op':22} {'impl':14} {'workload':20} {'ms':>8} {'p10':>8} {'p90':>8} {'TF/s':>7}"
        f" {'GB/s':>7} {'bound':>6} {'error':>9}"
    ]
    for r in rows:
        bound = "" if r.bound is None else f"{r.bound:.0%}"
        error = "" if r.error is None else f"{r.error:.2e}"
        times = f"{r.ms:8.3f} {r.p10:8.3f} {r.p90:8.3f}"
        rates = f"{r.rate:7.1f} {r.bandwidth:7.0f} {bound:>6} {error:>9}"
        lines.append(f"{r.op:22} {r.impl:14} {r.workload:20} {times} {rates}")
    return "\n".join(lines)


def _whole(text: str) -> int:
    if not re.fullmatch("[+-]?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register("type", int, _whole)

    def _get_values(self, action, arg_strings):
        if action.option_strings and arg_strings == ["--"]:  # which argparse would take away
            self.error(f"argument {action.option_strings[0]}: it needs a value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str, why: str = "", fix: str = "") -> NoReturn:
        """Ends the process, as argparse does, with an error in three lines."""
        fix = fix or f"see {self.prog} --help"
        lines = [f"error: {message}", why or self.format_usage().strip(), fix]
        self.exit(2, "\n".join(" ".join(line.split()) for line in lines) + "\n")


def build_parser() -> _Parser:
    parser = _Parser(
        prog="python -m pallas_kernels.bench",
        description="Times and errors of the kernels.",
        allow_abbrev=False,
    )
    parser.add_argument("op", nargs="*", help=f"which ops; default all: {', '.join(CASES)}")
    parser.add_argument(
        "--workload", default="", help="only workloads whose name has this in it, e.g. 480p"
    )
    parser.add_argument("--impl", default="", help="only these implementations, comma separated")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--no_error",
        dest="error",
        action="store_false",
        help="leave out the comparison with the reference",
    )
    parser.add_argument("--json", type=Path, help="append one JSON line for each row to this file")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of the command; ends the process for those that make no sense."""
    parser = build_parser()
    args = parser.parse_args(argv)
    impls = dict.fromkeys(impl for case in CASES.values() for impl in case.impls)
    asked = args.impl.split(",") if args.impl else []
    for flag, names, known in (("op", args.op, CASES), ("--impl", asked, impls)):
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name[:200], known, 1, 0)
                parser.error(
                    f"{flag} {name[:80]!r} is unknown",
                    f"allowed: {', '.join(known)}",
                    f"did you mean {near[0]!r}?" if near else "",
                )
    if not 1 <= args.repeats <= 100_000:
        parser.error(
            f"--repeats is {args.repeats}", "it must be at least 1 and at most 100000", "use 20"
        )
    workloads = [name for op in args.op or CASES for name in CASES[op].workloads]
    if not any(args.workload in name for name in workloads):
        parser.error(
            f"--workload {args.workload[:80]!r} is in no name",
            f"names are {', '.join(dict.fromkeys(workloads))}",
            "leave it away for all",
        )
    if args.json is not None:
        _check_file(parser, args.json)
    return args


def _check_file(parser: _Parser, path: Path) -> None:
    """Ends the process where lines cannot be appended to a file."""
    try:
        there = path.exists()
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:
        parser.error(f"--json {str(path)[:80]!r} cannot be written", str(error), "name a file")


def refusal() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if jax.default_backend() == "gpu":
        return None
    return (
        "the kernels run on NVIDIA GPUs\n"
        f"the first device here is {jax.devices()[0].device_kind}\n"
        "records of an H100 are in docs/bench/kernels.jsonl"
    )


def _wanted(args: argparse.Namespace) -> Iterator[tuple[Case, str, str]]:
    """(case, workload, impl) of every row that is asked for."""
    impls = args.impl.split(",") if args.impl else None
    absent = [] if mosaic.at_hand() else ["mosaic", "channel+mosaic", "fp8+mosaic"]
    for case in (CASES[name] for name in args.op or CASES):
        for workload in case.workloads:
            for impl in case.impls:
                asked = impl in impls if impls else impl not in absent
                if asked and args.workload in workload:
                    yield case, workload, impl


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 1 a row could not be measured, 2 usage, or no GPU."""
    args = parse(sys.argv[1:] if argv is None else argv)
    reason = refusal()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    metadata = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{name} {value}" for name, value in metadata.items()), flush=True)
    rows, failed = [], False
    for case, workload, impl in _wanted(args):
        name = f"  {case.name} {impl} {workload}"
        try:
            row = measure(case, impl, workload, repeats=args.repeats, error=args.error)
        except (ValueError, NotImplementedError, RuntimeError) as reason:
            # a row that a device cannot run; the others go on
            print(f"{name}: {str(reason).splitlines()[0]}", file=sys.stderr, flush=True)
            failed = True
            continue
        rows.append(row)
        print(f"{name}: {row.ms:.3f} ms", file=sys.stderr, flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({**metadata, **dataclasses.asdict(row)}) + "\n")
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
