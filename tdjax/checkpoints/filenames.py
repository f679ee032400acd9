"""What names of published files and folders mean. Pure functions of names: no file is opened,
nothing is downloaded.

A list of names is relative to one folder or hub repository, with "/" between parts.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from tdjax.errors import CheckpointError
from tdjax.presets import PRESETS

WEIGHTS = (".pth", ".pt", ".safetensors", ".safetensors.index.json", ".gguf")
# Names of each part, best first. A name without a suffix is a folder: ours (manifest.json) or
# diffusers' (config.json).
COMPONENTS = {
    "vae": ("vae", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "wan_2.1_vae.safetensors"),
    "text": (
        "text",
        "text_encoder",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer/tokenizer.json",
        "google/umt5-xxl/tokenizer.json",
        "spiece.model",
        "tokenizer/spiece.model",
        "google/umt5-xxl/spiece.model",
    ),
}
LIKELY = {
    "vae": re.compile(r"(^|[^a-z])vae([^a-z]|$)"),
    "text": re.compile(r"(^|[^a-z])u?m?t5([^a-z0-9]|$)"),
}
OWN = {"vae": re.compile(r"wan_?2[._]?1"), "text": re.compile(r"umt5")}
SCALED = re.compile(r"fp8|int8|scaled|q\d_")
# ComfyUI's tree: folders of transformers, and those beside them where other parts lie.
COMFY_MODELS = ("diffusion_models", "unet")
COMFY_PARTS = ("vae", "text_encoders", "clip")
OTHER = re.compile(
    r"(^|[/_.-])(vae|tae\w*|u?m?t5|clip|lora|text|text_encoder|image_encoder|tokenizer)([/_.-]|$)"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
EXPERT = re.compile(r"(?<![a-z])(high|low)(?=[_-]?noise|[^a-z]|$)")
TWO_EXPERTS = re.compile(r"(high|low)[_-]?noise|a14b|wan2[._]?2")
SECOND = "transformer_2"
# Other suffixes of torch files, taken where a file is named: a folder may hold the same weights
# under these as well.
ALSO = (".ckpt", ".bin", ".sft")
GENERIC = ("diffusion_pytorch_model", "transformer")


def is_weights(name: str) -> bool:
    """Whether a file is one of weights by its suffix, in any case."""
    return name.lower().endswith((*WEIGHTS, *ALSO))


def stem(name: str) -> str:
    """A file's name without its suffix of weights."""
    ends = [suffix for suffix in (*WEIGHTS, *ALSO) if name.lower().endswith(suffix)]
    return name[: -max(map(len, ends))] if ends else name


STEMS = {
    stem(file).lower(): alias
    for alias, p in PRESETS.items()
    for file in p.dit
    if not PurePath(file).name.startswith(GENERIC)
}


def alias_of(model: str) -> str | None:
    """The preset that a name, a published file's stem or a hub id means; case does not matter."""
    low = model.lower()
    if low in PRESETS:
        return low
    by_repo = {
        preset.repo.lower(): alias for alias, preset in reversed(PRESETS.items())
    }  # the first preset of a repository wins
    return STEMS.get(low) or by_repo.get(low)


def alias_of_path(path: PurePath) -> str | None:
    """The preset that a local file or folder seems to be: by its own name, or by its folders where
    its own name says nothing."""
    if stem(path.name).lower() in STEMS:
        return STEMS[stem(path.name).lower()]
    if not path.name.startswith(GENERIC):
        return None
    # A hub cache has models--organisation--name/snapshots/<commit>/[folder/]file.
    folders = [
        part.split("--")[-1].lower().removesuffix("-diffusers") for part in path.parts[-6:-1]
    ]
    return next((folder for folder in reversed(folders) if folder in PRESETS), None)


def telling(path: PurePath) -> list[str]:
    """Returns the names that may say what a file is: its own, its folder's, and that of the hub
    repository whose cache it lies in."""
    repositories = [part for part in path.parts[-6:-1] if part.startswith("models--")]
    return [path.name, path.parent.name, *repositories]


def expert(name: str) -> str | None:
    """ "high" or "low" by a file's own name, else by its folder's (diffusers calls the folder of
    the low-noise expert transformer_2)."""
    for part in reversed(PurePath(name.lower()).parts[-2:]):
        found = EXPERT.findall(part)
        if found:
            return found[-1]
        if part == SECOND:
            return "low"
    return None


def needs_two(name: str) -> bool:
    """Whether a file named high or low is surely one of two experts (and not, say, a "high quality"
    variant)."""
    return (
        expert(name) is not None
        and TWO_EXPERTS.search("/".join(PurePath(name.lower()).parts[-2:])) is not None
    )


def swap_expert(text: str) -> str:
    """The same name for the other expert."""
    other = {
        "high": "low",
        "low": "high",
        "High": "Low",
        "Low": "High",
        "HIGH": "LOW",
        "LOW": "HIGH",
    }
    return re.sub(
        r"(?<![A-Za-z])(high|low|High|Low|HIGH|LOW)(?=[_-]?[nN]oise|[^A-Za-z]|$)",
        lambda m: other[m[0]],
        text,
    )


def component(names: list[str], part: str) -> str | None:
    """The name of a part ("vae", "text", "tokenizer"): a known name, or the only file that looks
    like it, or of several the one that says Wan2.1 or umT5 (of those, one that is not scaled)."""
    have = set(names)
    for name in COMPONENTS[part]:
        if (
            name in have
            or f"{name}/manifest.json" in have
            or (part != "tokenizer" and f"{name}/config.json" in have)
        ):
            return name
    if part not in LIKELY:
        return None
    likely = [
        n
        for n in names
        if "/" not in n
        and n.endswith(WEIGHTS)
        and not SHARD.search(n)
        and LIKELY[part].search(n.lower())
    ]
    if len(likely) > 1:
        own = [n for n in likely if OWN[part].search(n.lower())]
        likely = [n for n in own if not SCALED.search(n.lower())] or own
    return likely[0] if len(likely) == 1 else None


def transformers(names: list[str], where: str) -> tuple[str, tuple[str, ...]]:
    """(layout, names of the transformer): one, (high noise, low noise), or () if there is none.

    Several transformers that are no pair of experts: CheckpointError with the list, because nothing
    says which is meant.
    """
    have = set(names)
    for layout, mark, choices in (
        ("ours", "manifest.json", (("dit_high", "dit_low"), ("dit",))),
        ("diffusers", "config.json", (("transformer", "transformer_2"), ("transformer",))),
    ):
        for choice in choices:
            if all(f"{name}/{mark}" in have for name in choice):
                return layout, choice
    found = [
        n
        for n in names
        if n.endswith(WEIGHTS)
        and n.count("/") <= 1
        and not SHARD.search(n)
        and not OTHER.search(n.lower())
    ]
    pairs = [(n, swap_expert(n)) for n in found if expert(n) == "high" and swap_expert(n) in found]
    paired = {n for pair in pairs for n in pair}
    options = [*pairs, *((n,) for n in found if n not in paired)]
    if len(options) > 1:
        raise CheckpointError(
            f"{where} holds several transformers",
            "; ".join(" with ".join(option) for option in options),
            f"give one of the files, for example {where}/{options[0][0]}",
        )
    return "published", options[0] if options else ()
