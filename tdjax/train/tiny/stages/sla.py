"""Stage 3: sparse-linear attention in place of dense, towards the teacher's velocity."""

from __future__ import annotations

import jax.numpy as jnp

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig
from tdjax.media.scenes import detector
from tdjax.models.wan_dit import DiT
from tdjax.train import sla
from tdjax.train.configs import LogNormal, OptimizerConfig, SLATrainingConfig
from tdjax.train.optimizer import adamw
from tdjax.train.state import Batch, Teacher, TrainState
from tdjax.train.tiny import work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.settings import SLAStage
from tdjax.train.tiny.work import Run

_SHOWN = ("all", "shape", "colour", "motion", "speed")


def sparse(model: DiT, cfg: DiTConfig, compute: str) -> DiT:
    """Returns a dense model's weights in a sparse one, whose projections begin at zero."""
    wanted = orbax.abstract("dit", work.trained(cfg, compute))
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in orbax.named_leaves(wanted).items()}
    return orbax.assemble(wanted, zeros | orbax.named_leaves(model))


def make_step(config: SLATrainingConfig, optimizer, batch: int):
    """Returns step(state, data, teacher, text) -> (state, numbers): towards the teacher's velocity,
    without guidance."""
    one = sla.make_step(config, optimizer)

    def step(state: TrainState, clips, teacher, text):
        latents, tokens = clips.draw(work.batch_key(state), batch)
        return one(state, Teacher(teacher), Batch(latents, encoded.embed(text, tokens)))

    return step


def run_stage(run: Run) -> None:
    """Trains the stage and writes its result, sla/."""
    cfg: SLAStage = run.settings["sla"]
    vae = work.load(run, "vae")
    text = work.load(run, "text")
    teacher = work.load(run, "teacher", cfg.compute)
    optimizer = adamw(OptimizerConfig(learning_rate=cfg.learning_rate, b1=0.9, warmup=cfg.warmup))
    config = SLATrainingConfig(time=LogNormal(mean=cfg.mean))
    student = sparse(teacher, run.sizes.sla, cfg.compute)
    state = TrainState.create(student, optimizer, run.key("sla steps"))
    program = work.repeated(make_step(config, optimizer, cfg.batch), cfg.chunk, run.mesh)
    negative = encoded.negative(encoded.tokenizer(run))
    prompts = sampling.prompts(encoded.tokenizer(run), run.key("check"), cfg.check_clips)
    how = sampling.teacher(cfg.check_steps, "euler", cfg.guidance, 3.0)

    def check(state, step: int) -> dict[str, float]:
        tokens, key = prompts.tokens, run.key("check")
        x = sampling.latents(state.ema, text, tokens, negative, key, how, run.mesh)
        scores = detector.scores(sampling.measured(vae, x, run.mesh), prompts.said)
        return {name: scores[name] for name in _SHOWN}

    clips = encoded.make(run, vae, cfg.clips)
    state = work.train(
        run,
        "sla",
        state,
        program,
        cfg.steps,
        cfg.chunk,
        (clips, teacher, text),
        check,
        cfg.check_every,
        run.mesh,
    )
    work.export(run, "sla", "dit", state.ema, run.sizes.sla, steps=cfg.steps)
    work.forget_states(run, "sla")
