"""Ahead-of-time compilation for GPUs that are only described: runs on a machine without one.

Of a Triton kernel XLA writes the PTX, which ptxas takes here. A Mosaic GPU kernel is compiled by
its own backend, in a process of its own: what it writes is asked for by variables of the
environment that are read once.

Needs jax 0.11 or newer, the CUDA plugin (jax-cuda13-plugin, jax-cuda13-pjrt) and ptxas
(nvidia-cuda-nvcc); machine code of Mosaic GPU's kernels is read with nvdisasm
(nvidia-cuda-nvdisasm).
"""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# name -> capability, multiprocessors, KiB of shared memory: of a multiprocessor, of a block at
# most; a device name that jax knows
TARGETS = {
    "sm80": (8, 0, 108, 164, 163, "NVIDIA A100-SXM4-80GB"),
    "sm89": (8, 9, 128, 100, 99, "NVIDIA GeForce RTX 4090"),
    "sm90": (9, 0, 132, 228, 227, "NVIDIA H100 80GB HBM3"),
    "sm100": (10, 0, 148, 228, 227, "NVIDIA B200"),
    "sm120": (12, 0, 188, 100, 99, "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
}
PTXAS_ARCH = {
    "sm80": "sm_80",
    "sm89": "sm_89",
    "sm90": "sm_90a",
    "sm100": "sm_100a",
    "sm120": "sm_120a",
}
# what ptxas says where wgmma instructions wait for each other
WAITS = ("C7510", "C7511", "C7514")
MOSAIC_WAITS = ("C7510", "C7511", "C7512", "C7513", "C7514")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel. Spills are bytes; serialized: wgmma instructions that had to
    wait for each other."""

    name: str
    registers: int
    spills: int
    shared: int
    serialized: bool
    ptx: str
    sass: str = ""  # of Mosaic GPU, where there is nvdisasm


def available() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the CUDA compiler wheels (jax-cuda13-plugin, nvidia-cuda-nvcc) are not installed"
    return None


@cache
def mesh(arch: str):
    """One such GPU."""
    return Mesh(devices(arch, 1), ("x",), axis_types=(AxisType.Auto,))


def described(arch: str, sizes: dict[str, int]):
    """A mesh of such GPUs with axes of these sizes, all of one host."""
    shape = tuple(sizes.values())
    found = np.reshape(devices(arch, math.prod(shape)), shape)
    return Mesh(found, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def devices(arch: str, count: int):
    """GPUs of one host, as the compiler knows them."""
    major, minor, cores, shared, block, name = TARGETS[arch]
    text = f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: {block * 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""
    shape = f"1x1x{count}"
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape).devices


def compile_for(arch: str, function, *args) -> list[Compiled]:
    """The Triton kernels of jit(function)(*args), compiled for `arch`; args are arrays or
    ShapeDtypeStructs."""
    sharding = NamedSharding(mesh(arch), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh(arch)):
        options = {
            "xla_gpu_autotune_level": 0,
            "xla_dump_to": folder,
            "xla_dump_emitter_re": "ptx|llvm",
        }
        jax.jit(function).lower(*args).compile(compiler_options=options)
        return [
            assembled(name, shared, Path(folder), arch) for name, shared in launched(Path(folder))
        ]


def compile_mosaic(function, *args) -> list[Compiled]:
    """The Mosaic GPU kernels of jit(function)(*args), compiled for sm90; in a process for which
    `mosaic_environment` was set before jax was imported."""
    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for path in folder.iterdir():
        path.unlink()
    sharding = NamedSharding(mesh("sm90"), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with jax.set_mesh(mesh("sm90")):
        lowered = jax.jit(function).lower(*args)
        lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
    made = []
    for path in sorted(folder.glob("*.ptxas")):
        kernel = _read(path.stem, 0, path.read_text(), path.with_suffix(".ptx"), MOSAIC_WAITS)
        listing = path.with_suffix(".sass_ctrl")
        sass = listing.read_text() if listing.exists() else ""
        made.append(dataclasses.replace(kernel, sass=sass))
    return made


def mosaic_environment(folder) -> dict[str, str]:
    """Variables by which Mosaic GPU writes PTX, the log of ptxas and, if nvdisasm is installed,
    machine code to a folder."""
    wanted = ["MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS"]
    path = os.environ["PATH"]
    (where,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    if (Path(where) / "bin" / "nvdisasm").exists():
        wanted.append("MOSAIC_GPU_DUMP_SASS")
        path = os.pathsep.join((path, f"{where}/bin"))
    return {"MOSAIC_GPU_DUMP_TO": str(folder), "PATH": path, **dict.fromkeys(wanted, "1")}


def launched(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of shared memory of every pallas_call among the compiled program's kernels."""
    (metadata,) = folder.glob("*thunk_metadata.txt")
    (sequence,) = folder.glob("*thunk_sequence.txt")
    call = r'profile_annotation: "pallas_call[^"]*"\s+thunk_id: (\d+)'
    kernel = r"^(\d+): kCustomKernel.*\] (\w+) grid: .* shared_memory: (\d+) bytes"
    ours = set(re.findall(call, metadata.read_text()))
    rows = re.findall(kernel, sequence.read_text(), re.M)
    return [(name, int(shared)) for number, name, shared in rows if str(int(number)) in ours]


def assembled(name: str, shared: int, folder: Path, arch: str) -> Compiled:
    """One kernel through ptxas."""
    (path,) = [p for p in folder.glob("*.ptx") if f".entry {name}(" in p.read_text()]
    (where,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    options = ["-v", f"-arch={PTXAS_ARCH[arch]}", "-o", str(path.with_suffix(".cubin"))]
    command = [f"{where}/bin/ptxas", *options, str(path)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    part = log.split(f"Compiling entry function '{name}'")[1].split("Compiling entry function")[0]
    return _read(name, shared, part, path, WAITS)


def _read(name: str, shared: int, log: str, ptx: Path, waits: tuple[str, ...]) -> Compiled:
    """What ptxas says of a kernel in its log."""
    number = lambda pattern: int(m.group(1)) if (m := re.search(pattern, log)) else 0
    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    serialized = any(code in log for code in waits)
    registers = number(r"Used (\d+) registers")
    return Compiled(name, registers, spills, shared, serialized, ptx.read_text())
