"""From short videos with captions to a video of the model that was trained on them: the commands of
docs/training.md, at a small size."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
import random_model
from clip_cases import folder_of_clips

import tdjax
from tdjax.checkpoints import orbax
from tdjax.cli import hyphens
from tdjax.config import SLAConfig
from tdjax.errors import CheckpointError
from tdjax.generate import __main__ as generate
from tdjax.media import video
from tdjax.train import __main__ as train
from tdjax.train import checkpoints, metrics
from tdjax.train.encode import __main__ as encode
from tdjax.train.shards import index
from tdjax.train.storage import find_shards

DOCS = Path(__file__).resolve().parents[4] / "docs/training.md"
COMMANDS = {"tdjax.train.encode": encode, "tdjax.train": train, "tdjax.generate": generate}
SMALLER = {
    "data.frames=9": "data.frames=2",
    "data.batch=16": "data.batch=4",
    "run.steps=10": "run.steps=2",
    "run.steps=20": "run.steps=3",
    "sample.every=10": "sample.every=2",
    "sample.num_steps=16": "sample.num_steps=2",
    "16": "2",  # steps of the sampler
}


def commands(heading: str) -> list[list[str]]:
    """The words of the commands in the block under a heading of the page."""
    block = DOCS.read_text().split(heading)[1].split("```sh\n")[1].split("```")[0]
    lines = [shlex.split(line) for line in block.splitlines()]
    return [[SMALLER.get(word, word) for word in words] for words in lines]


@pytest.mark.slow
def test_clips_to_a_video(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_clips(tmp_path / "clips", 32)
    dense = dataclasses.replace(random_model.DIT, layers=1, attention="dense")
    random_model.dit_folder(tmp_path / "runs/dense/dit", dense)
    own = {encode: ["--model", str(model)], generate: ["--model", str(model), "-q"], train: ["-q"]}
    own[train].append(f"sample.model={model}")
    for words in commands("## From clips to a video"):
        if words[0] == "echo":
            _, prompt, _, name = words
            Path(name).write_text(f"{prompt}\n")
            continue
        name = COMMANDS[words[2]]
        if "fm-tiny" in words:
            continue  # the dense network is there
        assert name.main(hyphens([*words[3:], *own[name]])) == 0, capsys.readouterr().err
    entries = [entry for path in find_shards(tmp_path / "shards") for entry in index(path)]
    assert len(entries) == 32 and len({entry.latent.bytes() for entry in entries}) == 32

    run = tmp_path / "runs/sla"
    assert checkpoints.steps(run) == [2, 3]
    assert all(np.isfinite(row["sla/loss"]) and row["sla/loss"] > 0 for row in metrics.read(run))
    config, trained = orbax.restore(run / "dit")
    assert config.attention == "sla" and config.sla == SLAConfig(block_q=64, block_k=64)
    leaves = orbax.named_leaves(trained)
    moved = [name for name in leaves if orbax.DENSE_DROPS in name]
    assert moved and all(np.abs(np.asarray(leaves[name])).max() > 0 for name in moved)
    shown = {path.name: len([*path.glob("*.mp4")]) for path in run.glob("samples/*")}
    assert shown == {"step_000000": 3, "step_000002": 2}  # the teacher's too before the first
    made = video.read_video(tmp_path / "square.mp4")
    assert made.shape == (5, 32, 32, 3) and made.std() > 1


@pytest.mark.slow
def test_the_demo_completes_a_transformer_of_its_latents(tmp_path):
    """Its VAE and text encoder are taken for what was trained on them, and for nothing else."""
    own = dataclasses.replace(random_model.DIT, layers=1, attention="dense", text_dim=128)
    random_model.dit_folder(tmp_path / "dit", own)
    random_model.dit_folder(tmp_path / "other", dataclasses.replace(own, text_dim=64))
    pipe = tdjax.load(dit_path=tmp_path / "dit", progress=False)
    assert pipe.config.layers == 1 and (pipe.size.frames, pipe.size.width) == (33, 64)
    with pytest.raises(CheckpointError):
        tdjax.load(dit_path=tmp_path / "other", progress=False)
