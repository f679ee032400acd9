"""Stage 4: the few-step student, distilled beside its critic."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from tdjax.checkpoints import orbax
from tdjax.media.scenes import detector
from tdjax.models.wan_dit import DiT, with_compute
from tdjax.sampling import flow
from tdjax.train import rcm
from tdjax.train.configs import (
    SCM,
    LogNormal,
    OptimizerConfig,
    RCMConfig,
    UniformShift,
)
from tdjax.train.optimizer import adamw
from tdjax.train.state import Batch, DistillState, Teacher
from tdjax.train.step import guided_teacher, velocity
from tdjax.train.tiny import work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.evaluation import metrics, sampling
from tdjax.train.tiny.settings import RCMStage
from tdjax.train.tiny.work import Run

_LEAST_DIVERSITY = 0.85  # a student below it loses in the choice of the best
_COMPARED = 16  # clips on which the derivative is compared with a difference


def _config(cfg: RCMStage) -> RCMConfig:
    consistency = None
    if cfg.kappa:
        consistency = SCM(
            kappa=cfg.kappa,
            time=LogNormal(mean=cfg.mean),
            tangent=cfg.derivative,
            interval=cfg.interval,
            compute=cfg.tangent,
        )
    return RCMConfig(
        guidance=cfg.guidance,
        consistency=consistency,
        dmd_weight=cfg.dmd_weight,
        dmd_limit=cfg.dmd_limit or None,
        sample_time=UniformShift(shift=cfg.shift),
        max_steps=cfg.max_steps,
        frequency=cfg.frequency,
        warmup=0,
    )


def rates(cfg: RCMStage, rate: float, updates: int) -> OptimizerConfig:
    """Returns an optimizer whose rate falls over the last of so many updates."""
    return OptimizerConfig(
        learning_rate=rate,
        warmup=cfg.warmup,
        decay="linear",
        steps=updates + 1,
        decay_from=cfg.decay_from,
    )


def make_cycle(cfg: RCMStage, optimizer, critic_optimizer):
    """Returns cycle(state, data, teacher, text, negative [s d]) -> (state, numbers): a turn of the
    student, and the critic's until the next."""
    config = _config(cfg)
    student_step = rcm.make_student_step(config, optimizer)
    critic_step = rcm.make_critic_step(config, critic_optimizer) if cfg.dmd_weight else None

    def cycle(state: DistillState, clips, teacher, text, negative):
        def turn(step, state):
            latents, tokens = clips.draw(work.batch_key(state), cfg.batch)
            batch = Batch(latents, encoded.embed(text, tokens))
            return step(state, Teacher(teacher, negative), batch)

        state, numbers = turn(student_step, state)
        if critic_step:
            critic_turn = lambda state, _: turn(critic_step, state)
            state, more = lax.scan(critic_turn, state, None, length=cfg.frequency - 1)
            means = {f"critic_{name}": more[name].mean() for name in ("loss", "grad_norm")}
            numbers |= means
        return state, numbers

    return cycle


def tangent_error(cfg: RCMStage, model: DiT, teacher: DiT, text, clips, negative, key):  # -> f32[]
    """Returns the relative difference of the exact derivative along the teacher and a central
    difference over 0.02 of the time."""
    latents, tokens = clips.draw(key, _COMPARED)
    batch = Batch(latents.astype(jnp.float32), encoded.embed(text, tokens))
    noise, time = jax.random.split(key)
    u = jax.random.uniform(time, (_COMPARED,), minval=0.1, maxval=0.9)
    eps = jax.random.normal(noise, batch.latents.shape)
    x = flow.noisy(batch.latents, eps, flow.per_sample(flow.from_u(u)))
    v = guided_teacher(Teacher(teacher, negative), batch, cfg.guidance)(x, flow.TIME_SCALE * u)
    network = velocity(with_compute(model, cfg.tangent), batch.text)
    student = lambda x, u: network(x, flow.TIME_SCALE * u)
    exact = jax.jvp(student, (x, u), (v, jnp.ones_like(u)))[1]
    h = 0.01
    difference = (student(x + h * v, u + h) - student(x - h * v, u - h)) / (2 * h)
    return jnp.sqrt(jnp.mean(jnp.square(exact - difference)) / jnp.mean(jnp.square(exact)))


class Best:
    """The averaged student that does best on prompts of its own, kept on disk: accuracy in 4 steps,
    a third of that in 1, and diversity."""

    def __init__(self, run: Run, cfg: RCMStage, name: str, vae, text):
        self.run = run
        self.name = f"work/{name}/best"
        self.vae = vae
        self.text = text
        self.seeds = cfg.check_seeds
        tokenizer = encoded.tokenizer(run)
        key = run.key("student check")
        self.prompts = sampling.prompts(tokenizer, key, cfg.check_prompts, repeats=self.seeds)
        self.negative = encoded.negative(tokenizer)
        self.score = -math.inf
        if work.finished(run, self.name):
            self.score = orbax.inspect(run.folder / self.name)["source"]["score"]

    def __call__(self, state: DistillState, step: int) -> dict[str, float]:
        key = self.run.key("student noise")
        found: dict[str, float] = {}
        tokens, mesh = self.prompts.tokens, self.run.mesh
        for steps in (4, 1):
            how = sampling.student(steps)
            x = sampling.latents(state.ema, self.text, tokens, self.negative, key, how, mesh)
            seen = sampling.measured(self.vae, x, mesh)
            found[f"all_{steps}"] = detector.scores(seen, self.prompts.said)["all"]
            if steps == 4:
                start = seen.start.reshape(-1, self.seeds, 2)
                said = jax.tree.map(lambda i: i[:: self.seeds], self.prompts.said)
                found["diversity"] = metrics.diversity(start, said, key)
        lacking = max(0.0, _LEAST_DIVERSITY - found["diversity"])
        score = found["all_4"] + found["all_1"] / 3 - lacking
        if score >= self.score:
            self.score = score
            source = {"step": step, "score": score, **found}
            work.export(self.run, self.name, "dit", state.ema, self.run.sizes.dit, **source)
        return found | {"score": score, "best": self.score}


def run_stage(run: Run) -> None:
    """Trains the stage and writes its result, the folder that `rcm.name` says."""
    cfg: RCMStage = run.settings["rcm"]
    vae = work.load(run, "vae")
    text = work.load(run, "text")
    # Blocks in a loop: a cycle has a dozen passes, and its program, with all of their blocks one by
    # one, took four minutes to compile.
    teacher = work.load(run, "teacher", cfg.compute, remat=True)
    clips = encoded.make(run, vae, cfg.clips)
    empty = encoded.negative(encoded.tokenizer(run))
    negative = jax.jit(encoded.embed)(text, empty[None])[0]
    optimizer = adamw(rates(cfg, cfg.learning_rate, cfg.steps))
    critic_optimizer = adamw(rates(cfg, cfg.critic_rate, cfg.steps * max(1, cfg.frequency - 1)))
    critic = {"critic": teacher, "critic_optimizer": critic_optimizer} if cfg.dmd_weight else {}
    state = DistillState.create(teacher, optimizer, run.key("rcm steps"), **critic)
    if cfg.kappa:
        key = run.key("tangent check")
        compared = jax.jit(lambda *models: tangent_error(cfg, *models, clips, negative, key))
        error = compared(state.model, teacher, text)
        run.say(
            f"rcm: derivative along the teacher against a central difference: {float(error):.3f}"
            " relative (above 0.5 is too noisy)"
        )
    program = work.repeated(make_cycle(cfg, optimizer, critic_optimizer), cfg.chunk, run.mesh)
    best = Best(run, cfg, cfg.name, vae, text)
    work.train(
        run,
        cfg.name,
        state,
        program,
        cfg.steps,
        cfg.chunk,
        (clips, teacher, text, negative),
        best,
        cfg.check_every,
        run.mesh,
    )
    kept = run.folder / best.name
    source = orbax.inspect(kept)["source"]
    source = {name: value for name, value in source.items() if name not in ("name", "seed")}
    work.export(run, cfg.name, "dit", work.load(run, best.name), run.sizes.dit, **source)
    work.forget_states(run, cfg.name)
