"""A video's metadata, which lies beside it as JSON, as the options that make it again. Imports no
jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tdjax.errors import UsageError

# What metadata has of arrays that were given (as their sha256), and the options that give them.
_GIVEN = {
    "image": ("--image_path", "--image"),
    "latents": ("--latents",),
    "prompt_embeds": ("--prompt_embeds",),
}
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
    for name, options in _GIVEN.items():
        if name in about.get("given", {}) and not said & set(options):
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
    try:
        return _options(about)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} cannot be read", f"as metadata of a video it lacks {error}", "give the options"
        ) from error


def _options(about: dict[str, Any]) -> dict[str, Any]:
    sampler, size, dit = about["sampler"], about["size"], about["transformer"]
    number = about.get("index", 0) // about["num_samples"]
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
        **_loras(about.get("lora", {})),
    }
    if "prompt_embeds" not in about.get("given", {}):
        out["prompt"] = about["prompts"][number]
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
