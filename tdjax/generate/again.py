"""A video's metadata, which lies beside it as JSON, as the options that make it again. Imports no
jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tdjax.config.parsing import mismatch
from tdjax.errors import UsageError

# What metadata has of arrays that were given (as their sha256), and the options that give them.
_GIVEN = {
    "image": ("--image_path", "--image"),
    "latents": ("--latents",),
    "prompt_embeds": ("--prompt_embeds",),
}


class Size(TypedDict):
    frames: int
    height: int
    width: int


class Sampler(TypedDict):
    num_steps: int
    sampler: str
    sigma_max: float
    mid_t: list[float]
    boundary: float
    shift: float
    guidance_scale: float


class Sparse(TypedDict):
    topk: float


class Policy(TypedDict):
    compute: str


class Transformer(TypedDict):
    attention: str
    linear: str
    sla: Sparse
    policy: Policy


class Video(TypedDict):
    """What is read of a video's metadata; other names in it are free."""

    model: str
    prompts: list[str]
    negative_prompt: str
    seed: int
    num_samples: int
    fit: str
    fps: float
    size: Size
    sampler: Sampler
    transformer: Transformer
    vae_dtype: str
    given: dict[str, str]
    lora: dict[str, list[tuple[str, float]]]
    index: NotRequired[int]  # of the video among all of its call


_FEW_STEP = ("num_steps", "sampler", "sigma_max", "mid_t", "boundary")
_TEACHER = ("num_steps", "sampler", "sigma_max", "boundary", "shift", "guidance_scale")


def is_metadata(values: dict[str, Any]) -> bool:
    """Whether a table of names and values is what tdjax writes beside a video."""
    return "tdjax" in values and "transformer" in values


def options_of(about: dict[str, Any], path: Path, said: set[str]) -> dict[str, Any]:
    """Returns {option: value} of a video's metadata.

    path: where it was read. said: options of the command line, which must give what the metadata
    has as a digest only. Raises UsageError where they do not, or where no option can.
    """
    given = about.get("given")
    for name, options in _GIVEN.items():
        if isinstance(given, dict) and name in given and not said & set(options):
            raise UsageError(
                f"{path}: the video was made with {name} of its own",
                "its metadata has only their sha256",
                f"give them with {options[0]} FILE",
            )
    if about.get("seed") is None:
        raise UsageError(
            f"{path}: the video was made with a jax.random key",
            "a command takes seeds only",
            "make it again in Python",
        )
    wrong = mismatch(about, Video)
    if wrong is None and not about["prompts"] and "prompt_embeds" not in about["given"]:
        wrong = "it has no prompt"
    if wrong:
        raise UsageError(
            f"{path} is no whole metadata of a video", wrong, "give the options themselves"
        )
    return _options(about)


def _options(about: dict[str, Any]) -> dict[str, Any]:
    sampler, size, dit = about["sampler"], about["size"], about["transformer"]
    names = _FEW_STEP if sampler["sampler"] in ("sde", "ode") else _TEACHER
    linear = {"float": "none"}.get(dit["linear"], dit["linear"])
    out = {
        "model": about["model"],
        "negative_prompt": about["negative_prompt"],
        "seed": about["seed"],
        "num_samples": about["num_samples"],
        "fit": about["fit"],
        "fps": about["fps"],
        "width": size["width"],
        "height": size["height"],
        "num_frames": size["frames"],
        "attention_type": dit["attention"],
        "sla_topk": dit["sla"]["topk"],
        "quant": linear,
        "dtype": dit["policy"]["compute"],
        "vae_dtype": about["vae_dtype"],
        **{name: sampler[name] for name in names},
        **_loras(about["lora"]),
    }
    if "prompt_embeds" not in about["given"]:
        number = about.get("index", 0) // max(about["num_samples"], 1)
        out["prompt"] = about["prompts"][min(number, len(about["prompts"]) - 1)]
    return out


def _loras(lora: dict[str, list]) -> dict[str, list[str]]:
    """{option: FILE:WEIGHT ...} of {expert: its (file, weight) pairs}."""
    words = {slot: [f"{file}:{weight:g}" for file, weight in pairs] for slot, pairs in lora.items()}
    high, low = words.get("dit", []), words.get("dit_low", [])
    if "dit_low" not in words:
        return {"lora": high}
    both = [word for word in high if word in low]
    return {
        "lora": both,
        "lora_high": [word for word in high if word not in both],
        "lora_low": [word for word in low if word not in both],
    }
