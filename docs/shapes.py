"""For the API pages: the comment behind a signature, which gives shapes, becomes part of a docstring that gives none."""

from __future__ import annotations

import griffe


class Shapes(griffe.Extension):
    """Reads the comment at the end of a function's signature; keeps functions that a file of their package shares the name with."""

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
                if comment and "noqa" not in comment and not ("->" in func.docstring.value and "[" in func.docstring.value):
                    func.docstring.value = f"{func.docstring.value.rstrip()}\n\n{comment.strip()}"
                return

    def on_package(self, **_) -> None:
        for func in self.of_packages:
            func.parent.set_member(func.name, func)
