"""Programs and weights made by threads: asked for early, waited for in their own stage, wrong there
and nowhere else."""

import dataclasses
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model

import tdjax
from tdjax.checkpoints import orbax
from tdjax.errors import CheckpointError
from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Programs
from tdjax.pipeline.components import Part
from tdjax.progress import Stages
from tdjax.sampling import flow

SMALL = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model.write(tmp_path_factory.mktemp("models") / "random")


def double(x):
    return 2 * x


def test_a_program_asked_for_is_made_by_a_thread():
    where, programs, stages = [], Programs(), Stages(show=False)

    def traced(x):
        where.append(threading.current_thread())
        return 2 * x

    shape = programs.shape((3,))
    with programs.ahead():
        assert programs.get(stages, "double", traced, shape) is None
        assert programs.get(stages, "double", traced, shape) is None
    run = programs.get(stages, "double", traced, shape)
    assert len(where) == 1 and where[0] is not threading.main_thread()
    assert np.array_equal(run(jnp.arange(3.0)), [0, 2, 4])
    assert programs.get(stages, "double", traced, shape) is run and [
        row.name for row in stages.rows
    ] == ["compile double"]


def test_a_mistake_is_raised_where_the_program_is_needed():
    programs, stages = Programs(), Stages(show=False)

    def wrong(x):
        raise RuntimeError("no such program")

    with programs.ahead():
        programs.get(stages, "wrong", wrong, programs.shape((3,)))
        programs.get(stages, "double", double, programs.shape((3,)))
    programs.get(stages, "double", double, programs.shape((3,)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such program"):
            programs.get(stages, "wrong", wrong, programs.shape((3,)))


def test_what_was_not_begun_can_be_forgotten(monkeypatch):
    monkeypatch.setattr("tdjax.pipeline.compilation.COMPILERS", 1)
    programs, stages, go, made = Programs(), Stages(show=False), threading.Event(), []

    def slow(x):
        go.wait(30)
        return x

    with programs.ahead():
        programs.get(stages, "slow", slow, programs.shape((3,)))
        programs.get(stages, "other", lambda x: made.append(1) or x, programs.shape((4,)))
    while not next(iter(programs.coming.values())).running():
        time.sleep(0.01)
    programs.forget()
    go.set()
    programs.get(stages, "slow", slow, programs.shape((3,)))
    programs.pool.shutdown()
    assert not made and not programs.coming


def test_weights_loaded_ahead_are_the_weights(model):
    here, ahead = Part(model / "vae", "vae"), Part(model / "vae", "vae")
    ahead.load_ahead()
    ahead.load_ahead()
    a, b = orbax.named_leaves(here.load()), orbax.named_leaves(ahead.load())
    assert all(np.array_equal(a[name], b[name]) for name in a) and ahead.load() is ahead.load()
    ahead.free()
    ahead.load_ahead()
    ahead.free()
    assert ahead.module is None and ahead.coming is None


def damaged(model, folder):
    shutil.copytree(model, folder)
    files = sorted(
        (p for p in (folder / "dit" / "params").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    return folder


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the reader's own, of reads that it gave up
def test_damaged_weights_are_told_when_they_are_needed(model, tmp_path, capsys):
    stages = Stages(show=True)
    pipe = tdjax.load(damaged(model, tmp_path / "model"), stages=stages)
    with pytest.raises(CheckpointError, match="dit"):
        pipe("a red circle", **SMALL)
    names = [row.name for row in stages.rows]
    assert (
        names[-2:] == ["text", "compile start noise"]
        and "load dit ..." in capsys.readouterr().err.splitlines()[-1]
    )
    assert pipe.parts["dit"].module is None


def test_stages_are_told_in_order(model):
    """Whatever the threads are at, a run tells its stages in one order; without room for all,
    programs come before weights."""
    pipe = tdjax.load(model, prompt_cache=False)
    names = list(pipe("a red circle", **SMALL).timings)
    assert names == ["prepare", "load text", "compile text", "text", "compile start noise", "load dit", "compile denoise",
                     "compile and load the rest", "denoise", "load vae", "compile vae decode", "vae decode"]  # fmt: skip
    assert list(pipe("a red circle", **SMALL).timings) == ["text", "denoise", "vae decode"]
    lean = tdjax.load(model, prompt_cache=False, low_memory=True, text_encoder_device="device")
    names = list(lean("a red circle", **SMALL).timings)
    assert names == ["compile text", "load text", "text", "compile start noise", "compile denoise", "load dit", "denoise",
                     "compile vae decode", "load vae", "vae decode"]  # fmt: skip


def test_everything_has_begun_before_the_first_stage_ends(model, monkeypatch):
    pipe = tdjax.load(model, prompt_cache=False)
    seen = []
    monkeypatch.setattr(
        pipe.text,
        "whole",
        lambda *args, run=pipe.text.whole: seen.append(asked(pipe)) or run(*args),
    )
    pipe("a red circle", **SMALL)
    assert seen == [{"start", "denoise", "decode_first", "decode_later", "dit", "vae"}]
    assert not pipe.programs.coming


def unfinished(pipe) -> set[str]:
    """Of what threads were asked for, what they still do."""
    futures = {**{key[0].__name__: future for key, future in pipe.programs.coming.items()},
               **{name: part.coming for name, part in pipe.parts.items() if part.coming is not None}}  # fmt: skip
    return {name for name, future in futures.items() if not future.done()}


def test_a_transformer_begins_alone(model, monkeypatch):
    """cuDNN cannot prepare its attention while other threads use the GPU: they have finished when
    the first step begins."""
    pipe = tdjax.load(model, prompt_cache=False)
    seen, denoise, compile_, read = [], pipe.denoise_program, Programs.compile, Part.read
    slow = lambda run: lambda *args: time.sleep(0.3) or run(*args)
    monkeypatch.setattr(Programs, "compile", slow(compile_))
    monkeypatch.setattr(Part, "read", slow(read))

    def watched(*args):
        run = denoise(*args)
        return run and (lambda *a: seen.append(unfinished(pipe)) or run(*a))

    monkeypatch.setattr(pipe, "denoise_program", watched)
    pipe("a red circle", **SMALL)
    assert seen == [set()]


def asked(pipe) -> set[str]:
    programs = {function.__name__ for function, *_ in pipe.programs.coming}
    return programs | {name for name, part in pipe.parts.items() if part.coming is not None}


def test_little_memory_begins_nothing(model, monkeypatch):
    pipe = tdjax.load(model)
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**20)
    pipe.begin(pipe.request("a", **SMALL))
    assert asked(pipe) == set()


# -- the second expert -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")
    cfg = dataclasses.replace(random_model.DIT, attention="dense", layers=1)
    for seed, name in enumerate(("dit_high", "dit_low")):
        orbax.save(folder / name, random_model.random_leaves("dit", cfg, seed), kind="dit", cfg=cfg)
    return folder


def test_weights_held_by_the_host_are_the_weights(experts):
    here, held = Part(experts / "dit_low", "dit"), Part(experts / "dit_low", "dit")
    held.load_ahead(host=True)
    module = held.coming.result()
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(module)} == {"pinned_host"}
    a, b = orbax.named_leaves(here.load()), orbax.named_leaves(held.load())
    assert {leaf.sharding.memory_kind for leaf in b.values()} == {
        jax.devices()[0].default_memory().kind
    }
    assert all(np.array_equal(a[name], b[name]) for name in a) and all(
        leaf.is_deleted() for leaf in jax.tree.leaves(module)
    )


def test_the_second_expert_waits_in_the_host(experts, monkeypatch):
    """Memory for one expert at a time: the other one is read while the first runs, and the video is
    the same."""
    call = {"num_frames": 5, "width": 32, "height": 32, "output_type": "latent"}
    plain = tdjax.load(experts)
    expected, request = plain("a red circle", **call), plain.request("a", **call)
    limit = plain.plan(request)[1].total + 2**20
    assert not memory.keep_resident(plain.plan(request), 3 * limit, True)
    staged = []
    monkeypatch.setattr(
        Part,
        "read_to_host",
        lambda self, run=Part.read_to_host: staged.append(self.path.name) or run(self),
    )
    for room, names in ((True, ["dit_low"]), (False, [])):
        staged.clear()
        lean = tdjax.load(experts, low_memory=True)
        monkeypatch.setattr(memory, "memory_limit", lambda room=room: 2**34 if room else limit // 2)
        assert np.array_equal(lean("a red circle", **call).latents, expected.latents)
        assert staged == names and all(
            part.module is None and part.coming is None for part in lean.parts.values()
        )


def test_the_second_expert_is_read_after_the_first_step(experts, monkeypatch):
    pipe, events = tdjax.load(experts, low_memory=True), []
    denoise = pipe.denoise_program

    def counted(*args):
        run = denoise(*args)
        return lambda *a: events.append("step") or run(*a)

    monkeypatch.setattr(pipe, "denoise_program", counted)
    monkeypatch.setattr(pipe, "stage_second", lambda request: events.append("read"))
    call = {"num_frames": 5, "width": 32, "height": 32, "output_type": "latent"}
    pipe("a red circle", num_steps=4, **call)
    high = flow.split_times(
        flow.times(pipe.request("a", num_steps=4, **call).sampler), pipe.sampler.boundary
    )
    assert high > 1 and events == ["step", "read", "step", "step", "step"]
    events.clear()
    pipe(
        "a red circle", num_steps=4, boundary=0.95, **call
    )  # one step above it: nothing to hide the reading behind
    assert events == ["step"] * 4


def test_room_for_staging(experts, monkeypatch):
    module = Part(experts / "dit_low", "dit").abstract()
    stage = memory.StagePlan("denoise", 1000, 1000)
    assert memory.may_stage(stage, module, 2**34) and memory.host_available() > 2**20
    assert not memory.may_stage(stage, module, None) and not memory.may_stage(stage, module, 3000)
    monkeypatch.setattr(memory, "host_available", lambda: memory.module_bytes(module))
    assert not memory.may_stage(stage, module, 2**34)


def test_what_is_quantised_at_load_cannot_wait(model):
    assert (
        tdjax.load(model).parts["dit"].stageable
        and not tdjax.load(model, quant="fp8").parts["dit"].stageable
    )
