"""`python -m tdjax.env [--json]`: versions, devices, kernels and caches of this machine, for a
first look and for bug reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from tdjax import cli

GIB = 2**30
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "av",
    "huggingface_hub",
)
# how names of device plugins begin
PLUGINS = ("jax-cuda", "jax-rocm", "jax-metal", "jax-tpu", "libtpu", "nvidia-cudnn")
CUDA_KERNELS = 8.0  # compute capability from which the CUDA kernels run: Ampere
HOPPER = 9.0  # compute capability of the Mosaic GPU kernels


def versions() -> dict[str, str | None]:
    """This package, and what it stands on; None for one that is missing."""
    import tdjax

    installed = {
        d.name.lower().replace("_", "-"): d.version for d in metadata.distributions() if d.name
    }
    out = {"tdjax": tdjax.__version__, "python": platform.python_version()}
    out |= {name: installed.get(name.replace("_", "-")) for name in PACKAGES}
    return out | {
        name: version for name, version in sorted(installed.items()) if name.startswith(PLUGINS)
    }


def devices() -> list[dict[str, Any]]:
    """Every device of the default backend. Starts the backend."""
    import jax

    rows = []
    for device in jax.devices():
        memory = device.memory_stats() or {}  # None on a CPU
        rows.append(
            {
                "id": device.id,
                "platform": device.platform,
                "kind": device.device_kind,
                "compute_capability": getattr(device, "compute_capability", None),
                "memory_bytes": memory.get("bytes_limit"),
            }
        )
    return rows


def kernels(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every implementation of every op, whether the first device can run it, and why not."""
    from pallas_kernels.inventory import OPS, compiled

    device = found[0] if found else None
    return [
        {"op": op, "impl": impl, "why_not": why_not(impl, device)}
        for op in OPS
        for impl in compiled(op)
    ]


def why_not(impl: str, device: dict[str, Any] | None) -> str | None:
    """The reason that an implementation cannot run on a device, or None. The reference runs on
    everything."""
    if device is None:
        return "no device"
    if impl == "reference":
        return None
    capability = device["compute_capability"]
    if device["platform"] not in ("gpu", "cuda") or capability is None:
        return f"needs an NVIDIA GPU; the first device is {device['kind']}"
    if float(capability) < CUDA_KERNELS:
        return (
            f"needs compute capability {CUDA_KERNELS} (Ampere) or newer; {device['kind']} has"
            f" {capability}"
        )
    if impl == "mosaic" and float(capability) // 1 != HOPPER:
        return f"needs compute capability {HOPPER} (Hopper); {device['kind']} has {capability}"
    return None


def folders() -> dict[str, dict[str, Any]]:
    """Where files are kept, and whether they can be written."""
    from huggingface_hub import constants

    from tdjax.checkpoints.locate import cache_folder

    places = {
        "tdjax": cache_folder(),
        "compiled": cache_folder() / "compiled",
        "hub": Path(constants.HF_HUB_CACHE),
    }
    return {
        name: {"path": str(path), "exists": path.is_dir(), "writable": writable(path)}
        for name, path in places.items()
    }


def writable(path: Path) -> bool:
    """Whether the folder can be written, or made: asked of its nearest ancestor that exists."""
    nearest = next(p for p in (path, *path.parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def report() -> dict[str, Any]:
    """Returns all of it as JSON values. A backend that does not start is part of the report."""
    out: dict[str, Any] = {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions(),
    }
    try:
        out |= {"devices": devices(), "error": None}
    except (RuntimeError, AssertionError) as error:  # jax: a plugin that cannot start, or is absent
        out |= {"devices": [], "error": str(error) or type(error).__name__}
    from huggingface_hub import constants

    return out | {
        "kernels": kernels(out["devices"]),
        "folders": folders(),
        "hub_offline": constants.HF_HUB_OFFLINE,
        "variables": {
            name: os.environ[name]
            for name in ("JAX_PLATFORMS", "XLA_FLAGS", "TDJAX_CACHE", "HF_HOME")
            if name in os.environ
        },
    }


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"system     {found['system']}, {found['cpus']} CPU cores"]
    lines += [
        f"{'versions' if i == 0 else '':10} {name} {v or 'missing'}"
        for i, (name, v) in enumerate(found["versions"].items())
    ]
    for i, device in enumerate(found["devices"]):
        size = device["memory_bytes"]
        known = [device["platform"]]
        if device["compute_capability"]:
            known.append(f"compute capability {device['compute_capability']}")
        if size:
            known.append(f"{size / GIB:.1f} GiB usable")
        name = f"{device['id']}: {device['kind']} ({', '.join(known)})"
        lines.append(f"{'devices' if i == 0 else '':10} {name}")
    if found["error"]:
        lines.append(f"devices    none: {found['error']}")
    for i, row in enumerate(found["kernels"]):
        state = f"no: {row['why_not']}" if row["why_not"] else "yes"
        lines.append(f"{'kernels' if i == 0 else '':10} {row['op']} {row['impl']}: {state}")
    for i, (name, place) in enumerate(found["folders"].items()):
        state = "" if place["exists"] else " (not there yet)"
        if not place["writable"]:
            state += " (NOT writable)"
        lines.append(f"{'caches' if i == 0 else '':10} {name}: {place['path']}{state}")
    if found["hub_offline"]:
        lines.append("hub        offline (HF_HUB_OFFLINE)")
    lines += [
        f"{'variables' if i == 0 else '':10} {name}={value}"
        for i, (name, value) in enumerate(found["variables"].items())
    ]
    return "\n".join(lines)


def selftest() -> int:
    """Every kernel against its reference, one line each."""
    import jax

    from pallas_kernels import selftest

    cli.start_jax(print)
    device = jax.devices()[0]
    impl = "triton" if device.platform == "gpu" else "interpret"
    how = "compiled" if impl == "triton" else "interpreted (no CUDA device)"
    print(f"{device.device_kind}: kernels {how}", flush=True)
    checks = list(selftest.run(impl))
    print(selftest.table(checks))
    return 0 if all(check.passed for check in checks) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "tdjax env",
        description="Versions, devices, kernels and caches of this machine.",
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run every kernel against its reference (a minute; exit code 1 if one fails)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 1 a device or a kernel fails, 2 usage, 130 interrupted."""
    return cli.main(_command, argv, parser=build_parser)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.selftest:
        return selftest()
    found = report()
    print(json.dumps(found, indent=1) if args.json else text(found))
    return 1 if found["error"] else 0


if __name__ == "__main__":
    cli.run(main)
