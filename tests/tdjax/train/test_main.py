"""`python -m tdjax.train`: messages, help, dry runs."""

import subprocess
import sys
import time

import pytest
from run_cases import built, fails

from tdjax.train import __main__ as command
from tdjax.train.presets import PRESETS
from tdjax.train.shards import write_shard


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("sla-2b", ["unknown preset 'sla-2b'", "sla-1.3b, sla-14b", "did you mean sla-"]),
        (
            "sla-14b optimizer.lerning_rate=1",
            ["unknown key optimizer.lerning_rate", "did you mean optimizer.learning_rate?"],
        ),
        (
            "sla-14b learning_rate=1",
            ["unknown key learning_rate", "did you mean optimizer.learning_rate?"],
        ),
        ("sla-14b run=1", ["unknown key run"]),
        ("sla-14b critic.b1=0.5", ["unknown key critic.b1", "did you mean optimizer.b1?"]),
        ("sla-14b run.steps", ["cannot read 'run.steps'", "key=value", "run.steps=1000"]),
        ("sla-14b run.steps=1.5", ["run.steps is '1.5'", "a whole number", "2000"]),
        ("sla-14b optimizer.b1=high", ["optimizer.b1 is 'high'", "a number"]),
        ("sla-14b optimizer.clip=yes", ["a number, or none", "none"]),
        ("sla-14b model.offline=1", ["true or false", "false"]),
        ("fm-tiny model.dit.patch=1,2", ["three numbers"]),
        ("sla-14b loss.ema=1", ["loss.ema is '1'", "loss.ema.width, loss.ema.decay"]),
        (
            "sla-14b loss.ema.decay.x=1",
            ["unknown key loss.ema.decay.x", "loss.ema.decay is a float or None"],
        ),
        (
            "rcm-14b loss.consistency=none loss.consistency.kappa=1",
            ["loss.consistency is none", "loss.consistency=SCM or DCM"],
        ),
        ("sla-14b run.steps=0", ["RunConfig.steps is 0"]),
        ("sla-14b run.keep=-1", ["keep is -1"]),
        ("sla-14b data.batch=0", ["DataConfig.batch is 0"]),
        ("sla-14b model.attention=sparse", ["'sparse'", "dense, sla"]),
        ("sla-14b model.sla.topk=3", ["sla_topk is 3"]),
        (
            "sla-14b model.dit.dim=64",
            ["model.dit.dim=64 with model.weights", "the sizes are those of the file"],
        ),
        ("fm-tiny model.student=x", ["student is given without weights"]),
        ("sla-14b", ["data.path is not given", "shard_000000.tar", "data.path=FOLDER"]),
        ("sla-14b data.path=nowhere", ["nowhere is not a folder"]),
    ],
)
def test_messages(capsys, argv, words):
    err = fails(capsys, *argv.split())
    assert all(word in err for word in words), err
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize("word", ["optimizer.b1=2", "loss.target=box", "loss.time.deviation=0"])
def test_what_a_class_refuses(capsys, word, tmp_path):
    write_shard(tmp_path / "shard_000000.tar", [])
    err = fails(capsys, "sla-14b", word, f"data.path={tmp_path}")
    assert "allowed" in err or "must" in err or "needed" in err


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["rcm-14b", "--help"], ["rcm-14b", "run.stepz=3"], ["rcm-14b", "data.path=none"]],
)
def test_answers_come_before_jax_is_imported(argv):
    code = (
        f"import sys; from tdjax.train import __main__ as c\nc.main({argv!r})\nassert not {{'jax',"
        " 'av'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        time.perf_counter() - start < 5
    )  # under 0.5 s on an idle machine; the bound here only catches a jax import


def test_help_lists_presets_and_keys(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert command.main(["rcm-14b", "loss.max_steps=3", "-h"]) == 0
    out = capsys.readouterr().out
    found = {line.split("#")[0].strip() for line in out.splitlines()}
    assert {"loss.consistency.time.mean=1.5", "loss.max_steps=3", "run.steps=4000"} <= found
    assert "# one step is one update of one network" in out
    assert "model.dit" not in out  # the weights have sizes
    assert command.main([]) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.mesh=fsdp=64", "use a multiple of 64"),
        ("run.mesh=dp=2,fsdp=24", "use a multiple of 48"),
        ("loss.accumulate=3", "a batch of 32 cannot be divided into 3 microbatches"),
    ],
)
def test_a_dry_run_refuses_a_batch_that_does_not_divide_as_the_run_does(capsys, setting, message):
    assert command.main(["sla-14b", setting, "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_the_memory_of_the_embedded_model(capsys):
    """Which is always here."""
    assert command.main(["lora-demo", "--dry_run"]) == 0
    printed = capsys.readouterr().err
    assert "frozen weights" in printed and "known when" not in printed


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_prints_settings_that_give_themselves(capsys, name):
    assert command.main([name, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert built(name, *printed) == built(name, f"run.folder=output/{name}")
    assert all(
        line in printed for line in (f"run.folder=output/{name}", "data.path=", "loss.accumulate=1")
    )
