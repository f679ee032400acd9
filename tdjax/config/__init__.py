"""Frozen dataclasses of networks, sizes and samplers. All validation of numbers happens here, in
`__post_init__`, and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from tdjax.config.parsing import mismatch, told
from tdjax.config.values import settle
from tdjax.errors import UsageError
from tdjax.precision import Policy

ATTENTION = ("dense", "sla", "sagesla")
# int8: tiles of 128 x 128, as published; the last two: tokens x output channels.
LINEAR = ("float", "int8", "int8_channel", "fp8")
# Implementations of every op; other names are implementations of attention alone.
IMPLS = ("auto", "reference", "triton", "interpret")


# none: all activations are kept, and the loop is unrolled. block: what each block reads, and it is
# computed again. products: those of its linear layers too, and the rest again. offload: what each
# block reads, in page-locked memory of the host.
REMAT = ("none", "block", "products", "offload")

# Rows of CLIP's features of an image of 224 x 224: its class and 16 x 16 patches.
CLIP_TOKENS = 257

LARGEST = 2**20  # what a size of a network stays below: umT5's vocabulary has a quarter of that
MANY = 1024  # layers, blocks, and other counts of which each costs work


def positive(config, *names, most: int = LARGEST):
    """Raises ValueError for a size below 1, and for one that no network has: files say what they
    like."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be at least 1")
        if value > most:
            raise ValueError(
                f"{type(config).__name__}.{name} is {value}; it must be at most {most}"
            )


def small(config, *names):
    """Raises ValueError for a number that is not between 0 and 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """Sparse-linear attention: the share of key blocks kept for each query block, and the block
    sizes in tokens."""

    topk: float = 0.1
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self):
        settle(self, topk="sla_topk")
        if not 0 < self.topk <= 1:
            raise UsageError(
                f"sla_topk is {self.topk}",
                "it is the share of key blocks that stays exact, greater than 0 and at most 1",
                "use 0.1 (fast, as published) or 0.15 (quality)",
            )
        if (self.block_q, self.block_k) not in ((128, 64), (64, 64), (64, 128)):
            raise ValueError(
                f"SLA blocks are {self.block_q}x{self.block_k}; allowed: 128x64, 64x64, 64x128"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the Wan video transformer. Defaults are Wan2.1 T2V 1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    layers: int = 30
    heads: int = 12
    in_channels: int = dataclasses.field(
        default=16,
        metadata={"help": "36 for image-to-video: 16 noise + 4 mask + 16 latents of the image"},
    )
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None  # width of image features (Wan2.1 I2V: 1280); None: no branch
    coordinates: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "three constant channels with the place in the clip: small models do not learn"
            " it from rotation"
        },
    )
    eps: float = 1e-6
    attention: str = "dense"
    linear: str = "float"
    # what the backward pass has of each block: REMAT; True and False of older files are "block" and
    # "none"
    remat: str | bool = "block"
    impl: str = "auto"  # which kernels compute: an `impl` of pallas_kernels
    sla: SLAConfig = SLAConfig()
    round_time: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "timestep rounded to bfloat16 before the sinusoid, as all published weights"
            " expect"
        },
    )
    policy: Policy = Policy()

    def __post_init__(self):
        positive(
            self,
            "dim",
            "ffn_dim",
            "heads",
            "in_channels",
            "out_channels",
            "freq_dim",
            "text_dim",
            "text_len",
        )
        positive(self, "layers", most=MANY)
        small(self, "eps")
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "block" if self.remat else "none")
        if self.remat not in REMAT:
            raise ValueError(f"DiTConfig.remat is {self.remat!r}; allowed: {', '.join(REMAT)}")
        if len(self.patch) != 3 or not all(1 <= n <= MANY for n in self.patch):
            raise ValueError(f"DiTConfig.patch is {self.patch}; it must be three sizes")
        if self.image_dim is not None:
            positive(self, "image_dim")
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(
                f"DiTConfig: dim {self.dim} over {self.heads} heads must give an even whole head"
                " width"
            )
        if self.attention not in ATTENTION:
            raise ValueError(
                f"DiTConfig.attention is {self.attention!r}; allowed: {', '.join(ATTENTION)}"
            )
        if self.linear not in LINEAR:
            raise ValueError(f"DiTConfig.linear is {self.linear!r}; allowed: {', '.join(LINEAR)}")
        if self.in_channels < self.out_channels:
            raise ValueError(
                f"DiTConfig: in_channels {self.in_channels} is less than out_channels"
                f" {self.out_channels}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def row_impl(self) -> str:
        """`impl` of norms, rotation and quantisation. "mosaic" is a name of attention and of the
        products of linear layers only: the rest is "auto"."""
        return self.impl if self.impl in IMPLS else "auto"

    @property
    def product_impl(self) -> str:
        """`impl` of the products of linear layers."""
        return "mosaic" if self.impl == "mosaic" else self.row_impl

    @property
    def embed_channels(self) -> int:
        """Channels that the patch embedding reads: the latents', the condition's, and t h w where
        the model takes them."""
        return self.in_channels + 3 * self.coordinates

    @property
    def condition_channels(self) -> int:
        """Channels beside the noisy latents: 20 for image-to-video (4 mask + 16 latents), else
        0."""
        return self.in_channels - self.out_channels

    @property
    def task(self) -> str:
        return "i2v" if self.condition_channels else "t2v"


# Per-channel mean and deviation of Wan2.1 latents; Wan-Video/Wan2.1 wan/modules/vae.py.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the causal video VAE (8x in space, 4x in time). Defaults are Wan2.1, which Wan2.2
    A14B uses too."""

    dim: int = 96
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = LATENT_MEAN
    std: tuple[float, ...] = LATENT_STD
    policy: Policy = Policy()
    impl: str = "auto"  # which kernels compute: an `impl` of pallas_kernels

    def __post_init__(self):
        positive(self, "dim", "latent_channels")
        positive(self, "res_blocks", most=MANY)
        if not 1 <= len(self.multipliers) <= 8 or not all(1 <= n <= MANY for n in self.multipliers):
            raise ValueError(
                f"VAEConfig.multipliers are {self.multipliers}; they must be one to eight positive"
                " numbers"
            )
        if len(self.temporal_down) != len(self.multipliers) - 1:
            raise ValueError(
                f"VAEConfig: {len(self.multipliers)} multipliers need {len(self.multipliers) - 1}"
                " temporal_down flags"
            )
        if not len(self.mean) == len(self.std) == self.latent_channels:
            raise ValueError(
                f"VAEConfig: mean and std need {self.latent_channels} values, one for each latent"
                " channel"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ValueError("VAEConfig: mean and std must be finite, and std positive")

    @property
    def wan_latents(self) -> bool:
        """Whether the latents are those of Wan2.1."""
        return (self.mean, self.std) == (LATENT_MEAN, LATENT_STD)

    @property
    def spatial(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def temporal(self) -> int:
        return 2 ** sum(self.temporal_down)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyVAEConfig:
    """Sizes of a small decoder of the same latents, normalised. Defaults are taew2_1."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    temporal_up: tuple[bool, ...] = (False, True, True)
    policy: Policy = Policy()

    def __post_init__(self):
        positive(self, "latent_channels")
        good = all(isinstance(n, int) and 1 <= n <= MANY**2 for n in self.widths)
        if not good or len(self.widths) != len(self.temporal_up) + 1 or not self.temporal_up:
            raise ValueError(
                f"TinyVAEConfig: widths {self.widths} and temporal_up {self.temporal_up}; positive"
                " widths are needed, one more than there are flags"
            )

    @property
    def spatial(self) -> int:
        return 2 ** len(self.temporal_up)

    @property
    def temporal(self) -> int:
        return 2 ** sum(self.temporal_up)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the umT5 encoder. Defaults are umT5-xxl."""

    vocab: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    text_len: int = 512
    eps: float = 1e-6
    policy: Policy = Policy()

    def __post_init__(self):
        positive(
            self,
            "vocab",
            "dim",
            "attention_dim",
            "ffn_dim",
            "heads",
            "buckets",
            "max_distance",
            "text_len",
        )
        positive(self, "layers", most=MANY)
        small(self, "eps")
        if self.attention_dim % self.heads:
            raise ValueError(
                f"TextConfig: attention_dim {self.attention_dim} is not a multiple of {self.heads}"
                " heads"
            )

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.heads


Config = DiTConfig | VAEConfig | TinyVAEConfig | TextConfig
SAMPLES = 10_000  # videos of one prompt in a call
KINDS: dict[str, type] = {
    "dit": DiTConfig,
    "vae": VAEConfig,
    "tiny_vae": TinyVAEConfig,
    "text": TextConfig,
}


def to_dict(config) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict[str, Any]):
    """The inverse of `to_dict`, with defaults for fields that are not there. Raises ValueError with
    the name of a field that is unknown, of another type, or not allowed."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is {told(values)}, not a table")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}"
        )
    hints = typing.get_type_hints(cls)
    out = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            out[name] = from_dict(hints[name], value)
            continue
        wrong = mismatch(value, hints[name], f"{cls.__name__}.{name}")
        if wrong:
            raise ValueError(wrong)
        out[name] = tuple(value) if isinstance(value, list) else value
    return cls(**out)


# (width, height) by resolution and aspect ratio. "480p" and "720p" are the trained sizes; "480",
# "512" and "720" are the older rows of thu-ml/TurboDiffusion imaginaire/utils/io/..., accepted
# because its commands name them: they are other sizes.
VIDEO_SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "480p": {
        "16:9": (832, 480),
        "9:16": (480, 832),
        "4:3": (640, 480),
        "3:4": (480, 640),
        "1:1": (640, 640),
    },
    "720p": {
        "16:9": (1280, 720),
        "9:16": (720, 1280),
        "4:3": (960, 720),
        "3:4": (720, 960),
        "1:1": (960, 960),
    },
    "480": {
        "16:9": (768, 432),
        "9:16": (432, 768),
        "4:3": (640, 480),
        "3:4": (480, 640),
        "1:1": (480, 480),
    },
    "512": {
        "16:9": (640, 384),
        "9:16": (384, 640),
        "4:3": (640, 512),
        "3:4": (512, 640),
        "1:1": (512, 512),
    },
    "720": {
        "16:9": (1280, 704),
        "9:16": (704, 1280),
        "4:3": (960, 704),
        "3:4": (704, 960),
        "1:1": (960, 960),
    },
}


def neighbours(value: int, step: int, offset: int = 0) -> tuple[int, int]:
    """The two nearest values of the form `step * k + offset` (at least one step) around `value`."""
    low = max((value - offset) // step * step + offset, offset if offset else step)
    return low, low + step


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Size of a clip in frames and pixels. Wan's VAE and patches allow 4k+1 frames and multiples of
    16 pixels."""

    frames: int = 81
    height: int = 480
    width: int = 832

    def __post_init__(self):
        settle(self, frames="num_frames")
        if self.frames < 1 or (self.frames - 1) % 4:
            low, high = neighbours(self.frames, 4, 1)
            raise UsageError(
                f"num_frames is {self.frames}",
                "the video VAE codes one frame, then groups of four: the number must be 4k+1",
                f"nearest allowed: {low} and {high}",
            )
        sides = {"height": self.height, "width": self.width, "num_frames": self.frames}
        large = [name for name, n in sides.items() if n > (4097 if name == "num_frames" else 8192)]
        if large:
            raise UsageError(
                f"{large[0]} is {sides[large[0]]}",
                "sides end at 8192 pixels and clips at 4097 frames, far beyond what the models were"
                " trained on",
                "use 832x480 or 1280x720, 81 frames",
            )
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                low, high = neighbours(value, 16)
                raise UsageError(
                    f"{name} is {value}",
                    "the VAE shrinks by 8 and the transformer takes patches of 2: it must be a"
                    " multiple of 16",
                    f"nearest allowed: {low} and {high}",
                )

    @property
    def latent_frames(self) -> int:
        """One for the first frame, and one for every four after it."""
        return 1 + (self.frames - 1) // 4

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the latents."""
        return self.latent_frames, self.height // 8, self.width // 8

    def token_grid(self, patch: tuple[int, int, int] = (1, 2, 2)) -> tuple[int, int, int]:
        """Patches along t, h and w."""
        t, h, w = (n // p for n, p in zip(self.latent_grid, patch, strict=True))
        return t, h, w

    def tokens(self, patch: tuple[int, int, int] = (1, 2, 2)) -> int:
        """How many tokens self-attention has: 32,760 at 832x480 and 81 frames, 75,600 at
        1280x720."""
        return math.prod(self.token_grid(patch))

    def __str__(self):
        return f"{self.width}x{self.height}, {self.frames} frames"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Few-step (rCM) sampling, or the teacher's many guided steps.

    sampler: "sde" (fresh noise at every step) or "ode" for distilled weights; "unipc" or "euler"
             for undistilled ones.
    mid_t:   TrigFlow times between the first and the last, of which the first num_steps-1 are used.
             rCM only.
    """

    num_steps: int = 4
    sampler: str = "sde"
    sigma_max: float = 80.0
    mid_t: tuple[float, ...] = (1.5, 1.4, 1.0)
    boundary: float = 0.9  # two experts: the low-noise one takes over at the first time below this
    shift: float = 5.0  # teacher only
    guidance_scale: float = 1.0  # teacher only; distilled weights have guidance built in

    def __post_init__(self):
        settle(self)
        if self.sampler not in ("sde", "ode", "unipc", "euler"):
            raise UsageError(
                f"sampler is {self.sampler!r}",
                "allowed: sde, ode (distilled weights), unipc, euler (teacher)",
                "leave it away for the weights' own",
            )
        if self.num_steps < 1:
            raise UsageError(
                f"num_steps is {self.num_steps}", "at least one step is needed", "use 4"
            )
        if self.few_step and self.num_steps > len(self.mid_t) + 1:
            raise UsageError(
                f"num_steps is {self.num_steps}",
                f"distilled weights take 1 to {len(self.mid_t) + 1} steps with the mid times"
                f" {', '.join(map(str, self.mid_t))}",
                f"use {len(self.mid_t) + 1}, or give {self.num_steps - 1} mid times (mid_t)",
            )
        for name in ("boundary", "shift", "guidance_scale"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name == "shift" and value == 0):
                raise UsageError(
                    f"{name} is {value}",
                    "a finite number is needed, not negative; shift positive",
                    "leave it at its default",
                )
        if not 0 < self.sigma_max < math.inf:
            raise UsageError(
                f"sigma_max is {self.sigma_max}",
                "it must be positive",
                "use 80 (text) or 200 (image)",
            )
        if self.few_step:
            self._check_few_step()

    def _check_few_step(self):
        times = (math.atan(self.sigma_max), *self.mid_t[: self.num_steps - 1], 0.0)
        if not all(a > b for a, b in zip(times, times[1:], strict=False)):
            raise UsageError(
                f"mid_t is {', '.join(map(str, self.mid_t))}",
                f"mid times must fall from {times[0]:.4f} (arctan of sigma_max"
                f" {self.sigma_max:g}) to 0",
                "the published ones are 1.5 1.4 1.0",
            )
        if self.guidance_scale != 1.0:
            raise UsageError(
                f"guidance_scale is {self.guidance_scale:g}",
                "distilled weights have guidance built in: it is not applied again",
                "leave it at 1, or use `sampler` unipc with undistilled weights",
            )

    @property
    def few_step(self) -> bool:
        """Whether this is sampling of distilled weights."""
        return self.sampler in ("sde", "ode")

    @property
    def guided(self) -> bool:
        """Whether every step also runs on the negative prompt."""
        return self.guidance_scale != 1.0


def check_samples(count: int) -> None:
    """Raises UsageError unless so many videos of one prompt can be asked for."""
    if not 1 <= count <= SAMPLES:
        raise UsageError(
            f"num_samples is {count}",
            f"at least one video is made of a prompt, and at most {SAMPLES}",
            "use 1",
        )


def check_fps(fps: float) -> None:
    """Raises UsageError unless files can have this frame rate."""
    if not 1 <= fps <= 1000:
        raise UsageError(
            f"fps is {fps}",
            "it is the frame rate written into the file, 1 to 1000",
            "the models were trained at 16",
        )


_EARLIER = {"steps": "num_steps", "mode": "sampler", "mid": "mid_t", "guidance": "guidance_scale"}


def sampler_changes(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a SamplerConfig that a model's own folder sets (model.json), by the
    names that they have now: folders written by tdjax 0.1 say steps, mode, mid and guidance. Raises
    ValueError for another name or type."""
    changes = {
        _EARLIER.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    }
    hints = typing.get_type_hints(SamplerConfig)
    for name, value in changes.items():
        if name not in hints:
            raise ValueError(f"a sampler has no {name}; it has {', '.join(hints)}")
        wrong = mismatch(value, hints[name], name)
        if wrong:
            raise ValueError(wrong)
    return changes
