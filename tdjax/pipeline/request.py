"""One call of the pipeline as checked values. Everything wrong with the arguments is found here,
before any long work, and without jax unless there is a key."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from tdjax.checkpoints.locate import Located
from tdjax.config import (
    DiTConfig,
    SamplerConfig,
    TextConfig,
    VideoSize,
    check_fps,
    check_samples,
    sampler_changes,
)
from tdjax.config.values import is_flat, is_small_float, reals, settle, shown, whole
from tdjax.errors import UsageError
from tdjax.media.image import as_image
from tdjax.media.resolution import choose_size
from tdjax.pipeline.call import CallAliases
from tdjax.pipeline.options import (
    Check,
    Fit,
    OutputType,
    Sampler,
    check_choice,
    without_aliases,
)
from tdjax.presets import I2V_SAMPLER, PRESETS, T2V_SAMPLER, TEACHER_SAMPLER
from tdjax.progress import Listener

if TYPE_CHECKING:
    import jax

_SIZE = ("resolution", "aspect_ratio", "width", "height", "num_frames")
_SAMPLER = tuple(field.name for field in dataclasses.fields(SamplerConfig))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A validated call."""

    prompts: tuple[str, ...]
    size: VideoSize
    sampler: SamplerConfig
    negative_prompt: str = ""
    image: np.ndarray | None = None  # uint8 [H W 3]
    fit: str = "crop"
    num_samples: int = 1
    seed: int | tuple[int, ...] | None = 0  # one, or one for each prompt; None beside a key
    key: Any = None
    latents: np.ndarray | None = None  # start noise [1 t h w c]
    prompt_embeds: np.ndarray | None = None  # [b s d], in place of the text encoder
    output_type: str = "uint8"
    fps: int = 16
    resolution: str | None = None  # the name that the size came from, where there was one
    check: str = "finite"
    on_frames: Callable[[int, np.ndarray], None] | None = None  # takes chunks [t H W 3]
    on_step: Callable[[int, int], Any] | None = None  # takes (step that is done, steps)
    on_stage: Callable[[str], Any] | None = None  # takes the name of a stage that begins
    on_preview: Callable[[int, np.ndarray], Any] | None = None  # takes (step, frames [T H W 3])
    cancel: Any = None  # a threading.Event

    def __post_init__(self):
        settle(self)

    @property
    def single_steps(self) -> bool:
        """Whether somebody listens between the steps of the sampler."""
        return any(x is not None for x in (self.on_step, self.cancel, self.on_preview))

    @property
    def videos(self) -> int:
        """How many videos the call makes."""
        prompts = self.prompts if self.prompt_embeds is None else self.prompt_embeds
        return len(prompts) * self.num_samples

    def listener(self) -> Listener:
        """Returns whom the call tells how it goes."""
        return Listener(self.on_stage, self.on_step, self.cancel, self.on_preview)

    def random_key(self) -> jax.Array:
        """Returns the key that was given, or that of the seed."""
        import jax

        if self.key is not None:
            return self.key
        return jax.random.key(self.seed if isinstance(self.seed, int) else 0)

    def of(self, number: int) -> Request:
        """Returns the request with the seed of one of its prompts."""
        if not isinstance(self.seed, tuple):
            return self
        return dataclasses.replace(self, seed=self.seed[number])

    def digests(self) -> dict[str, str]:
        """Returns sha256 of the arrays that the caller gave, so that a sidecar tells whether they
        were the same."""
        given = {name: getattr(self, name) for name in ("image", "latents", "prompt_embeds")}
        return {
            k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest()
            for k, v in given.items()
            if v is not None
        }


_PLAIN = tuple(
    field.name
    for field in dataclasses.fields(Request)
    if field.name not in ("prompts", "size", "sampler", "resolution")
)
ACCEPTED = (*_PLAIN, *_SAMPLER, *_SIZE)  # arguments of a call beside the prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model: what a call takes from it where it gives nothing else, what the
    call's arrays must be, and what its notes speak of.

    distilled: it was made for few steps. experts: it has two transformers. language: the closed
    language of a small model, or None. prompts: some that suit it.
    """

    name: str
    task: str
    distilled: bool
    experts: bool
    language: dict[str, Any] | None
    prompts: tuple[str, ...]
    size: VideoSize
    resolution: str | None  # a name of VIDEO_SIZES; None for a model with a size of its own
    sampler: SamplerConfig
    text_encoder: bool  # whether there is one
    text_len: int
    text_dim: int
    channels: int  # of latents

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """Returns (1, t, h, w, c) of the latents of one video."""
        return (1, *size.latent_grid, self.channels)


def model_info(
    located: Located, transformer: DiTConfig, text: TextConfig | None, experts: bool
) -> ModelInfo:
    """Returns what a model says of itself (its model.json), else what its preset says, else its
    task."""
    about = located.facts
    sampler = I2V_SAMPLER if transformer.task == "i2v" else T2V_SAMPLER
    resolution: str | None = "480p"
    if located.preset in PRESETS:
        preset = PRESETS[located.preset]
        sampler, resolution = preset.sampler, preset.resolution
    if "width" in about:
        resolution = None
    sizes = {name: about[name] for name in ("frames", "height", "width") if name in about}
    return ModelInfo(
        name=about.get("name", located.name),
        task=transformer.task,
        distilled=located.distilled,
        experts=experts,
        language=about.get("language"),
        prompts=tuple(about.get("prompts", ())),
        size=VideoSize(**sizes),
        resolution=resolution,
        sampler=dataclasses.replace(sampler, **sampler_changes(about.get("sampler", {}))),
        text_encoder=text is not None,
        text_len=(text or transformer).text_len,
        text_dim=transformer.text_dim,
        channels=transformer.out_channels,
    )


def make_request(
    prompt: str | list[str] | tuple[str, ...] | None,
    arguments: dict[str, Any],
    model: ModelInfo,
) -> Request:
    """Returns the arguments over the model's own defaults; those that are None count as not given.

    Raises UsageError.
    """
    prompts = texts_of(prompt)
    defaults = {"num_samples": Request.num_samples}
    named = without_aliases(arguments, CallAliases, ACCEPTED, defaults)
    given = {name: value for name, value in named.items() if value is not None}
    image = given.pop("image", None)
    if image is not None:
        image = as_image(image)
    _check_task(model, image)
    size_given = {name: given.pop(name) for name in _SIZE if name in given}
    fit = given.pop("fit", Request.fit)
    check_choice("fit", fit, get_args(Fit))
    size, resolution = _chosen_size(size_given, fit, image, model)
    changes = {name: given.pop(name) for name in _SAMPLER if name in given}
    sampler = _chosen_sampler(changes, model.sampler)
    if "seed" in given:
        given["seed"] = _seeds(given["seed"])
    request = Request(
        prompts=prompts,
        size=size,
        sampler=sampler,
        image=image,
        fit=fit,
        resolution=resolution,
        **given,
    )
    return _checked(request, model)


def texts_of(given: Any) -> tuple[str, ...]:
    """The texts of one, a list of them, or None. Raises UsageError."""
    several = (given,) if isinstance(given, str) else given
    if given is None:
        several = ()
    if not is_flat(several) or not all(isinstance(each, str) for each in several):
        raise UsageError(
            f"prompt is {shown(given)}",
            "it is a text, or a list of texts with one video each",
            'for example pipe("a fox in the snow")',
        )
    return tuple(map(str, several))


def _chosen_size(
    given: dict[str, Any], fit: str, image: np.ndarray | None, model: ModelInfo
) -> tuple[VideoSize, str | None]:
    """(size, the name that it came from)."""
    if not given and model.resolution is None and fit != "adaptive":
        return model.size, None
    if model.resolution is None and not set(given) - {"num_frames"}:
        given = given | {"width": model.size.width, "height": model.size.height}
    given = {"resolution": model.resolution, "num_frames": model.size.frames} | given
    image_size = None if image is None else (image.shape[1], image.shape[0])
    return choose_size(**given, image_size=image_size, fit=fit), given["resolution"]


def _chosen_sampler(changes: dict[str, Any], own: SamplerConfig) -> SamplerConfig:
    """The model's sampler with what was asked for. Asked for the other class of samplers, it is
    that class's own defaults that are changed."""
    if "mid_t" in changes:
        times = reals("mid_t", changes["mid_t"])
        changes = {"num_steps": len(times) + 1} | changes | {"mid_t": times}
    if "sampler" in changes:
        check_choice("sampler", changes["sampler"], get_args(Sampler))
        few_step = changes["sampler"] in ("sde", "ode")
        if few_step != own.few_step:
            own = SamplerConfig() if few_step else TEACHER_SAMPLER
    return dataclasses.replace(own, **changes)


def _checked(request: Request, model: ModelInfo) -> Request:
    check_samples(request.num_samples)
    for name in ("latents", "prompt_embeds"):
        if (value := getattr(request, name)) is not None:
            _check_floats(name, value)
    _check_arrays(request, model)
    _check_seeds(request)
    check_choice("output_type", request.output_type, get_args(OutputType))
    check_choice("check", request.check, get_args(Check))
    check_fps(request.fps)
    if request.on_frames is not None and request.output_type == "latent":
        raise UsageError(
            "on_frames and output_type latent", "latents have no frames", "leave one of them away"
        )
    _check_listeners(request)
    if request.key is not None and not _is_key(request.key):
        raise UsageError(
            f"key is {shown(request.key)}",
            "a jax.random key is needed",
            "for example jax.random.key(3), or give a number as seed",
        )
    if not request.prompts and request.prompt_embeds is None:
        raise UsageError(
            "no prompt",
            "a prompt or prompt_embeds is needed",
            'give a sentence, for example pipe("a fox in the snow")',
        )
    if request.sampler.guided and not model.text_encoder:
        raise UsageError(
            "guidance without a text encoder",
            "the negative prompt is encoded by it",
            "give the prompt itself, or guidance_scale 1",
        )
    return request if request.key is None else dataclasses.replace(request, seed=None)


def _seeds(given: Any) -> int | tuple[int, ...]:
    """One seed, or several of a list. Raises UsageError."""
    if is_flat(given):
        return tuple(whole("seed", seed) for seed in given)
    return whole("seed", given)


def _check_seeds(request: Request) -> None:
    """Raises UsageError for seeds that no key can be made of, and for another number of them than
    there are prompts."""
    seeds = request.seed if isinstance(request.seed, tuple) else (request.seed,)
    for seed in seeds:
        if seed is not None and not 0 <= seed < 2**32:
            raise UsageError(
                f"seed is {seed!r}",
                "a whole number from 0 to 4294967295",
                "use 0, or give a jax.random key as key",
            )
    prompts = request.videos // request.num_samples
    if isinstance(request.seed, tuple) and len(seeds) != prompts:
        raise UsageError(
            f"{len(seeds)} seeds for {prompts} prompts",
            "`seed` is one for all prompts, or a list of one for each",
            "for several videos of one prompt, num_samples",
        )


def _check_listeners(request: Request) -> None:
    """Raises UsageError for functions that cannot be called as they will be."""
    taken = {
        "on_frames": ("index", "frames"),
        "on_step": ("step", "steps"),
        "on_stage": ("name",),
        "on_preview": ("step", "frames"),
    }
    for name, arguments in taken.items():
        function = getattr(request, name)
        if function is not None and not _takes(function, arguments):
            raise UsageError(
                f"{name} is {shown(function)}",
                f"it is a function that is called as {name}({', '.join(arguments)})",
                f"for example {name}=print",
            )
    if request.cancel is not None and not _takes(getattr(request.cancel, "is_set", None), ()):
        raise UsageError(
            f"cancel is {shown(request.cancel)}",
            "it is a threading.Event, which ends the call once it is set",
            "use threading.Event()",
        )


def _takes(function: Any, arguments: tuple) -> bool:
    """Whether a function can be called with these arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a function of C that does not say what it takes
        return True
    return True


def _check_floats(name: str, value: Any) -> None:
    """Raises UsageError unless an argument is an array of numbers that are finite as float32."""
    try:
        kind = np.dtype(value.dtype)
        plain = kind.kind in "biuf" or is_small_float(kind)
        plain = plain and not isinstance(value, np.ma.MaskedArray)
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(value, np.float32)).all() if plain else False
    except (AttributeError, TypeError, ValueError, RuntimeError):  # the last: it was deleted
        plain = finite = False
    if not plain:
        raise UsageError(
            f"{name} is {shown(value)}",
            "it is an array of numbers, without a mask",
            "convert it with numpy.asarray(..., numpy.float32)",
        )
    if not finite:
        raise UsageError(
            f"{name} hold NaN or infinity", "they are where sampling begins", "make them again"
        )


def _is_key(key: Any) -> bool:
    """Whether this is one key, of jax.random.key or of jax.random.PRNGKey."""
    import jax

    if not isinstance(key, jax.Array) or key.is_deleted():
        return False
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.dtype == np.uint32 and key.shape == (2,)


def _check_arrays(request: Request, model: ModelInfo) -> None:
    """Raises UsageError unless given arrays have the shapes of this model at this size."""
    latents, embeds = request.latents, request.prompt_embeds
    expected = model.latent_shape(request.size)
    if latents is not None and tuple(latents.shape) != expected:
        raise UsageError(
            f"latents have shape {tuple(latents.shape)}",
            f"{request.size} needs {expected}, [1 t h w c]",
            "match the size",
        )
    rows = (model.text_len, model.text_dim)
    if embeds is not None and (tuple(embeds.shape[1:]) != rows or not len(embeds)):
        raise UsageError(
            f"prompt_embeds have shape {tuple(embeds.shape)}",
            f"this model needs [b {model.text_len} {model.text_dim}]",
            "make them with pipe.embed(prompts), or save_prompt_embeds of the command",
        )
    if embeds is not None and len(request.prompts) not in (0, len(embeds)):
        raise UsageError(
            f"{len(embeds)} prompt_embeds for {len(request.prompts)} prompts",
            "prompts beside prompt_embeds say what these are of",
            "give as many, or no prompt",
        )


def _check_task(model: ModelInfo, image: np.ndarray | None) -> None:
    if model.task == "t2v" and image is not None:
        raise UsageError(
            "an image was given to text-to-video weights",
            f"their patch embedding takes {model.channels} channels, which are the noise's;"
            " image-to-video weights take 36 (16 noise, 4 mask, 16 image latents)",
            "use turbowan2.2-i2v-a14b-720p, or leave the image away",
        )
    if model.task == "i2v" and image is None:
        raise UsageError(
            "image-to-video weights need an image",
            "their patch embedding takes 36 channels (16 noise, 4 mask, 16 image latents);"
            " text-to-video weights take 16",
            "give `image`, or use a text-to-video model such as turbowan2.1-t2v-1.3b-480p",
        )
