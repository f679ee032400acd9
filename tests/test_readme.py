"""The README's code: the Python block is executed; .ci/run executes the two commands as they stand
there."""

import re
from pathlib import Path

import pytest

from tdjax.__main__ import COMMANDS, main
from tdjax.generate.arguments import build_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_python_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path / "cache"))
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "circle.mp4").stat().st_size > 1000
    assert "(1, 33, 64, 64, 3)" in capsys.readouterr().out


def test_a_clip_and_the_two_commands_are_on_the_first_screen():
    screen = "\n".join(README.splitlines()[:40])
    assert "docs/images/demo.gif" in screen
    for kind in ("main", "test"):
        assert len(re.findall(rf"^```sh {kind}$", README, re.M)) == 1
        assert re.search(rf"^```sh {kind}\n.*?^```$", screen, re.M | re.S)


def test_every_option_named_in_the_readme_exists():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    named = {
        option
        for line in README.splitlines()
        if line.startswith(("tdjax generate", "| `--"))
        for option in re.findall(r"--\w+", line)
    }
    assert len(named) >= 4 and named <= known, named - known


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parent.parent
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (root / target).exists(), target


def test_one_door_to_the_commands(capsys):
    assert main([]) == 2 and main(["--help"]) == 0 and main(["nonsense"]) == 2
    out = capsys.readouterr()
    assert all(name in out.out for name in COMMANDS)
    assert main(["generate", "--num_frames", "80"]) == 2
