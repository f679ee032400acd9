"""Seconds until `Pipeline.set_loras` has put LoRA files on a loaded transformer of 1.3B, another in
their place, and taken them off, with the weights in bfloat16 and in 8 bits.

    python tests/gpu/lora_switch.py --rank 64 --json rows.jsonl

Weights and files are random; the files are in the memory that the system keeps of files. A row has
the first switch, which compiles the sum, and the median and the largest of those after it, and
whether the weights are the same bit by bit when the files are off, with the shapes of programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tdjax.bench.pipeline import RandomComponent, opened
from tdjax.checkpoints import orbax
from tdjax.config import VideoSize
from tdjax.pipeline.adapters import FACTOR
from tdjax.pipeline.pipeline import Pipeline
from tdjax.presets import PRESETS, UMT5_XXL, WAN_VAE

MODEL = "turbowan2.1-t2v-1.3b-480p"
SWITCHES = 8


def write(path: Path, rank: int, seed: int) -> str:
    """Factors of every linear layer of the blocks, in bfloat16."""
    cfg = PRESETS[MODEL].config
    sizes = {f"{part}_attn.{x}": (cfg.dim, cfg.dim) for part in ("self", "cross") for x in "qkvo"}
    sizes |= {"ffn.0": (cfg.ffn_dim, cfg.dim), "ffn.2": (cfg.dim, cfg.ffn_dim)}
    random = np.random.default_rng(seed)
    normal = lambda *shape: (0.02 * random.standard_normal(shape, np.float32)).astype(
        ml_dtypes.bfloat16
    )
    tensors = {}
    for layer in range(cfg.layers):
        for name, (outputs, inputs) in sizes.items():
            key = f"diffusion_model.blocks.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = normal(rank, inputs)
            tensors[f"{key}.lora_B.weight"] = normal(outputs, rank)
    save_file(tensors, path)
    return str(path)


@jax.jit
def checksums(leaves: dict) -> dict:
    """Of the bits of every leaf."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        at = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        return (bits.astype(jnp.uint32) * (2 * at + 1)).sum()

    return jax.tree.map(one, leaves)


def bits(pipe: Pipeline) -> dict[str, int]:
    leaves = orbax.named_leaves(pipe.components["dit"].module)
    return jax.tree.map(int, checksums(leaves))


def shapes_of(pipe: Pipeline) -> dict[str, tuple]:
    """What the compiled programs depend on."""
    leaves = orbax.named_leaves(pipe.components["dit"].module)
    return {name: (x.shape, x.dtype, x.sharding) for name, x in leaves.items()}


def seconds(pipe: Pipeline, *files: str) -> float:
    start = time.perf_counter()
    pipe.set_loras(files)
    jax.block_until_ready(pipe.components["dit"].module)
    return time.perf_counter() - start


def row(linear: str, files: list[str], rank: int) -> dict:
    info = PRESETS[MODEL]
    shared = {
        "vae": RandomComponent("vae", "vae", WAN_VAE),
        "text": RandomComponent("text", "text", UMT5_XXL),
    }
    cfg = dataclasses.replace(info.config, linear=linear)
    pipe = opened(cfg, shared, VideoSize(), MODEL)
    jax.block_until_ready(pipe.components["dit"].load())
    before = bits(pipe)
    first = seconds(pipe, files[0])
    on = bits(pipe)
    shapes = shapes_of(pipe)
    times = [seconds(pipe, files[(i + 1) % 2]) for i in range(SWITCHES)]
    assert bits(pipe) == on and shapes == shapes_of(pipe)
    off = seconds(pipe)
    again = seconds(pipe, files[1])
    assert bits(pipe) != on
    seconds(pipe)
    return {
        "what": f"LoRA of rank {rank} on 1.3B, {linear}: another in its place",
        "ms": 1e3 * float(np.median(times)),
        "largest_ms": 1e3 * max(times),
        "first_ms": 1e3 * first,
        "off_ms": 1e3 * off,
        "on_again_ms": 1e3 * again,
        "same_bits_off": bits(pipe) == before,
        "beside": any(FACTOR in name for name in on),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    facts = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": str(datetime.date.today()),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [write(Path(folder) / f"{n}.safetensors", args.rank, n) for n in range(2)]
        for linear in ("int8_channel", "float"):
            found = facts | row(linear, files, args.rank)
            print(found, flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
