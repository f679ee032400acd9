"""Programs and weights made by threads: asked for early, waited for in their own stage, wrong there
and nowhere else."""

import dataclasses
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import random_model

import tdjax
from tdjax.checkpoints import orbax
from tdjax.errors import Cancelled, CheckpointError
from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Programs
from tdjax.pipeline.components import Component
from tdjax.progress import Stages
from tdjax.sampling import schedules

SMALL = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 1}


def double(x):
    return 2 * x


def test_a_program_begun_early_is_made_by_a_thread():
    where, stages = [], Stages(show=False)
    programs = Programs(stages)

    def traced(x):
        where.append(threading.current_thread())
        return 2 * x

    shape = programs.shape((3,))
    program = programs.request("double", traced, shape)
    program.begin()
    program.begin()
    assert programs.request("double", traced, shape) is program
    run = program.wait()
    assert len(where) == 1 and where[0] is not threading.main_thread()
    assert np.array_equal(run(jnp.arange(3.0)), [0, 2, 4])
    assert programs.request("double", traced, jnp.arange(3.0)).wait() is run
    assert [row.name for row in stages.rows] == ["compile double"]


def test_programs_that_were_let_go_are_made_again():
    programs = Programs(Stages(show=False))
    shape = programs.shape((3,))
    before = programs.request("double", double, shape)
    before.wait()
    programs.clear()
    assert not programs.compiled and programs.request("double", double, shape) is not before
    assert np.array_equal(programs.request("double", double, shape).wait()(jnp.ones(3)), [2, 2, 2])


def test_a_program_that_nobody_began_is_made_where_it_is_waited_for():
    where, programs = [], Programs(Stages(show=False))
    traced = lambda x: where.append(threading.current_thread()) or x
    program = programs.request("same", traced, programs.shape((3,)))
    assert not where and not programs.compiled
    program.wait()
    assert where == [threading.main_thread()] and len(programs.compiled) == 1


def test_a_mistake_is_raised_where_the_program_is_needed():
    programs = Programs(Stages(show=False))

    def wrong(x):
        raise RuntimeError("no such program")

    request = lambda function: programs.request("it", function, programs.shape((3,)))
    request(wrong).begin()
    request(double).begin()
    request(double).wait()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such program"):
            request(wrong).wait()


def test_what_was_not_begun_can_be_forgotten(monkeypatch):
    monkeypatch.setattr("tdjax.pipeline.compilation.COMPILERS", 1)
    programs, go, made = Programs(Stages(show=False)), threading.Event(), []

    def slow(x):
        go.wait(30)
        return x

    programs.request("slow", slow, programs.shape((3,))).begin()
    programs.request("other", lambda x: made.append(1) or x, programs.shape((4,))).begin()
    while not next(iter(programs.coming.values())).running():
        time.sleep(0.01)
    programs.forget()
    go.set()
    programs.request("slow", slow, programs.shape((3,))).wait()
    assert not made and not programs.coming


def test_none_is_being_compiled_once_all_are_let_go():
    programs, at_work, done = Programs(Stages(show=False)), threading.Event(), []

    def slow(x):
        at_work.set()
        time.sleep(0.3)
        done.append(1)
        return x

    programs.request("slow", slow, programs.shape((3,))).begin()
    at_work.wait(30)
    programs.clear()
    assert done and not programs.coming


def damaged(model, folder):
    shutil.copytree(model, folder)
    files = sorted(
        (p for p in (folder / "dit" / "params").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    return folder


@pytest.mark.slow
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
        and "load dit: failed" in capsys.readouterr().err.splitlines()[-1]
    )
    assert pipe.components["dit"].module is None


@pytest.mark.slow
def test_stages_are_told_in_order(model):
    """Whatever the threads are at, a run tells its stages in one order; without room for all,
    programs come before weights."""
    pipe = tdjax.load(model, prompt_cache=False)
    names = list(pipe("a red circle", **SMALL).timings)
    assert names == [
        "prepare",
        *("load text", "compile text", "text"),
        *("compile start noise", "load dit", "compile denoise"),
        *("compile and load the rest", "denoise"),
        *("load vae", "compile vae decode", "vae decode"),
    ]
    assert list(pipe("a red circle", **SMALL).timings) == ["text", "denoise", "vae decode"]
    lean = tdjax.load(model, prompt_cache=False, low_memory=True, text_encoder_device="device")
    names = list(lean("a red circle", **SMALL).timings)
    assert names == [
        *("compile text", "load text", "text"),
        *("compile start noise", "compile denoise", "load dit", "denoise"),
        *("compile vae decode", "load vae", "vae decode"),
    ]


@pytest.mark.slow
def test_everything_has_begun_before_the_first_stage_ends(model, monkeypatch):
    pipe = tdjax.load(model, prompt_cache=False)
    seen = []
    encode = pipe.text_encoding.whole
    watched = lambda *args: seen.append(asked(pipe)) or encode(*args)
    monkeypatch.setattr(pipe.text_encoding, "whole", watched)
    pipe("a red circle", **SMALL)
    assert seen == [{"start", "denoise", "decode_first", "decode_later", "dit", "vae"}]
    assert not pipe.programs.coming


@pytest.mark.slow
def test_what_was_let_go_begins_again(model, monkeypatch):
    """After a call that was cancelled as its first stage began, and after all programs went."""
    pipe, seen = tdjax.load(model, prompt_cache=False), []
    encode = pipe.text_encoding.run
    watched = lambda *args: seen.append(asked(pipe) - {"dit", "vae"}) or encode(*args)
    monkeypatch.setattr(pipe.text_encoding, "run", watched)
    make, gate = Programs.compile, threading.Event()
    gated = lambda *args: (gate.wait(30), make(*args))[1]
    monkeypatch.setattr(Programs, "compile", gated)
    monkeypatch.setattr("tdjax.pipeline.compilation.COMPILERS", 1)
    with pytest.raises(Cancelled):
        pipe("a red circle", on_stage=lambda name: name == "prepare", **SMALL)
    gate.set()
    pipe("a red circle", **SMALL)
    pipe.programs.clear()
    pipe("a red circle", **SMALL)
    assert seen == [{"start", "denoise", "decode_first", "decode_later"}] * 3


def unfinished(pipe) -> set[str]:
    """Of what threads were asked for, what they still do."""
    futures = {key[0].__name__: future for key, future in pipe.programs.coming.items()}
    futures |= {name: each.coming for name, each in pipe.components.items() if each.coming}
    return {name for name, future in futures.items() if not future.done()}


class Watched:
    """A program whose executable tells before each call."""

    def __init__(self, program, tell):
        self.program, self.tell = program, tell

    def __getattr__(self, name):
        return getattr(self.program, name)

    @property
    def executable(self):
        return lambda *args: self.tell() or self.program.executable(*args)


def watch_steps(monkeypatch, pipe, tell) -> None:
    """tell() is called before each segment of the denoising loop."""
    make = pipe.denoising.program
    monkeypatch.setattr(pipe.denoising, "program", lambda *args: Watched(make(*args), tell))


@pytest.mark.slow
def test_a_transformer_begins_alone(model, monkeypatch):
    """cuDNN cannot prepare its attention while other threads use the GPU: they have finished when
    the first step begins."""
    pipe = tdjax.load(model, prompt_cache=False)
    seen, compile_, read = [], Programs.compile, Component.read
    slow = lambda run: lambda *args: time.sleep(0.3) or run(*args)
    monkeypatch.setattr(Programs, "compile", slow(compile_))
    monkeypatch.setattr(Component, "read", slow(read))
    watch_steps(monkeypatch, pipe, lambda: seen.append(unfinished(pipe)))
    pipe("a red circle", **SMALL)
    assert seen == [set()]


def asked(pipe) -> set[str]:
    programs = {function.__name__ for function, *_ in pipe.programs.coming}
    return programs | {name for name, each in pipe.components.items() if each.coming is not None}


def test_little_memory_begins_nothing(model, monkeypatch):
    pipe = tdjax.load(model)
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**20)
    request = pipe.request("a", **SMALL)
    pipe.preparation.begin(request, pipe.plan(request))
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


@pytest.mark.slow
def test_the_second_expert_is_read_after_the_first_step(experts, monkeypatch):
    pipe, events = tdjax.load(experts, low_memory=True), []
    watch_steps(monkeypatch, pipe, lambda: events.append("step"))
    second = pipe.components["dit_low"]
    monkeypatch.setattr(memory, "may_stage", lambda *_, **__: True)
    monkeypatch.setattr(second, "load_ahead", lambda host: events.append("read"))
    call = {"num_frames": 5, "width": 32, "height": 32, "output_type": "latent"}
    pipe("a red circle", num_steps=4, **call)
    high = schedules.split_times(
        schedules.times(pipe.request("a", num_steps=4, **call).sampler), pipe.sampler.boundary
    )
    assert high > 1 and events == ["step", "read", "step", "step", "step"]
    events.clear()
    pipe(
        "a red circle", num_steps=4, boundary=0.95, **call
    )  # one step above it: nothing to hide the reading behind
    assert events == ["step"] * 4


# The last one, as what it asks for holds for the rest of the module.
@pytest.mark.slow
@pytest.mark.usefixtures("as_users")  # bits of programs are compared
def test_the_second_expert_waits_in_the_host(experts, monkeypatch):
    """Memory for one expert at a time: the other one is read while the first runs, and the video is
    the same."""
    call = {"num_frames": 5, "width": 32, "height": 32, "output_type": "latent"}
    plain = tdjax.load(experts)
    expected, request = plain("a red circle", **call), plain.request("a", **call)
    limit = plain.plan(request).of("dit").total + 2**20
    staged, read = [], Component.read_to_host
    noted = lambda self: staged.append(self.path.name) or read(self)
    monkeypatch.setattr(Component, "read_to_host", noted)
    for room, names in ((True, ["dit_low"]), (False, [])):
        staged.clear()
        lean = tdjax.load(experts, low_memory=True)
        monkeypatch.setattr(memory, "memory_limit", lambda room=room: 2**34 if room else limit // 2)
        assert np.array_equal(lean("a red circle", **call).latents, expected.latents)
        assert staged == names
        assert all(c.module is None and c.coming is None for c in lean.components.values())
