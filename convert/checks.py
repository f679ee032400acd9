"""The three depths of `python -m convert.validate CKPT`: (facts, text, number of failures) each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from convert.cli import known, reading
from convert.leaves import Leaves, open_leaves
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.detect import describe
from tdjax.config import DiTConfig, TextConfig

LEVELS = ("keys", "values", "forward")
SHOWN = 20


def _keys(args) -> tuple[dict, str, int]:
    """Opening a checkpoint is the check: it raises with the full list."""
    leaves = open_leaves(args.checkpoint, **known(args))
    text = (
        f"{describe(leaves.kind, leaves.config)}: {leaves.facts['matched']} tensors fill"
        f" {len(leaves.lazy)} leaves"
    )
    facts = {
        "kind": leaves.kind,
        "matched": leaves.facts["matched"],
        "dropped": leaves.facts["dropped"],
        "leaves": len(leaves.lazy),
    }
    return facts, text + f", {leaves.facts['dropped']} dropped", 0


def _values(args) -> tuple[dict, str, int]:
    """Every value finite and, with --against, within atol + rtol |other| of the other file's."""
    ours = open_leaves(args.checkpoint, "float32", **known(args))
    other = _against(args, ours)
    atol, rtol = args.atol or 0.0, args.rtol or 0.0
    bad, worst, not_finite = [], 0.0, []
    with reading(ours, args.checkpoint.name) as ours:
        for name, lazy in ours.lazy.items():
            x = lazy.read()
            if x.dtype != np.int8 and not np.isfinite(x).all():
                not_finite.append(name)
            if other is not None:
                y = other.lazy[name].read().astype(np.float32)
                error = np.abs(x.astype(np.float32) - y)
                worst = max(worst, float(np.nanmax(error, initial=0.0)))
                if not (error <= atol + rtol * np.abs(y)).all():
                    bad.append((float(np.nanmax(error, initial=0.0)), name))
    lines = [f"not finite  {name}" for name in not_finite] + [
        f"differs     {name} by up to {e:.3e}" for e, name in sorted(bad)[::-1]
    ]
    total = f"{len(ours.lazy)} leaves, {len(not_finite)} not finite"
    total += (
        f", {len(bad)} differ from {args.against.name}, by at most {worst:.3e}"
        if other is not None
        else ""
    )
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    facts = {
        "leaves": len(ours.lazy),
        "not_finite": not_finite,
        "different": {name: e for e, name in bad},
        "worst": worst,
    }
    return facts, "\n  ".join([total, *lines[:SHOWN], *more]), len(lines)


def _against(args, ours: Leaves) -> Leaves | None:
    """The other file, checked to be the same network."""
    if args.against is None:
        return None
    other = open_leaves(args.against, "float32", **known(args))
    orbax.check_table(
        _shapes(ours),
        _shapes(other),
        f"{args.against.name} is not the same network as {args.checkpoint.name}",
    )
    return other


def _shapes(leaves: Leaves) -> dict:
    return {name: (tuple(x.shape), x.dtype.name) for name, x in leaves.lazy.items()}


def _forward(args) -> tuple[dict, str, int]:
    """The network on random input: finite, and with --against close to the other's output."""
    a = _output(args.checkpoint, args)
    finite = bool(np.isfinite(a).all())
    facts, text, failed = (
        {"finite": finite, "rms": float(np.sqrt(np.mean(a**2)))},
        "finite" if finite else "NOT FINITE",
        int(not finite),
    )
    if args.against is not None:
        b = _output(args.against, args)
        atol, rtol = (1e-2 if x is None else x for x in (args.atol, args.rtol))
        error = np.abs(a - b)
        close = bool((error <= atol + rtol * np.abs(b)).all())
        relative = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        facts |= {"largest_error": float(error.max()), "relative_l2": relative}
        text += (
            f", {'close to' if close else 'FAR FROM'} {args.against.name}: largest error"
            f" {error.max():.3e}, relative L2 {relative:.3e}"
        )
        failed += not close
    return facts, text, failed


def _output(path, args) -> np.ndarray:
    """The output of a checkpoint's network on small random input that depends on its sizes
    alone."""
    leaves = open_leaves(path, None, **known(args))
    module = leaves.file.load(leaves.config) if leaves.file is not None else orbax.restore(path)[1]
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    cfg = leaves.config
    if isinstance(cfg, DiTConfig):
        t, h, w = (n * 2 for n in cfg.patch)
        image = normal(2, 1, t, h, w, cfg.condition_channels) if cfg.condition_channels else None
        features = normal(3, 1, 257, cfg.image_dim) if cfg.image_dim else None
        inputs = (
            normal(0, 1, t, h, w, cfg.out_channels),
            jnp.float32([500.0]),
            normal(1, 1, 16, cfg.text_dim),
            image,
            features,
        )
        return np.asarray(_applied(module, *inputs), np.float32)
    if isinstance(cfg, TextConfig):
        ids, mask = jnp.arange(8, dtype=jnp.int32)[None] % cfg.vocab, jnp.ones((1, 8), jnp.int32)
        return np.asarray(_applied(module, ids, mask).astype(jnp.float32))
    side = 2 * cfg.spatial
    video = jnp.tanh(normal(0, 1, 1 + cfg.temporal, side, side, 3))
    return np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in _coded(module, video)])


@jax.jit  # one program for two checkpoints of the same config
def _applied(module, *inputs):
    return module(*inputs)


@jax.jit
def _coded(vae, video):
    latents = vae.encode(video)
    return latents, vae.decode(latents)


CHECKS = {"keys": _keys, "values": _values, "forward": _forward}
