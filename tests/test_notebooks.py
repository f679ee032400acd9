"""Notebooks: stripped in git, and every cell runs, in order, in a kernel of its own on a CPU. What
they show is kept for the site; its pages have all of it."""

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OURS = {"tdjax", "pallas_kernels", "convert"}

spec = importlib.util.spec_from_file_location(
    "scripts", FOLDER.parent / "docs/scripts/notebooks.py"
)
scripts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripts)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def test_there_are_notebooks():
    assert [path.name[0] for path in NOTEBOOKS] == list("1234567")


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
@pytest.mark.filterwarnings("default")  # of the kernel's own client
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, no_compile_cache):
    pytest.importorskip("matplotlib", reason="the notebook extra is not installed")
    pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    shown = scripts.outputs(scripts.execute(path))
    stderr = [output["text"] for _, output in shown if output.get("name") == "stderr"]
    assert not stderr, "\n".join(stderr)  # a reader would see it in red
    text, figures = scripts.page(path)
    pictures = [output for _, output in shown if "image/png" in output.get("data", {})]
    assert len(figures) == len(pictures) == text.count("![What the cell above draws]")
    assert len(pictures) >= 2 and "made on a CPU" in text


def test_a_page_has_what_its_notebook_shows(tmp_path, monkeypatch):
    path = tmp_path / "1_small.ipynb"
    cell = {"cell_type": "code", "metadata": {}, "source": ["print(1)\n", "figure"]}
    texts = {
        "cell_type": "markdown",
        "metadata": {},
        "source": ["# Small\n", "see `docs/files.md`"],
    }
    plain = {"cells": [texts, cell | {"outputs": []}, cell | {"outputs": []}]}
    plain["cells"][2]["metadata"] = {"tags": ["gpu"]}
    path.write_text(json.dumps(plain))
    monkeypatch.setattr(scripts, "RUN", tmp_path / "run")
    bare = "*`notebooks/1_small.ipynb` of the repository, shown without outputs.*"
    text, figures = scripts.page(path)
    assert not figures and text == (
        f"# Small\nsee [files.md](../files.md)\n\n{bare}\n\n```python\nprint(1)\nfigure\n```\n\n"
        "```python\nprint(1)\nfigure\n```\n\n*This cell needs a GPU, and was not run.*"
    )

    shown = json.loads(json.dumps(plain))
    times = {
        "iopub.execute_input": "2026-01-01T10:00:00Z",
        "shell.execute_reply": "2026-01-01T10:01:02Z",
    }
    shown["cells"][1]["metadata"] = {"execution": times}
    shown["cells"][1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["10 %\r100 %\n"]},
        {
            "output_type": "display_data",
            "data": {"image/png": "aGVs\nbG8=", "text/plain": "<Figure>"},
        },
        {
            "output_type": "execute_result",
            "data": {"text/html": ["<b>", "x</b>"], "text/plain": "x"},
        },
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/1_small.ipynb").write_text(json.dumps(shown))
    text, figures = scripts.page(path)
    assert figures == {"1_small_1_0.png": b"hello"} and "on a CPU, in 62 s" in text
    assert (
        "``` {.text .output}\n100 %\n```\n\n![What the cell above draws](1_small_1_0.png)" in text
    )
    assert '<div class="output">\n<b>x</b>\n</div>' in text

    shown["cells"][1]["source"] = ["print(2)"]  # outputs of another text are not shown
    (tmp_path / "run/1_small.ipynb").write_text(json.dumps(shown))
    assert bare in scripts.page(path)[0]
