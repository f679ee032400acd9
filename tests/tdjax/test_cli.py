"""What every command does with errors, signals, closed streams and the spelling of options."""

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from tdjax import cli
from tdjax.__main__ import COMMANDS
from tdjax.errors import CheckpointError, NotFinite, OutOfMemory, UsageError

OPTIONS = {"num_frames": "--num_frames", "seed": "--seed", "image": "--image_path"}


def parser():
    made = cli.Parser("tdjax try", usage="%(prog)s FILE [options]")
    made.add_argument("file", metavar="FILE", help="where to")
    made.add_argument("--num_frames", type=int, default=81, help="of a video: 100%% of it")
    made.add_argument("--attention", "--attention_type", choices=("dense", "sla"), help="its kind")
    made.add_argument("--overwrite", action="store_true", help="replace")
    made.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    return made


def code(error=None, argv=(), **options):
    def command(words):
        if error is not None:
            raise error
        return len(words)

    return cli.main(command, list(argv), parser=parser, **options)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, 0),
        (UsageError("a", "b", "c"), 2),
        (CheckpointError("a", "b", "c"), 3),
        (OutOfMemory("a", "b", "c"), 4),
        (NotFinite("a", "b", "c"), 5),
    ],
)
def test_errors_are_exit_codes(capsys, error, expected):
    assert code(error) == expected
    assert capsys.readouterr().err == ("error: a\nb\nc\n" if error else "")


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x"), ["x: Permission denied"]),
        (OSError(errno.ENOSPC, "No space left on device", "x"), ["the disk is full", "make room"]),
        (OSError("odd"), ["odd", "the file system refused it"]),
    ],
)
def test_what_the_file_system_refuses_is_told_in_three_lines(capsys, error, lines):
    assert code(error) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 3
    assert all(line in err for line in lines)


def test_interrupts(capsys):
    assert code(KeyboardInterrupt(), interrupted="all is kept") == 130
    assert capsys.readouterr().err == "\ninterrupted: all is kept\n"


def test_other_errors_are_mistakes_of_the_program():
    with pytest.raises(ZeroDivisionError):
        code(ZeroDivisionError())


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("a --num_frames x", ["--num_frames is 'x'", "a whole number", "--num_frames: of a video"]),
        ("a --attention sal", ["--attention is 'sal'", "allowed: dense, sla", "nearest: sla"]),
        ("a --num_frames", ["expected one argument", "--num_frames: of a video", "tdjax try"]),
        ("a --num_frame 3", ["unknown option --num_frame", "see", "did you mean --num_frames?"]),
        ("a --odd=3", ["unknown option --odd", "see", "in full"]),
        ("a -x", ["unknown option -x", "see", "in full"]),
        ("a b", ["'b' is surplus", "tdjax try FILE [options]", "needs quotes"]),
        ("a --overwrite=3", ["--overwrite: ignored explicit", "--overwrite: replace", "--help"]),
        ("", ["required: FILE", "usage: tdjax try FILE [options]", "see tdjax try --help"]),
    ],
)
@pytest.mark.parametrize("how", ["parse_args", "parse_intermixed_args"])
def test_what_is_wrong_with_the_words_is_told_in_three_lines(capsys, how, words, lines):
    command = lambda argv: getattr(parser(), how)(argv)
    assert cli.main(command, words.split(), parser=parser) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 3 and out == ""
    for line, part in zip(err.splitlines(), lines, strict=True):
        assert part in line


def test_help_shows_defaults_and_one_line_of_usage():
    text = parser().format_help()
    assert text.startswith("usage: tdjax try FILE [options]\n")
    assert "of a video: 100% of it (default: 81)" in " ".join(text.split())


def every_parser(made, name):
    """A parser with those of its commands."""
    yield name, made
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, each in action.choices.items():
                yield from every_parser(each, f"{name} {word}")


PARSERS = [
    pair
    for module in [*(module for module, _ in COMMANDS.values()), "tdjax.train.tiny.__main__"]
    for pair in every_parser(importlib.import_module(module).build_parser(), module)
]


@pytest.mark.parametrize(("name", "made"), PARSERS, ids=[name for name, _ in PARSERS])
def test_every_option_of_every_command_is_described(name, made):
    assert isinstance(made, cli.Parser)
    text = made.format_help()
    assert text.startswith("usage: ") and text.index("\n\n") < 120  # no list of options there
    for action in made._actions:
        assert isinstance(action, argparse._SubParsersAction) or action.help, action.dest
        said = made.formatter_class("x")._get_help_string(action)
        plain = action.default not in (None, "", argparse.SUPPRESS)
        if plain and not isinstance(action.default, bool | list):
            assert "default" in said, action.dest


def test_signals_of_the_process_stay_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    cli.main(lambda words: seen.append(signal.getsignal(signal.SIGTERM)) or 0, [], parser=parser)
    assert seen == [before]


WRITES = """
import time
from tdjax import cli
from tdjax.files import written
def command(words):
    with written("out/a.mp4") as part:
        part.write_text("half")
        print("here", flush=True)
        time.sleep(60)
cli.run(lambda: cli.main(command, [], parser=None))
"""


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(tmp_path, number, expected):
    command = [sys.executable, "-c", WRITES]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"here\n" and os.listdir(tmp_path / "out")
        process.send_signal(number)
        assert process.wait(timeout=30) == expected and os.listdir(tmp_path / "out") == []


SPEAKS = """
import sys
from tdjax import cli
def command(words):
    for i in range(20000):
        print("a line on standard output")
    print("a line on standard error", file=sys.stderr)
    return 0
cli.run(lambda: cli.main(command, [], parser=None))
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_closed_streams(closed):
    line = f'"{sys.executable}" -c "$SPEAKS" {closed}'
    done = subprocess.run(line, shell=True, env={**os.environ, "SPEAKS": SPEAKS}, timeout=60)
    assert done.returncode == 0


def test_a_reader_that_stops_ends_the_command_quietly():
    line = f'"{sys.executable}" -c "$SPEAKS" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line], env={**os.environ, "SPEAKS": SPEAKS}, capture_output=True, timeout=60
    )
    assert done.stdout.decode().splitlines() == ["a line on standard output", "141"]
    assert done.stderr == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_reader_of_errors_that_stops_changes_no_exit_code(tmp_path, number):
    command = [sys.executable, "-c", WRITES]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"here\n"
        process.stderr.close()
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number


def test_hyphens_and_underscores_are_one():
    given = ["--num-steps=2-3", "--sigma-max", "-1", "a-b", "--", "--no-hash"]
    expected = ["--num_steps=2-3", "--sigma_max", "-1", "a-b", "--", "--no_hash"]
    assert cli.hyphens(given) == expected
    seen = []
    cli.main(lambda words: seen.extend(words) or 0, given, parser=parser)
    assert seen == expected


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("num_frames is 80", "--num_frames is 80"),
        ("give `seed`, or `overwrite`", "give --seed, or `overwrite`"),
        ("give an `image`", "give an --image_path"),
        ("(given as num_frames)", "(given as --num_frames)"),
        ("use num_frames=81", "use --num_frames=81"),
        ("num_frames: a number", "--num_frames: a number"),
        ("the seed of an image", "the seed of an image"),
        ("already --num_frames", "already --num_frames"),
        ("/data/num_frames/x and num_frames.txt", "/data/num_frames/x and num_frames.txt"),
        ("num_frames_2, my_num_frames", "num_frames_2, my_num_frames"),
        ("call num_frames() and x.num_frames", "call num_frames() and x.num_frames"),
        ("see `hf auth login` or HF_TOKEN", "see `hf auth login` or HF_TOKEN"),
        ("other_name stays", "other_name stays"),
    ],
)
def test_arguments_are_written_as_the_options_of_the_command(library, command):
    assert cli.spelled(library, OPTIONS) == command


def test_options_of_a_parser(capsys):
    found = cli.options(parser(), {"impl": "attention_impl"})
    assert found["attention"] == found["attention_type"] == "--attention"
    assert found["impl"] == "--attention_impl" and found["quiet"] == "--quiet"
    code(UsageError("x exists", "", "give `overwrite`"))
    assert capsys.readouterr().err == "error: x exists\ngive --overwrite\n"


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a:.5", ("a", 0.5)),
        ("a:+1", ("a", 1.0)),
        ("a:-2.", ("a", -2.0)),
        ("a:1e-3", ("a", 1e-3)),
        ("C:/a", ("C:/a", 1.0)),
        ("C:/a:2", ("C:/a", 2.0)),
        ("a:b", ("a:b", 1.0)),
        (":1", (":1", 1.0)),
    ],
)
def test_lora_pairs(text, pair):
    assert cli.lora_pair(text) == pair


def test_a_weight_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("0,8", "1.2.3", "+-1"):
        with pytest.raises(UsageError, match="is no number(.|\n)*a:0.8"):
            cli.lora_pair(f"a:{word}")
    (tmp_path / "a:1-2").touch()
    assert cli.lora_pair("a:1-2") == ("a:1-2", 1.0)


def test_paths_take_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/data/home")
    assert cli.path("~/x") == Path("/data/home/x") and cli.path("x~") == Path("x~")


def test_a_compile_cache_that_cannot_be_written_costs_a_line(tmp_path):
    (tmp_path / "file").touch()
    assert "is not writable" in cli.set_compile_cache(str(tmp_path / "file" / "x"))
    assert cli.set_compile_cache("none") is None


STARTS = """
import argparse
from tdjax import cli
command = lambda words: cli.start_jax(print) and 0
cli.run(lambda: cli.main(command, [], parser=argparse.ArgumentParser))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable", ["JAX_PLATFORMS=cuda", "JAX_PLATFORMS=odd", "JAX_DISABLE_JIT=1"]
)
def test_a_device_that_is_not_there_is_told_in_three_lines(variable):
    name, _, value = variable.partition("=")
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = done.stderr[done.stderr.index("error: ") :]
    assert done.returncode == 2 and errors.count("\n") == 3 and name in errors
    assert "Traceback" not in done.stderr


ALL_HELP = """
import importlib
from tdjax.__main__ import COMMANDS
for module, _ in COMMANDS.values():
    importlib.import_module(module).build_parser().format_help()
"""


@pytest.mark.slow  # imports every command
def test_commands_need_no_docstrings():
    subprocess.run([sys.executable, "-OO", "-c", ALL_HELP], check=True, timeout=120)


def test_numbers_of_64_bits_are_turned_off():
    notes = []
    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", True)
        cli.start_jax(notes.append)
        assert not jax.config.jax_enable_x64 and "JAX_ENABLE_X64" in notes[0]
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize(
    ("name", "strict"),
    [("jax_numpy_rank_promotion", "raise"), ("jax_transfer_guard", "disallow")],
)
def test_settings_that_refuse_right_programs_are_turned_off(name, strict):
    notes, before = [], getattr(jax.config, name)
    try:
        jax.config.update(name, strict)
        cli.start_jax(notes.append)
        assert getattr(jax.config, name) == "allow" and name.upper() in notes[0]
        assert (jax.numpy.ones((2, 3)) + jax.numpy.ones(3) * 2)[0, 0] == 3
    finally:
        jax.config.update(name, before)


@pytest.mark.filterwarnings("error")  # an error that leaves the thread
@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_a_gpu_is_used_by_a_thread_before_anything_waits_for_it(monkeypatch, backend):
    used = threading.Event()

    def refused(value):
        used.set()
        raise RuntimeError("out of memory")  # which what comes after it meets as well

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_put", refused)
    cli.take_memory()
    for thread in threading.enumerate():
        if thread.name == "first copy":
            thread.join(10)
    assert used.is_set() == (backend == "gpu")


@pytest.mark.slow
def test_nothing_of_it_imports_jax():
    modules = "tdjax.cli, tdjax.files, tdjax.cache, tdjax.generate.__main__, convert.__main__"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_signal_while_a_module_is_imported_ends_the_process_at_once(tmp_path):
    """Native modules would turn an exception into an abort or an ImportError of their own."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, sys\nos.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
    )
    code = (
        "from tdjax import cli\n"
        "def main():\n"
        "    try:\n"
        "        import slow\n"
        "    except BaseException:\n"
        "        raise ImportError('initialization failed')\n"
        "    return 0\n"
        "cli.run(main)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    for name, expected in (("SIGINT", cli.INTERRUPTED), ("SIGTERM", cli.TERMINATED)):
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == expected, done.stderr
        assert "stopped: nothing was left half-written" in done.stderr


NATIVE = """
import runpy, sys
from tdjax import cli
def begin(main=None):
    raise SystemExit(" ".join({"av", "PIL", "safetensors", "jax"} & set(sys.modules)))
cli.heed_signals = cli.run = begin
for name in sys.argv[1:]:
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as told:
        assert not told.code, f"{name} imports {told.code} first"
"""


def test_signals_are_heeded_before_native_modules_are_imported():
    root = Path(cli.__file__).parents[1]
    files = [p for room in ("tdjax", "convert") for p in (root / room).rglob("*.py")]
    ended = [p for p in files if "\n    cli.run(" in p.read_text()]
    names = [".".join(p.relative_to(root).with_suffix("").parts) for p in ended]
    assert len(names) > 10
    done = subprocess.run(
        [sys.executable, "-c", NATIVE, *names], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
