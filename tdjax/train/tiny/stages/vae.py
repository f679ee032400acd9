"""Stage 1: the video autoencoder, trained on rendered clips; then the mean and deviation of its
latents."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tdjax.media.scenes import clips, detector
from tdjax.models.wan_vae import VAE
from tdjax.train.configs import EMAConfig, OptimizerConfig
from tdjax.train.ema import ema_update
from tdjax.train.evaluate import distances
from tdjax.train.optimizer import adamw
from tdjax.train.state import TrainState
from tdjax.train.step import apply, named_keys
from tdjax.train.tiny import work
from tdjax.train.tiny.settings import VAEStage
from tdjax.train.tiny.work import Run

_EMA = EMAConfig(decay=0.995)
# Of a latent channel, as a share of the largest: a dead channel would become noise of full
# strength.
LEAST_DEVIATION = 0.2
_AT_ONCE = 64
_SHOWN = ("psnr", "all", "shape", "colour", "size", "motion", "speed", "overlap")


def posterior(vae: VAE, video):  # f32[b T H W 3] -> mean, log variance f32[b t h w z]
    mean, log_variance = jnp.split(vae.encoded(video, whole=True).astype(jnp.float32), 2, -1)
    return mean, jnp.clip(log_variance, -20.0, 10.0)


def emphasis(video, drawn: float):  # f32[b T H W 3] -> f32[b T H W 1], of mean 1 in every clip
    """Returns the weight of each pixel: `drawn` times as much where something is drawn, which is
    but a twentieth of a clip."""
    corner = video[:, :, :1, :1]  # is background
    object_ = jnp.abs(video - corner).max(-1, keepdims=True) > 0.05
    weight = jnp.where(object_, jnp.float32(drawn), 1.0)
    return weight / weight.mean((1, 2, 3, 4), keepdims=True)


def _distance(a, b, width: float):
    """Quadratic below `width` and linear above: a background that is nearly right does not drown
    the object's gradient."""
    return jnp.sqrt(jnp.square(a - b) + width**2) - width


def deviation(latents, axes: tuple[str, ...] = ()):  # f32[b t h w z] -> f32[z]
    """Returns that of each channel, over the clips of all devices of the mesh axes of these
    names."""
    mean_of = lambda x: lax.pmean(x.mean((0, 1, 2, 3)), axes) if axes else x.mean((0, 1, 2, 3))
    return jnp.sqrt(mean_of(jnp.square(latents - mean_of(latents))))


def loss(vae: VAE, video, draws, jitter, cfg: VAEStage, axes: tuple[str, ...] = ()):
    """Returns (f32[], its parts): the distance of pixels and of their differences, and a little of
    the divergence; jitter f32[] times noise is added to what the decoder sees. axes: of the mesh
    that the clips of a batch are divided over."""
    mean, log_variance = posterior(vae, video)
    z = mean + jnp.exp(0.5 * log_variance) * draws["latent"]
    z = z + jitter * deviation(lax.stop_gradient(mean), axes) * draws["jitter"]
    made = vae.decode(z, whole=True)
    pixels = (emphasis(video, cfg.drawn) * _distance(made, video, cfg.width)).mean()
    along = [
        _distance(jnp.diff(made, axis=axis), jnp.diff(video, axis=axis), cfg.width).mean()
        for axis in (1, 2, 3)
    ]
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean()
    total = pixels + cfg.differences * sum(along) + cfg.kl * kl
    return total, {"loss": total, "rmse": jnp.sqrt(jnp.square(made - video).mean()), "kl": kl}


def gradient(cfg: VAEStage, mesh: Mesh | None):
    """Returns f(vae, video, draws, jitter) -> (gradient, parts of the loss): means over a batch, of
    which each device of a mesh has a share."""
    if mesh is None:
        return partial(jax.grad(loss, has_aux=True), cfg=cfg)
    axes = mesh.axis_names
    own = partial(jax.grad(loss, has_aux=True), cfg=cfg, axes=axes)
    whole, divided = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        lambda *args: lax.pmean(own(*args), axes),
        mesh=mesh,
        in_specs=(whole, divided, divided, whole),
        out_specs=whole,
        check_vma=False,
    )


def make_step(cfg: VAEStage, optimizer, mesh: Mesh | None = None):
    """Returns step(state) -> (state, numbers) on whole clips: with shorter ones, reconstructions of
    whole ones stayed at 20 dB."""
    gradient_of = gradient(cfg, mesh)

    def step(state: TrainState):
        keys = named_keys(state, "clips", "latent", "jitter")
        video = clips.render(clips.sample(keys["clips"], cfg.batch, "all"))
        shape = jax.eval_shape(lambda vae: posterior(vae, video)[0], state.model).shape
        draws = {name: jax.random.normal(keys[name], shape) for name in ("latent", "jitter")}
        late = state.step >= cfg.jitter_from * cfg.steps
        jitter = jnp.where(late, jnp.float32(cfg.jitter), jnp.float32(0))
        grads, numbers = gradient_of(state.model, video, draws, jitter)
        model, opt, more = apply(optimizer, grads, state.opt, state.model)
        ema = ema_update(state.ema, model, state.step, _EMA)
        state = dataclasses.replace(state, step=state.step + 1, model=model, ema=ema, opt=opt)
        return state, numbers | more

    return step


@jax.jit
def _round_trip(vae: VAE, video):  # f32[b T H W 3] -> the same
    return vae.decode(vae.encode(video, whole=True), whole=True)


def _make_check(run: Run, cfg: VAEStage):
    """check(state, step): whole clips through the averaged weights, judged as generated clips
    are."""
    factors = clips.sample(run.key("check"), cfg.check_clips, "all")

    def check(state: TrainState, step: int) -> dict[str, float]:
        scores = _judged(state.ema, factors)
        return {name: scores[name] for name in _SHOWN}

    return check


def _judged(vae: VAE, factors: clips.Factors) -> dict[str, float]:
    """Detector scores and PSNR of a round trip."""
    measured, fidelity = [], []
    n = factors.start.shape[0]
    for i in range(0, n, _AT_ONCE):
        video = clips.render(jax.tree.map(lambda x, i=i: x[i : i + _AT_ONCE], factors))
        made = _round_trip(vae, video)
        measured.append(detector.measure(made))
        fidelity.append(distances.psnr(made, video) * len(made))
    whole = jax.tree.map(lambda *x: np.concatenate([np.asarray(part) for part in x]), *measured)
    return detector.scores(whole, jax.device_get(factors.said)) | {"psnr": sum(fidelity) / n}


@partial(jax.jit, static_argnums=2)
def moments(vae: VAE, key, n: int):  # -> sums over n clips: f32[z], of squares f32[z], count
    mean = vae.encode(clips.render(clips.sample(key, n)), whole=True)
    return mean.sum((0, 1, 2, 3)), jnp.square(mean).sum((0, 1, 2, 3)), mean.size / mean.shape[-1]


def statistics(vae: VAE, key, n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation of every latent channel over n clips, the deviation not below
    LEAST_DEVIATION of the largest."""
    size = min(_AT_ONCE, n)
    parts = [
        jax.device_get(moments(vae, jax.random.fold_in(key, i), size))
        for i in range(math.ceil(n / _AT_ONCE))
    ]
    total, squares, count = (np.sum([np.float64(part[i]) for part in parts], 0) for i in range(3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std = np.maximum(std, LEAST_DEVIATION * std.max())
    return tuple(round(float(x), 5) for x in mean), tuple(round(float(x), 5) for x in std)


def run_stage(run: Run) -> None:
    """Trains the stage and writes its result, vae/."""
    cfg: VAEStage = run.settings["vae"]
    sizes = work.trained(run.sizes.vae, cfg.compute)
    rates = OptimizerConfig(
        learning_rate=cfg.learning_rate,
        b1=0.9,
        b2=0.99,
        warmup=cfg.warmup,
        decay="cosine",
        steps=cfg.steps + 1,
        final=0.01,
        clip=1.0,
    )
    optimizer = adamw(rates)
    vae = jax.jit(lambda key: VAE(sizes, rngs=nnx.Rngs(key)))(run.key("vae"))
    state = TrainState.create(vae, optimizer, run.key("vae steps"))
    mesh = run.mesh if run.mesh is not None and cfg.batch % run.mesh.size == 0 else None
    program = work.repeated(make_step(cfg, optimizer, mesh), cfg.chunk, mesh)
    check, every = _make_check(run, cfg), cfg.check_every
    state = work.train(run, "vae", state, program, cfg.steps, cfg.chunk, (), check, every, mesh)
    with run.stages("latent statistics"):
        mean, std = statistics(state.ema, run.key("statistics"), cfg.statistics)
    run.say(f"latents: mean {mean}, deviation {std}")
    measured = dataclasses.replace(run.sizes.vae, mean=mean, std=std)
    work.export(run, "vae", "vae", state.ema, measured, steps=cfg.steps)
    work.forget_states(run, "vae")
