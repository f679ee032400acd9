"""Arguments of `load`: refused before anything is read, and what they make of a model."""

import dataclasses
import shutil

import numpy as np
import pytest
import random_model
from random_model import SMALL, dit_folder

import tdjax
from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.errors import CheckpointError, UsageError
from tdjax.pipeline.components import PlannedComponent
from tdjax.pipeline.load import _make_alike, _swapped_lora, plan_pipeline
from tdjax.pipeline.options import PipelineOptions
from tdjax.presets import PRESETS, TEACHER_SAMPLER


def test_mesh_messages(model):
    with pytest.raises(UsageError, match=r"legal sizes of tp .*: 1, 2; sp takes any$"):
        tdjax.load(model, mesh="tp=3")
    with pytest.raises(UsageError, match="AXIS=SIZE"):
        tdjax.load(model, mesh="four")


def test_the_reference_needs_no_kernel_in_any_part(model):
    """--attention_impl reference is for GPUs without our kernels: the VAE follows it."""
    pipe = tdjax.load(model, impl="reference")
    assert pipe.config.impl == pipe.components["vae"].config.impl == "reference"
    assert tdjax.load(model).components["vae"].config.impl == "auto"


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_defaults_to_its_own_size(name):
    pipe = plan_pipeline(name, PipelineOptions())
    image = {"image": np.zeros((90, 160, 3), np.uint8)} if pipe.task == "i2v" else {}
    size = pipe.request("a", **image).size
    assert (size.width, size.height, size.frames) == {
        "480p": (832, 480, 81),
        "720p": (1280, 720, 81),
    }[PRESETS[name].resolution]


@pytest.mark.slow
def test_quantised_at_load_and_back(model, tmp_path, caplog):
    call = {"output_type": "latent", "num_steps": 2, **SMALL}
    exact = tdjax.load(model)("a red circle", **call).latents
    int8 = tdjax.load(model, quant="int8")
    far = lambda pipe: (
        np.linalg.norm(pipe("a red circle", **call).latents - exact) / np.linalg.norm(exact)
    )
    assert 1e-5 < far(int8) < 0.05
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")
    orbax.save(folder / "dit", int8.components["dit"].load(), kind="dit", cfg=int8.config)
    caplog.clear()
    back = tdjax.load(folder, quant="none")
    assert not caplog.text and back.config.linear == "float"
    assert 1e-5 < far(back) < 0.05
    caplog.clear()
    tdjax.load(folder)
    assert not caplog.text
    channel = tdjax.load(folder, quant="int8_channel")
    assert "int8 weights in the blocks, made int8_channel at load" in caplog.text
    assert 1e-5 < far(channel) < 0.05


def test_load_arguments(model, tmp_path):
    with pytest.raises(UsageError, match="cuDNN attention runs on NVIDIA GPUs"):
        tdjax.load(model, impl="cudnn")
    with pytest.raises(UsageError, match="Triton kernels run on NVIDIA GPUs"):
        tdjax.load(model, impl="triton")
    with pytest.raises(UsageError, match="attention is 'spares'"):
        tdjax.load(model, attention="spares")
    with pytest.raises(UsageError, match="allowed: auto, none, int8, int8_channel, fp8"):
        tdjax.load(model, quant="int4")
    with pytest.raises(CheckpointError):
        tdjax.load(tmp_path / "nowhere.pth")


def test_load_refuses_what_it_does_not_know(model):
    with pytest.raises(UsageError, match="vae_dtype is 'float64'"):
        tdjax.load(model, vae_dtype="float64")
    with pytest.raises(UsageError, match="did you mean 'tokenizer_path'"):
        tdjax.load(model, tokeniser_path="x")
    with pytest.raises(UsageError, match="8192"):
        tdjax.load(model).request("a", width=16000, height=16000)


@pytest.mark.parametrize(
    "name, kind, steps",
    [
        ("wan2.1_t2v_lightx2v_4step.safetensors", "LightX2V or Lightning", ("euler", 4, 1.0)),
        ("FastWan2.1-T2V.safetensors", "FastWan", ("sde", 3, 1.0)),
        ("mine.safetensors", "TurboDiffusion or rCM (by its keys)", ("sde", 4, 1.0)),
    ],
)
def test_weights_bring_their_sampler(model, tmp_path, caplog, name, kind, steps):
    file = export(open_leaves(model / "dit"), tmp_path / name)
    paths = {"vae_path": model / "vae", "text_encoder_path": model / "text"}
    pipe = tdjax.load(file, tokenizer_path=model / "tokenizer.json", **paths)
    sampler = pipe.sampler
    assert (sampler.sampler, sampler.num_steps, sampler.guidance_scale) == steps
    assert kind in caplog.text
    assert pipe.request("a", num_steps=2, sampler="ode").sampler.num_steps == 2


def test_weights_that_nothing_tells_are_undistilled(model, tmp_path, caplog):
    folder = dit_folder(tmp_path / "mine", dataclasses.replace(random_model.DIT, attention="dense"))
    paths = {"vae_path": model / "vae", "text_encoder_path": model / "text"}
    pipe = tdjax.load(folder, tokenizer_path=model / "tokenizer.json", **paths)
    assert pipe.sampler == TEACHER_SAMPLER
    assert "undistilled (nothing in names" in caplog.text


def test_what_a_file_is_comes_before_what_is_missing_beside_it(tmp_path, write_safetensors):
    factors = {f"blocks.0.self_attn.q.lora_{x}.weight": np.ones((2, 2), "f4") for x in "AB"}
    with pytest.raises(CheckpointError, match="is a LoRA, not a model"):
        tdjax.load(write_safetensors(tmp_path / "style.safetensors", factors))
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        tdjax.load(tmp_path / "page.safetensors")


def test_a_lora_whose_name_says_the_other_expert():
    low, high = ("a_low_noise.safetensors", 1.0), ("high.safetensors", 1.0)
    assert _swapped_lora([low], [low, high]) == [
        "a_low_noise.safetensors was given as lora_high, but its name says low",
        "high.safetensors was given as lora_low, but its name says high",
    ]


def test_experts_of_different_files_get_one_kind_of_layers():
    """One from GGUF, which is dequantised, the other in float8."""
    for kinds, made in (
        (("float", "fp8"), "fp8"),
        (("int8", "fp8"), "int8"),
        (("float",), "float"),
    ):
        dits = [
            PlannedComponent(
                f"{kind}.gguf", "dit", dataclasses.replace(random_model.DIT, linear=kind)
            )
            for kind in kinds
        ]
        notes = []
        _make_alike(dict(zip(("dit", "dit_low"), dits, strict=False)), notes.append)
        assert {dit.config.linear for dit in dits} == {made}
        assert len(notes) == len(kinds) - 1 and all(f"made {made}" in note for note in notes)
