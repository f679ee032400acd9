"""For the API pages: the comment behind a signature, which gives shapes, becomes part of a docstring that gives none."""

from __future__ import annotations

import griffe


class Shapes(griffe.Extension):
    """Reads the comment at the end of a function's signature."""

    def on_function_instance(self, *, node, func: griffe.Function, **_) -> None:
        if func.docstring is None or not func.source:
            return
        for line in func.source.splitlines():
            code, _, comment = line.partition("  # ")
            if code.rstrip().endswith(":") and not code.lstrip().startswith("@"):
                if comment and "noqa" not in comment and not ("->" in func.docstring.value and "[" in func.docstring.value):
                    func.docstring.value = f"{func.docstring.value.rstrip()}\n\n{comment.strip()}"
                return
