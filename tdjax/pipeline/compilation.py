"""The jitted stages of generation. Models are arguments, so nothing recompiles for another prompt,
seed or set of weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.models.umt5 import without_padding
from tdjax.parallel import hosts, space
from tdjax.parallel.sharding import COPIES, halves, twice
from tdjax.pipeline import executables
from tdjax.pipeline.executables import Asked
from tdjax.progress import Stages
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
    """Frames f32[b 4n H W 3] after those that the cache remembers -> (latents f32[b n h w c],
    cache)."""
    return vae.encode_chunk(video, cache)


def decode_first(vae, latents, *, output: str):
    """The first latent frame f32[b 1 h w c] -> (its frame [b 1 H W 3], whether all of it was
    finite, cache)."""
    return decode_later(vae, None, latents, output=output)


def decode_later(vae, cache, latents, *, output: str):
    """Latent frames [b n h w c] after those that the cache remembers -> (frames [b 4n H W 3],
    whether all of them were finite, cache)."""
    video, cache = vae.decode_chunk(latents, cache)
    return *pixels(video, output), cache


def pixels(video, output: str):
    """f32 in [-1, 1] -> (uint8, or float32 in [0, 1]; whether all of it was finite)."""
    finite = space.on_every_device(jnp.isfinite(video).all())
    video = jnp.clip(video, -1.0, 1.0)
    if output == "uint8":
        return jnp.round((video + 1.0) * 127.5).astype(jnp.uint8), finite
    return (video + 1.0) * 0.5, finite


@dataclasses.dataclass(frozen=True)
class OverSpace:
    """A body of the VAE with its frames divided over a mesh of `space.space_mesh`: one function for
    equal fields. inputs, outputs: which of them are divided."""

    body: Callable
    mesh: Mesh
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]

    @property
    def __name__(self) -> str:
        return self.body.__name__

    def __call__(self, vae, *chunk, output: str | None = None):
        """chunk: the body's arrays after its weights. output: of bodies that decode."""
        op = self.body if output is None else functools.partial(self.body, output=output)
        return space.over_space(op, self.mesh, self.inputs, self.outputs)(vae, *chunk)


def start_noise(key, steps: int, shape: tuple[int, ...]):
    """f32[steps *shape]. Entry k draws from fold_in(key, k): the start is the same for every number
    of steps."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), shape, jnp.float32))(
        jnp.arange(steps)
    )


def denoise(model, x, text, image, schedule, *, sampler: str):
    """Few steps: schedule = (noise f32[n b t h w c], times f32[n+1]) -> (x f32[b t h w c], finite
    bool[n]). image: of each sample, or [1 t h w c] of all."""
    noise, times = schedule
    kv, image = _text_kv(model, text), _of_all(image, x)
    return few_step.sample_from(
        lambda x, timestep: model.velocity(x, timestep, kv, image), x, noise, times, sampler
    )


def _of_all(image, x):
    """An image's channels for every row of x [b t h w c]."""
    if image is None or len(image) == len(x):
        return image
    return jnp.broadcast_to(image, (len(x), *image.shape[1:]))


def _text_kv(model, text):
    """Keys and values of the text, which every step reads alike; the barrier keeps the compiler
    from moving them into the loop."""
    return lax.optimization_barrier(model.text_kv(text))


def denoise_guided(model, state, text, image, schedule, *, guidance_scale: float):
    """The teacher's steps: schedule = unipc.StepCoefficients; text holds the prompt of each sample,
    then its negative prompt, [2b s d] (or [b s d] at guidance 1). image: of each sample, or of all.

    Both halves run as one doubled batch.
    """
    kv, image = _text_kv(model, text), _of_all(image, state.x)

    def velocity(x, timestep):
        both = lambda a: None if a is None else twice(a)
        if guidance_scale == 1.0:
            return model.velocity(x, timestep, kv, image)
        v, v_negative = halves(model.velocity(both(x), both(timestep), kv, both(image)))
        return few_step.guide(v, v_negative, guidance_scale)

    return few_step.teacher_from(velocity, state, schedule)


class Program:
    """An executable, or one to be."""

    def __init__(self, label: str, make: Callable[[], Any], owner: Programs):
        self.label = label
        self.executable: Any = None
        self.coming: Future | None = None
        self._make: Callable[[], Any] | None = make
        self._owner = owner

    def begin(self) -> None:
        """Has a thread compile it, unless that was asked before."""
        if self._make is not None and self.coming is None:
            self.coming = self._owner.submit(self._make)

    def wait(self) -> Any:
        """Returns the executable; it is compiled here where no thread has begun to.

        Waiting is a row of its own in the table of stages. Raises what went wrong: the next request
        for the same program tries again.
        """
        return self._owner.wait([self])[0]

    @property
    def ready(self) -> bool:
        """Whether the executable is there."""
        return self._make is None

    def finish(self) -> None:
        """Makes the executable, or takes it from the thread that was asked for it."""
        if self._make is None:
            return
        coming, self.coming = self.coming, None
        try:
            self.executable = self._make() if coming is None else coming.result()
        except BaseException:
            self._owner.drop(self)
            raise
        self._make = None  # it holds the arguments


class Programs:
    """Programs by function, static arguments and shapes.

    stages: where waiting for the compiler is told. With a mesh, weights lie as their shapes say and
    everything else is whole on every device, unless `rows` says otherwise. apart: its devices are
    those of several processes, all of which run the same programs in the same order.
    """

    def __init__(self, stages: Stages, mesh: Mesh | None = None):
        self.stages = stages
        self.mesh = mesh
        self.apart = hosts.apart(mesh)
        self.dropped = 0  # how often programs were let go: who has asked for them asks again
        self._requested: dict[Any, Program] = {}
        self._pool: ThreadPoolExecutor | None = None

    @property
    def whole(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    @property
    def copies(self) -> int:
        """How many videos are denoised at a time: one for each copy of the weights."""
        return 1 if self.mesh is None else self.mesh.shape.get(COPIES, 1)

    def rows(self, axis: int = 0) -> NamedSharding | None:
        """Returns how an array lies whose axis of this number is that of videos, which copies of
        the weights divide; whole where there is one copy."""
        if self.mesh is None or self.copies == 1:
            return self.whole
        return NamedSharding(self.mesh, PartitionSpec(*axis * [None], COPIES))

    def shape(self, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        """Returns the shape of an input of a program."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)

    def shapes_of(self, tree, lies: NamedSharding | None = None):
        """Returns the shapes of arrays that will be inputs of a program. lies: where, if they are
        not whole."""
        lies = lies or self.whole
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), tree)

    def place(self, tree):
        """Returns the inputs of a stage on the device, or whole on every device of the mesh."""
        if not self.apart:
            return jax.device_put(tree, self.whole)
        return jax.tree.map(lambda x: hosts.place(x, self.whole), tree)

    def readable(self, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Returns results of a program so that this process can read all of each: they may be
        divided over devices of several."""
        return self.place(arrays) if self.apart else arrays

    def request(
        self,
        label: str,
        function,
        *args,
        donate: tuple[int, ...] = (),
        mesh: Mesh | None = None,
        lies: Any = None,
        **static,
    ) -> Program:
        """Returns the program of a function for these arguments (arrays or shapes): the same one
        for the same function, static arguments and shapes. Nothing is compiled yet.

        mesh: another one over the same devices, by which the function itself says where its results
              lie. lies: where they lie on the pipeline's own, as `jax.jit` takes it; by default
              they are whole on every device.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
        key = function, tuple(sorted(static.items())), structure, shapes
        if key not in self._requested:
            lies = None if self.mesh is None or mesh is not None else lies or self.whole
            asked = Asked(function, args, static, donate, lies, mesh or self.mesh)
            self._requested[key] = Program(label, lambda: self.compile(asked), self)
        return self._requested[key]

    def wait(self, programs: Sequence[Program]) -> list[Any]:
        """Returns the executables of programs of one stage. Waiting for those that are not there is
        one row."""
        if not all(program.ready for program in programs):
            with self.stages(f"compile {programs[0].label}"):
                for program in programs:
                    program.finish()
        return [program.executable for program in programs]

    def compile(self, asked: Asked) -> jax.stages.Compiled:
        """Returns the executable of a program, from disk where it was kept."""
        return executables.made(asked)

    def submit(self, make: Callable[[], Any]) -> Future:
        """Has one of the compiling threads call a function."""
        self._pool = self._pool or ThreadPoolExecutor(COMPILERS, thread_name_prefix="compile")
        return self._pool.submit(make)

    @property
    def compiled(self) -> dict[Any, Any]:
        """The executables that are there, by (function, static arguments, structure, shapes)."""
        return {
            key: program.executable
            for key, program in self._requested.items()
            if program.executable is not None
        }

    @property
    def coming(self) -> dict[Any, Future]:
        """What threads were asked for and nobody has waited for yet, by the same keys."""
        return {
            key: program.coming
            for key, program in self._requested.items()
            if program.coming is not None
        }

    def forget(self) -> None:
        """Programs that threads were asked for and have not begun are not compiled."""
        for program in list(self._requested.values()):
            if program.coming is not None and program.coming.cancel():
                self.drop(program)

    def drop(self, program: Program) -> None:
        """The next request for it makes a new one."""
        self.dropped += 1
        self._requested = {k: other for k, other in self._requested.items() if other is not program}

    def clear(self) -> None:
        """Lets every program go, as new sizes for hours would fill the memory; the next request for
        one compiles it, or reads it from disk. Waits for those that threads are compiling, as a
        transformer begins alone."""
        self.forget()
        wait(self.coming.values())
        self.dropped += 1
        self._requested = {}

    def memory(self) -> dict[str, int]:
        """Returns XLA's own count of peak bytes on a device (arguments, outputs and temporaries)
        for each compiled stage."""
        out: dict[str, int] = {}
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
