"""Documents: code is executed, commands are read by their own parsers, quoted messages are in the
source, links lead somewhere."""

import argparse
import ast
import html
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convert.__main__
import convert.quantize
import convert.validate
import pallas_kernels.bench
import tdjax.bench.__main__
import tdjax.cache
import tdjax.env
import tdjax.server.__main__
import tdjax.server.keys
import tdjax.train.__main__
import tdjax.train.encode.__main__
import tdjax.train.evaluate.__main__
import tdjax.train.synthesize
import tdjax.train.tiny.__main__
from tdjax import cli
from tdjax.__main__ import COMMANDS
from tdjax.checkpoints import demo
from tdjax.cli import hyphens
from tdjax.generate import __main__ as generate
from tdjax.generate import arguments, decode, models
from tdjax.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ids = lambda path: str(path.relative_to(ROOT))

# What a fence may say. "sh main" and "sh test": .ci/run executes them; "bash": executed here; "sh":
# read by the commands' parsers. "py": code that needs what is not here (a GPU, another package);
# it is parsed.
FENCES = {"", "text", "sh", "sh main", "sh test", "bash", "python", "py"}


def blocks(path: Path) -> list[tuple[str, str]]:
    """(what the fence says, text) of every block of a page."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", path.read_text(), re.M | re.S)


def commands(path: Path) -> list[str]:
    """Every command line of a page: in fences, and in backquotes of the text."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    inline = re.findall(r"`((?:python -m|tdjax) [^`]+)`", text)
    return inline + [
        line.split("  #")[0]
        for fence, body in blocks(path)
        if fence in FENCES
        for line in body.splitlines()
        if is_command(line)
    ]


def is_command(line: str) -> bool:
    return re.match(r"(\.venv/bin/)?(python3?|pip|jupyter|mkdocs|tdjax) ", line) is not None


# -- parsers: each reads a command as far as it can without opening a file -------------------------


def read_generate(argv):
    early = arguments.parse(hyphens(argv))
    for name in ("image_path", "prompt_file", "prompt_embeds", "latents", "ray"):
        setattr(early, name, None)  # neither the files nor Ray need be here
    generate.check_early(early)


def read_train(argv):
    args = tdjax.train.__main__.build_parser().parse_intermixed_args(hyphens(argv))
    if args.preset and args.preset != "PRESET":
        parts = tdjax.train.__main__.resolve(args.preset, args.settings)
        assert all(tdjax.train.__main__.build(tree) is not None for tree in parts.values())


def read_encode(argv):
    args = tdjax.train.encode.__main__.build_parser().parse_args(hyphens(argv))
    tdjax.train.encode.__main__.check_early(args)


def read_synthesize(argv):
    args = tdjax.train.synthesize.build_parser().parse_args(hyphens(argv))
    tdjax.train.synthesize.check_early(args)


def read_tiny(argv):
    args = tdjax.train.tiny.__main__.build_parser().parse_intermixed_args(hyphens(argv))
    assert tdjax.train.tiny.__main__.chosen_stages(args.stage)
    assert tdjax.train.tiny.__main__.resolve(args.settings, args.scale)


def read_convert(argv):
    args = convert.__main__.build_parser().parse_intermixed_args(hyphens(argv))
    *sources, target = (Path(path) for path in args.paths)
    convert.__main__.check(args, sources, target)


def read_env(argv):
    assert set(argv) <= {"--json", "--selftest"}


def read_cache(argv):
    """Its listing is harmless, and is made."""
    assert argv[0] == "ls" and tdjax.cache.main(argv) == 0


READERS = {
    "tdjax.generate": read_generate,
    "tdjax.server": lambda argv: tdjax.server.__main__.build_parser().parse_args(hyphens(argv)),
    "tdjax.server.keys": lambda argv: tdjax.server.keys.build_parser().parse_args(argv),
    "tdjax.train": read_train,
    "tdjax.train.encode": read_encode,
    "tdjax.train.synthesize": read_synthesize,
    "tdjax.train.tiny": read_tiny,
    "tdjax.train.evaluate": lambda argv: tdjax.train.evaluate.__main__.build_parser().parse_args(
        hyphens(argv)
    ),
    "tdjax.bench": tdjax.bench.__main__.parse,
    "tdjax.cache": read_cache,
    "tdjax.env": read_env,
    "convert": read_convert,
    "convert.validate": lambda argv: convert.validate.build_parser().parse_args(argv),
    "convert.quantize": lambda argv: convert.quantize.build_parser().parse_args(argv),
    "tdjax.generate.models": lambda argv: models.build_parser().parse_args(argv),
    "tdjax.generate.decode": lambda argv: decode.build_parser().parse_args(argv),
    "pallas_kernels.bench": pallas_kernels.bench.parse,
    "pytest": lambda argv: None,  # .ci/run executes it
    "venv": lambda argv: None,
}
# Commands that the text names without their arguments, or with a word that stands for some.
SHORT = {
    "tdjax --help",
    "tdjax decode",
    "tdjax decode FILE",
    "tdjax generate --config clip.mp4.json",
    "tdjax bench --model NAME",
    "tdjax generate --model NAME --dry_run",
    "tdjax convert",
    "tdjax quantize",
    "tdjax train PRESET key=value ...",
    "python -m convert",
    "python -m convert.quantize",
    "python -m convert --merge",
    "python -m convert --lora",
    "python -m tdjax.cache rm",
    "python -m tdjax.train",
    "python -m tdjax.train.encode",
    "python -m tdjax.train.synthesize",
    "python -m tdjax.train PRESET key=value ...",
}


def read_pip(argv):
    for word in argv:
        for extra in re.findall(r"\[(\w+)\]", word):
            assert extra in PROJECT["optional-dependencies"], f"no extra {extra}"


def read(line: str) -> None:
    line = line.strip()
    if line in SHORT:
        return None
    program, *argv = shlex.split(line)
    program = Path(program).name
    if program == "tdjax":
        module, _ = COMMANDS[argv[0]]
        program, argv = "python", ["-m", module.removesuffix(".__main__"), *argv[1:]]
    if program == "pip":
        return read_pip(argv)
    if program == "jupyter":
        assert argv[0] == "lab" and (ROOT / argv[1]).is_dir()
        return None
    if program == "mkdocs":
        assert argv == ["build", "--strict"] and (ROOT / "mkdocs.yml").is_file()
        return None
    if program == "python" and argv[0].startswith("docs/scripts/"):
        assert (ROOT / argv[0]).is_file(), line
        return None
    assert program in ("python", "python3") and argv[0] == "-m", line
    try:
        return READERS[argv[1]](argv[2:])
    except SystemExit as error:
        assert error.code in (0, None), f"{line}: its own parser refuses it"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_command_is_understood(path):
    for line in commands(path):
        read(line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_every_command_that_a_notebook_names_is_understood(path):
    for line in re.findall(r"`(python -m [^`]+)`", path.read_text()):
        read(line.replace("NAME ...", "tdjax.env"))


def test_a_wrong_command_would_be_found():
    for line in (
        "python -m tdjax.generate --promt fox",
        "python -m tdjax.train sla-1.3b modle.weights=x",
        'pip install -e ".[notebok]"',
    ):
        with pytest.raises((AssertionError, ValueError)):
            read(line)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_fences_are_known(path):
    text = path.read_text()
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(blocks(path))
    for fence, body in blocks(path):
        assert fence in FENCES, fence
        if fence in ("python", "py"):
            ast.parse(body)


# A process for the code of all pages: imports and programs are there for the next page, and names
# are not; commands are processes of their own. The demo is the folder that it is given. Says
# {number of the page: what went wrong}.
MANY = """
import gc, json, os, pathlib, shlex, subprocess, sys, traceback
from tdjax.checkpoints import demo
gc.set_threshold(50_000)
demo.PACKAGED = pathlib.Path(sys.argv[2])
found = {}
for number, (folder, blocks) in enumerate(json.load(sys.stdin)):
    os.chdir(folder)
    os.environ["TDJAX_CACHE"] = os.path.join(folder, "cache")
    try:
        for fence, block in blocks:
            if fence == "python":
                exec(compile(block, "block", "exec"), {"__name__": "__main__"})
            for line in block.splitlines() if fence == "bash" else ():
                words = [sys.executable, *shlex.split(line)[1:]]
                done = subprocess.run(words, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, f"{words}\\n{done.stdout}\\n{done.stderr}"
    except BaseException:
        found[number] = traceback.format_exc()
json.dump(found, open(sys.argv[1], "w"))
"""
RUN = [p for p in PAGES if p != README and {"python", "bash"} & {fence for fence, _ in blocks(p)}]


@pytest.fixture(scope="module")
def as_a_reader():
    """The environment of a reader: one device. Programs are compiled quickly."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    quick = {"XLA_FLAGS": " ".join(flags), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """The demo model, with short clips where nothing else is said."""
    folder = tmp_path_factory.mktemp("demo")
    for name in demo.PARTS:
        (folder / name).symlink_to(demo.folder() / name)
    facts = json.loads((folder / "model.json").read_text()) | {"frames": 5}
    (folder / "model.json").unlink()
    (folder / "model.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def failures(as_a_reader, short_demo, tmp_path_factory):
    """{page: what went wrong in its code, from top to bottom in one folder}."""
    code = [[each for each in blocks(path) if each[0] in ("python", "bash")] for path in RUN]
    folders = [str(tmp_path_factory.mktemp("page")) for _ in RUN]
    result = tmp_path_factory.mktemp("pages") / "failures.json"
    done = subprocess.run(
        [sys.executable, "-c", MANY, result, short_demo],
        input=json.dumps([*zip(folders, code, strict=True)]),
        env=as_a_reader,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {RUN[int(number)]: text for number, text in json.loads(result.read_text()).items()}


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=ids)
def test_blocks_run(path, failures):
    """As a reader would try it."""
    assert path not in failures, failures[path]


# -- troubleshooting -------------------------------------------------------------------------------


def template(node) -> str | None:
    """A string of the source with an ellipsis for everything that is put in when it runs."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = template(node.left), template(node.right)
        return "".join(part or "…" for part in parts) if any(parts) else None
    return None


@pytest.mark.slow
def test_quoted_messages_are_in_the_source():
    """Headings of troubleshooting.md quote lines of messages; each is part of a string somewhere in
    the code."""
    files = [
        path
        for package in ("tdjax", "convert", "pallas_kernels")
        for path in (ROOT / package).rglob("*.py")
    ]
    strings = {
        text
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if (text := template(node))
    }
    options = cli.options(arguments.build_parser(), generate.NAMES)
    strings |= {cli.spelled(text, options) for text in strings}
    quotes = [
        q
        for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines()
        if line.startswith("### ")
        for q in re.findall("`([^`]+)`", line)
    ]
    assert len(quotes) > 100 and len(set(quotes)) == len(quotes)
    assert min(len(quote.replace("…", "").strip()) for quote in quotes) >= 6
    missing = [quote for quote in quotes if not any(quote in text for text in strings)]
    assert not missing, "\n".join(missing)


PARSERS = (
    arguments,
    convert.__main__,
    convert.quantize,
    convert.validate,
    tdjax.bench.__main__,
    tdjax.server.__main__,
    tdjax.train.__main__,
    tdjax.train.encode.__main__,
    tdjax.train.evaluate.__main__,
    tdjax.train.synthesize,
    tdjax.train.tiny.__main__,
)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_options_that_pages_name_exist(path):
    known = {"--strict", "--selftest", "--lf"}.union(  # of mkdocs, tdjax.env and pytest
        *(options_of(module.build_parser()) for module in PARSERS)
    )
    # Commands of other programs are in fences that say "text".
    text = re.sub(r"^```text\n.*?^```$", "", path.read_text(), flags=re.M | re.S)
    named = set(re.findall(r"(?<![\w-])--[a-z_]+", text))
    assert named <= known, named - known


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


# -- links, paths, API -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_paths_that_pages_name_exist(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for name in re.findall(
        r"`((?:docs|tests|tdjax|convert|pallas_kernels|notebooks)/[\w./]+)`", text
    ):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / target).exists() or Path(target).name in MADE, target


# Pages that docs/scripts/pages.py makes.
MADE = {"commands.md", "license.md", "changelog.md", "contributing.md"}


def documented():
    """(page, dotted name, object) of everything that the API pages show."""
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for name, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", page.read_text(), re.M):
            owner, _, last = name.rpartition(".")
            try:
                found = importlib.import_module(name)
            except ModuleNotFoundError:
                found = getattr(importlib.import_module(owner), last)
                yield page.name, name, found
            members = re.search(r"members: \[(.*?)\]", options)
            for member in filter(None, members[1].split(", ") if members else ()):
                yield page.name, f"{name}.{member}", inspect.getattr_static(found, member)


def test_the_results_are_those_of_the_packaged_model():
    card = (ROOT / "tdjax/assets/demo/MODEL_CARD.md").read_text().split("## Results")[1]
    table = "\n".join(line for line in card.splitlines() if line.startswith("|"))
    assert table.count("\n") > 10 and table in (ROOT / "docs/training.md").read_text()


def test_what_the_api_pages_show_is_documented():
    rows = list(documented())
    assert len(rows) > 80
    for page, name, found in rows:
        found = getattr(found, "fget", found)
        assert inspect.getdoc(found), f"{page}: {name} has no docstring"


def test_public_names_are_on_the_api_pages():
    shown = {name.rpartition(".")[2] for _, name, _ in documented()}
    import pallas_kernels
    import tdjax

    missing = {*tdjax.__all__, *pallas_kernels.__all__} - shown - {"PRESETS", "__version__"}
    assert not missing, missing


def test_the_commands_page_has_every_option():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/scripts/pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = pages.commands()
    for name, (module, about) in COMMANDS.items():
        section = text.split(f"## tdjax {name}\n")[1].split("\n## ")[0]
        assert f"| [`tdjax {name}`](#tdjax-{name}) | {about} |" in text
        for action in importlib.import_module(module).build_parser()._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                assert f"`{option}`" in section, f"{name} {option}"
    table = pages.model_table()
    assert all(f"| `{name}` |" in table for name in ("demo", *PRESETS))


# What people look for, and the page that says it.
SEARCHED = {
    "install": "",
    "quickstart": "",
    "4090": "speed/",
    "docker": "faq/",
    "license": "license/",
    "lora": "howto/lora/",
    "progress": "api/pipeline/",
    "prompt_file": "howto/batch/",
    "fastapi": "howto/api/",
    "glossary": "glossary/",
    "notebook": "notebooks/1_generate/",
}


def test_built_site(tmp_path):
    """Where mkdocs is installed: the site builds, shows all that the API pages name, and its links
    lead to files and headings."""
    pytest.importorskip("mkdocs")
    options = ["--strict", "--quiet", "--site-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mkdocs", "build", *options]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    names = {path: set(re.findall(r'id="([^"]+)"', text)) for path, text in pages.items()}
    for page, name, _ in documented():
        assert name in names[tmp_path / "api" / Path(page).stem / "index.html"], (
            f"{page}: {name} is not shown"
        )
    index = json.loads((tmp_path / "search/search_index.json").read_text())["docs"]
    for word, page in SEARCHED.items():
        rows = [row for row in index if row["location"].partition("#")[0] == page]
        assert any(word in f"{row['title']} {row['text']}".lower() for row in rows), word
    for path in NOTEBOOKS:
        assert tmp_path / "notebooks" / path.stem / "index.html" in pages, path
        assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text(), path
    for path, text in pages.items():
        for target in re.findall(r'(?:href|src)="(?!https?:|data:|/)([^"]+)"', text):
            place, _, heading = html.unescape(target).partition("#")
            goal = path if not place else (path.parent / place).resolve()
            goal = goal / "index.html" if goal.is_dir() else goal
            assert goal.exists(), f"{path}: {target}"
            if heading and goal.suffix == ".html":
                assert heading in names[goal], f"{path}: {target}"
