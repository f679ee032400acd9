"""The VAE with and without convolutions of pairs of frames, on one Hopper GPU: time, compile time
and working memory of whole clips in bfloat16, and the distance of both to float32.

    python tests/gpu/vae_pairs.py [--size 832x480] [--num_frames 81] [--json FILE]

Random weights and latents, one program for a clip: its times are not those of `python -m
tdjax.bench --stage vae`, which goes chunk by chunk. Medians of 6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import causal_conv
from tdjax.config import VAEConfig
from tdjax.models.wan_vae import VAE
from tdjax.precision import BF16, FLOAT32

FORMS = {"pairs": None, "taps": lambda *_: "not asked for"}  # what stands for `refusal`


def measured(state, policy, method: str, x, refuse, repeats: int):
    """Output, and a row, of a VAE in this precision."""
    vae = nnx.eval_shape(lambda: VAE(VAEConfig(policy=policy), rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(vae)
    state = jax.tree.map(lambda a: a.astype(policy.param_dtype), state)
    run = lambda state, x: getattr(nnx.merge(graph, state), method)(x)
    with mock.patch.object(causal_conv, "refusal", refuse or causal_conv.refusal):
        start = time.perf_counter()
        program = jax.jit(run).lower(state, x).compile()
    row = {"compile_s": time.perf_counter() - start}
    row["working"] = program.memory_analysis().temp_size_in_bytes
    y = jax.block_until_ready(program(state, x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(state, x))
        times.append(1e3 * (time.perf_counter() - start))
    return np.asarray(y), row | ({"ms": statistics.median(times)} if times else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--num_frames", type=int, default=81)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    make = lambda: VAE(VAEConfig(policy=FLOAT32), rngs=nnx.Rngs(0))
    _, state = nnx.split(nnx.jit(make)())
    shape = (1, (args.num_frames - 1) // 4 + 1, height // 8, width // 8, 16)
    latents = jax.random.normal(jax.random.key(1), shape)
    frames = (1, args.num_frames, height, width, 3)
    video = jnp.clip(0.3 * jax.random.normal(jax.random.key(2), frames), -1, 1)
    for method, x in (("decode", latents), ("encode", video)):
        exact, _ = measured(state, FLOAT32, method, x, FORMS["taps"], 0)
        for form, refuse in FORMS.items():
            y, row = measured(state, BF16, method, x, refuse, 6)
            row["error"] = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
            row = {"device": jax.devices()[0].device_kind, "what": method, "form": form} | row
            print(row)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
