"""The door to the commands."""

import pytest

import tdjax
from tdjax.__main__ import COMMANDS, main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tdjax {tdjax.__version__}\n"


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("genrate", "did you mean tdjax generate?"),
        ("--modles", "did you mean tdjax models?"),
        ("zzz", "see tdjax --help"),
        ("a red circle", 'tdjax generate "a red circle"'),
    ],
)
def test_a_word_that_is_no_command_is_told_in_three_lines(capsys, word, fix):
    assert main([word]) == 2
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert first == f"error: {word!r} is no command" and out == ""
    assert second == f"commands: {', '.join(COMMANDS)}" and fix in third
