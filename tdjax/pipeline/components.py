"""The components of a pipeline (text encoder, VAE, transformer): opened without data, loaded when a
stage begins, freed after.

Weights come from our own checkpoint folder or straight from a published file; what comes out is the
same module.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from tdjax.checkpoints import orbax
from tdjax.checkpoints.locate import Located
from tdjax.checkpoints.orbax import abstract
from tdjax.checkpoints.published import checkpoint as published
from tdjax.config import UMT5_XXL, WAN_VAE, Config, DiTConfig, Preset
from tdjax.errors import CheckpointError, UsageError
from tdjax.models.wan_dit import with_linear
from tdjax.parallel.sharding import shardings
from tdjax.precision import Policy
from tdjax.text.tokenizer import Tokenizer

KINDS = {
    "dit": ("a video transformer", "dit_path"),
    "vae": ("a video VAE", "vae_path"),
    "text": ("a umT5 text encoder", "text_encoder_path"),
}
ENDS = 2**16  # bytes at each end of a file that stand for it in an identity
LOADER = ThreadPoolExecutor(
    1, thread_name_prefix="load"
)  # parts that are loaded ahead, in the order in which they were asked for
HOST_MEMORY = "pinned_host"
Lora = tuple[tuple[str, float], ...]


class Part:
    """One network. kind: "text", "vae" or "dit". `module` is None until loaded; `config` says what
    it is loaded as."""

    def __init__(self, path: Path, kind: str, *, lora: Lora = ()):
        self.path, self.mesh, self.module, self.coming, self.lora = (
            Path(path),
            None,
            None,
            None,
            lora,
        )
        self.ours = (self.path / "manifest.json").is_file()
        if self.ours:
            manifest = orbax.inspect(self.path)
            self.kind, self.stored = manifest["kind"], orbax.config_of(manifest)
            if lora:
                raise UsageError(
                    "--lora with a converted checkpoint",
                    "LoRA is merged into published weights",
                    "use python -m convert --lora",
                )
        else:
            self.file = published.open_checkpoint(self.path, lora=lora)
            self.kind, self.stored = self.file.kind, self.file.config
        if self.kind != kind:
            raise CheckpointError(
                f"{self.path} is {KINDS[self.kind][0]}, not {KINDS[kind][0]}",
                "recognised from its keys and shapes",
                f"give it as --{KINDS[self.kind][1]}",
            )
        self.config: Config = self.stored

    @classmethod
    def planned(cls, kind: str, config: Config, name: str) -> Part:
        """A part by its config alone, for a memory plan before any file is there."""
        part = cls.__new__(cls)
        part.path, part.mesh, part.module, part.kind, part.config, part.stored = (
            Path(name),
            None,
            None,
            kind,
            config,
            config,
        )
        part.lora, part.coming = (), None
        return part

    def abstract(self):
        """The module as shapes (with shardings under a mesh), by which programs are compiled before
        weights arrive."""
        module = abstract(self.kind, self.config)
        if self.mesh is None:
            return module
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            module,
            shardings(module, self.mesh),
        )

    def load(self):
        """The module on the device; loading twice is loading once."""
        if self.module is None:
            coming, self.coming = self.coming, None
            module = self.read() if coming is None else coming.result()
            if jax.tree.leaves(module)[0].sharding.memory_kind == HOST_MEMORY:
                there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                module, held = jax.block_until_ready(jax.device_put(module, there)), module
                for leaf in jax.tree.leaves(held):
                    leaf.delete()
            self.module = module
        return self.module

    def load_ahead(self, host: bool = False) -> None:
        """Begin to load in a thread, one part after another; `load` then waits for it, and raises
        what went wrong.

        host: only into the memory of the host, where the device's own is taken; `load` moves it.
        """
        if self.module is None and self.coming is None:
            self.coming = LOADER.submit(self.read_to_host if host else self.read)

    @property
    def stageable(self) -> bool:
        """Whether the host can hold the weights as the device will: on one device, and nothing left
        to quantise."""
        unchanged = (
            not isinstance(self.config, DiTConfig) or self.config.linear == self.stored.linear
        )
        return self.mesh is None and unchanged

    def read_to_host(self):
        """The weights in page-locked memory of the host. A published leaf passes through the
        device, which transposes it."""
        there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind=HOST_MEMORY)
        if not self.ours:
            return jax.block_until_ready(self.file.load(self.config, there))
        module = abstract(self.kind, self.config)
        leaves = [jax.device_put(self.leaf(name), there) for name in orbax.named_leaves(module)]
        return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(module), leaves))

    def read(self):
        """The weights on the device, whatever is there already."""
        config = self.config
        if isinstance(
            config, DiTConfig
        ):  # linears are read as stored, then quantised or dequantised on the device
            config = dataclasses.replace(config, linear=self.stored.linear)
        where = None if self.mesh is None else shardings(abstract(self.kind, config), self.mesh)
        module = (
            orbax.restore(self.path, where, config)[1]
            if self.ours
            else self.file.load(config, where)
        )
        if isinstance(config, DiTConfig) and config.linear != self.config.linear:
            module = with_linear(module, self.config.linear, free=True)
            if self.mesh is not None:
                module = jax.device_put(module, shardings(module, self.mesh))
        return jax.block_until_ready(module)

    def layers(self, prefix: str) -> Iterator[dict[str, jax.Array]]:
        """{leaf name: its part of one layer, on the device} for each layer of the stacked leaves
        below `prefix`, one after another.

        A published file is read as its layers are asked for; a checkpoint of ours passes through
        host memory whole.
        """
        device = jax.local_devices()[0]
        if not self.ours:
            yield from self.file.layers(self.config, prefix, device)
            return
        names = [
            name
            for name in orbax.named_leaves(abstract(self.kind, self.config))
            if name.startswith(prefix)
        ]
        leaves = {name: self.leaf(name) for name in names}
        for i in range(len(leaves[names[0]])):
            yield {name: jax.device_put(leaf[i], device) for name, leaf in leaves.items()}

    def leaf(self, name: str) -> np.ndarray:
        """One leaf on the host, in the dtype that it is loaded as."""
        if not self.ours:
            return self.file.leaf(self.config, name)
        return orbax.read(self.path, name).astype(
            orbax.named_leaves(abstract(self.kind, self.config))[name].dtype
        )

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a table on the host."""
        return self.leaf(name)[ids] if self.ours else self.file.rows(self.config, name, ids)

    def free(self) -> None:
        coming, self.coming = self.coming, None
        if coming is not None and not coming.cancel():
            coming.add_done_callback(dropped)
        if self.module is not None:
            for leaf in jax.tree.leaves(self.module):
                leaf.delete()
            self.module = None

    def identity(self) -> str:
        """A hash that tells these weights from any others on this machine: size, date, beginning
        and end of every file."""
        files = (
            sorted(p for p in self.path.rglob("*") if p.is_file())
            if self.ours
            else self.file.source.files
        )
        found = hashlib.sha256()
        for file in files:
            facts = file.stat()
            found.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
            with file.open("rb") as f:
                found.update(f.read(ENDS))
                f.seek(max(0, facts.st_size - ENDS))
                found.update(f.read(ENDS))
        return found.hexdigest()

    def fingerprint(self) -> dict:
        """Name, size and a quick hash (first and last MiB) of the file, or the source that our
        manifest recorded."""
        if self.ours:
            return {"path": str(self.path), "source": orbax.inspect(self.path).get("source")}
        files = self.file.source.files
        quick = hashlib.sha256()
        for file in files:
            with file.open("rb") as f:
                quick.update(f.read(2**20))
                f.seek(max(0, file.stat().st_size - 2**20))
                quick.update(f.read())
        return {
            "path": str(self.path),
            "bytes": sum(f.stat().st_size for f in files),
            "quick_sha256": quick.hexdigest(),
        }


def dropped(coming: Future) -> None:
    """Weights that nobody waits for any more."""
    if not coming.cancelled() and coming.exception() is None:
        for leaf in jax.tree.leaves(coming.result()):
            leaf.delete()


def open_parts(
    located: Located,
    *,
    attention: str,
    impl: str,
    quant: str,
    topk: float | None,
    dtype: str,
    vae_dtype: str,
    lora: dict[str, Lora],
    note,
) -> dict[str, Part]:
    """All components with the configs that they will run as; those that cannot work together are
    refused."""
    check_impl(impl, dtype)
    parts = {}
    for name, path in zip(("dit", "dit_low"), located.dit, strict=False):
        part = parts[name] = Part(path, "dit", lora=lora[name])
        part.config = chosen(
            part, attention=attention, quant=quant, topk=topk, impl=impl, dtype=dtype, note=note
        )
    if "dit_low" not in parts and lora["dit_low"] != lora["dit"]:
        raise UsageError(
            "--lora_high or --lora_low with one transformer",
            "they are for the two experts of Wan2.2 A14B",
            "use --lora",
        )
    for name, path, kind in (("vae", located.vae, vae_dtype), ("text", located.text, dtype)):
        if path is not None:
            part = parts[name] = Part(path, name)
            more = {"impl": "reference" if impl == "reference" else "auto"} if name == "vae" else {}
            part.config = dataclasses.replace(
                part.stored, policy=Policy(param=kind, compute=kind), **more
            )
    check_parts(parts)
    return parts


def planned_parts(
    preset: Preset, *, attention: str, quant: str, topk: float | None, dtype: str, note
) -> dict[str, Part]:
    """The parts of a preset whose files are not here, for a GPU's dtype unless another was asked
    for."""
    dtype = "bfloat16" if dtype == "auto" else dtype
    policy = Policy(param=dtype, compute=dtype)
    parts = {"dit": Part.planned("dit", preset.config, preset.dit[0])}
    parts["dit"].config = chosen(
        parts["dit"],
        attention=attention,
        quant=quant,
        topk=topk,
        impl="auto",
        dtype=dtype,
        note=note,
    )
    if len(preset.dit) == 2:
        parts["dit_low"] = Part.planned("dit", parts["dit"].config, preset.dit[1])
    parts["vae"] = Part.planned("vae", dataclasses.replace(WAN_VAE, policy=policy), preset.vae)
    parts["text"] = Part.planned("text", dataclasses.replace(UMT5_XXL, policy=policy), preset.text)
    return parts


def reference_notes(cfg: DiTConfig) -> list[str]:
    """Where a GPU user would expect the kernels of sparse attention and gets the reference."""
    if jax.default_backend() != "gpu" or cfg.attention == "dense" or cfg.impl == "triton":
        return []
    if cfg.impl != "reference" and cfg.policy.compute in ("bfloat16", "float16"):
        return []
    why = "as asked for" if cfg.impl == "reference" else "the kernels take bfloat16 and float16"
    return [
        f"{cfg.attention} attention runs as its XLA reference ({why}): several times slower than"
        " the kernels"
    ]


def check_impl(impl: str, dtype: str) -> None:
    kernels = {"cudnn": "cuDNN attention runs", "triton": "the Triton kernels run"}
    if impl in kernels and (jax.default_backend() != "gpu" or dtype == "float32"):
        raise UsageError(
            f"attention_impl is {impl!r} on {jax.default_backend()} in {dtype}",
            f"{kernels[impl]} on NVIDIA GPUs, in"
            f" bfloat16{' and float16' if impl == 'cudnn' else ''}",
            "use auto, or reference",
        )


def chosen(
    part: Part, *, attention: str, quant: str, topk: float | None, impl: str, dtype: str, note
) -> DiTConfig:
    """The stored config with what was asked for."""
    return dataclasses.replace(
        part.stored,
        attention=chosen_attention(part, attention),
        linear=chosen_linear(part, quant, note),
        sla=part.stored.sla if topk is None else dataclasses.replace(part.stored.sla, topk=topk),
        impl=impl,
        policy=Policy(param=dtype, compute=dtype),
    )


def chosen_attention(part: Part, asked: str) -> str:
    asked = {"original": "dense", "auto": part.stored.attention}.get(asked, asked)
    if asked != "dense" and part.stored.attention == "dense":
        raise CheckpointError(
            f"{part.path.name} has no SLA projection (self_attn.attn_op.local_attn.proj_l), but"
            f" --attention_type {asked} was asked for",
            "these are dense weights, or rCM weights without SLA",
            "use --attention_type original, or merge an SLA difference: python -m convert --merge",
        )
    return asked


def chosen_linear(part: Part, quant: str, note) -> str:
    stored = part.stored.linear
    linear = {"auto": stored, "none": "float"}.get(quant, quant)
    if stored != "float":
        say = {
            stored: "running as W8A8 (--quant none dequantises at load)",
            "float": "dequantised at load",
        }
        note(
            f"{part.path.name}: {stored} weights in the blocks,"
            f" {say.get(linear, f'made {linear} at load')}"
        )
    return linear


def check_parts(parts: dict[str, Part]) -> None:
    """Raises CheckpointError for networks that do not belong together, before anything is read."""
    dit = parts["dit"].config
    vae, text, low = parts.get("vae"), parts.get("text"), parts.get("dit_low")
    if vae and vae.config.latent_channels != dit.out_channels:
        raise CheckpointError(
            f"{vae.path.name} has {vae.config.latent_channels} latent channels, the transformer"
            f" {dit.out_channels}",
            "Wan2.1 and Wan2.2 A14B use the Wan2.1 VAE (16 latent channels); the Wan2.2 VAE (48)"
            " belongs to TI2V-5B only",
            "give Wan2.1_VAE.pth as --vae_path",
        )
    if text and text.config.dim != dit.text_dim:
        raise CheckpointError(
            f"{text.path.name} gives vectors of {text.config.dim}, the transformer takes"
            f" {dit.text_dim}",
            "Wan models take umT5-xxl (4096)",
            "give models_t5_umt5-xxl-enc-bf16.pth as --text_encoder_path",
        )
    if dit.image_dim is not None:
        raise CheckpointError(
            f"{parts['dit'].path.name} is a Wan2.1 image-to-video network",
            "its image branch needs CLIP features, and tdjax has no CLIP encoder",
            "use turbowan2.2-i2v-a14b-720p, or call tdjax.models.wan_dit.DiT with your own"
            " features",
        )
    if low and low.config != dit:
        raise CheckpointError(
            f"{parts['dit'].path.name} and {low.path.name} are networks of different kinds",
            f"high noise: {dit}; low noise: {low.config}",
            "give the two files of one release",
        )


def check_vocabulary(tokenizer: Tokenizer | None, text: Part | None) -> None:
    """An id outside the embedding would be clamped without a word."""
    if tokenizer and text and tokenizer.size > text.config.vocab:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.size} ids, {text.path.name} has {text.config.vocab}"
            " embeddings",
            "they belong to different text encoders",
            "give the tokenizer of google/umt5-xxl as --tokenizer_path",
        )
