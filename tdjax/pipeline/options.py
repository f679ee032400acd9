"""How a model is opened, as one frozen value, and what its arguments may be. Imports no jax."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union, get_args

from tdjax.config.values import path, real, settle, shown, whole
from tdjax.errors import UsageError
from tdjax.files import near

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

Attention = Literal["auto", "original", "dense", "sla", "sagesla"]
Impl = Literal["auto", "reference", "triton", "mosaic", "cudnn"]
Quant = Literal["auto", "none", "int8", "int8_channel", "fp8"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
TextEncoderDevice = Literal["auto", "device", "stream"]
TransformerDevice = Literal["auto", "device", "stream"]
VAEDecoding = Literal["auto", "full", "tiled"]
Sampler = Literal["sde", "ode", "unipc", "euler"]
Fit = Literal["crop", "pad", "stretch", "adaptive"]
OutputType = Literal["uint8", "float", "latent"]
Check = Literal["finite", "none"]
LoraFile = Union["str | Path", tuple["str | Path", float]]  # of weight 1, or with its own
Lora = LoraFile | Iterable[LoraFile]
MOST_LORA = 1000  # of a LoRA's weight; what is beyond it is a slip, and makes infinity of weights


class LoadAliases(TypedDict, total=False):
    """Other names of arguments of `tdjax.load`."""

    attention_impl: Impl
    attention_type: Attention
    local_files_only: bool


# Other projects' names, and earlier ones of this one, by what they mean here. They are accepted at
# the door and nowhere else.
ALIASES = {
    "attention_impl": "impl",
    "attention_type": "attention",
    "local_files_only": "offline",
    "num_inference_steps": "num_steps",
    "image_path": "image",
    "num_videos_per_prompt": "num_samples",
    "generator": "key",
    "callback_on_step_end": "on_step",
    "flow_shift": "shift",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How a model is opened; the arguments of `tdjax.load` say what they mean. Where its files are
    is not told here."""

    attention: Attention = "auto"
    impl: Impl = "auto"
    quant: Quant = "auto"
    dtype: DType = "auto"
    vae_dtype: DType | None = None
    sla_topk: float | None = None
    mesh: str | int | Mesh | None = None
    low_memory: bool = False
    text_encoder: bool = True
    text_encoder_device: TextEncoderDevice = "auto"
    transformer_device: TransformerDevice = "auto"
    vae: VAEDecoding = "auto"
    prompt_cache: bool = True
    lora: Lora = ()
    lora_high: Lora = ()
    lora_low: Lora = ()

    def __post_init__(self):
        settle(self)
        for name in ("lora", "lora_high", "lora_low"):
            object.__setattr__(self, name, lora_pairs(name, getattr(self, name)))
        named = self.mesh is None or isinstance(self.mesh, str)
        if not named and not hasattr(self.mesh, "axis_names"):
            object.__setattr__(self, "mesh", whole("mesh", self.mesh))
        check_choice("attention", self.attention, get_args(Attention))
        check_choice("quant", self.quant, get_args(Quant))
        check_choice("dtype", self.dtype, get_args(DType))
        if self.vae_dtype is not None:
            check_choice("vae_dtype", self.vae_dtype, get_args(DType))
        check_choice("text_encoder_device", self.text_encoder_device, get_args(TextEncoderDevice))
        check_choice("transformer_device", self.transformer_device, get_args(TransformerDevice))
        check_choice("vae", self.vae, get_args(VAEDecoding))
        check_choice("impl", self.impl, get_args(Impl))
        if self.mesh is not None and self.text_encoder_device == "stream":
            raise UsageError(
                "text_encoder_device stream with a mesh",
                "layers are streamed to one device",
                "use device, or no mesh",
            )
        if self.mesh is not None and self.transformer_device == "stream":
            raise UsageError(
                "transformer_device stream with a mesh",
                "blocks are streamed to one device",
                "use device, or no mesh",
            )

    def loras(self, *names: str) -> tuple[tuple[str, float], ...]:
        """Returns the (file, weight) pairs of these arguments, one after another."""
        return tuple(pair for name in names for pair in lora_pairs(name, getattr(self, name)))

    @property
    def stream_text(self) -> bool | None:
        """Whether the text encoder is streamed; None: where not everything fits together."""
        if self.mesh is not None:
            return False
        return {"auto": None, "device": False, "stream": True}[self.text_encoder_device]

    @property
    def stream_transformer(self) -> bool | None:
        """Whether the transformer's blocks are streamed; None: where it does not fit."""
        if self.mesh is not None:
            return False
        return {"auto": None, "device": False, "stream": True}[self.transformer_device]

    @property
    def tiled_vae(self) -> bool | None:
        """Whether frames are decoded in tiles; None: where the whole frame does not fit."""
        return {"auto": None, "full": False, "tiled": True}[self.vae]

    def with_dtype(self, dtype: DType) -> PipelineOptions:
        """Returns the options with "auto" settled: `dtype`, and the VAE's the same where none was
        asked for."""
        dtype = dtype if self.dtype == "auto" else self.dtype
        vae_dtype = dtype if self.vae_dtype in (None, "auto") else self.vae_dtype
        return dataclasses.replace(self, dtype=dtype, vae_dtype=vae_dtype)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises UsageError unless the value is one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        nearest = near(value, allowed, cutoff=0.0)[0]
        raise UsageError(
            f"{name} is {shown(value)}", f"allowed: {', '.join(allowed)}", f"nearest: {nearest}"
        )


def without_aliases(
    arguments: dict[str, Any], aliases: type, accepted: Collection[str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns the arguments by their own names.

    aliases:  the TypedDict of other names that may be among them; accepted: their own names.
    defaults: {argument: the value that it has where nobody gave it}, other than None.
    Raises UsageError for an unknown name, and where one thing was given by two names.
    """
    others = aliases.__annotations__
    out = {name: value for name, value in arguments.items() if name in accepted}
    for name, value in arguments.items():
        if name in accepted:
            continue
        if name not in others:
            known = sorted([*accepted, *others])
            nearest = near(name, known)
            raise UsageError(
                f"unknown argument {name!r}",
                f"allowed: {', '.join(known)}",
                f"did you mean {nearest[0]!r}?" if nearest else "help(tdjax.load) says more",
            )
        own = ALIASES[name]
        if value is None:
            continue
        before = out.get(own)
        if before is not None and not (
            isinstance(before, int | str) and before == defaults.get(own)
        ):
            raise UsageError(
                f"{own} and {name} were both given", "they are the same argument", f"give {own}"
            )
        out[own] = value
    return out


def lora_pairs(name: str, given: Any) -> tuple[tuple[str, float], ...]:
    """Returns ((file, weight), ...) of one file, a (file, weight) pair, or a list of both. Raises
    UsageError.

    name: of the argument.
    """
    one = isinstance(given, str | os.PathLike)
    pair = isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], _FILES)
    if not one and not pair and not isinstance(given, list | tuple):
        raise _no_lora(name, given)
    return tuple(_lora_pair(name, each) for each in ([given] if one or pair else given))


_FILES = (str, os.PathLike, tuple, list)


def _lora_pair(name: str, given: Any) -> tuple[str, float]:
    if isinstance(given, str | os.PathLike):
        return str(path(name, given)), 1.0
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise _no_lora(name, given)
    weight = real(f"the weight of {name}", given[1])
    if not abs(weight) <= MOST_LORA:
        raise UsageError(
            f"the weight of {name} is {weight:g}",
            f"it is a number from -{MOST_LORA} to {MOST_LORA}",
            "1 is the LoRA as it was trained, 0 leaves it out",
        )
    return str(path(name, given[0])), weight


def refuse_experts(lora_high: Lora, lora_low: Lora) -> None:
    """Raises UsageError where LoRA files of experts were given, to a model that has none."""
    if lora_pairs("lora_high", lora_high) or lora_pairs("lora_low", lora_low):
        raise UsageError(
            "lora_high or lora_low with one transformer",
            "they are for the two experts of Wan2.2 A14B",
            "use `lora`",
        )


def _no_lora(name: str, given: Any) -> UsageError:
    return UsageError(
        f"{name} is {shown(given)}",
        "it is a file, a (file, weight) pair, or a list of them",
        f'for example {name}="x.safetensors", or {name}=[("x.safetensors", 0.8)]',
    )
