"""`tdjax COMMAND ...` (console script) and `python -m tdjax COMMAND ...`: one door to the
commands."""

from __future__ import annotations

import importlib
import sys

from tdjax.cli import run

COMMANDS = {
    "generate": ("tdjax.generate.__main__", "prompt or image to video"),
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
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
        asked = bool(argv) and argv[0] in ("-h", "--help")
        text = "\n".join(
            ["usage: tdjax COMMAND [arguments]", *lines, "`tdjax COMMAND --help` says more."]
        )
        print(text, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:])


def command() -> None:
    """The console script."""
    run(main)


if __name__ == "__main__":
    command()
