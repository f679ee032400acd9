"""For the site: pages that are made when it is built. The commands' page comes from their own
parsers, the table of models from the presets; the changes, the license and how to contribute are
the repository's files."""

from __future__ import annotations

import argparse
import html
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from tdjax.__main__ import COMMANDS
from tdjax.generate import models
from tdjax.presets import SHARED_GB

ROOT = Path(__file__).resolve().parent.parent.parent
# Pages whose text lies beside docs/, and where links of theirs lead on the site.
FILES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
MODELS = "<!-- the table of models -->"
# Who looks for a word wants to be shown how, before every message and option that has the word.
BOOSTS = {"index": 4, "quickstart": 3, "howto/": 3, "speed": 3, "faq": 2, "troubleshooting": 0.3}


def on_files(files, config):
    """Adds the pages that no file in docs/ holds."""
    from mkdocs.structure.files import File

    made = {"commands.md": commands(), "license.md": license_page()}
    made |= {page: linked((ROOT / name).read_text()) for page, name in FILES.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts the table of models where a page asks for it, and how far up a search shows the page."""
    boost = next((value for name, value in BOOSTS.items() if page.file.src_uri.startswith(name)), 1)
    page.meta.setdefault("search", {"boost": boost})
    return markdown.replace(MODELS, model_table())


def linked(text: str) -> str:
    """A file of the repository as a page: links into docs/ lead to pages, others are plain."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    for page, name in {**FILES, "license.md": "LICENSE"}.items():
        text = text.replace(f"]({name})", f"]({page})")
    return re.sub(r"\[([^\]]+)\]\((?!http|[\w/]+\.md|#)[^)]*\)", r"\1", text)


def license_page() -> str:
    """The license as a page."""
    return f"# License\n\nApache-2.0.\n\n```text\n{(ROOT / 'LICENSE').read_text()}```\n"


def model_table() -> str:
    """Every named model as a row."""
    lines = [
        "| name | makes | size | steps | download | files |",
        "|---|---|---|---|---|---|",
        "| `demo` | video from text | 64x64 | 4 | none: in the package | |",
    ]
    for row in models.listing():
        task = {"t2v": "video from text", "i2v": "video from an image"}[row["task"]]
        link = f"[{row['repo']}](https://huggingface.co/{row['repo']})"
        files = ", ".join(f"`{file}`" for file in row["files"])
        lines.append(
            f"| `{row['name']}` | {task} | {row['resolution']} | {row['num_steps']} |"
            f" {row['gigabytes']:.1f} GB | {link}: {files} |"
        )
    shared = next(iter(models.listing()))["shared"]
    places = "; ".join(f"`{repo}` {' and '.join(files)}".strip() for repo, files in shared.items())
    lines += ["", f"{SHARED_GB:g} GB of each download are shared by all: {places}."]
    return "\n".join(lines)


def commands() -> str:
    """The page of commands."""
    text = [
        "# Commands",
        "",
        "`tdjax COMMAND` and `python -m tdjax COMMAND` are the same. Options may be written with"
        " hyphens or underscores. Paths written go to stdout, everything else to stderr.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`tdjax {name}`](#tdjax-{name}) | {row[1]} |" for name, row in COMMANDS.items()),
        "",
    ]
    for name, (module, _) in COMMANDS.items():
        text += section(importlib.import_module(module).build_parser(), f"tdjax {name}")
    codes = "0 done, 2 usage, 3 checkpoint, 4 out of memory, 5 not finite, 130 interrupted,"
    return "\n".join([*text, "## Exit codes", "", f"{codes} 143 terminated."])


def section(parser: argparse.ArgumentParser, name: str, level: int = 2) -> Iterator[str]:
    """The lines about one command, with those of the commands in it."""
    usage = parser.format_usage()[7:].strip()
    yield from (f"{'#' * level} {name}", "", "```text", usage, "```", "")
    if parser.description and level == 2:
        yield from (parser.description, "")
    inner = []
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        inner += [a for a in shown if isinstance(a, argparse._SubParsersAction)]
        rows = [row(parser, a) for a in shown if not isinstance(a, argparse._SubParsersAction)]
        if rows:
            titles = {"positional arguments": "words", "options": "options"}
            title = titles.get(str(group.title), group.title)
            yield from (f"| {title} | |", "|---|---|")
            yield from (*rows, "")
    for action in inner:
        for word, each in action.choices.items():
            yield from section(each, f"{name} {word}", level + 1)
    if parser.epilog:
        yield from ("```text", parser.epilog, "```", "")


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One option as a row."""
    names = ", ".join(f"`{option}`" for option in action.option_strings)
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if action.choices is not None:
        value = " or ".join(map(str, action.choices)) if len(action.choices) < 7 else value
    said = parser.formatter_class(parser.prog)._get_help_string(action) or ""
    text = said % (vars(action) | {"prog": parser.prog})
    names = f"{names} {value}".strip() if names else f"`{value}`"
    cells = (html.escape(cell, quote=False).replace("|", "\\|") for cell in (names, text))
    return f"| {' | '.join(cells)} |"
