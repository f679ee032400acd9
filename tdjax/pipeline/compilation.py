"""The jitted stages of generation. Models are arguments, so nothing recompiles for another prompt,
seed or set of weights."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tdjax.models.umt5 import without_padding
from tdjax.sampling import few_step

COMPILERS = 4  # programs that are compiled at the same time


def encode_text(encoder, ids, mask):
    """ids, mask i32[b s] -> [b s d], zeros after each prompt's end."""
    return encoder(ids, mask)


def text_layer(block, x, mask):
    """One layer of the text encoder: x [b s d] -> [b s d]."""
    return block(x, mask)


def text_end(norm, x, mask):
    """What the encoder does after its last layer."""
    return without_padding(norm(x), mask)


def encode_first(vae, video):
    """The first frame f32[b 1 H W 3] in [-1, 1] -> (normalised latents f32[b 1 h w c], cache)."""
    return vae.encode_chunk(video)


def encode_later(vae, cache, video):
    """Four frames f32[b 4 H W 3] after those that the cache remembers -> (latents f32[b 1 h w c],
    cache)."""
    return vae.encode_chunk(video, cache)


def decode_first(vae, latents, *, output: str):
    """The first latent frame f32[b 1 h w c] -> (its frame [b 1 H W 3], whether all of it was
    finite, cache)."""
    return decode_later(vae, None, latents, output=output)


def decode_later(vae, cache, latents, *, output: str):
    """A latent frame after those that the cache remembers -> (frames [b 4 H W 3], whether all of it
    was finite, cache)."""
    video, cache = vae.decode_chunk(latents, cache)
    return *pixels(video, output), cache


def pixels(video, output: str):
    """f32 in [-1, 1] -> (uint8, or float32 in [0, 1]; whether all of it was finite)."""
    finite, video = jnp.isfinite(video).all(), jnp.clip(video, -1.0, 1.0)
    if output == "uint8":
        return jnp.round((video + 1.0) * 127.5).astype(jnp.uint8), finite
    return (video + 1.0) * 0.5, finite


def start_noise(key, steps: int, shape: tuple[int, ...]):
    """f32[steps *shape]. Entry k draws from fold_in(key, k): the start is the same for every number
    of steps."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), shape, jnp.float32))(
        jnp.arange(steps)
    )


def denoise(model, x, text, image, schedule, *, mode: str):
    """Few steps: schedule = (noise f32[n b t h w c], times f32[n+1]) -> (x f32[b t h w c], finite
    bool[n])."""
    noise, times = schedule
    kv = before_the_loop(model, text)
    return few_step.sample_from(
        lambda x, timestep: model.velocity(x, timestep, kv, image), x, noise, times, mode
    )


def before_the_loop(model, text):
    """Keys and values of the text, which every step reads alike; the barrier keeps the compiler
    from moving them into the loop."""
    return lax.optimization_barrier(model.text_kv(text))


def denoise_guided(model, state, text, image, schedule, *, guidance: float):
    """The teacher's steps: schedule = teacher.Rows; text holds the prompt, then the negative
    prompt, [2b s d] (or [b s d] at guidance 1).

    Both halves run as one doubled batch.
    """
    kv = before_the_loop(model, text)

    def velocity(x, timestep):
        both = lambda a: None if a is None else jnp.concatenate([a, a])
        if guidance == 1.0:
            return model.velocity(x, timestep, kv, image)
        return few_step.guide(
            *jnp.split(model.velocity(both(x), both(timestep), kv, both(image)), 2), guidance
        )

    return few_step.teacher_from(velocity, state, schedule)


class Programs:
    """Compiled executables by function, static arguments and shapes; waiting for the compiler is a
    stage of its own.

    With a mesh, weights lie as their shapes say and everything else is whole on every device.
    """

    def __init__(self, mesh=None):
        self.mesh = mesh
        self.compiled: dict = {}
        self.asking = False
        self.coming: dict[Any, Future] = {}
        self.pool: ThreadPoolExecutor | None = None

    @property
    def whole(self):
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def shape(self, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)

    def place(self, tree):
        """Inputs of a stage on the device, or whole on every device of the mesh."""
        return jax.device_put(tree, self.whole)

    def get(self, stages, label: str, function, *args, donate: tuple[int, ...] = (), **static):
        """The executable for these arguments (arrays or shapes); compiled on first use. Within
        `ahead` it is asked for: None."""
        leaves, structure = jax.tree.flatten(args)
        key = (
            function,
            tuple(sorted(static.items())),
            structure,
            tuple((tuple(x.shape), str(x.dtype)) for x in leaves),
        )
        if key in self.compiled:
            return self.compiled[key]
        make = lambda: self.compile(
            jax.jit(
                lambda *a: function(*a, **static), donate_argnums=donate, out_shardings=self.whole
            ),
            args,
        )
        if self.asking:
            self.pool = self.pool or ThreadPoolExecutor(COMPILERS, thread_name_prefix="compile")
            if key not in self.coming:
                self.coming[key] = self.pool.submit(make)
            return None
        with stages(f"compile {label}"):
            future = self.coming.pop(key, None)
            self.compiled[key] = make() if future is None else future.result()
        return self.compiled[key]

    def compile(self, jitted, args):
        if self.mesh is None:
            return jitted.lower(*args).compile()
        with jax.set_mesh(self.mesh):
            return jitted.lower(*args).compile()

    @contextlib.contextmanager
    def ahead(self):
        """Within the block `get` hands programs to threads and returns at once; the next `get` of
        each waits for it, and raises what went wrong."""
        self.asking = True
        try:
            yield
        finally:
            self.asking = False

    def forget(self) -> None:
        """Programs that were asked for and not begun are not compiled."""
        self.coming = {key: future for key, future in self.coming.items() if not future.cancel()}

    def memory(self) -> dict[str, int]:
        """XLA's own count of peak bytes on a device (arguments, outputs and temporaries) for each
        compiled stage."""
        out = {}
        for (function, *_), executable in self.compiled.items():
            m = executable.memory_analysis()
            if m is not None:
                size = (
                    m.argument_size_in_bytes
                    + m.output_size_in_bytes
                    + m.temp_size_in_bytes
                    - m.alias_size_in_bytes
                )
                out[function.__name__] = max(out.get(function.__name__, 0), size)
        return out
