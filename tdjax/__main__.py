"""`tdjax COMMAND ...` (console script) and `python -m tdjax COMMAND ...`: one door to the
commands."""

from __future__ import annotations

import importlib
import sys

import tdjax
from tdjax.cli import run
from tdjax.files import near

COMMANDS = {
    "generate": ("tdjax.generate.__main__", "prompt or image to video"),
    "decode": ("tdjax.generate.decode", "saved latents to a video"),
    "models": ("tdjax.generate.models", "models that have a name: sizes, files, downloads"),
    "server": ("tdjax.server.__main__", "videos over HTTP, for programs and people"),
    "bench": ("tdjax.bench.__main__", "time and memory of every stage, with random weights"),
    "train": ("tdjax.train.__main__", "SLA fine-tuning, rCM distillation, flow matching"),
    "env": ("tdjax.env", "versions, devices, caches"),
    "cache": ("tdjax.cache", "what tdjax keeps on disk: list, remove"),
    "convert": ("convert.__main__", "published checkpoints to tdjax's layout and back"),
    "validate": ("convert.validate", "check a checkpoint: keys, values, forward, golden vectors"),
    "quantize": ("convert.quantize", "bf16 weights to W8A8"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"tdjax {tdjax.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(_unknown(argv[0]), file=sys.stderr)
        return 2
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:])


def _help() -> str:
    lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    first = '`tdjax generate "a red circle moving right on navy"` makes a first video;'
    return "\n".join(
        [
            "usage: tdjax COMMAND [arguments], or tdjax --version",
            *lines,
            f"{first} `tdjax COMMAND --help` says more.",
        ]
    )


def _unknown(word: str) -> str:
    """An error in three lines about a word that is no command."""
    close = near(word, COMMANDS)
    fix = f"did you mean tdjax {close[0]}?" if close else "see tdjax --help"
    if " " in word:
        fix = f'a prompt follows the command: tdjax generate "{word}"'
    return f"error: {word!r} is no command\ncommands: {', '.join(COMMANDS)}\n{fix}"


def command() -> None:
    """The console script."""
    run(main)


if __name__ == "__main__":
    command()
