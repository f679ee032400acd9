"""A file of golden vectors through our modules: its weights by the same rows as any checkpoint,
every value compared.

Files: arrays w/<PyTorch key>, in/..., mid/..., out/... and a JSON `config`, made by the official
code in float32. Sizes are taken from the file, so sets of other widths and seeds run as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pallas_kernels import sparse_attention as sparse
from tdjax.checkpoints.published.checkpoint import Checkpoint
from tdjax.checkpoints.published.detect import detect
from tdjax.checkpoints.published.files import Source
from tdjax.config import SLAConfig
from tdjax.config.parsing import json_object, mismatch, npz_arrays
from tdjax.errors import CheckpointError, TdjaxError
from tdjax.models import intermediates, umt5, wan_vae
from tdjax.precision import FLOAT32

# (atol, rtol); the floor of float32 itself is about 2e-6 in the transformer and the VAE, 6e-6 in
# umT5.
TOLERANCE = {"dit": (5e-5, 1e-5), "sla": (5e-5, 1e-5), "vae": (3e-5, 1e-5), "text": (5e-5, 1e-5)}
NOT_A_TARGET = {
    "out/v_fastnorm": (
        "the official fast LayerNorm counts padding in the variance; ours is a true one"
    ),
    "bf16": "the official module in bfloat16; this run is float32",
    "empty": "the official code keeps no block here and divides 0 by 0; ours keeps one",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One value: its largest error, the tolerance where it is closest to being passed, or why it is
    not compared."""

    name: str
    error: float | None = None
    allowed: float | None = None
    failed: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that is in memory already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read(self) -> np.ndarray:
        return self.array


class _Golden:
    """The arrays and the config of one file."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.arrays = npz_arrays(self.path)
            if not self.arrays:
                raise ValueError("it holds no arrays")
            config = self.arrays.pop("config", np.frombuffer(b"{}", np.uint8))
            self.config: dict[str, Any] = json_object(config.tobytes())
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{self.path} does not exist",
                "a file of golden vectors was expected",
                "check the path",
            ) from e
        except ValueError as e:
            raise CheckpointError(
                f"{self.path} is not a file of golden vectors",
                str(e),
                "it is an .npz with a JSON config",
            ) from e
        self.seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            raise CheckpointError(
                f"{self.path} lacks {key}",
                "its format is not one that is known",
                "see the names of its arrays",
            )
        return self.arrays[key]

    def module(self, **known):
        """Our module in float32, filled from w/ by the rows."""
        tensors = {
            k.removeprefix("w/"): Held(v) for k, v in self.arrays.items() if k.startswith("w/")
        }
        found = detect(tensors, self.path.name, **known, policy=FLOAT32)
        return Checkpoint(Source(self.path, (self.path,), tensors, {}), found, tensors).load()

    def compare(self, kind: str, values: dict[str, Any], prefix: str) -> Iterator[Row]:
        """A row for every one of `values` that the file has under `prefix`; maps and counts must be
        equal."""
        for name, value in values.items():
            key = f"{prefix}{name}"
            if key not in self.arrays:
                continue
            self.seen.add(key)
            got, want = np.asarray(value), self.arrays[key]
            if got.shape != want.shape:
                yield Row(key, float("inf"), 0.0, True, f"shape {got.shape}, expected {want.shape}")
                continue
            atol, rtol = (0.0, 0.0) if want.dtype.kind in "iub" else TOLERANCE[kind]
            error = np.abs(got.astype(np.float64) - want.astype(np.float64))
            error = np.where(np.isnan(error), np.inf, error)
            allowed = atol + rtol * np.abs(want.astype(np.float64))
            worst = np.argmax(error - allowed)
            yield Row(
                key, float(error.max()), float(allowed.flat[worst]), bool((error > allowed).any())
            )

    def rest(self) -> Iterator[Row]:
        """The targets that no row has covered, each with the reason."""
        for key in self.arrays:
            if key.startswith(("out/", "mid/")) and key not in self.seen:
                known = key in NOT_A_TARGET
                note = f"not a target: {NOT_A_TARGET[key]}" if known else "not computed here"
                yield Row(key, note=note)


class _TransformerConfig(TypedDict):
    num_heads: int
    text_len: int
    eps: float
    patch_size: tuple[int, int, int]
    sla_topk: NotRequired[float]
    BLKQ: NotRequired[int]
    BLKK: NotRequired[int]


class _VAEConfig(TypedDict):
    latent_mean: list[float]
    latent_std: list[float]


class _TextConfig(TypedDict):
    text_len: int


class _OpConfig(TypedDict):
    tag: str
    BLKQ: int
    BLKK: int
    k_blocks: int
    real_topk: int
    topk_ratio: float


class _OpConfigs(TypedDict):
    configs: list[_OpConfig]


def _check_of(g: _Golden):
    """The function that runs a file of this kind, by a field of its config, or None. Raises
    CheckpointError where that config is not of its form."""
    marks = {
        "num_layers": (dit, _TransformerConfig),
        "dim_mult": (_vae, _VAEConfig),
        "encoder_layers": (_text, _TextConfig),
        "configs": (_sla_op, _OpConfigs),
    }
    check, form = next((marks[mark] for mark in marks if mark in g.config), (None, Any))
    wrong = mismatch(g.config, form, "its config")
    if wrong:
        raise _damaged(g, wrong)
    return check


def _damaged(g: _Golden, why: str) -> CheckpointError:
    return CheckpointError(
        f"{g.path} is not a file of golden vectors", why[:300], "it is an .npz with a JSON config"
    )


def files(path: Path) -> list[Path]:
    """A file, or those of a folder that can be run here."""
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.glob("*.npz")) if _check_of(_Golden(file)) is not None]
    if not found:
        raise CheckpointError(
            f"{path} holds no golden vectors of a network",
            "looked for *.npz with a known config",
            "give a file",
        )
    return found


def run(path, impl: str = "auto") -> list[Row]:
    """Every out/ and mid/ value of a file of golden vectors against ours. Raises CheckpointError
    for unknown formats."""
    g = _Golden(path)
    check = _check_of(g)
    if check is None:
        known = "transformers, sparse attention, VAE and umT5"
        raise CheckpointError(
            f"{g.path} is not a kind of golden file that is run here",
            f"its config: {str(g.config)[:200]}",
            f"run are: {known}",
        )
    try:
        with jax.default_matmul_precision("highest"):
            return [*check(g, impl), *g.rest()]
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as e:
        if isinstance(e, TdjaxError):
            raise
        why = "its arrays do not fit together"  # their shapes, which jax finds when it traces
        raise _damaged(g, f"{why}: {str(e).splitlines()[0]}") from e


def _channels_last(x):
    return jnp.asarray(rearrange(x, "b c t h w -> b t h w c"))


@jax.jit
def _of_dit(model, *inputs):
    return intermediates.intermediates(model, *inputs), model(*inputs)


def dit(g: _Golden, impl: str) -> Iterator[Row]:
    """dit_*: text- and image-to-video, dense and SLA."""
    c = g.config
    known = {
        "heads": c["num_heads"],
        "text_len": c["text_len"],
        "eps": c["eps"],
        "round_time": False,
        "impl": impl,
    }
    if "sla_topk" in c:
        known["sla"] = SLAConfig(topk=c["sla_topk"], block_q=c["BLKQ"], block_k=c["BLKK"])
    model = g.module(patch=tuple(c["patch_size"]), **known)
    image = _channels_last(g["in/y"]) if "in/y" in g else None
    features = jnp.asarray(g["in/clip"]) if "in/clip" in g else None
    inputs = (
        _channels_last(g["in/x"]),
        jnp.asarray(g["in/timesteps"][:, 0]),
        jnp.asarray(g["in/crossattn_emb"]),
        image,
        features,
    )
    kind = "sla" if "sla_topk" in c else "dit"
    inside, v = _of_dit(model, *inputs)
    yield from g.compare(kind, inside | {"sinusoid_f64": inside["sinusoid"]}, "mid/")
    yield from g.compare(kind, {"v": rearrange(v, "b t h w c -> b c t h w")}, "out/")


def _sla_op(g: _Golden, impl: str) -> Iterator[Row]:
    """sla_op: the sparse-linear attention alone, at several block sizes and shares."""
    qkv = tuple(jnp.asarray(g[f"in/{name}"]) for name in "qkv")
    proj = jnp.asarray(g["w/proj_l.weight"]).T, jnp.asarray(g["w/proj_l.bias"])
    identity = (
        jnp.eye(qkv[0].shape[-1], dtype=qkv[0].dtype),
        jnp.zeros(qkv[0].shape[-1], qkv[0].dtype),
    )
    linear = jax.jit(sparse.linear_attention)
    yield from g.compare(
        "sla", {"o_l_raw": linear(*qkv, *identity), "o_l": linear(*qkv, *proj)}, "mid/"
    )
    for c in g.config["configs"]:
        if c["k_blocks"] > qkv[1].shape[1]:
            raise _damaged(g, f"k_blocks is {c['k_blocks']}, more than there are keys")
        sizes = {name: c[name] for name in ("BLKQ", "BLKK", "topk_ratio", "k_blocks")}
        scores, values = _of_sparse(*qkv, *proj, **sizes, impl=impl)
        yield from g.compare("sla", {"pooled_score": scores}, f"mid/{c['tag']}/")
        prefix = f"out/{c['tag']}/"
        yield from g.compare("sla", values if c["real_topk"] else {}, prefix)
        for key in [key for key in g.arrays if key.startswith(prefix) and key not in g.seen]:
            bf16 = key.endswith("_bf16")
            if bf16 or not c["real_topk"]:
                g.seen.add(key)
                yield Row(key, note=f"not a target: {NOT_A_TARGET['bf16' if bf16 else 'empty']}")


@partial(jax.jit, static_argnames=("BLKQ", "BLKK", "topk_ratio", "k_blocks", "impl"))
def _of_sparse(q, k, v, kernel, bias, *, BLKQ, BLKK, topk_ratio, k_blocks, impl):
    """Pooled scores, and the outputs by name, of one configuration of the file."""
    size, topk = {"block_q": BLKQ, "block_k": BLKK}, topk_ratio
    blocks = sparse.block_map(q, k, topk=topk, **size)
    o_s = sparse.sparse_attention(q, k, v, blocks, **size, impl=impl)
    o = sparse.sparse_linear_attention(q, k, v, kernel, bias, topk=topk, **size, impl=impl)
    return sparse.pooled_scores(q, k, **size), {
        "sparse_map": sparse.dense_map(blocks, k_blocks),
        "o_s": o_s,
        "o": o,
    }


@jax.jit
def _of_vae(vae, video, latents):
    outputs = {"encoded": vae.encode(video), "decoded": vae.decode(latents)}
    return wan_vae.intermediates(vae, video, latents), outputs


def _vae(g: _Golden, impl: str) -> Iterator[Row]:
    """vae_*: encoder and decoder at several numbers of frames."""
    known = {"mean": tuple(g.config["latent_mean"]), "std": tuple(g.config["latent_std"])}
    model = g.module(**known)
    for case in sorted({key.split("/")[1] for key in g.arrays if key.startswith("in/")}):
        video, latents = (_channels_last(g[f"in/{case}/{name}"]) for name in ("video", "latent"))
        inside, out = _of_vae(model, video, latents)
        yield from g.compare("vae", inside, f"mid/{case}/")
        yield from g.compare(
            "vae",
            {k: rearrange(v, "b t h w c -> b c t h w") for k, v in out.items()},
            f"out/{case}/",
        )


@jax.jit
def _of_text(model, ids, mask):
    bias = umt5.position_bias(model.blocks.relative_bias[...][0], model.cfg, ids.shape[1])
    outer = {"block0/pos_bias_first_query": bias[:, 0], "block0/pos_bias_last_query": bias[:, -1]}
    return umt5.intermediates(model, ids, mask) | outer, model(ids, mask)


def _text(g: _Golden, impl: str) -> Iterator[Row]:
    """umt5_*: the encoder, with its position buckets and the bias of the outer queries."""
    model = g.module(text_len=g.config["text_len"])
    ids, mask = jnp.asarray(g["in/ids"]), jnp.asarray(g["in/mask"])
    inside, out = _of_text(model, ids, mask)
    yield from g.compare("text", inside, "mid/")
    yield from g.compare("text", {"embedding": out}, "out/")


def table(rows: list[Row]) -> str:
    """Name, largest error, tolerance there, verdict."""
    width = max(len(r.name) for r in rows)
    lines = []
    for r in rows:
        if r.error is None:
            lines.append(f"{r.name:{width}}  {'-':>9}  {'-':>9}  {r.note}")
        else:
            verdict = "OVER" if r.failed else "ok"
            lines.append(
                f"{r.name:{width}}  {r.error:9.2e}  {r.allowed:9.2e} "
                f" {verdict}{'  ' + r.note if r.note else ''}"
            )
    return "\n".join(lines)
