"""Runs of two processes, with two fake devices each: equal to one process, stopped together, gone
on with elsewhere."""

import dataclasses
import signal
import time

import hosts_cases
import jax
import numpy as np
import pytest
from hosts_cases import ends
from run_cases import flow, training_run
from safetensors.numpy import load_file
from tolerances import assert_close
from train_cases import mesh

from tdjax.checkpoints import orbax
from tdjax.train import checkpoints, metrics, placement

pytestmark = pytest.mark.slow
MESH = "run.mesh=dp=2,fsdp=2"  # copies on each host, parameters over its devices
ENDLESS = "run.steps=1000000"


def settings(folder, run, *more):
    return flow(folder, f"run.folder={run}", "run.log_every=1", "run.keep=0", *more)


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """start(run folder, words of the command) -> two processes, which are gone afterwards."""
    with hosts_cases.command("tdjax.train", tmp_path_factory.mktemp("cache")) as run:
        yield lambda where, *words, **options: run(*settings(folder, where, *words), **options)


def wait_for(step, run, processes):
    """Waits until a run has reported a step, or a process has ended."""
    while all(p.poll() is None for p in processes):
        rows = metrics.read(run)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError([p.communicate() for p in processes])


@pytest.fixture(scope="module")
def finished(folder, start, tmp_path_factory):
    """A run of two processes that came to its end, of four steps."""
    run = tmp_path_factory.mktemp("two") / "run"
    return run, ends(start(run, MESH, "run.steps=4", "run.save_every=2"))


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """alone(steps) -> (its folder, its state there) of a run of one process, with four devices,
    which goes on from one call to the next."""
    where = tmp_path_factory.mktemp("one")
    run = training_run(*settings(folder, where, MESH))

    def to(steps):
        run.config["run"] = dataclasses.replace(run.config["run"], steps=steps)
        return where, run.train(resume=True).state

    return to


def same_state(run, wanted):
    """Compares the last checkpoint of a run, as one process reads it over two devices, with a
    state."""
    shapes = placement.abstract(jax.eval_shape(lambda x: x, wanted), mesh(fsdp=2))
    state = checkpoints.restore(checkpoints.latest(run), shapes)
    found, wanted = checkpoints.arrays(state), checkpoints.arrays(wanted)
    assert found.keys() == wanted.keys() and int(state.step) == wanted["step"]
    assert any(len(x.sharding.device_set) == 2 for x in found.values())
    for name, value in found.items():
        if ".mu." not in name and ".nu." not in name:
            assert_close(np.asarray(value), np.asarray(wanted[name]), "float32", name)


def test_two_processes_give_the_numbers_of_one(finished, alone):
    """One of them writes the numbers, both the checkpoints and the weights."""
    run, done = finished
    assert [code for code, *_ in done] == [0, 0], done
    assert [hosts_cases.printed(out) for _, out, _ in done] == [[str(run / "dit")], []]
    assert checkpoints.steps(run) == [2, 4]
    where, state = alone(4)
    losses = [[row["flow/loss"] for row in metrics.read(each)] for each in (run, where)]
    assert len(losses[0]) == 4
    assert_close(losses[0], losses[1], "float32", "losses")
    same_state(run, state)
    exported = orbax.named_leaves(orbax.restore(run / "dit")[1])
    for name, leaf in orbax.named_leaves(state.ema).items():
        assert_close(np.asarray(exported[name]), np.asarray(leaf), "float32", name)


def test_two_processes_train_a_part(folder, start, tmp_path):
    """Adapters, the projections of sparse attention and norms: numbers and files are those of one
    process, which reads the state over two devices."""
    part = [
        f"model.weights={folder / 'sparse'}",
        "model.attention=sla",
        "model.lora.rank=2",
        r"optimizer.train=blocks\.(norm3\..*|self_attn\.core\.proj\..*)",
        "optimizer.learning_rate=1e-2",
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    own = *part, "run.mesh=fsdp=4", "run.steps=2"
    processes = start(two, *own)
    alone = training_run(*settings(folder, one, *own))
    outcome = alone.train(False)
    alone.export(outcome)
    done = ends(processes)
    assert [code for code, *_ in done] == [0, 0], done
    written = [str(two / name) for name in ("dit", "lora.safetensors")]
    assert [hosts_cases.printed(out) for _, out, _ in done] == [written, []]
    losses = [[row["flow/loss"] for row in metrics.read(run)] for run in (two, one)]
    assert len(losses[0]) == 2
    assert_close(losses[0], losses[1], "float32", "losses")
    loras = [load_file(run / "lora.safetensors") for run in (two, one)]
    weights = [orbax.named_leaves(orbax.restore(run / "dit")[1]) for run in (two, one)]
    for found, wanted in (loras, weights):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(np.asarray(found[name]), np.asarray(value), "float32", name)
    assert all(np.any(x) for name, x in loras[0].items() if ".lora_B." in name)
    same_state(two, outcome.state)


def test_a_signal_to_one_stops_both_and_the_run_goes_on_elsewhere(folder, finished, start, alone):
    run = finished[0]
    processes = start(run, MESH, ENDLESS, "run.save_every=1000000", "--resume")
    wait_for(6, run, processes)
    processes[1].send_signal(signal.SIGTERM)
    done = ends(processes)
    assert [code for code, *_ in done] == [130, 130], done
    step = checkpoints.steps(run)[-1]
    assert step >= 6 and metrics.read(run)[-1]["step"] == step
    words = settings(folder, run, "run.mesh=fsdp=2", f"run.steps={step + 2}")
    state = checkpoints.arrays(training_run(*words).train(resume=True).state)
    wanted = checkpoints.arrays(alone(step + 2)[1])
    for name in wanted:
        if name.startswith(("model.", "ema.", "step")):
            assert_close(np.asarray(state[name]), np.asarray(wanted[name]), "float32", name)


def test_one_that_is_lost_ends_the_other(finished, start):
    run = finished[0]
    before = checkpoints.steps(run)
    processes = start(run, MESH, ENDLESS, "run.save_every=1000000", "--resume", lost=10)
    wait_for(before[-1] + 2, run, processes)
    processes[1].kill()
    code, _, err = ends(processes)[0]
    by_us = "an exchange with the other processes of this run failed" in err
    by_jax = "the JAX distributed service detected fatal errors" in err
    assert (by_us and code == 1) or (by_jax and code == -signal.SIGABRT), (code, err)
    assert checkpoints.steps(run) == before
