"""`python -m tdjax.train.tiny`: what the settings become, messages, stages."""

import pytest

from tdjax.errors import UsageError
from tdjax.train.tiny import __main__ as command
from tdjax.train.tiny import settings


@pytest.mark.parametrize("name", command.STAGES)
def test_every_stage_has_its_function(name):
    assert callable(command.stage_function(name))


def test_settings_are_scaled_and_overridden():
    parts = command.resolve(["teacher.batch=4", "teacher.chunk=50", "rcm.kappa=0.5"], 0.01)
    teacher, vae = parts["teacher"], parts["vae"]
    assert (teacher.steps, teacher.chunk) == (100, 50)  # whole chunks
    assert (teacher.batch, teacher.clips) == (4, 328)
    assert vae.steps == 100 and vae.chunk == 50
    assert parts["rcm"].kappa == 0.5 and parts["rcm"].steps == 10
    usual = command.resolve([], 1.0)
    assert usual == {name: cls() for name, cls in settings.STAGES.items()}
    assert all(s.steps % s.chunk == 0 for s in usual.values() if hasattr(s, "steps"))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--stage", "vae,dream"], "unknown stage dream"),
        (["--scale", "0"], "--scale is 0"),
        (["teacher.stepz=3"], "did you mean teacher.steps?"),
        (["teacher.steps=many"], "teacher.steps is 'many'"),
        (["fast"], "cannot read 'fast'"),
        (["vae.steps=1"], "vae.warmup is 100, of 1 steps"),
        (["--mesh", "cfg=2", "--stage", "sla"], "has the axis cfg=2"),
        (["--mesh", "dp=64", "--stage", "sla"], "needs 64 devices"),
        (["--mesh", "dp=2", "rcm.batch=7", "--stage", "sla"], "--mesh dp=2 with rcm.batch=7"),
    ],
)
def test_errors_of_the_command(argv, text, capsys):
    assert command.main([*argv, "--folder", "nowhere"]) == UsageError.exit_code
    assert text in capsys.readouterr().err


def test_finished_stages_are_skipped(tmp_path, capsys):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "manifest.json").write_text("{}")
    argv = ["--stage", "vae", "--folder", str(tmp_path), "--compile_cache_dir", "none"]
    assert command.main(argv) == 0
    assert "vae: finished already" in capsys.readouterr().err
