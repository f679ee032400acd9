"""Runs of a tiny network, as the command makes them."""

from tdjax.config import DiTConfig
from tdjax.precision import FLOAT32
from tdjax.progress import Stages
from tdjax.train import __main__ as command
from tdjax.train.presets import PRESETS
from tdjax.train.run import TrainingRun
from tdjax.train.settings import build

TINY = DiTConfig(
    dim=32,
    heads=2,
    ffn_dim=48,
    layers=2,
    in_channels=4,
    out_channels=4,
    freq_dim=16,
    text_dim=6,
    text_len=7,
    policy=FLOAT32,
)


def built(preset, *words):
    """The objects of a preset with settings over it."""
    return {first: build(tree) for first, tree in command.resolve(preset, list(words)).items()}


def fails(capsys, *argv, code=2):
    assert command.main(list(argv)) == code
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


def words(folder, *more):
    own = ["data.frames=2", "data.batch=4", "run.log_every=2", "model.compute=float32"]
    own.append("data.per_device=none")
    return [
        f"data.path={folder / 'shards'}",
        f"data.negative={folder / 'negative.pt'}",
        *own,
        *more,
    ]


def flow(folder, *more):
    """Flow matching whose program is the same in every test. Adam's eps is large, or it would
    magnify the rounding of small gradients."""
    fixed = [
        "optimizer.eps=1e-3",
        "optimizer.decay=constant",
        "optimizer.steps=none",
        "optimizer.warmup=0",
        "loss.dropout=0.5",
        "loss.ema.decay=0.9",
    ]
    return ["fm-tiny", f"model.weights={folder / 'dense'}", *words(folder, *fixed, *more)]


def training_run(preset, *settings):
    return TrainingRun(preset, PRESETS[preset].method, built(preset, *settings), {}, Stages(False))
