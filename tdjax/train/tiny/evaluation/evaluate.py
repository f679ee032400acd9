"""All numbers of a row of the table: from the same prompts and noise as every other row's."""

from __future__ import annotations

import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tdjax.checkpoints import orbax
from tdjax.media.scenes import clips, detector
from tdjax.models.wan_dit import with_linear
from tdjax.train.evaluate import distances
from tdjax.train.tiny import configs, work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.evaluation import metrics, sampling
from tdjax.train.tiny.evaluation.variants import Variant
from tdjax.train.tiny.work import Run

_AT_ONCE = 64  # clips compared or rendered together
_REAL_AT_ONCE = 1024  # real clips whose features are made together
_KEPT = 6  # sets of clips: a row's and its parent's, of each seed
_REPEATS = 5  # of a timing


class Bench:
    """What rows share: networks, prompts, noise, and features of real clips; clips of parents are
    kept while they may be asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.cfg = run.settings["evaluate"]
        self.vae = work.load(run, "vae")
        self.text = work.load(run, "text")
        self.tokenizer = encoded.tokenizer(run)
        self.negative = encoded.negative(self.tokenizer)
        self.models: dict = {}
        self.kept: dict = {}
        self.real = None

    def model(self, row: Variant):
        """Returns the transformer of a row; one is kept at a time."""
        name = (row.weights, row.linear)
        if name not in self.models:
            stored = work.load(self.run, row.weights, self.cfg.compute)
            self.models = {name: with_linear(stored, row.linear)}
        return self.models[name]

    def prompts(self, row: Variant, seed: int, n: int, repeats: int = 1) -> sampling.Prompts:
        """Returns n captions of a seed, each `repeats` times in a row."""
        key = self.run.key(f"evaluate {seed} {row.split} {n}")
        return sampling.prompts(self.tokenizer, key, n, row.split, row.template, repeats)

    def sampled(self, row: Variant, tokens, key):  # i32[b s 2] -> f32[b t h w c]
        """Returns latents of a batch of captions, sampled as the row says."""
        model = self.model(row)
        return sampling.latents(
            model, self.text, tokens, self.negative, key, row.sampler, self.run.mesh
        )

    def latents(self, row: Variant, prompts, key):  # -> f32[n t h w c] on the host
        """Returns latents of all captions, a batch at a time."""
        n = len(prompts.texts)
        size = min(self.cfg.batch, n)
        parts = []
        for i in range(0, n, size):
            tokens = prompts.tokens[i : i + size]
            parts.append(np.asarray(self.sampled(row, tokens, jax.random.fold_in(key, i))))
        return np.concatenate(parts)

    def clips(self, row: Variant, seed: int):  # -> uint8[n T H W 3] on the host, what was asked for
        """Returns the clips of a row and a seed: made once for itself and for its children."""
        name = (row.key, seed)
        if name not in self.kept:
            prompts = self.prompts(row, seed, self.cfg.clips)
            self.kept[name] = (self.made(row, seed, prompts), prompts.said)
            while len(self.kept) > _KEPT:
                self.kept.pop(next(iter(self.kept)))
        return self.kept[name]

    def made(self, row: Variant, seed: int, prompts):  # -> uint8[n T H W 3] on the host
        """Returns clips of the first prompts of a seed, as many as are given: all of them or whole
        batches."""
        if row.sampler is not None:
            x = self.latents(row, prompts, self.run.key(f"noise {seed}"))
            return sampling.videos(self.vae, x, self.run.mesh)
        n = self.cfg.clips
        factors = clips.sample(self.run.key(f"evaluate {seed} {row.split} {n}"), n, row.split)
        factors = jax.tree.map(lambda x: x[: len(prompts.texts)], factors)
        return self.rendered(factors, through_vae=row.key == "vae")

    def rendered(self, factors, through_vae: bool = False):  # -> uint8[n T H W 3] on the host
        """Returns true clips, as they are or through encoder and decoder."""
        parts = []
        for i in range(0, factors.start.shape[0], _AT_ONCE):
            part = jax.tree.map(lambda x, i=i: x[i : i + _AT_ONCE], factors)
            made = self.divided(_through, (self.vae,), part) if through_vae else _rendered(part)
            parts.append(np.asarray(made))
        return np.concatenate(parts)

    def divided(self, function, whole: tuple, part):
        """Returns function(*whole, part), clips divided over the run's devices."""
        return work.by_devices(self.run.mesh, function, whole, (part,))

    def measured(self, video) -> detector.Measured:
        """Returns what the detector sees, on the host."""
        parts = [
            jax.device_get(self.divided(detector.measure, (), video[i : i + _AT_ONCE]))
            for i in range(0, len(video), _AT_ONCE)
        ]
        return jax.tree.map(lambda *part: np.concatenate(part), *parts)

    def features(self, video) -> tuple[np.ndarray, np.ndarray]:
        """Returns pooled pixels and the random network's view."""
        blocks = (video[i : i + _AT_ONCE] for i in range(0, len(video), _AT_ONCE))
        pairs = [self.divided(_features, (), block) for block in blocks]
        return tuple(np.concatenate([np.asarray(pair[i]) for pair in pairs]) for i in range(2))

    def reference(self):
        """Returns (basis, Gaussian of principal components, Gaussian of random features) of real
        clips."""
        if self.real is None:
            with self.run.stages("features of real clips"):
                self.real = self._reference()
        return self.real

    def _reference(self):
        n = min(_REAL_AT_ONCE, self.cfg.real)
        parts = []
        for i in range(math.ceil(self.cfg.real / _REAL_AT_ONCE)):
            factors = clips.sample(self.run.key(f"real {i}"), n)
            parts.append(self.features(self.rendered(factors)))
        pooled, random = (np.concatenate(x) for x in zip(*parts, strict=True))
        basis = metrics.principal(pooled, min(metrics.COMPONENTS, n - 1))
        return basis, distances.gaussian(basis(pooled)), distances.gaussian(random)


@jax.jit
def _through(vae, factors):  # -> uint8[b T H W 3]
    return sampling.decode(vae, encoded.encode(vae, factors).astype(jnp.float32))


@jax.jit
def _rendered(factors):  # -> uint8[b T H W 3]
    return clips.to_uint8(clips.render(factors))


@jax.jit
def _features(video):  # uint8[b T H W 3]
    video = clips.from_uint8(video)
    return metrics.pooled_pixels(video), metrics.random_features(video)


def psnr(video, parents) -> float:  # uint8[n T H W 3] x2
    """Returns `distances.psnr` of clips of bytes, computed on the device."""
    parts = [
        np.asarray(_decibels(video[i : i + _AT_ONCE], parents[i : i + _AT_ONCE]))
        for i in range(0, len(video), _AT_ONCE)
    ]
    return float(np.concatenate(parts).mean())


@jax.jit
def _decibels(video, parents):  # -> f32[b]
    error = jnp.square(video.astype(jnp.float32) - parents.astype(jnp.float32)).mean((1, 2, 3, 4))
    return 10 * jnp.log10(255.0**2 / error)


def evaluate(bench: Bench, row: Variant, rows: dict[str, Variant]) -> dict:
    """Returns all numbers of a row: of each seed, and their means with what is measured over all
    seeds together. rows: those that a parent is looked up in."""
    seeds, features = [], []
    for seed in range(bench.cfg.seeds):
        video, said = bench.clips(row, seed)
        values = detector.scores(bench.measured(video), said)
        if row.parent:
            values["psnr"] = psnr(video, bench.clips(rows[row.parent], seed)[0])
        seeds.append(values)
        features.append(bench.features(video))
    basis, pooled, random = bench.reference()
    mean = {name: float(np.mean([values[name] for values in seeds])) for name in seeds[0]}
    mean["clips"] = bench.cfg.clips * bench.cfg.seeds
    own_pooled, own_random = (np.concatenate(x) for x in zip(*features, strict=True))
    mean["fd_pca"] = distances.frechet(distances.gaussian(basis(own_pooled)), pooled)
    mean["fd_random"] = distances.frechet(distances.gaussian(own_random), random)
    if row.sampler is not None and row.template is None and row.split == "train":
        mean["diversity"] = _diversity(bench, row)
    if row.sampler is not None:
        mean["megabytes"] = _megabytes(bench, row)
    return {
        "title": row.title,
        "evaluations": row.evaluations,
        "steps": row.sampler.num_steps if row.sampler else 0,
        "seeds": seeds,
        "values": mean,
    }


def _diversity(bench: Bench, row: Variant) -> float:
    n = bench.cfg.prompts
    prompts = bench.prompts(row, bench.cfg.seeds, n, repeats=n)
    x = bench.latents(row, prompts, bench.run.key("diversity"))
    start = sampling.measured(bench.vae, jnp.asarray(x), bench.run.mesh).start.reshape(n, n, 2)
    said = jax.tree.map(lambda i: i[::n], prompts.said)
    return metrics.diversity(start, said, bench.run.key("places"))


def _megabytes(bench: Bench, row: Variant) -> float:
    """The size of all three networks as they are packaged."""
    networks = {"dit": bench.model(row), "vae": bench.vae, "text": bench.text}
    shapes = [orbax.abstract(kind, configs.stored(x.cfg)) for kind, x in networks.items()]
    leaves = jax.tree.leaves(shapes)
    return sum(x.size * x.dtype.itemsize for x in leaves) / 1e6


def seconds(bench: Bench, row: Variant) -> float:
    """Returns the time of one clip from tokens to pixels, programs compiled and weights in place:
    the median of a few."""
    prompts = bench.prompts(row, 0, 1)

    def one() -> float:
        start = time.perf_counter()
        x = bench.sampled(row, prompts.tokens, jax.random.key(0))
        jax.block_until_ready(sampling.decode(bench.vae, x))
        return time.perf_counter() - start

    one()
    return statistics.median(one() for _ in range(_REPEATS))
