"""Stages on small networks: losses fall, states go on to the same bits, derivatives run in the dtype asked for, merging adds up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close

from tdjax import checkpoint
from tdjax.config import TextConfig, VAEConfig
from tdjax.models.umt5 import UMT5
from tdjax.models.wan_dit import DiT, with_compute
from tdjax.models.wan_vae import VAE
from tdjax.precision import FLOAT32
from tdjax.tokenizer import Tokenizer
from tdjax.train.optimizer import OptimizerConfig, adamw
from tdjax.train.sla import SLATrainingConfig
from tdjax.train.state import DistillState, TrainState
from tdjax.train.tiny import captions, clips, configs, data, distil, sampling, settings, teacher, vae, work
from tdjax.train.tiny.data import Data
from tdjax.train.tiny.tokenizer import build

TEXT = TextConfig(vocab=256, dim=16, attention_dim=16, ffn_dim=16, heads=1, layers=1, text_len=32, policy=FLOAT32)
DIT = dataclasses.replace(configs.DIT, dim=32, ffn_dim=32, layers=1, heads=1, text_dim=16, freq_dim=32)
SLA = dataclasses.replace(DIT, attention="sla", sla=configs.DIT_SLA.sla)
SMALL_VAE = VAEConfig(dim=4, latent_channels=2, multipliers=(1, 1, 1, 1), res_blocks=1, mean=(0.0,) * 2, std=(1.0,) * 2, policy=FLOAT32)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build(captions.vocabulary()).save(str(path))
    return Tokenizer(path, TEXT.text_len)


@pytest.fixture(scope="module")
def some(tokens):
    """Latents that are a colour each, with their captions."""
    said = clips.sample(jax.random.key(0), 16).said
    rows = np.stack([data.tokens_of(tokens, texts) for texts in data.texts_of(said, 0)], 1)
    shade = jnp.asarray(said.colour, jnp.float32).reshape(-1, 1, 1, 1, 1) / 4 - 1
    return Data(jnp.broadcast_to(shade, (16, 3, 4, 4, 8)).astype(jnp.bfloat16), jnp.asarray(rows))


def dit(cfg=DIT, seed=0):
    """A network whose output is not zero."""
    model = jax.jit(lambda key: DiT(cfg, rngs=nnx.Rngs(key)))(jax.random.key(seed))
    leaves = checkpoint.names(model)
    leaves["head.proj.kernel"] = 0.1 * jax.random.normal(jax.random.key(seed + 1), leaves["head.proj.kernel"].shape)
    return checkpoint.assemble(checkpoint.abstract("dit", cfg), leaves)


@pytest.fixture(scope="module")
def text():
    return jax.jit(lambda key: UMT5(TEXT, rngs=nnx.Rngs(key)))(jax.random.key(3))


# -- data ------------------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_pipeline(tokens):
    texts = [captions.random_prompt(seed) for seed in range(5)] + [""]
    rows, known = data.tokens_of(tokens, texts), tokens.encode(texts)
    assert np.array_equal(rows[..., 0], known.ids) and np.array_equal(rows[..., 1], known.mask)
    assert np.array_equal(data.negative(tokens), rows[-1])


def test_every_clip_has_whole_captions_and_a_short_one():
    said = jax.device_get(clips.sample(jax.random.key(1), 60).said)
    texts = data.texts_of(said, 7)
    assert len(texts) == data.FULL + 1 and texts == data.texts_of(said, 7) and texts != data.texts_of(said, 8)
    for i, group in enumerate(texts):
        read = captions.parse(group)
        for name in ("shape", "colour", "background", "motion"):
            assert np.array_equal(getattr(read, name), getattr(said, name))
        short = i == data.FULL
        assert np.array_equal(read.size == -1, np.full(60, short) & (np.arange(60) % 3 != 1))


def test_a_batch_keeps_latents_and_captions_together(some, tokens):
    latents, rows = some.draw(jax.random.key(2), 64)
    for x, row in zip(np.asarray(latents, np.float32), np.asarray(rows), strict=True):
        i = next(i for i in range(16) if any(np.array_equal(row, known) for known in np.asarray(some.tokens[i])))
        assert np.array_equal(x, np.asarray(some.latents[i], np.float32))
    assert len({bytes(np.asarray(row)) for row in rows}) > 16  # different captions of one clip


# -- the autoencoder -------------------------------------------------------------------------------------------------------


def small_vae():
    return jax.jit(lambda key: VAE(SMALL_VAE, rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_the_mean_of_the_posterior_is_what_the_encoder_gives():
    model, video = small_vae(), jax.random.normal(jax.random.key(1), (1, 5, 16, 16, 3))
    mean, log_variance = jax.jit(vae.posterior)(model, video)
    assert mean.shape == log_variance.shape == (1, 2, 2, 2, 2)
    assert_close(mean, jax.jit(lambda m, v: m.encode(v))(model, video), "float32")


def test_the_loss_counts_pixels_differences_and_divergence():
    cfg, model = settings.VAEStage(), small_vae()
    video = jax.random.uniform(jax.random.key(1), (1, 5, 16, 16, 3), minval=-1.0)
    zeros = {name: jnp.zeros((1, 2, 2, 2, 2)) for name in ("latent", "jitter")}
    run = jax.jit(lambda draws, jitter: vae.loss(model, video, draws, jitter, cfg))
    total, parts = run(zeros, jnp.float32(0))
    made = model.decode(model.encode(video))
    steps = sum(float(jnp.abs(jnp.diff(made - video, axis=axis)).mean()) for axis in (1, 2, 3))
    assert_close(parts["l1"], jnp.abs(made - video).mean(), "float32")
    assert abs(float(total) - float(parts["l1"]) - 0.1 * steps - 1e-4 * float(parts["kl"])) < 1e-5
    noise = zeros | {"jitter": jnp.ones((1, 2, 2, 2, 2))}
    assert float(run(noise, jnp.float32(0))[0]) == float(total) != float(run(noise, jnp.float32(0.5))[0])


def test_deviations_are_not_below_a_share_of_the_largest(monkeypatch):
    sums = lambda model, key, n: (np.float32([8.0, 4.0]) * n, np.float32([20.0, 4.0]) * n, 4 * n)  # mean 2, 1; variance 1, 0
    monkeypatch.setattr(vae, "moments", sums)
    mean, std = vae.statistics(None, jax.random.key(0), 100)
    assert mean == (2.0, 1.0) and std == (1.0, vae.LEAST_DEVIATION)


# -- the teacher -----------------------------------------------------------------------------------------------------------


def test_the_teacher_learns(some, tokens):
    cfg = settings.TeacherStage(steps=60, batch=16, learning_rate=3e-3, text_rate=3e-3, warmup=5, compute="float32", ema=0.9)
    optimizer = teacher.make_optimizer(cfg)
    model = jax.jit(lambda key: teacher.Captioned(DIT, TEXT, rngs=nnx.Rngs(key)))(jax.random.key(0))
    state = TrainState.create(model, optimizer, jax.random.key(1))
    program, negative = work.repeated(teacher.make_step(cfg, optimizer), 60), data.negative(tokens)
    before = np.asarray(model.text.embed.embedding[...])
    state, numbers = program(state, some, negative)
    losses = np.asarray(numbers["loss"])
    assert losses[-10:].mean() < 0.6 * losses[:5].mean() and int(state.step) == 60
    assert np.abs(np.asarray(state.model.text.embed.embedding[...]) - before).max() > 1e-3  # the text encoder learns too


# -- sparse attention, few steps, merging ----------------------------------------------------------------------------------


def test_sparse_attention_follows_the_teacher(some, text):
    """Latents of three frames of 16 tokens are one block: its linear branch alone differs, and begins at nothing."""
    optimizer = adamw(OptimizerConfig(learning_rate=1e-3, b1=0.9, warmup=0))
    dense = dit()
    student = distil.sparse(dense, SLA, "float32")
    x, t, rows = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 8)), jnp.float32([500]), jnp.zeros((1, 32, 16))
    assert_close(student(x, t, rows), dense(x, t, rows), "float32")
    start = dit(seed=4)
    state = TrainState.create(distil.sparse(start, SLA, "float32"), optimizer, jax.random.key(1))
    program = work.repeated(distil.make_sla_step(SLATrainingConfig(), optimizer, 8), 20)
    state, numbers = program(state, some, dense, text)
    losses = np.asarray(numbers["loss"])
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_a_cycle_is_a_turn_of_the_student_and_four_of_the_critic(some, text, tokens, kappa):
    cfg = settings.RCMStage(batch=2, steps=6, warmup=0, compute="float32", tangent="float32", kappa=kappa, learning_rate=1e-3)
    student_rates, critic_rates = (adamw(distil.rates(cfg, 1e-3, n)) for n in (6, 24))
    model = dit()
    state = DistillState.create(model, student_rates, jax.random.key(0), critic=model, critic_optimizer=critic_rates)
    negative = distil.embed(text, data.negative(tokens)[None])[0]
    state, numbers = work.repeated(distil.make_rcm_cycle(cfg, student_rates, critic_rates), 2)(state, some, model, text, negative)
    assert int(state.step) == 10 and all(np.isfinite(np.asarray(x)).all() for x in numbers.values())
    moved = lambda after: max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (after, model)), strict=True))
    assert moved(state.model) > 1e-4 and moved(state.critic) > 1e-4
    assert ("consistency" in numbers) == (kappa > 0)


def test_the_tangent_may_run_in_another_dtype():
    model = dit(dataclasses.replace(DIT, policy=dataclasses.replace(FLOAT32, compute="bfloat16")))
    exact = with_compute(model, "float32")
    assert exact.cfg.policy.compute == "float32" == exact.blocks.self_attn.cfg.policy.compute
    x, t, rows = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 8)), jnp.float32([500]), jnp.ones((1, 32, 16))
    assert_close(exact(x, t, rows), dit()(x, t, rows), "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(model), strict=True))


def test_merging_adds_what_sparse_attention_changed():
    student, before = dit(seed=1), dit(seed=2)
    after = distil.sparse(dit(seed=3), SLA, "float32")
    leaves = checkpoint.names(after)
    leaves["blocks.self_attn.core.proj.bias"] = leaves["blocks.self_attn.core.proj.bias"] + 0.5
    after = checkpoint.assemble(checkpoint.abstract("dit", SLA), leaves)
    out = checkpoint.names(distil.merged(student, before, after, SLA, "float32"))
    name = "blocks.up.kernel"
    a, b, c = (checkpoint.names(model)[name] for model in (student, before, after))
    assert_close(out[name], a + c - b, "float32")
    assert np.all(np.asarray(out["blocks.self_attn.core.proj.bias"]) == 0.5)


def test_healing_takes_the_times_of_the_sampler():
    times = np.asarray(distil.StudentTimes().draw(jax.random.key(0), (400,)))
    grid = sampling.student(4)
    wanted = np.log(np.tan([np.arctan(grid.sigma_max), *grid.mid]))
    assert np.allclose(np.unique(times), np.sort(wanted), atol=1e-5)
