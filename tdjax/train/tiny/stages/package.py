"""Stage 7: the folder that ships: int8 transformer, VAE, text encoder, tokenizer, metadata and a
card."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from tdjax.checkpoints import orbax
from tdjax.checkpoints.folders import is_model
from tdjax.files import written
from tdjax.media.scenes import factors
from tdjax.models.wan_dit import with_linear
from tdjax.train.tiny import configs, work
from tdjax.train.tiny.data import captions, encoded
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.work import Run

PROMPT = "a large red circle moves right quickly on a gray background"
PROMPTS = 100  # that are drawn from where none is given
LIMIT = 10_000_000  # bytes of the whole folder


def metadata() -> dict:
    """Returns model.json, what a pipeline should know of the model."""
    how = sampling.student(4)
    return {
        "name": "demo",
        "frames": factors.FRAMES,
        "height": factors.SIDE,
        "width": factors.SIDE,
        "prompts": [PROMPT, *itertools.islice(_lively(), PROMPTS - 1)],
        "sampler": {"mid_t": list(how.mid_t), "sigma_max": how.sigma_max},
        "language": captions.LANGUAGE,
    }


def _lively() -> Iterator[str]:
    """Prompts of clips in which something moves, and quickly: a first video should."""
    for seed in itertools.count(1):
        prompt = captions.random_prompt(seed)
        said = captions.parse_one(prompt)
        if said["motion"] != factors.STILL and said["speed"] == len(factors.SPEEDS) - 1:
            yield prompt


def run_stage(run: Run) -> None:
    """Writes the folder demo/. Raises ValueError if it is too large to ship."""
    target = run.folder / "demo"
    with written(target, overwrite=True, owned=is_model) as part:
        _write(run, part)
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if size > LIMIT:
            raise ValueError(f"the package has {size} bytes; at most {LIMIT} may ship")
    run.say(f"{target}: {size / 1e6:.2f} MB")


def _write(run: Run, folder: Path) -> None:
    """All of the package into a folder that is not there yet."""
    folder.mkdir(parents=True)
    source = orbax.inspect(run.folder / "merged")["source"]
    model = with_linear(work.load(run, "merged"), "int8")
    cfg = configs.stored(dataclasses.replace(run.sizes.sla, linear="int8"))
    wanted = orbax.named_leaves(orbax.abstract("dit", cfg))
    leaves = {name: x.astype(wanted[name].dtype) for name, x in orbax.named_leaves(model).items()}
    orbax.save(
        folder / "dit",
        jax.device_get(leaves),
        kind="dit",
        cfg=cfg,
        source=source | {"quantised": "int8 block128"},
    )
    for name in ("vae", "text"):
        shutil.copytree(run.folder / name, folder / name)
    shutil.copy(encoded.tokenizer(run).path, folder / "tokenizer.json")
    (folder / "model.json").write_text(json.dumps(metadata(), indent=1) + "\n")
    (folder / "MODEL_CARD.md").write_text(_card(run))


def _card(run: Run) -> str:
    """The model card: data, recipe and results, from what the run measured."""
    file = run.folder / "table.md"
    table = file.read_text() if file.is_file() else "(not evaluated)\n"
    steps = {
        name: orbax.inspect(run.folder / name)["source"].get("steps")
        for name in ("vae", "teacher", "sla")
    }
    chosen = orbax.inspect(run.folder / "student")["source"].get("step")
    known = "\n".join(
        f"- {factor}: {', '.join(values)}" for factor, values in captions.knows().items()
    )
    return _CARD.format(known=known, table=table, seed=run.seed, chosen=chosen, **steps)


_CARD = """# The embedded demo model

A Wan-shaped text-to-video model of 7.3 million parameters, trained from nothing by `python -m \
tdjax.train.tiny`. It makes clips of 33
frames of 64x64 pixels in 1 to 4 network steps and fits every stage of the real pipeline: \
umT5-style text encoder, video transformer with
sparse-linear attention and int8 linears, causal video VAE. It exists to show and to test the \
code; it knows nothing but this:

{known}

## Data

Procedural: one object of a plain colour on a plain background, anti-aliased, rendered as it is \
needed; captions from five templates with
synonyms. Three of 32 pairs of shape and colour are kept from training. No collected images, \
videos or texts were used.

## Recipe

Seed {seed}. VAE {vae} steps; teacher and text encoder by flow matching, {teacher} steps; \
sparse-linear attention towards the teacher,
{sla} steps; four-step student by rCM (consistency and distribution matching), the averaged \
weights of update {chosen}, chosen on prompts
that the table does not use; the two merged, repaired in a few steps, and quantised to int8 \
(tiles of 128 x 128). The details are in
`tdjax/train/tiny/settings.py`.

## Results

Measured from pixels (`tdjax/media/scenes/detector.py`) of so many clips; the row marked \
as packaged is this model. FD are Frechet distances
to real clips, diversity is the spread of places that the prompt leaves free, as a share of the \
data's; PSNR is to the clips of the same
noise from the row that a variant should reproduce.

{table}"""
