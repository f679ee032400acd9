"""Names, keys and LoRA files to samplers: none runs in other steps than it was made for."""

import dataclasses

import numpy as np
import pytest

from tdjax.checkpoints import recipes
from tdjax.config import DiTConfig
from tdjax.presets import EULER_SAMPLER, I2V_SAMPLER, T2V_SAMPLER, TEACHER_SAMPLER
from tdjax.sampling import schedules

T2V, I2V = DiTConfig(), DiTConfig(in_channels=36)
SLA = dataclasses.replace(T2V, attention="sla")
EULER_TIMES = [1.0, 0.9375, 0.8333, 0.625, 0.0]
NAMES = {  # of files as people hold them -> kind
    "wan2.1_t2v_14b_lightx2v_4step.safetensors": "LightX2V or Lightning",
    "wan2.1_i2v_480p_int8_lightx2v_4step.safetensors": "LightX2V or Lightning",
    "wan2.2_i2v_A14b_high_noise_lightx2v_4step_720p_260412.safetensors": "LightX2V or Lightning",
    "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217": "LightX2V or Lightning",
    "Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16.safetensors": "LightX2V or Lightning",
    "models--FastVideo--FastWan2.1-T2V-1.3B-Diffusers": "FastWan",
    "models--FastVideo--SFWan2.2-I2V-A14B-Preview-Diffusers": "causal weights of FastVideo",
    "rCM_Wan2.1_T2V_1.3B_480p.pt": "TurboDiffusion or rCM",
    "rCM_Wan2.1_T2V_14B_720p.pt": "rCM at 14B 720p",
    "Wan2.2-I2V-A14B-high-rCM4.0-merged.pt": "TurboDiffusion or rCM",
    "TurboWan2.1-T2V-14B-720P-quant.pth": "TurboDiffusion or rCM",
    "my_turbo_t2v.safetensors": "TurboDiffusion or rCM",
    "Wan21_CausVid_14B_T2V_lora_rank32.safetensors": "few-step weights",
    "Wan21_T2V_14B_StepDistill_rank64.safetensors": "few-step weights",
    "wan2.1_t2v_1.3B_fp16.safetensors": "undistilled",
    "Wan2_1-T2V-14B_fp8_e4m3fn.safetensors": "undistilled",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "undistilled",
    "diffusion_pytorch_model.safetensors": "undistilled",
    "my film, 50 steps.safetensors": "undistilled",
    "breakfast.safetensors": "undistilled",
}
LORA = {  # styles that are no recipe
    "lightning_strike_effect.safetensors",
    "hyperrealism_wan.safetensors",
    "slow_motion_v2.safetensors",
    "turbo_car.safetensors",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    found = recipes.recognise([name], T2V)
    assert found.kind == NAMES[name]
    assert found.distilled == (NAMES[name] != "undistilled")
    assert (name in found.reason) == found.distilled


@pytest.mark.parametrize("name", sorted(LORA))
def test_styles_are_no_recipes(name):
    assert not recipes.recognise(["wan.safetensors"], T2V, lora=[name]).distilled


def test_lora_files_come_before_the_base():
    name = "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors"
    found = recipes.recognise(["Wan2_2-T2V-A14B_fp8_scaled.safetensors"], T2V, lora=[name])
    assert found.kind == "LightX2V or Lightning" and name in found.line()


def test_keys():
    for cfg in (SLA, dataclasses.replace(T2V, linear="int8")):
        assert recipes.recognise(["a.pth"], cfg).sampler == T2V_SAMPLER
    assert recipes.recognise(["a.pth"], T2V, gates=True).kind == "FastWan"
    assert recipes.recognise(["a.pth"], T2V).sampler == TEACHER_SAMPLER


def test_image_to_video():
    assert recipes.recognise(["TurboWan.pth"], I2V).sampler == I2V_SAMPLER
    assert recipes.recognise(["wan_i2v_lightx2v"], I2V).sampler == EULER_SAMPLER


@pytest.mark.parametrize(
    "name, times, boundary",
    [
        ("wan2.1_t2v_14b_lightx2v_4step", EULER_TIMES, 0.9),
        ("FastWan2.1-T2V-1.3B", [1.0, 0.757, 0.522, 0.0], 0.9),
        (
            "SFWan2.2",
            [1.0, 0.98551, 0.96552, 0.93617, 0.86598, 0.81988, 0.75, 0.63158, 0.0],
            0.875,
        ),
        ("rCM_Wan2.1_T2V_14B_720p", [0.99174, 0.93379, 0.8529, 0.60898, 0.0], 0.9),
    ],
)
def test_times(name, times, boundary):
    """The flow times that the published code walks, to the digits that it says."""
    sampler = recipes.recognise([name], T2V).sampler
    np.testing.assert_allclose(schedules.grid(sampler), times, atol=5e-5)
    assert sampler.boundary == boundary


def test_two_steps_of_lightx2v_belong_to_each_expert():
    assert schedules.split_times(schedules.times(EULER_SAMPLER), EULER_SAMPLER.boundary) == 2
