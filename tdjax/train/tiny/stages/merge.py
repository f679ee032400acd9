"""Stage 5: the student with what sparse attention changed, and a short repair."""

from __future__ import annotations

import math

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig
from tdjax.models.wan_dit import DiT
from tdjax.train.configs import OptimizerConfig, SLATrainingConfig
from tdjax.train.optimizer import adamw
from tdjax.train.state import TrainState
from tdjax.train.times import Choice
from tdjax.train.tiny import work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.settings import MergeStage
from tdjax.train.tiny.stages import sla
from tdjax.train.tiny.work import Run

# The times at which the student's steps stand: it begins at sigma 80.
STUDENT_TIMES = Choice((math.log(80.0), *(math.log(math.tan(t)) for t in sampling.MID)))


def merged(student: DiT, before: DiT, after: DiT, cfg: DiTConfig, compute: str) -> DiT:
    """Returns student + (after - before), and what `after` alone has: its sparse projections."""
    ours, old, new = (orbax.named_leaves(model) for model in (student, before, after))
    leaves = {name: ours[name] + (x - old[name]) if name in ours else x for name, x in new.items()}
    if set(ours) - set(leaves) or len(leaves) - len(ours) != 2:
        raise ValueError(f"the networks differ: {sorted(set(ours) ^ set(leaves))}")
    return orbax.assemble(orbax.abstract("dit", work.trained(cfg, compute)), leaves)


def run_stage(run: Run) -> None:
    """Writes the results, merged_raw/ and, repaired, merged/."""
    cfg: MergeStage = run.settings["merge"]
    student, before, after = (
        work.load(run, name, cfg.compute) for name in ("student", "teacher", "sla")
    )
    model = merged(student, before, after, run.sizes.sla, cfg.compute)
    work.export(run, "merged_raw", "dit", model, run.sizes.sla)
    if cfg.heal:
        model = _healed(run, cfg, model, student)
    work.export(run, "merged", "dit", model, run.sizes.sla, heal=cfg.heal)


def _healed(run: Run, cfg: MergeStage, model: DiT, student: DiT) -> DiT:
    """The merged model after a few steps towards the student."""
    rates = OptimizerConfig(
        learning_rate=cfg.learning_rate,
        b1=0.9,
        warmup=cfg.warmup,
        decay="cosine",
        steps=cfg.heal + 1,
        final=0.05,
    )
    optimizer = adamw(rates)
    config = SLATrainingConfig(time=STUDENT_TIMES)
    state = TrainState.create(model, optimizer, run.key("heal steps"))
    program = work.repeated(sla.make_step(config, optimizer, cfg.batch), cfg.chunk, run.mesh)
    clips = encoded.make(run, work.load(run, "vae"), cfg.clips)
    data = (clips, student, work.load(run, "text"))
    state = work.train(run, "merge", state, program, cfg.heal, cfg.chunk, data, mesh=run.mesh)
    work.forget_states(run, "merge")
    return state.ema
