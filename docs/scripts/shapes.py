"""For the API pages: comments that give shapes of a signature or meanings of a config's fields
become part of the docstring."""

from __future__ import annotations

import re

import griffe

FIELD = re.compile(r"    (\w+): [^#]*  # (.+)")


class Shapes(griffe.Extension):
    """Reads the comment at the end of a function's signature; keeps functions that a file of their
    package shares the name with."""

    def __init__(self):
        self.of_packages: list[griffe.Function] = []

    def on_function_instance(self, *, node, func: griffe.Function, **_) -> None:
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
        if cls.docstring is not None and fields:
            width = max(len(name) for name, _ in (match.groups() for match in fields))
            told = "\n".join(
                f"{name:{width}}  {meaning}"
                for name, meaning in (match.groups() for match in fields)
            )
            cls.docstring.value = f"{cls.docstring.value.rstrip()}\n\n{told}"

    def on_package(self, **_) -> None:
        for func in self.of_packages:
            func.parent.set_member(func.name, func)
