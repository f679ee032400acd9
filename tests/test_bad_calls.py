"""Calls that cannot be meant, made from the options and signatures themselves: a new option is in
them by existing. Each ends before any work, with the documented code and three lines that name it.
"""

import argparse
import ast
import importlib
import inspect
import itertools
import os
import random
import re
import types
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import tdjax
from tdjax import cli
from tdjax.__main__ import COMMANDS
from tdjax.config.values import shown as values_shown
from tdjax.errors import UsageError
from tdjax.pipeline import options
from tdjax.train import __main__ as train
from tdjax.train.presets import PRESETS
from tdjax.train.settings import fields, table
from tdjax.train.tiny import settings as tiny_settings

NUMBERS = ("x", "", "٣", "²", "1_000", "9" * 5000, "0x10", "1,5", "1 0", "--", "half \ud83d")
NAMES = ("", "a\0b", "n" * 300, "n/" * 3000, "half \ud83d")
CHOICES = ("", "nonsense", "n" * 5000, "\0", "half \ud83d")
MODULES = {name: module for name, (module, _) in COMMANDS.items()}
MODULES |= {"tiny": "tdjax.train.tiny.__main__", "kernels": "pallas_kernels.bench"}
MODULES |= {"encode": "tdjax.train.encode.__main__", "synthesize": "tdjax.train.synthesize"}
# Words without which a command says that they are missing, before it looks at the others.
NEEDED = {
    "decode": ["latents.safetensors"],
    "convert": ["in.pth", "out"],
    "quantize": ["in.pth", "out"],
    "validate": ["in.pth"],
    "train": ["fm-tiny", "--dry_run"],
    "encode": ["clips", "--out=shards", "--dry_run"],
    "synthesize": ["prompts.txt", "--out=shards", "--dry_run"],
}


def command(name):
    module = importlib.import_module(MODULES[name])
    return module.main, module.build_parser()


def parsers(parser, before=()):
    """(words that lead there, parser) of a parser, or of those of its subcommands."""
    inside = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in inside:
        for word, inner in action.choices.items():
            needed = ["weights"] if any(not a.option_strings for a in inner._actions) else []
            yield from parsers(inner, (*before, word, *needed))
    if not inside:
        yield before, parser


def bad_values(action):
    """Words that cannot be the value of an option."""
    if action.choices is not None:
        values = CHOICES
    elif action.type in (int, float):
        values = (*NUMBERS, "1.5") if action.type is int else NUMBERS
    elif action.type in (cli.path, os.path.expanduser):
        values = NAMES
    else:
        values = ("",)
    return [value for value in values if value != "" or action.default != ""]


def bad_calls(name):
    """(argv, names one of which the error must say) of a command, in the order of its options."""
    for before, parser in parsers(command(name)[1]):
        needed = [*before, *NEEDED.get(name, [])]
        known = {option for action in parser._actions for option in action.option_strings}
        for action in parser._actions:
            said = {*action.option_strings, str(action.metavar), action.dest}
            for option in (o for o in action.option_strings if o.startswith("--")):
                if f"{option}zz" not in known:
                    yield [*needed, f"{option}zz"], {f"{option}zz"}
                if option[:-1] not in known and option != "--help":
                    yield [*needed, option[:-1]], {option[:-1]}
                if action.nargs == 0:
                    yield [*needed, f"{option}=x"], said
                    continue
                yield [*needed, option], said
                for value in bad_values(action):
                    yield [*needed, f"{option}={value}"], said


def mixed_calls(name, count=300):
    """So many different bad calls: those of `bad_calls`, and then with other words around them."""
    calls = list(bad_calls(name))
    _, parser = command(name)
    flags = [o for a in parser._actions if a.nargs == 0 for o in a.option_strings]
    flags = [flag for flag in flags if flag not in ("-h", "--help", "--version")]
    rng = random.Random(0)
    seen = {tuple(argv) for argv, _ in calls}
    while len(calls) < count:
        argv, said = rng.choice(calls[: len(seen)])
        more = rng.sample(flags, min(len(flags), rng.randint(0, 3)))
        surplus = f"--{''.join(rng.choices('abcdefgh', k=6))}"
        made = [*argv[:-1], surplus, *more, argv[-1]]
        if tuple(made) not in seen:
            seen.add(tuple(made))
            calls.append((made, said | {surplus}))
    return calls


def refused(capsys, main, argv):
    """The error of a call, which must be a refusal in three lines."""
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    shown = [word[:80] for word in argv]
    assert code == 2, f"{shown}: exit code {code}\n{captured.err[-500:]}"
    assert captured.out == "", shown
    lines = captured.err.rstrip("\n").split("\n")
    assert lines[0].startswith("error: ") and len(lines) == 3, f"{shown}: {captured.err[:500]}"
    assert all(lines) and len(lines[0]) < 400, f"{shown}: {captured.err[:500]}"
    return captured.err


def check(capsys, name, calls):
    main, _ = command(name)
    for argv, said in calls:
        error = refused(capsys, main, argv)
        assert any(word in error for word in said), f"{argv}: {error}"


@pytest.mark.parametrize("name", MODULES)
def test_bad_values_of_some_options(capsys, name):
    calls = list(bad_calls(name))
    check(capsys, name, calls[:: max(1, len(calls) // 16)])


@pytest.mark.slow  # three thousand calls and more
@pytest.mark.parametrize("name", MODULES)
def test_three_hundred_bad_calls(capsys, name):
    calls = mixed_calls(name)
    assert len(calls) >= 300
    check(capsys, name, calls)


def legal_values(action):
    """Words that the parser itself takes as the value of an option."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return {int: ["7", "-1", "+3", "007"], float: ["7", "0.5", ".5", "1e-3", "-2.", "nan"]}.get(
        action.type, ["a word", "ü-{x}:0.5", "-"]
    )


@pytest.mark.parametrize("name", MODULES)
def test_legal_values_are_taken(name):
    for before, parser in parsers(command(name)[1]):
        needed = [word for word in NEEDED.get(name, []) if not word.startswith("--")]
        # the words that lead to a parser of a subcommand are not its own
        needed += before[1:]
        for action in parser._actions:
            option = next((o for o in action.option_strings if o.startswith("--")), None)
            if option is None or action.nargs == 0:
                continue
            for value in legal_values(action):
                parser.parse_args([*needed, f"{option}={value}"])


EXTREMES = ("0", "-1", "1", str(2**31), str(2**63 - 1), str(2**64), "1e308", "-1e308", "1e-308")
EXTREMES += ("nan", "inf", "-inf", "0.0", "-0.0")


@pytest.mark.slow  # a few hundred plans
def test_no_number_is_too_large_for_a_plan(capsys):
    main, parser = command("generate")
    numbers = [action for action in parser._actions if action.type in (int, float)]
    assert len(numbers) > 12
    for action, value in itertools.product(numbers, EXTREMES):
        argv = ["a red circle", "--dry_run", f"{action.option_strings[0]}={value}"]
        code = main(argv)
        captured = capsys.readouterr()
        assert code in (0, 2), argv
        if code == 2:
            error = captured.err[captured.err.index("error: ") :]
            assert error.count("\n") == 3 and "".join(argv[2].partition("=")[:1])[2:] in error, (
                error
            )


# -- settings of training --------------------------------------------------------------------------

WRONG = {
    int: ("x", "1.5", "", "٣", "9" * 5000),
    float: ("x", "nan", "inf", "", "1_0", "٣.5"),
    bool: ("yes", "1", ""),
    tuple[int, int, int]: ("1,2", "a,b,c", ""),
    tuple[float, ...]: ("a,b", "1,,2"),
}


def bad_settings(cls, prefix):
    """(key=value, key) of every key of a configuration class that no type of its takes."""
    for name, field in fields(cls).items():
        key = f"{prefix}.{name}"
        yield f"{key}zz=1", f"{key}zz"
        plain = [kind for kind in field.kinds if kind not in (types.NoneType, *field.classes)]
        if str not in plain:
            values = set.intersection(*(set(WRONG[kind]) for kind in plain)) if plain else {"x"}
            yield from ((f"{key}={value}", key) for value in sorted(values))


def of_each_kind():
    """A preset for each set of configuration classes, which have the same keys."""
    classes = lambda preset: tuple(tree.cls for tree in train.resolve(preset, []).values())
    return {classes(preset): preset for preset in PRESETS}.values()


@pytest.mark.slow
@pytest.mark.parametrize("preset", of_each_kind())
def test_settings_of_training(capsys, preset):
    parts = train.resolve(preset, [])
    words = [word for part, tree in parts.items() for word in bad_settings(tree.cls, part)]
    assert len(words) > 60 and len(table(parts)) > 20
    for word, key in words:
        assert key in refused(capsys, train.main, [preset, "--dry_run", word])


@pytest.mark.slow
def test_settings_of_the_tiny_recipe(capsys):
    main, _ = command("tiny")
    words = [w for name, cls in tiny_settings.STAGES.items() for w in bad_settings(cls, name)]
    for word, key in words:
        assert key in refused(capsys, main, [word])


# -- the Python API --------------------------------------------------------------------------------

LONG = 10**5000
STRANGE = (
    *(b"x", object(), {}, {"a": 1}, [object()], (None,), 3 + 0j, float("nan"), LONG, -LONG),
    *(np.zeros((2, 2)), np.array([]), np.array(["a"]), Path("a\0b"), "nul\0", "half \ud83d"),
    *("", "n" * 5000, "33", 33.5, True, -1, lambda: None, np.datetime64("2020"), {3}, range(3)),
)
PLAIN = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "Path": lambda v: isinstance(v, str | Path),
    "None": lambda v: v is None,
}


def bad_arguments(signature):
    """(argument, value) where the value is of none of the types of its annotation, as far as these
    are plain ones or choices; of the others, what nothing takes."""
    for name, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            continue
        kinds = str(parameter.annotation).split(" | ")
        chosen = getattr(options, kinds[0], None)
        for value in STRANGE:
            if all(kind in PLAIN for kind in kinds):
                if any(PLAIN[kind](value) for kind in kinds) and abs_of(value) < 2**63:
                    continue
            elif get_args(chosen) and all(isinstance(c, str) for c in get_args(chosen)):
                pass
            elif not isinstance(value, bytes | complex | np.datetime64) or name == "image":
                continue
            yield name, value


def abs_of(value):
    return abs(value) if isinstance(value, int) else 0


def refuses(call, name, value):
    shown = f"{name}={type(value).__name__} {values_shown(value)}"
    try:
        call(**{name: value})
    except UsageError as error:
        text = str(error)
    except Exception as error:
        pytest.fail(f"{shown}: {type(error).__name__}: {error}")
    else:
        pytest.fail(f"{shown} is taken")
    assert text.count("\n") == 2 and name in text and len(text) < 1500, f"{shown}: {text}"


def test_python_arguments_of_load():
    calls = list(bad_arguments(inspect.signature(tdjax.load)))
    assert len(calls) >= 300
    for name, value in calls:
        refuses(tdjax.load, name, value)


def test_python_arguments_of_a_call():
    pipe = tdjax.load("demo", prompt_cache=False)
    calls = list(bad_arguments(inspect.signature(type(pipe).__call__)))
    calls = [(name, value) for name, value in calls if name not in ("self", "prompt")]
    assert len(calls) >= 300
    for name, value in calls:
        refuses(lambda **given: pipe.request("a red circle", **given), name, value)


def test_prompts_that_are_none():
    pipe = tdjax.load("demo", prompt_cache=False)
    for value in STRANGE:
        texts = isinstance(value, str) or getattr(value, "dtype", None) == np.dtype("<U1")
        if not texts:
            refuses(pipe.request, "prompt", value)


ROOT = Path(tdjax.__file__).parent.parent


def test_python_methods_refuse_by_name():
    pipe = tdjax.load("demo", prompt_cache=False)
    for call, words in {
        lambda: pipe.embed(3): "prompt is 3",
        lambda: pipe.embed([b"x"]): "prompt is",
        lambda: pipe.request(np.array("x")): "prompt is",
        lambda: pipe.free("vea"): "nearest: vae",
        lambda: pipe.default_prompt("x"): "seed is 'x'",
        lambda: pipe.decode(3): "latents are 3",
        lambda: tdjax.Result.load(3): "path is 3",
        lambda: pipe.request("a", seed=[1, 2]): "2 seeds",
    }.items():
        with pytest.raises(UsageError, match=re.escape(words)):
            call()


def errors(nodes):
    """{name} of our errors among classes, those of those among them."""
    known = {"TdjaxError"}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    for _ in range(3):
        known |= {c.name for c in classes if known & {ast.unparse(base) for base in c.bases}}
    return known


@pytest.mark.slow  # parses all sources
def test_every_error_says_what_and_why_and_what_to_do():
    nodes = [
        (path, node)
        for package in ("tdjax", "convert")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    ours = errors(node for _, node in nodes)
    assert ours >= {"UsageError", "DataError"}
    found = [
        (path, node.lineno, [*node.args, *(keyword.value for keyword in node.keywords)])
        for path, node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours
    ]
    assert len(found) > 300
    for path, line, arguments in found:
        if any(isinstance(value, ast.Starred) for value in arguments):
            continue
        ends = [value.orelse if isinstance(value, ast.IfExp) else value for value in arguments]
        empty = [value for value in ends if isinstance(value, ast.Constant) and not value.value]
        assert len(arguments) == 3 and not empty, f"{path}:{line}"
