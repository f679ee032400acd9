"""Stages 3 to 5: sparse attention, the few-step student, and the two put together."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig
from tdjax.models.wan_dit import DiT, with_compute
from tdjax.sampling import flow
from tdjax.train import rcm, sla
from tdjax.train.optimizer import OptimizerConfig, adamw
from tdjax.train.rcm import SCM, RCMConfig
from tdjax.train.sla import SLATrainingConfig
from tdjax.train.state import (
    Batch,
    DistillState,
    EMAConfig,
    Teacher,
    TrainState,
    guided_teacher,
    velocity,
)
from tdjax.train.times import LogNormal, UniformShift
from tdjax.train.tiny import work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.evaluation import detector, metrics, sampling
from tdjax.train.tiny.settings import MergeStage, RCMStage, SLAStage
from tdjax.train.tiny.stages.teacher import batch_key
from tdjax.train.tiny.work import Run

FIRST = math.log(80.0)  # log sigma at which the student begins
LEAST_DIVERSITY = 0.85  # a student below it loses in the choice of the best


def embed(text, tokens):  # i32[b s 2] -> [b s d]
    return text(tokens[..., 0], tokens[..., 1])


def sparse(model: DiT, cfg: DiTConfig, compute: str) -> DiT:
    """A dense model's weights in a sparse one, whose projections begin at zero."""
    wanted = orbax.abstract("dit", work.trained(cfg, compute))
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in orbax.named_leaves(wanted).items()}
    return orbax.assemble(wanted, zeros | orbax.named_leaves(model))


# -- sparse attention ------------------------------------------------------------------------------


def make_sla_step(config: SLATrainingConfig, optimizer, batch: int):
    """step(state, data, teacher, text) -> (state, numbers): towards the teacher's velocity, without
    guidance."""
    one = sla.make_step(config, optimizer)

    def step(state: TrainState, clips, teacher, text):
        latents, tokens = clips.draw(batch_key(state), batch)
        return one(state, Teacher(teacher), Batch(latents, embed(text, tokens)))

    return step


def sla_stage(run: Run) -> None:
    cfg: SLAStage = run.settings["sla"]
    vae, text, teacher = (
        work.load(run, "vae"),
        work.load(run, "text"),
        work.load(run, "teacher", cfg.compute),
    )
    optimizer = adamw(OptimizerConfig(learning_rate=cfg.learning_rate, b1=0.9, warmup=cfg.warmup))
    config = SLATrainingConfig(time=LogNormal(mean=cfg.mean))
    state = TrainState.create(
        sparse(teacher, run.sizes.sla, cfg.compute), optimizer, run.key("sla steps")
    )
    program = work.repeated(make_sla_step(config, optimizer, cfg.batch), cfg.chunk)
    negative = encoded.negative(encoded.tokenizer(run))
    prompts = sampling.prompts(encoded.tokenizer(run), run.key("check"), cfg.check_clips)
    how = sampling.teacher(cfg.check_steps, "euler", cfg.guidance, 3.0)

    def check(state, step: int) -> dict[str, float]:
        x = sampling.latents(state.ema, text, prompts.tokens, negative, run.key("check"), how)
        scores = detector.scores(sampling.measured(vae, x), prompts.said)
        return {name: scores[name] for name in ("all", "shape", "colour", "motion", "speed")}

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
    )
    work.export(run, "sla", "dit", state.ema, run.sizes.sla, steps=cfg.steps)
    work.forget_states(run, "sla")


# -- few steps -------------------------------------------------------------------------------------


def rcm_config(cfg: RCMStage) -> RCMConfig:
    how = {"compute": cfg.tangent, "tangent": cfg.derivative, "interval": cfg.interval}
    consistency = SCM(kappa=cfg.kappa, time=LogNormal(mean=cfg.mean), **how) if cfg.kappa else None
    return RCMConfig(
        guidance=cfg.guidance, consistency=consistency, dmd_weight=cfg.dmd_weight, dmd_limit=cfg.dmd_limit or None,
        sample_time=UniformShift(shift=cfg.shift), max_steps=cfg.max_steps, frequency=cfg.frequency, warmup=0, ema=EMAConfig(),
    )  # fmt: skip


def rates(cfg: RCMStage, rate: float, updates: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=rate,
        warmup=cfg.warmup,
        decay="linear",
        steps=updates + 1,
        decay_from=cfg.decay_from,
    )


def make_rcm_cycle(cfg: RCMStage, optimizer, critic_optimizer):
    """cycle(state, data, teacher, text, negative [s d]) -> (state, numbers): a turn of the student,
    and the critic's until the next."""
    config = rcm_config(cfg)
    student_step = rcm.make_student_step(config, optimizer)
    critic_step = rcm.make_critic_step(config, critic_optimizer) if cfg.dmd_weight else None

    def cycle(state: DistillState, clips, teacher, text, negative):
        def turn(step, state):
            latents, tokens = clips.draw(batch_key(state), cfg.batch)
            return step(state, Teacher(teacher, negative), Batch(latents, embed(text, tokens)))

        state, numbers = turn(student_step, state)
        if critic_step:
            state, more = lax.scan(
                lambda state, _: turn(critic_step, state), state, None, length=cfg.frequency - 1
            )
            numbers |= {
                "critic_loss": more["loss"].mean(),
                "critic_grad_norm": more["grad_norm"].mean(),
            }
        return state, numbers

    return cycle


def tangent_error(cfg: RCMStage, model: DiT, teacher: DiT, text, clips, negative, key):  # -> f32[]
    """Relative difference of the exact derivative along the teacher and a central difference over
    0.02 of the time."""
    latents, tokens = clips.draw(key, 16)
    batch = Batch(latents.astype(jnp.float32), embed(text, tokens))
    noise, time = jax.random.split(key)
    u = jax.random.uniform(time, (16,), minval=0.1, maxval=0.9)
    x = flow.noisy(
        batch.latents,
        jax.random.normal(noise, batch.latents.shape),
        flow.per_sample(flow.from_u(u)),
    )
    v = guided_teacher(Teacher(teacher, negative), batch, cfg.guidance)(x, flow.TIME_SCALE * u)
    student = lambda x, u: velocity(with_compute(model, cfg.tangent), batch.text)(
        x, flow.TIME_SCALE * u
    )
    exact = jax.jvp(student, (x, u), (v, jnp.ones_like(u)))[1]
    h = 0.01
    ahead, back = student(x + h * v, u + h), student(x - h * v, u - h)
    return jnp.sqrt(
        jnp.mean(jnp.square(exact - (ahead - back) / (2 * h))) / jnp.mean(jnp.square(exact))
    )


class Best:
    """Keeps the averaged student that does best on prompts of its own: accuracy in 4 steps, a third
    of that in 1, and diversity."""

    def __init__(self, run: Run, cfg: RCMStage, name: str, vae, text):
        self.run, self.name, self.vae, self.text = run, f"work/{name}/best", vae, text
        self.seeds = cfg.check_seeds
        self.prompts = sampling.prompts(
            encoded.tokenizer(run),
            run.key("student check"),
            cfg.check_prompts,
            repeats=cfg.check_seeds,
        )
        self.negative = encoded.negative(encoded.tokenizer(run))
        file = run.folder / self.name
        self.score = (
            orbax.inspect(file)["source"]["score"]
            if (file / "manifest.json").is_file()
            else -math.inf
        )

    def __call__(self, state: DistillState, step: int) -> dict[str, float]:
        key, found = self.run.key("student noise"), {}
        for steps in (4, 1):
            x = sampling.latents(
                state.ema,
                self.text,
                self.prompts.tokens,
                self.negative,
                key,
                sampling.student(steps),
            )
            seen = sampling.measured(self.vae, x)
            found[f"all_{steps}"] = detector.scores(seen, self.prompts.said)["all"]
            if steps == 4:
                start = seen.start.reshape(-1, self.seeds, 2)
                said = jax.tree.map(lambda i: i[:: self.seeds], self.prompts.said)
                found["diversity"] = metrics.diversity(start, said, key)
        score = found["all_4"] + found["all_1"] / 3 - max(0.0, LEAST_DIVERSITY - found["diversity"])
        if score >= self.score:
            self.score = score
            work.export(
                self.run,
                self.name,
                "dit",
                state.ema,
                self.run.sizes.dit,
                step=step,
                score=score,
                **found,
            )
        return found | {"score": score, "best": self.score}


def rcm_stage(run: Run) -> None:
    cfg: RCMStage = run.settings["rcm"]
    vae, text = work.load(run, "vae"), work.load(run, "text")
    # Blocks in a loop: a cycle has a dozen passes, and its program, with all of their blocks one by
    # one, took four minutes to compile.
    teacher = work.load(run, "teacher", cfg.compute, remat=True)
    clips = encoded.make(run, vae, cfg.clips)
    negative = jax.jit(embed)(text, encoded.negative(encoded.tokenizer(run))[None])[0]
    optimizer = adamw(rates(cfg, cfg.learning_rate, cfg.steps))
    critic_optimizer = adamw(rates(cfg, cfg.critic_rate, cfg.steps * max(1, cfg.frequency - 1)))
    critic = {"critic": teacher, "critic_optimizer": critic_optimizer} if cfg.dmd_weight else {}
    state = DistillState.create(teacher, optimizer, run.key("rcm steps"), **critic)
    if cfg.kappa:
        key = run.key("tangent check")
        error = jax.jit(lambda *models: tangent_error(cfg, *models, clips, negative, key))(
            state.model, teacher, text
        )
        run.say(
            f"rcm: derivative along the teacher against a central difference: {float(error):.3f}"
            " relative (above 0.5 is too noisy)"
        )
    program = work.repeated(make_rcm_cycle(cfg, optimizer, critic_optimizer), cfg.chunk)
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
    )
    kept = run.folder / best.name
    facts = {
        name: value
        for name, value in orbax.inspect(kept)["source"].items()
        if name not in ("name", "seed")
    }
    work.export(run, cfg.name, "dit", work.load(run, best.name), run.sizes.dit, **facts)
    work.forget_states(run, cfg.name)


# -- together --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StudentTimes:
    """The times at which the student's steps stand, as log sigma: one of them for each sample."""

    values: tuple[float, ...] = (FIRST, *(math.log(math.tan(t)) for t in sampling.MID))

    def draw(self, key, shape):
        return jax.random.choice(key, jnp.float32(self.values), shape)


def merged(student: DiT, before: DiT, after: DiT, cfg: DiTConfig, compute: str) -> DiT:
    """student + (after - before), and what `after` alone has: its sparse projections."""
    ours, old, new = (orbax.named_leaves(model) for model in (student, before, after))
    leaves = {name: ours[name] + (x - old[name]) if name in ours else x for name, x in new.items()}
    if set(ours) - set(leaves) or len(leaves) - len(ours) != 2:
        raise ValueError(f"the networks differ: {sorted(set(ours) ^ set(leaves))}")
    return orbax.assemble(orbax.abstract("dit", work.trained(cfg, compute)), leaves)


def merge_stage(run: Run) -> None:
    cfg: MergeStage = run.settings["merge"]
    names = ("student", "teacher", "sla")
    vae, text, (student, before, after) = (
        work.load(run, "vae"),
        work.load(run, "text"),
        (work.load(run, n, cfg.compute) for n in names),
    )
    model = merged(student, before, after, run.sizes.sla, cfg.compute)
    work.export(run, "merged_raw", "dit", model, run.sizes.sla)
    if cfg.heal:
        optimizer = adamw(
            OptimizerConfig(
                learning_rate=cfg.learning_rate,
                b1=0.9,
                warmup=cfg.warmup,
                decay="cosine",
                steps=cfg.heal + 1,
                final=0.05,
            )
        )
        config = SLATrainingConfig(time=StudentTimes())
        state = TrainState.create(model, optimizer, run.key("heal steps"))
        program, clips = (
            work.repeated(make_sla_step(config, optimizer, cfg.batch), cfg.chunk),
            encoded.make(run, vae, cfg.clips),
        )
        model = work.train(
            run, "merge", state, program, cfg.heal, cfg.chunk, (clips, student, text)
        ).ema
        work.forget_states(run, "merge")
    work.export(run, "merged", "dit", model, run.sizes.sla, heal=cfg.heal)
