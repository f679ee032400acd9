"""For the API pages: comments that give shapes of a signature or meanings of a config's fields
become part of the docstring, and what a docstring says of arguments becomes a table."""

from __future__ import annotations

import re

import griffe

FIELD = re.compile(r"    (\w+): [^#]*  # (.+)")
ARGUMENT = re.compile(r"(\*?\w+(?:, \w+)*): +(\S.*)")  # "fps:   written into files"


def table(rows: list[tuple[str, str]]) -> str:
    """Returns names and what is said of them as a table of Markdown."""
    cell = lambda text: text.replace("|", "\\|")
    lines = [f"| `{name}` | {cell(meaning)} |" for name, meaning in rows]
    return "\n".join(["| argument | meaning |", "|---|---|", *lines])


def with_table(text: str, known: set[str]) -> str:
    """Returns a docstring whose lines about arguments, with those that go on below them, are a
    table. known: names of the arguments."""
    out: list[str] = []
    rows: list[tuple[str, str]] = []
    for line in [*text.splitlines(), ""]:
        match = ARGUMENT.fullmatch(line)
        if match and (match[1].split(", ")[0] in known or match[1].startswith("*")):
            rows.append((match[1], match[2]))
        elif rows and line.startswith("    "):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            out += ["", *table(rows).splitlines(), ""] if rows else []
            rows = []
            out.append(line)
    return "\n".join(out).strip()


class Shapes(griffe.Extension):
    """Reads the comment at the end of a function's signature; keeps functions that a file of their
    package shares the name with."""

    def __init__(self):
        self.of_packages: list[griffe.Function] = []

    def on_function_instance(self, *, node, func: griffe.Function, **_) -> None:
        if func.docstring is not None:
            known = {parameter.name for parameter in func.parameters}
            func.docstring.value = with_table(func.docstring.value, known)
        if func.parent is not None and func.parent.is_init_module:
            self.of_packages.append(func)
        if func.docstring is None or not func.source:
            return
        for line in func.source.splitlines():
            code, _, comment = line.partition("  # ")
            if code.rstrip().endswith(":") and not code.lstrip().startswith("@"):
                if (
                    comment
                    and "noqa" not in comment
                    and not ("->" in func.docstring.value and "[" in func.docstring.value)
                ):
                    func.docstring.value = f"{func.docstring.value.rstrip()}\n\n{comment.strip()}"
                return

    def on_class_instance(self, *, node, cls: griffe.Class, **_) -> None:
        fields = [
            match for line in (cls.source or "").splitlines() if (match := FIELD.fullmatch(line))
        ]
        if cls.docstring is not None:
            known = set(re.findall(r"^    (\w+): ", cls.source or "", re.M))
            text = with_table(cls.docstring.value, known)
            rows = [(match[1], match[2]) for match in fields]
            cls.docstring.value = f"{text.rstrip()}\n\n{table(rows)}" if rows else text

    def on_package(self, **_) -> None:
        for func in self.of_packages:
            func.parent.set_member(func.name, func)
