"""Stage 2: the dense teacher and its text encoder, trained together by flow matching on encoded
clips."""

from __future__ import annotations

import jax
import optax
from flax import nnx

from tdjax.config import DiTConfig, TextConfig
from tdjax.media.scenes import detector
from tdjax.models.umt5 import UMT5
from tdjax.models.wan_dit import DiT
from tdjax.parallel.sharding import leaf_name
from tdjax.train import flow_matching
from tdjax.train.configs import EMAConfig, FlowMatchingConfig, OptimizerConfig, UniformShift
from tdjax.train.optimizer import adamw
from tdjax.train.state import Batch, Teacher, TrainState
from tdjax.train.tiny import work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.data.encoded import Data
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.settings import TeacherStage
from tdjax.train.tiny.work import Run

_SHOWN = ("all", "shape", "colour", "background", "size", "motion", "speed", "present")


class Captioned(nnx.Module):
    """A transformer that reads captions as tokens i32[b s 2], through a text encoder of its own."""

    def __init__(self, dit: DiTConfig, text: TextConfig, *, rngs: nnx.Rngs):
        self.dit = DiT(dit, rngs=rngs)
        self.text = UMT5(text, rngs=rngs)

    def __call__(self, x, timestep, tokens, image=None):
        return self.dit(x, timestep, self.text(tokens[..., 0], tokens[..., 1]), image)


def make_optimizer(cfg: TeacherStage) -> optax.GradientTransformation:
    """Returns AdamW with one rate for the transformer and another for the text encoder."""
    rates = lambda rate: OptimizerConfig(
        learning_rate=rate,
        b1=0.9,
        b2=0.99,
        warmup=cfg.warmup,
        decay="cosine",
        steps=cfg.steps + 1,
        final=cfg.final,
        clip=1.0,
    )
    first_word = lambda path, _: leaf_name(path).partition(".")[0]
    labels = lambda model: jax.tree_util.tree_map_with_path(first_word, model)
    parts = {"dit": adamw(rates(cfg.learning_rate)), "text": adamw(rates(cfg.text_rate))}
    return optax.partition(parts, labels)


def make_step(cfg: TeacherStage, optimizer):
    """Returns step(state, data, negative i32[s 2]) -> (state, numbers)."""
    config = FlowMatchingConfig(
        time=UniformShift(shift=cfg.shift), dropout=cfg.dropout, ema=EMAConfig(decay=cfg.ema)
    )
    one = flow_matching.make_step(config, optimizer)

    def step(state: TrainState, clips: Data, negative):
        latents, tokens = clips.draw(work.batch_key(state), cfg.batch)
        return one(state, Teacher(None, negative), Batch(latents, tokens))

    return step


def _make_check(run: Run, cfg: TeacherStage, vae, negative):
    """check(state, step): guided samples of the averaged weights, judged by the detector."""
    tokenizer = encoded.tokenizer(run)
    key = run.key("check")
    prompts = sampling.prompts(tokenizer, key, cfg.check_clips)
    how = sampling.teacher(cfg.check_steps, "euler", cfg.guidance, cfg.shift)

    def check(state: TrainState, step: int) -> dict[str, float]:
        dit, text = state.ema.dit, state.ema.text
        x = sampling.latents(dit, text, prompts.tokens, negative, key, how, run.mesh)
        scores = detector.scores(sampling.measured(vae, x, run.mesh), prompts.said)
        return {name: scores[name] for name in _SHOWN}

    return check


def run_stage(run: Run) -> None:
    """Trains the stage and writes its results, text/ and teacher/."""
    cfg: TeacherStage = run.settings["teacher"]
    dit = work.trained(run.sizes.dit, cfg.compute)
    vae = work.load(run, "vae")
    clips = encoded.make(run, vae, cfg.clips)
    negative = encoded.negative(encoded.tokenizer(run))
    optimizer = make_optimizer(cfg)
    create = jax.jit(lambda key: Captioned(dit, run.sizes.text, rngs=nnx.Rngs(key)))
    model = create(run.key("teacher"))
    state = TrainState.create(model, optimizer, run.key("teacher steps"))
    program = work.repeated(make_step(cfg, optimizer), cfg.chunk, run.mesh)
    check = _make_check(run, cfg, vae, negative)
    state = work.train(
        run,
        "teacher",
        state,
        program,
        cfg.steps,
        cfg.chunk,
        (clips, negative),
        check,
        cfg.check_every,
        run.mesh,
    )
    work.export(run, "text", "text", state.ema.text, run.sizes.text, steps=cfg.steps)
    # The last one, since it says that the stage is finished.
    work.export(run, "teacher", "dit", state.ema.dit, run.sizes.dit, steps=cfg.steps)
    work.forget_states(run, "teacher")
