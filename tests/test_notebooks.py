"""Notebooks: stripped in git, and every cell runs, in order, in one namespace, in a process of its
own on a CPU."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 300  # seconds on two cores
OURS = {"tdjax", "pallas_kernels", "convert"}

# Figures are drawn where a notebook would show them, so that a wrong plot fails as well.
RUNNER = """
import json, sys, time
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt

def show(*_, **__):
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")

plt.show = show
space, start = {"__name__": "__main__"}, time.perf_counter()
for name, source in json.load(sys.stdin):
    exec(compile(source, name, "exec"), space)
    print(f"[{name}: {time.perf_counter() - start:.1f} s]", flush=True)
show()
"""


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def code(path: Path) -> list[tuple[str, str]]:
    """(name, source) of the cells that a CPU runs."""
    chosen = [(i, cell) for i, cell in enumerate(cells(path, "code")) if "gpu" not in tags(cell)]
    return [(f"{path.name}, code cell {i}", "".join(cell["source"])) for i, cell in chosen]


def test_there_are_notebooks():
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"tags"} and set(tags(cell)) <= {"gpu"}
    assert "widgets" not in json.loads(path.read_text())["metadata"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_parses_and_imports_only_what_is_installed(path):
    """Cells are plain Python (no magics), and need nothing beside the package and the `notebook`
    extra."""
    known = OURS | {"jax", "flax", "optax", "einops", "numpy", "safetensors", "ml_dtypes"}
    known |= {"matplotlib", "IPython"}  # the extra
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= known | sys.stdlib_module_names, names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_cells_import_from_us_exists(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
                for alias in node.names:
                    found = importlib.import_module(node.module)
                    if not hasattr(found, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_named_files_exist(path):
    """Paths that the text names in backquotes."""
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for name in re.findall(r"`((?:docs|tests|tdjax|convert|pallas_kernels)/[\w./]+)`", text):
        assert (FOLDER.parent / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    pytest.importorskip("matplotlib", reason="the notebook extra is not installed")
    # Four fake devices, and what makes compilation fast, are this process's own.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    folders = os.pathsep.join([str(FOLDER.parent), env.get("PYTHONPATH", "")])
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(code(path)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=FOLDER,
        env=env,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    print(done.stdout)
