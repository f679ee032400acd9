"""Notebooks with their outputs: runs them, keeps what they showed in build/notebooks, and makes
pages of the site of them. In git they lie without outputs.

    python docs/scripts/notebooks.py [1_generate ...]
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES, RUN = ROOT / "notebooks", ROOT / "build/notebooks"
LIMIT = 900  # seconds of one cell, on a machine that does other things too
SITE = "notebooks"  # folder of the pages
SKIPPED = "gpu"  # tag of cells that no CPU runs


def execute(path: Path) -> dict:
    """Runs every cell in a kernel of its own, on a CPU, and keeps the notebook with what it showed
    in RUN. Raises nbclient's CellExecutionError, and RuntimeError where a figure was not drawn."""
    import nbformat
    from nbclient import NotebookClient

    from tdjax.files import write_text

    # Fake devices, and what makes compilation fast, are the caller's own.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env["JAX_PLATFORMS"] = "cpu"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        skip_cells_with_tag=SKIPPED,
        resources={"metadata": {"path": str(SOURCES)}},
    )
    client.execute(env=env)
    for _, output in outputs(notebook):
        # A figure or a video that cannot be drawn ends no cell: its error is only shown.
        if output.get("name") == "stderr" and "Traceback" in output["text"]:
            raise RuntimeError(f"{path.name}: {output['text']}")
    RUN.mkdir(parents=True, exist_ok=True)
    write_text(RUN / path.name, nbformat.writes(notebook))
    return notebook


def outputs(notebook: dict) -> list[tuple[int, dict]]:
    """(number of the cell, output) of everything that a notebook shows."""
    cells = enumerate(notebook["cells"])
    return [(i, output) for i, cell in cells for output in cell.get("outputs", ())]


def on_files(files, config):
    """Adds a page for each notebook, and its figures."""
    from mkdocs.structure.files import File

    for path in sorted(SOURCES.glob("*.ipynb")):
        text, figures = page(path)
        files.append(File.generated(config, f"{SITE}/{path.stem}.md", content=text))
        for name, data in figures.items():
            files.append(File.generated(config, f"{SITE}/{name}", content=data))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links to notebooks, which are files of the repository, to their pages."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+notebooks/(\w+)\.ipynb\)", rf"]({up}{SITE}/\1.md)", markdown)


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """(text, figures by name) of a notebook; with outputs where it was run as it is now."""
    notebook, run = json.loads(path.read_text()), RUN / path.name
    shown = json.loads(run.read_text()) if run.is_file() else notebook
    if [source(cell) for cell in shown["cells"]] != [source(cell) for cell in notebook["cells"]]:
        shown = notebook
    lines, figures = [], {}
    for number, cell in enumerate(shown["cells"]):
        if cell["cell_type"] == "markdown":
            lines.append(linked(source(cell)))
            continue
        lines.append(fenced("python", source(cell)))
        if SKIPPED in cell["metadata"].get("tags", ()):
            lines.append("*This cell needs a GPU, and was not run.*")
        for output in joined(cell["outputs"]):
            lines.append(drawn(output, f"{path.stem}_{number}_{len(figures)}.png", figures))
    lines.insert(1, about(path, shown))
    return "\n\n".join(lines), figures


def about(path: Path, notebook: dict) -> str:
    """A line that says where the notebook is and what its outputs were made on."""
    line = f"*`notebooks/{path.name}` of the repository"
    marks = [cell["metadata"].get("execution") for cell in notebook["cells"]]
    marks = [mark for mark in marks if mark]
    if not marks:
        return f"{line}, shown without outputs.*"
    from datetime import datetime

    begin, end = (
        datetime.fromisoformat(mark[name])
        for mark, name in ((marks[0], "iopub.execute_input"), (marks[-1], "shell.execute_reply"))
    )
    return f"{line}. What it shows was made on a CPU, in {(end - begin).total_seconds():.0f} s.*"


def source(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def linked(text: str) -> str:
    """A cell's text, whose names of pages lead to them."""
    return re.sub(r"`docs/([\w/]+\.md)`", r"[\1](../\1)", text)


def joined(shown: list[dict]) -> list[dict]:
    """What a cell showed; lines of one stream that follow one another are one."""
    out: list[dict] = []
    for output in shown:
        if out and output["output_type"] == "stream" and output["name"] == out[-1].get("name"):
            text = ["".join(out[-1]["text"]), "".join(output["text"])]
            out[-1] = output | {"text": text}
        else:
            out.append(output)
    return out


def drawn(output: dict, name: str, figures: dict[str, bytes]) -> str:
    """What a cell showed as text of a page; a figure is put among `figures` under a name."""
    import base64

    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a bar of progress, which is gone
    if "text/html" in data:
        return f'<div class="output">\n{"".join(data["text/html"])}\n</div>'
    if "image/png" in data:
        figures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![What the cell above draws]({PurePosixPath(name)})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    # Of a line that was written over, what was left.
    return fenced(" {.text .output}", re.sub(r"[^\n]*\r(?!\n)", "", text).rstrip())


def fenced(kind: str, text: str) -> str:
    """A block of code or plain text; none for nothing."""
    fence = "````" if "```" in text else "```"
    return f"{fence}{kind}\n{text}\n{fence}" if text else ""


if __name__ == "__main__":
    for chosen in sorted(SOURCES.glob("*.ipynb")):
        if not sys.argv[1:] or chosen.stem in sys.argv[1:]:
            execute(chosen)
            print(RUN / chosen.name)
