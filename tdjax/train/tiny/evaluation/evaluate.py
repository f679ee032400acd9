"""Stage 6: the table. Every row has the same prompts and noise and a file of its own, so rows may
be made in several runs."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tdjax.checkpoints import orbax
from tdjax.models.wan_dit import with_linear
from tdjax.train.tiny import configs, work
from tdjax.train.tiny.data import clips, encoded
from tdjax.train.tiny.evaluation import detector, metrics, report, sampling
from tdjax.train.tiny.evaluation.variants import Variant, variants
from tdjax.train.tiny.settings import EvaluateStage
from tdjax.train.tiny.work import OutOfTime, Run

SHOWN = (
    "truth",
    "teacher_unipc_50",
    "teacher_euler_4",
    "student_4",
    "student_2",
    "student_1",
    "sla_50",
    "merged_4",
    "merged_int8_4",
)
AT_ONCE = 64  # clips compared or rendered together
KEPT = 6  # sets of clips: a row's and its parent's, of each seed
REPEATS = 5  # of a timing


class Bench:
    """What rows share: networks, prompts, noise, and features of real clips; clips of parents are
    kept while they may be asked for."""

    def __init__(self, run: Run):
        self.run, self.cfg = run, run.settings["evaluate"]
        self.vae, self.text = work.load(run, "vae"), work.load(run, "text")
        self.tokenizer = encoded.tokenizer(run)
        self.negative = encoded.negative(self.tokenizer)
        self.models: dict = {}
        self.kept: dict = {}
        self.real = None

    def model(self, row: Variant):
        """The transformer of a row; one is kept at a time."""
        name = (row.weights, row.linear)
        if name not in self.models:
            self.models = {
                name: with_linear(work.load(self.run, row.weights, self.cfg.compute), row.linear)
            }
        return self.models[name]

    def prompts(self, row: Variant, seed: int, n: int, repeats: int = 1) -> sampling.Prompts:
        key = self.run.key(f"evaluate {seed} {row.split} {n}")
        return sampling.prompts(self.tokenizer, key, n, row.split, row.template, repeats)

    def latents(self, row: Variant, prompts, key):  # -> f32[n t h w c] on the host
        size, parts = min(self.cfg.batch, len(prompts.texts)), []
        for i in range(0, len(prompts.texts), size):
            tokens = prompts.tokens[i : i + size]
            x = sampling.latents(
                self.model(row),
                self.text,
                tokens,
                self.negative,
                jax.random.fold_in(key, i),
                row.sampler,
            )
            parts.append(np.asarray(x))
        return np.concatenate(parts)

    def clips(self, row: Variant, seed: int):  # -> uint8[n T H W 3] on the host, what was asked for
        """The clips of a row and a seed: made once for itself and for its children."""
        name = (row.key, seed)
        if name not in self.kept:
            prompts = self.prompts(row, seed, self.cfg.clips)
            self.kept[name] = (self.made(row, seed, prompts), prompts.said)
            while len(self.kept) > KEPT:
                self.kept.pop(next(iter(self.kept)))
        return self.kept[name]

    def made(
        self, row: Variant, seed: int, prompts: sampling.Prompts
    ):  # -> uint8[n T H W 3] on the host
        """Clips of the first prompts of a seed, as many as are given: all of them or whole
        batches."""
        if row.sampler is not None:
            return sampling.videos(
                self.vae, self.latents(row, prompts, self.run.key(f"noise {seed}"))
            )
        factors = clips.sample(
            self.run.key(f"evaluate {seed} {row.split} {self.cfg.clips}"), self.cfg.clips, row.split
        )
        return self.rendered(
            jax.tree.map(lambda x: x[: len(prompts.texts)], factors), row.key == "vae"
        )

    def rendered(self, factors, through_vae: bool):
        parts = []
        for i in range(0, factors.start.shape[0], AT_ONCE):
            part = jax.tree.map(lambda x, i=i: x[i : i + AT_ONCE], factors)
            made = (
                sampling.decode(self.vae, self.vae_encode(part))
                if through_vae
                else clips.to_uint8(clips.render(part))
            )
            parts.append(np.asarray(made))
        return np.concatenate(parts)

    def vae_encode(self, factors):
        return encoded.encode(self.vae, factors).astype(jnp.float32)

    def measured(self, video) -> detector.Measured:
        parts = [
            jax.device_get(detector.measure(video[i : i + AT_ONCE]))
            for i in range(0, len(video), AT_ONCE)
        ]
        return jax.tree.map(lambda *part: np.concatenate(part), *parts)

    def features(self, video) -> tuple[np.ndarray, np.ndarray]:
        """Pooled pixels and the random network's view."""
        pairs = [both(video[i : i + AT_ONCE]) for i in range(0, len(video), AT_ONCE)]
        return tuple(np.concatenate([np.asarray(pair[i]) for pair in pairs]) for i in range(2))

    def reference(self):
        """(basis, Gaussian of principal components, Gaussian of random features) of real clips."""
        if self.real is None:
            with self.run.stages("features of real clips"):
                pooled, random = [], []
                for i in range(-(-self.cfg.real // 1024)):
                    n = min(1024, self.cfg.real)
                    part = self.features(
                        self.rendered(clips.sample(self.run.key(f"real {i}"), n), False)
                    )
                    pooled, random = [*pooled, part[0]], [*random, part[1]]
                basis = metrics.principal(np.concatenate(pooled), min(metrics.COMPONENTS, n - 1))
                self.real = (
                    basis,
                    metrics.gaussian(basis(np.concatenate(pooled))),
                    metrics.gaussian(np.concatenate(random)),
                )
        return self.real


@jax.jit
def both(video):  # uint8[b T H W 3]
    video = clips.from_uint8(video)
    return metrics.pooled_pixels(video), metrics.random_features(video)


def psnr(video, parents) -> float:  # uint8[n T H W 3] x2
    """`metrics.psnr` of clips of bytes, on the device."""
    parts = [
        np.asarray(decibels(video[i : i + AT_ONCE], parents[i : i + AT_ONCE]))
        for i in range(0, len(video), AT_ONCE)
    ]
    return float(np.concatenate(parts).mean())


@jax.jit
def decibels(video, parents):  # -> f32[b]
    error = jnp.square(video.astype(jnp.float32) - parents.astype(jnp.float32)).mean((1, 2, 3, 4))
    return 10 * jnp.log10(255.0**2 / error)


def evaluate(bench: Bench, row: Variant, rows: dict[str, Variant]) -> dict:
    """All numbers of a row: of each seed, and their means with what is measured over all seeds
    together."""
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
    mean["fd_pca"] = metrics.frechet(
        metrics.gaussian(basis(np.concatenate([f[0] for f in features]))), pooled
    )
    mean["fd_random"] = metrics.frechet(
        metrics.gaussian(np.concatenate([f[1] for f in features])), random
    )
    if row.sampler is not None and row.template is None and row.split == "train":
        mean["diversity"] = diversity(bench, row)
    if row.sampler is not None:
        mean["megabytes"] = megabytes(bench, row)
    return {
        "title": row.title,
        "evaluations": row.evaluations,
        "steps": row.sampler.num_steps if row.sampler else 0,
        "seeds": seeds,
    } | {"values": mean}


def diversity(bench: Bench, row: Variant) -> float:
    n = bench.cfg.prompts
    prompts = bench.prompts(row, bench.cfg.seeds, n, repeats=n)
    x = bench.latents(row, prompts, bench.run.key("diversity"))
    start = sampling.measured(bench.vae, jnp.asarray(x)).start.reshape(n, n, 2)
    return metrics.diversity(
        start, jax.tree.map(lambda i: i[::n], prompts.said), bench.run.key("places")
    )


def megabytes(bench: Bench, row: Variant) -> float:
    """Of all three networks as they are packaged."""
    cfg = configs.stored(bench.model(row).cfg)
    kinds = (
        ("dit", cfg),
        ("vae", configs.stored(bench.vae.cfg)),
        ("text", configs.stored(bench.text.cfg)),
    )
    leaves = [leaf for kind, cfg in kinds for leaf in jax.tree.leaves(orbax.abstract(kind, cfg))]
    return sum(x.size * x.dtype.itemsize for x in leaves) / 1e6


def seconds(bench: Bench, row: Variant) -> float:
    """Of one clip from tokens to pixels, programs compiled and weights in place: the median of a
    few."""
    prompts = bench.prompts(row, 0, 1)

    def one() -> float:
        start = time.perf_counter()
        x = sampling.latents(
            bench.model(row),
            bench.text,
            prompts.tokens,
            bench.negative,
            jax.random.key(0),
            row.sampler,
        )
        jax.block_until_ready(sampling.decode(bench.vae, x))
        return time.perf_counter() - start

    one()
    return statistics.median(one() for _ in range(REPEATS))


# -- files -----------------------------------------------------------------------------------------


def file_of(run: Run, row: Variant) -> Path:
    return run.folder / "results" / f"{row.key}.json"


def read(run: Run, row: Variant) -> dict:
    path = file_of(run, row)
    return json.loads(path.read_text()) if path.is_file() else {}


def write(run: Run, row: Variant, found: dict) -> None:
    """Add to a row's results; the file is complete or not there."""
    path = file_of(run, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = read(run, row)
    values = old.get("values", {}) | found.pop("values", {})
    part = path.with_suffix(".part")
    part.write_text(json.dumps(old | found | {"values": values}, indent=1) + "\n")
    os.replace(part, path)


def possible(run: Run, cfg: EvaluateStage) -> dict[str, Variant]:
    """The rows asked for whose weights are there."""
    rows = {
        row.key: row for row in variants(cfg) if not row.weights or work.finished(run, row.weights)
    }
    return (
        rows
        if cfg.rows == "all"
        else {key: rows[key] for key in cfg.rows.split(",") if key in rows}
    )


def families(rows: dict[str, Variant], parent: str = "") -> list[Variant]:
    """Rows with their children behind them, so that the parents' clips are still there."""
    own = [row for row in rows.values() if (row.parent if row.parent in rows else "") == parent]
    return [member for row in own for member in (row, *families(rows, row.key))]


def run_stage(run: Run) -> None:
    bench, rows = Bench(run), possible(run, run.settings["evaluate"])
    known = {row.key: row for row in variants(bench.cfg)}
    for row in families(rows):
        if "seeds" not in read(run, row):
            if time.monotonic() > run.until:
                raise OutOfTime(
                    f"evaluate: stopped before {row.key}; the same command goes on from there"
                )
            start = time.monotonic()
            write(run, row, evaluate(bench, row, known))
            values = read(run, row)["values"]
            shown = "  ".join(
                f"{name} {values[name]:.4g}"
                for name in ("all", "fd_pca", "diversity", "psnr")
                if name in values
            )
            run.say(f"{row.key}: {shown}  ({time.monotonic() - start:.0f} s)")
    tell(run)
    if all(
        key in rows
        for key in SHOWN[1:]
        if not known[key].weights or work.finished(run, known[key].weights)
    ):
        sheet(run, bench, [known[key] for key in SHOWN if key in rows])


def timing_stage(run: Run) -> None:
    """Seconds of one clip on this machine, for the column of its kind."""
    bench, gpu = Bench(run), jax.default_backend() == "gpu"
    column, factor = ("gpu_ms", 1000.0) if gpu else ("cpu_seconds", 1.0)
    for row in possible(run, run.settings["evaluate"]).values():
        if row.sampler is not None and column not in read(run, row).get("values", {}):
            write(run, row, {"values": {column: factor * seconds(bench, row)}})
            run.say(f"{row.key}: {column} {read(run, row)['values'][column]:.4g}")
    tell(run)


def tell(run: Run) -> None:
    """All results so far as a table, table.md."""
    found = [(row, read(run, row)) for row in variants(run.settings["evaluate"])]
    rows = [
        report.Row(
            name=row.title,
            evaluations=result["evaluations"],
            steps=result["steps"],
            values=result["values"],
        )
        for row, result in found
        if "seeds" in result
    ]
    (run.folder / "table.md").write_text(report.table(rows))


def sheet(run: Run, bench: Bench, rows: list[Variant], prompts: int = 3) -> None:
    """Frames of a few prompts from every variant, all from the same noise: sheet_0.png,
    sheet_1.png, ..."""
    shown: dict[int, dict[str, np.ndarray]] = {i: {} for i in range(prompts)}
    first = bench.prompts(rows[0], 0, bench.cfg.clips).first(bench.cfg.batch)
    texts = first.texts
    for row in rows:
        video = bench.made(row, 0, first)
        for i in shown:
            steps = (
                f", {row.sampler.num_steps} step{'s'[: row.sampler.num_steps > 1]}"
                if row.sampler
                else f": {texts[i]}"
            )
            shown[i][f"{row.title}{steps}"] = video[i]
    for i, strips in shown.items():
        report.contact_sheet(run.folder / f"sheet_{i}.png", strips)
