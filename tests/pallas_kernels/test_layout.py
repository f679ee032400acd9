"""Ops stand beside each other: one imports shared files, and never another op."""

import ast
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(pallas_kernels.__file__).parent
OPS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def imported(path):
    """The files and folders of the package that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pallas_kernels":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("pallas_kernels."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            parts = (name.name.split(".") for name in node.names)
            yield from (part[1] for part in parts if part[0] == "pallas_kernels" and part[1:])


@pytest.mark.parametrize("op", OPS)
def test_an_op_imports_no_other_op(op):
    paths = list((ROOT / op).glob("*.py"))
    assert ROOT / op / "reference.py" in paths
    for path in paths:
        assert not set(imported(path)) & set(OPS) - {op}, path


def test_shared_files_import_no_op():
    """But for what covers all of them."""
    above = {"__init__", "bench", "cases", "inventory", "selftest"}
    for path in ROOT.glob("*.py"):
        if path.stem not in above:
            assert not set(imported(path)) & set(OPS), path
