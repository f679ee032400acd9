"""Data of released models: networks, samplers, and PRESETS, their names with the files they are."""

from __future__ import annotations

import dataclasses

from tdjax.config import DiTConfig, SamplerConfig, TextConfig, VAEConfig

T2V_SAMPLER = SamplerConfig()
I2V_SAMPLER = SamplerConfig(sigma_max=200.0)
TEACHER_SAMPLER = SamplerConfig(
    num_steps=50, sampler="unipc", sigma_max=5000.0, shift=5.0, guidance_scale=5.0
)

PURE_NOISE = 1e6  # sigma of samplers that begin at pure noise: flow time 1 in float32
# ModelTC/LightX2V's distilled weights: 1, 0.9375, 0.8333, 0.625, two of them for each expert.
EULER_SAMPLER = SamplerConfig(num_steps=4, sampler="euler", sigma_max=PURE_NOISE, shift=5.0)
RCM_720P_SAMPLER = SamplerConfig(sigma_max=120.0)

WAN_1_3B = DiTConfig()
WAN_14B = DiTConfig(dim=5120, ffn_dim=13824, layers=40, heads=40)
WAN_A14B_I2V = dataclasses.replace(WAN_14B, in_channels=36)
WAN_VAE = VAEConfig()
UMT5_XXL = TextConfig()
SHARED_GB = 11.6  # VAE, text encoder and tokenizer, which all presets share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One released model: where its files are and how it is sampled. `dit` is (file,) or (high
    noise, low noise)."""

    repo: str  # hub id of the transformer
    dit: tuple[str, ...]
    config: DiTConfig
    resolution: str
    gigabytes: float  # of the transformer's files
    sampler: SamplerConfig = T2V_SAMPLER
    base_repo: str = "Wan-AI/Wan2.1-T2V-1.3B"  # hub id of VAE, text encoder and tokenizer
    vae: str = "Wan2.1_VAE.pth"
    text: str = "models_t5_umt5-xxl-enc-bf16.pth"
    tokenizer: str = "google/umt5-xxl"

    @property
    def distilled(self) -> bool:
        """Whether it was made for few steps, with guidance built in."""
        return not self.sampler.guided


def _turbo(
    name: str, config: DiTConfig, resolution: str, gigabytes: tuple[float, float]
) -> dict[str, Preset]:
    """The two presets of one distilled text-to-video model: as published, and its int8 (`-quant`)
    file."""
    sla = dataclasses.replace(config, attention="sla")
    int8 = dataclasses.replace(sla, linear="int8")
    repo = f"TurboDiffusion/{name}"
    return {
        name.lower(): Preset(
            repo=repo,
            dit=(f"{name}.pth",),
            config=sla,
            resolution=resolution,
            gigabytes=gigabytes[0],
        ),
        f"{name.lower()}-quant": Preset(
            repo=repo,
            dit=(f"{name}-quant.pth",),
            config=int8,
            resolution=resolution,
            gigabytes=gigabytes[1],
        ),
    }


def _turbo_i2v(suffix: str, linear: str, gigabytes: float) -> Preset:
    return Preset(
        repo="TurboDiffusion/TurboWan2.2-I2V-A14B-720P",
        dit=(
            f"TurboWan2.2-I2V-A14B-high-720P{suffix}.pth",
            f"TurboWan2.2-I2V-A14B-low-720P{suffix}.pth",
        ),
        config=dataclasses.replace(WAN_A14B_I2V, attention="sla", linear=linear),
        resolution="720p",
        gigabytes=gigabytes,
        sampler=I2V_SAMPLER,
    )


def _lightx2v_i2v(kind: str, linear: str, gigabytes: float) -> Preset:
    return Preset(
        repo="lightx2v/Wan2.2-Distill-Models",
        dit=tuple(
            f"wan2.2_i2v_A14b_{expert}_noise{kind}_lightx2v_4step.safetensors"
            for expert in ("high", "low")
        ),
        config=dataclasses.replace(WAN_A14B_I2V, linear=linear),
        resolution="480p",
        gigabytes=gigabytes,
        sampler=EULER_SAMPLER,
    )


def _rcm(size: str, config: DiTConfig, gigabytes: float, sampler=T2V_SAMPLER) -> Preset:
    return Preset(
        repo="worstcoder/rcm-Wan",
        dit=(f"rCM_Wan2.1_T2V_{size}.pt",),
        config=config,
        resolution=size.rpartition("_")[2],
        gigabytes=gigabytes,
        sampler=sampler,
    )


PRESETS: dict[str, Preset] = {
    **_turbo("TurboWan2.1-T2V-1.3B-480P", WAN_1_3B, "480p", (2.8, 1.5)),
    **_turbo("TurboWan2.1-T2V-14B-480P", WAN_14B, "480p", (28.6, 14.5)),
    **_turbo("TurboWan2.1-T2V-14B-720P", WAN_14B, "720p", (28.6, 14.5)),
    "turbowan2.2-i2v-a14b-720p": _turbo_i2v("", "float", 57.2),
    "turbowan2.2-i2v-a14b-720p-quant": _turbo_i2v("-quant", "int8", 29.1),
    "wan2.1-t2v-1.3b": Preset(
        repo="Wan-AI/Wan2.1-T2V-1.3B",
        dit=("diffusion_pytorch_model.safetensors",),
        config=WAN_1_3B,
        resolution="480p",
        gigabytes=5.7,
        sampler=TEACHER_SAMPLER,
    ),
    "wan2.1-t2v-14b": Preset(
        repo="Wan-AI/Wan2.1-T2V-14B",
        dit=("diffusion_pytorch_model.safetensors.index.json",),
        config=WAN_14B,
        resolution="720p",
        gigabytes=57.2,
        sampler=TEACHER_SAMPLER,
    ),
    "wan2.2-i2v-a14b": Preset(
        repo="Wan-AI/Wan2.2-I2V-A14B",
        dit=(
            "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
            "low_noise_model/diffusion_pytorch_model.safetensors.index.json",
        ),
        config=WAN_A14B_I2V,
        resolution="720p",
        gigabytes=114.3,
        sampler=dataclasses.replace(TEACHER_SAMPLER, num_steps=40, guidance_scale=3.5),
    ),
    "wan2.2-t2v-a14b": Preset(
        repo="Wan-AI/Wan2.2-T2V-A14B",
        dit=(
            "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
            "low_noise_model/diffusion_pytorch_model.safetensors.index.json",
        ),
        config=WAN_14B,
        resolution="720p",
        gigabytes=114.3,
        # The published code takes guidance 4 above the boundary and 3 below.
        sampler=dataclasses.replace(
            TEACHER_SAMPLER, num_steps=40, shift=12.0, boundary=0.875, guidance_scale=3.5
        ),
    ),
    "wan2.2-i2v-a14b-lightx2v": _lightx2v_i2v("", "float", 57.2),
    "wan2.2-i2v-a14b-lightx2v-int8": _lightx2v_i2v("_int8", "int8_channel", 29.1),
    "rcm-wan2.1-t2v-1.3b-480p": _rcm("1.3B_480p", WAN_1_3B, 2.8),
    "rcm-wan2.1-t2v-14b-480p": _rcm("14B_480p", WAN_14B, 28.6),
    "rcm-wan2.1-t2v-14b-720p": _rcm("14B_720p", WAN_14B, 28.6, RCM_720P_SAMPLER),
}
