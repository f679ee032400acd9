"""What every command shares: its parser, errors to exit codes, the spelling of options, the compile
cache, LoRA pairs. Imports no jax."""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tdjax.config import values
from tdjax.errors import TdjaxError, UsageError
from tdjax.files import near
from tdjax.progress import say

# Settings of JAX under which programs that are right are refused.
_STRICT = (
    "jax_numpy_rank_promotion",
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
)
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143
NOTHING_HALF_WRITTEN = "nothing was left half-written; the same command starts again"


class Parser(argparse.ArgumentParser):
    """The parser of a command: names are written in full, help shows every default, and what is
    wrong with the words is a UsageError in three lines, without the list of options."""

    def __init__(self, prog: str, **arguments: Any):
        arguments.setdefault("formatter_class", _Help)
        super().__init__(prog=prog, allow_abbrev=False, **arguments)
        self.register("type", int, values.parse_whole)
        self.register("type", float, values.parse_real)

    def error(self, message: str) -> NoReturn:
        """Raises what argparse has found as a UsageError."""
        surplus = message.removeprefix("unrecognized arguments: ")
        if surplus != message:
            raise self._surplus(surplus.partition(" ")[0])
        match = re.fullmatch(r"argument (\S+): (.+)", message)
        name, what = match.groups() if match else ("", message)
        raise UsageError(f"{name}: {what}" if name else what, self._meaning(name), self._see())

    def _surplus(self, word: str) -> UsageError:
        if not word.startswith("-"):
            why = f"it follows no option, and is too much for: {self.format_usage().strip()[7:]}"
            return UsageError(
                f"{values.shown(word)} is surplus", why, "a value with blanks needs quotes"
            )
        name = word.partition("=")[0]
        close = near(name.lstrip("-"), options(self))
        fix = f"did you mean --{close[0]}?" if close else "names are written in full"
        return UsageError(f"unknown option {name[: values.SHOWN]}", self._see(), fix)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            name = _name(action)  # argparse takes it away, and lets the option be an empty list
            raise UsageError(f"{name} is '--'", "it needs a value", self._meaning(name))
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        name = _name(action)
        if not arg_string and action.default != "":
            raise UsageError(f"{name} is empty", "it needs a value", self._meaning(name))
        if action.type in (path, os.path.expanduser):
            values.path(name, os.path.expanduser(arg_string))
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            wanted = "a whole number" if action.type is int else "a number"
            raise UsageError(
                f"{name} is {values.shown(arg_string)}",
                f"{wanted} is needed, in digits 0 to 9",
                self._meaning(name),
            ) from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise UsageError(
                f"{_name(action)} is {values.shown(str(value))}",
                f"allowed: {', '.join(choices)}",
                f"nearest: {near(value, choices, cutoff=0.0)[0]}",
            )

    def _meaning(self, name: str) -> str:
        """What the help says of an option, given any of its names."""
        for action in self._actions:
            if action.help and set(name.split("/")) & {*action.option_strings, _name(action)}:
                return f"{_name(action)}: {action.help % {'prog': self.prog}}"
        return f"usage: {self.format_usage().strip()[7:]}"

    def _see(self) -> str:
        return f"see {self.prog} --help"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Description and epilog as they are written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help, action.default
        unsaid = value in (None, "", argparse.SUPPRESS) or isinstance(value, bool | list | tuple)
        if not text or unsaid or "default" in text:
            return text
        return f"{text} (default: {str(value).replace('%', '%%')})"


def _name(action: argparse.Action) -> str:
    """An option's first long name, or a word's placeholder."""
    long = [option for option in action.option_strings if option.startswith("--")]
    return (long or action.option_strings or [str(action.metavar or action.dest)])[0]


def main(
    command: Callable[[list[str]], int],
    argv: list[str] | None,
    *,
    parser: Callable[[], argparse.ArgumentParser],
    names: Mapping[str, str] | None = None,
    interrupted: str = NOTHING_HALF_WRITTEN,
) -> int:
    """The exit code of a command: its own, that of the error which ended it, 2 where the file
    system refused something, 130 after Ctrl-C, 143 after SIGTERM.

    command:     takes the words of the command line, options with underscores.
    parser:      makes the parser whose options an error may speak of.
    names:       {argument of the library: option} where they differ.
    interrupted: what Ctrl-C leaves behind.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command: nobody listens
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    try:
        code = command(hyphens(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except TdjaxError as error:
        say(f"error: {spelled(str(error), options(parser(), names))}")
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        say(f"error: {_refused(error)}")
        return UsageError.exit_code
    except _Terminated:
        say(f"\nterminated: {interrupted}")
        return TERMINATED
    except KeyboardInterrupt:
        say(f"\ninterrupted: {interrupted}")
        return INTERRUPTED


def heed_signals() -> None:
    """Ends a command with SIGTERM as with Ctrl-C from now on. What imports native modules before
    `run` calls it first: an interrupt in their midst may crash the process."""

    def stop(number, frame):
        if _imports(frame):
            say(f"\nstopped: {NOTHING_HALF_WRITTEN}")
            os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for number, usual in (
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) is usual:
            signal.signal(number, stop)


def run(main: Callable[[], int]) -> NoReturn:
    """Ends this process with a command's exit code, and the command with SIGTERM as with Ctrl-C.

    It ends at once: files are closed by then, taking the libraries down in order takes most of a
    second, and after a failure threads may still be compiling or loading.
    """
    heed_signals()
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed or None
            stream.flush()
    os._exit(code)


def _imports(frame: types.FrameType | None) -> bool:
    """Whether a module is being imported at a frame: native ones (jax, tensorstore) abort the
    process or fail in odd ways where an exception reaches them meanwhile. What stops there is as
    whole as after a kill."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def hyphens(argv: list[str]) -> list[str]:
    """--num-steps=4 -> --num_steps=4"""
    out = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        out.append(word)
    return out


def options(
    parser: argparse.ArgumentParser, names: Mapping[str, str] | None = None
) -> dict[str, str]:
    """{argument of the library: option of the command as it is written, such as --num_steps}."""
    found = {}
    for action in parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        found |= {option[2:]: _name(action) for option in long}
    return found | {name: f"--{option}" for name, option in (names or {}).items()}


def spelled(message: str, options: Mapping[str, str]) -> str:
    """A message of the library with its arguments written as the command's options.

    Names with an underscore are recognised as they are, others between backticks: `seed`. Names
    inside paths, words and quotes, and those that the command lacks, stay.
    """

    def option(match: re.Match) -> str:
        name = match["quoted"] or match["plain"]
        return options.get(name, match[0])

    name = r"`(?P<quoted>\w+)`|(?<![\w\-./`'])(?P<plain>\w+_\w+)(?![\w./`(])"
    return re.sub(name, option, message)


def path(text: str) -> Path:
    """A word of the command line as a path. The shell expands ~ only where a word begins with it:
    not in --save_path=~/fox.mp4, nor in files."""
    return Path(text).expanduser()


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run of several processes, for `tdjax.parallel.hosts.join`."""
    group = parser.add_argument_group(
        "several processes, each with the devices of its host",
        "srun, Open MPI and a Kubernetes Job say these themselves",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where the first one listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="number of this one, from 0")


def lora_pair(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT, such as fox.safetensors:0.8 -> (file, weight). A colon that no number
    follows belongs to the name. Raises UsageError for what is meant as a number and is none."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", text, re.ASCII)
    if match and math.isfinite(float(match[2])):
        return match[1], float(match[2])
    name, _, weight = text.rpartition(":")
    if name and re.fullmatch(r"[\d.,+\-e]+|nan|[+-]?inf", weight) and not Path(text).exists():
        raise UsageError(
            f"{text}: the weight {weight!r} is no number",
            "a LoRA is given as FILE or FILE:WEIGHT",
            f"for example {name}:0.8",
        )
    return text, 1.0


def set_compile_cache(given: str | None = None) -> str | None:
    """Turns the persistent compile cache on; returns a line for the user where that fails.

    given: a folder, None for the one of this user, "none" for no cache.
    """
    if given == "none":
        return None
    from tdjax.checkpoints.compiled import keep_programs

    return keep_programs(Path(given).expanduser() if given else None)


def start_jax(note: Callable[[str], None]) -> str:
    """The name of JAX's default backend, which this starts. Numbers of 64 bits, which no network or
    kernel here has, are turned off. Raises UsageError where the environment asks for what is not
    there, or for programs that are not compiled.

    note: takes a line for the user.
    """
    import jax

    if jax.config.read("jax_enable_x64"):
        jax.config.update("jax_enable_x64", False)
        note("JAX_ENABLE_X64 has no effect: the numbers here have 32 bits or fewer")
    for name in _STRICT:
        if getattr(jax.config, name) in ("raise", "disallow", "disallow_explicit"):
            jax.config.update(name, "allow")
            note(f"{name.upper()} has no effect: it is for finding errors in programs")
    if jax.config.jax_disable_jit:
        raise UsageError(
            "JAX_DISABLE_JIT is set",
            "programs are compiled before they run, and then always run compiled",
            "unset it",
        )
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # what jax raises for a backend that fails
        asked = os.environ.get("JAX_PLATFORMS")
        lines = str(error).splitlines() or [type(error).__name__]
        raise UsageError(
            "JAX finds no device" + (f" for JAX_PLATFORMS={asked}" if asked else ""),
            lines[0],
            "python -m tdjax.env says what there is; without JAX_PLATFORMS that is used",
        ) from error


def take_memory() -> None:
    """Has a thread use the GPU for the first time, by which JAX takes most of its memory: that
    lasts seconds, in which a command has modules to import and files to open."""
    import jax

    def first_copy() -> None:
        with contextlib.suppress(RuntimeError):  # the next use tells it too
            jax.block_until_ready(jax.device_put(False))

    if jax.default_backend() == "gpu":
        threading.Thread(target=first_copy, name="first copy", daemon=True).start()


def _refused(error: OSError) -> str:
    """What, why and fix of an error of the file system."""
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno == errno.ENOSPC:
        return f"{what}\nthe disk is full\nmake room, or give a path on another disk"
    return f"{what}\nthe file system refused it\ngive another path"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: with its temporary files removed."""
