"""Plans of requests by arithmetic: what stays, what is streamed, what is tiled; and the errors that
speak of them."""

import dataclasses

import jax
import pytest

from tdjax.checkpoints import orbax
from tdjax.config import VideoSize
from tdjax.errors import OutOfMemory
from tdjax.media.resolution import choose_size
from tdjax.parallel.mesh import make_mesh
from tdjax.pipeline import memory
from tdjax.pipeline.memory import GIB
from tdjax.presets import PRESETS, UMT5_XXL, WAN_1_3B, WAN_A14B_I2V, WAN_VAE

SIZE = VideoSize(frames=81, height=480, width=832)
T2V = {"text": UMT5_XXL, "vae": WAN_VAE, "dit": WAN_1_3B}
I2V = {"text": UMT5_XXL, "vae": WAN_VAE, "dit": WAN_A14B_I2V, "dit_low": WAN_A14B_I2V}


def limited(monkeypatch, limit: int | None) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: limit)


def test_every_stage_has_a_row_by_its_name():
    plan = memory.make_plan(I2V, SIZE, guided=False)
    stages = {row.stage: (row.name, row.component) for row in plan}
    assert stages == {
        "text": ("text", "text"),
        "vae encode": ("vae encode", "vae"),
        "dit": ("denoise (high noise)", "dit"),
        "dit_low": ("denoise (low noise)", "dit_low"),
        "vae decode": ("vae decode", "vae"),
    }
    assert all(plan.of(row.stage) is row for row in plan)
    with pytest.raises(KeyError, match="'load dit'; this plan has text, vae encode, dit"):
        plan.of("load dit")
    one = memory.make_plan(T2V, SIZE, guided=False)
    assert [row.name for row in one] == ["text", "denoise", "vae decode"]
    assert "peak" in one.table() and "denoise " in one.table()


def test_a_plan_is_frozen():
    plan = memory.make_plan(T2V, SIZE, guided=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.keep_resident = False


def test_guidance_doubles_the_batch():
    once, twice = (memory.make_plan(T2V, SIZE, guided=guided).of("dit") for guided in (False, True))
    assert twice.weights == once.weights and 1.9 < twice.working / once.working < 2.1


@pytest.mark.parametrize("text, weights, working", [("sp=4", 1, 4), ("tp=2,sp=2", 2, 4)])
def test_a_device_of_a_mesh_has_its_share(text, weights, working):
    """Tokens and frames are divided, weights where the mesh has an axis for them; keys and values
    of the text are whole. The VAE takes two latent frames at once."""
    mesh = make_mesh(text, WAN_1_3B)
    one, each = (memory.make_plan(T2V, SIZE, guided=False, mesh=m) for m in (None, mesh))
    assert one.of("dit").weights / each.of("dit").weights == pytest.approx(weights, rel=0.1)
    assert one.of("vae decode").weights == each.of("vae decode").weights
    two = memory.vae_working(WAN_VAE, SIZE.height, SIZE.width, encode=False, latents=2)
    assert two // 4 == each.of("vae decode").working < one.of("vae decode").working / 2
    text_kv = 2 * WAN_1_3B.layers * WAN_1_3B.text_len * WAN_1_3B.dim * 2
    share = (one.of("dit").working - text_kv) / (each.of("dit").working - text_kv)
    assert 0.7 * working < share <= working


def test_a_device_has_a_half_of_a_guided_step_and_one_of_several_videos():
    def working(guided: bool, text: str | None = None) -> int:
        mesh = make_mesh(text, WAN_1_3B)
        return memory.make_plan(T2V, SIZE, guided=guided, mesh=mesh).of("dit").working

    assert working(True, "cfg=2") == working(False) < working(True)
    assert working(False, "cfg=2") == working(False)
    assert working(True, "dp=2") == working(True) and working(False, "dp=4") == working(False)
    assert working(True, "cfg=2,sp=2") == working(True, "dp=2,cfg=2") - working(False) + working(
        False, "sp=2"
    )


def test_what_a_device_has_room_for(monkeypatch):
    """From a device that says nothing, over one that holds all, down to one that holds a tile."""
    plan = lambda **choice: memory.make_plan(T2V, SIZE, guided=False, **choice)
    decisions = lambda plan: (plan.keep_resident, plan.stream_text, plan.tiled_vae)
    limited(monkeypatch, None)
    whole = plan()
    assert decisions(whole) == (True, False, False)
    need = sum(row.weights for row in whole) + max(row.working for row in whole)
    limited(monkeypatch, 2 * need)
    assert decisions(plan()) == (True, False, False)
    assert decisions(plan(low_memory=True)) == (False, True, False)
    assert decisions(plan(low_memory=True, stream_text=False)) == (False, False, False)
    limited(monkeypatch, need)
    streamed = plan()
    assert decisions(streamed) == (True, True, False)  # without the text encoder the rest fits
    assert streamed.of("text").weights < whole.of("text").weights / 5
    limited(monkeypatch, whole.of("vae decode").total)
    tiled = plan()
    assert tiled.tiled_vae and tiled.of("vae decode").total < whole.of("vae decode").total
    assert not plan(tiled_vae=False).tiled_vae and plan(tiled_vae=True) == tiled


def test_running_out_of_memory_is_told_of_its_own_stage(monkeypatch):
    limited(monkeypatch, 2**34)
    plan = memory.make_plan(I2V, SIZE, guided=False)
    for row in plan:
        naming = memory.naming(f"load {row.stage}", plan, row.stage)
        with pytest.raises(OutOfMemory) as error, naming:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9999 bytes")
        assert error.value.what == f"out of device memory in stage 'load {row.stage}'"
        need, weights = f"{row.total / GIB:.1f}", f"{row.weights / GIB:.1f}"
        assert f"estimated need {need} GiB, of which weights {weights} GiB" in error.value.why
        assert "usable 16.0 GiB" in error.value.why


@pytest.mark.parametrize("kind", [RuntimeError, jax.errors.JaxRuntimeError])
def test_other_errors_pass(kind):
    plan = memory.make_plan(T2V, SIZE, guided=False)
    with pytest.raises(kind, match="INTERNAL"), memory.naming("denoise", plan, "dit"):
        raise kind("INTERNAL: something else")


def test_room_for_a_second_expert_in_the_host(monkeypatch):
    module = orbax.abstract("dit", WAN_1_3B)
    row = memory.StagePlan("dit", "denoise", "dit", 1000, 1000)
    monkeypatch.setattr(memory, "host_available", lambda: 2 * memory.module_bytes(module))
    assert memory.may_stage(row, module, 2**40)
    assert not memory.may_stage(row, module, None)  # the device's memory is the host's own
    assert not memory.may_stage(row, module, 3000)
    monkeypatch.setattr(memory, "host_available", lambda: memory.module_bytes(module))
    assert not memory.may_stage(row, module, 2**40)


SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"


@pytest.mark.parametrize(
    "name, attention, linear, over, counted",
    [
        (SMALL, "dense", "float", 1, 1.38),
        (SMALL, "sla", "float", 1, 1.38),
        (SMALL, "sagesla", "int8_channel", 1, 1.09),
        (SMALL, "sagesla", "int8_channel", 2, 0.64),
        (LARGE, "sagesla", "int8_channel", 1, 5.05),
        (LARGE, "sagesla", "int8_channel", 2, 2.87),
    ],
)
def test_a_step_takes_what_was_counted_on_a_gpu(
    name, attention, linear, over, counted, monkeypatch
):
    """XLA's count of one NVIDIA H200 (docs/bench/pipeline.jsonl, gpus.jsonl), in GiB."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    preset = PRESETS[name]
    cfg = dataclasses.replace(preset.config, attention=attention, linear=linear)
    size = choose_size(resolution=preset.resolution)
    estimate = memory.dit_working(cfg, size, 1, {"seq": over})
    assert 0.9 * counted < estimate / 2**30 < 1.15 * counted
