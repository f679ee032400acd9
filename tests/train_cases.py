"""A toy of two leaves for the loop of training: samples in memory, a state, steps, whole runs."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tdjax.progress import Stages
from tdjax.train import checkpoints
from tdjax.train.configs import RunConfig
from tdjax.train.loop import Schedule, train
from tdjax.train.state import TrainState
from tdjax.train.stream import Position, Stream


class ArraySource:
    """Samples in memory: latents f32 [n t h w c], text [n s d], image [n t h w 20] or None."""

    units = 1

    def __init__(self, latents: np.ndarray, text: np.ndarray, image: np.ndarray | None = None):
        self.latents = latents
        self.text = text
        self.image = image
        self.fingerprint = hashlib.sha256(latents.tobytes() + text.tobytes()).hexdigest()[:16]

    def entries(self, unit: int):
        return range(len(self.latents))

    def size(self, unit: int):
        return ""

    def read(self, entry: int):
        image = None if self.image is None else self.image[entry]
        return np.asarray(self.latents[entry], np.float32), self.text[entry], image


START = Position()
OPTIMIZER = optax.adam(1e-2)


SAMPLES = 7


def numbers(bad=()):
    """A source of samples that are their own numbers, those in `bad` NaN."""
    x = np.arange(SAMPLES, dtype=np.float32)
    x[list(bad)] = np.nan
    return ArraySource(
        np.broadcast_to(x[:, None, None, None, None], (SAMPLES, 1, 1, 1, 2)),
        np.zeros((SAMPLES, 1, 1)),
    )


def state():
    model = {"w": jnp.full((2,), 0.5), "b": jnp.zeros((3, 2))}
    return TrainState(
        step=jnp.int32(0),
        model=model,
        ema=jax.tree.map(jnp.copy, model),
        opt=OPTIMIZER.init(model),
        key=jax.random.key(3),
    )


def step(state, teacher, batch):
    """Uses all that a step may depend on: the key, the number of the step, data, momentum."""
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), batch.latents.shape)
    loss = lambda model: jnp.mean(
        (batch.latents * model["w"] + model["b"].mean(0) - noise - teacher) ** 2
    )
    value, grads = jax.value_and_grad(loss)(state.model)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt = OPTIMIZER.update(grads, state.opt, state.model)
    model = optax.apply_updates(state.model, updates)
    ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.ema, model)
    state = dataclasses.replace(state, step=state.step + 1, model=model, ema=ema, opt=opt)
    return state, {"loss": value}


def total(state, teacher, batch):
    """Changes no weight; its loss is the sum of the batch."""
    return dataclasses.replace(state, step=state.step + 1), {"loss": batch.latents.sum()}


def run(
    folder,
    start=None,
    *,
    phases=None,
    cycle=None,
    stream=None,
    position=START,
    show=False,
    on_save=None,
    **config,
):
    usual = {"steps": 8, "log_every": 2, "save_every": 100}
    phases = phases or {"train": step}
    return train(
        start or state(),
        jnp.float32(1.5),
        phases,
        cycle or Schedule(cycle=tuple(phases)),
        stream or Stream(numbers(), batch=3),
        RunConfig(folder=str(folder), **(usual | config)),
        position=position,
        stages=Stages(show),
        on_save=on_save,
    )


def resumed(folder, **config):
    last, stream = checkpoints.latest(folder), Stream(numbers(), batch=3)
    position = stream.restored(checkpoints.inspect(last)["data"])
    return run(
        folder,
        checkpoints.restore(last, jax.eval_shape(state)),
        stream=stream,
        position=position,
        **config,
    )


def same_bits(a, b):
    a, b = checkpoints.arrays(a), checkpoints.arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def mesh(**axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
