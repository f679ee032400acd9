"""Who may import whom: the code's syntax trees against the table of docs/architecture.md; and that
importing costs no device."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tdjax", "pallas_kernels", "convert")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
DOCUMENT = ROOT / "docs/architecture.md"
PICTURE = ROOT / "docs/architecture.svg"
ENTRIES = 24  # files and folders directly in tdjax, at most


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}


# -- the code --------------------------------------------------------------------------------------


def executed(tree: ast.AST, inside_functions: bool):
    """Nodes of a file that run: not those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield from executed(node, inside_functions)


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Absolute names that a file imports, as `package.module` or `package.module.name`."""
    out = set()
    for node in executed(ast.parse(path.read_text()), inside_functions):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def ours(names: set[str]) -> set[str]:
    """Imported names as modules of this project."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return found & set(MODULES)


# -- the document ----------------------------------------------------------------------------------


def read_table(text: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """({room: its floor}, {floor: rooms that it may import}) from the table under "Who may import
    whom", in its order. A floor is a row: **its name**: `room`, `room`, or a room alone, whose name
    it has."""
    section = text.split("## Who may import whom")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ((?:\*\*|`).*) \| (.*) \|$", section, re.M)
    names = [re.match(r"\*\*(.+?)\*\*|`(.+?)`", rooms) for rooms, _ in rows]
    floors = {
        name[1] or name[2]: re.findall(r"`(.+?)`", row)
        for name, (row, _) in zip(names, rows, strict=True)
    }
    allowed = {}
    for floor, (_, right) in zip(floors, rows, strict=True):
        groups = [room for name in re.findall(r"\*\*(.+?)\*\*", right) for room in floors[name]]
        allowed[floor] = {*groups, *re.findall(r"`(.+?)`", right)}
    return {room: floor for floor, rooms in floors.items() for room in rooms}, allowed


FLOORS, ALLOWED = read_table(DOCUMENT.read_text())


def room_of(module: str) -> str:
    """The row that a module belongs to: its own name, or the nearest package above it. `tdjax` and
    `pallas_kernels` mean the package's own `__init__` there, and nothing beneath."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS and (name == module or name not in ("tdjax", "pallas_kernels")):
            return name
    raise AssertionError(f"{module} is in no room of the table of docs/architecture.md")


def arrows(knows: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """{(room, room that it imports): "module -> module" of every such import}."""
    out: dict[tuple[str, str], list[str]] = {}
    for module, known in knows.items():
        for other in known:
            if room_of(module) != room_of(other):
                pair = room_of(module), room_of(other)
                out.setdefault(pair, []).append(f"{module} -> {other}")
    return out


def against_the_table(knows: dict[str, set[str]]) -> list[str]:
    """Imports that the table does not have."""
    return sorted(
        line
        for (room, other), lines in arrows(knows).items()
        if other not in ALLOWED[FLOORS[room]]
        for line in lines
    )


KNOWS = {name: ours(imports(path)) for name, path in MODULES.items()}


def test_there_are_files():
    assert len(FILES) > 40 and len(FLOORS) > 20


def test_every_arrow_is_in_the_table():
    wrong = against_the_table(KNOWS)
    assert not wrong, "\n".join(wrong)


def test_an_arrow_upwards_would_be_found():
    for module, other in (
        ("tdjax.text.tokenizer", "tdjax.pipeline.conditioning"),
        ("tdjax.models.linear", "convert.model"),
        ("pallas_kernels.qk_prep.triton", "pallas_kernels.sage_attention.quantize"),
    ):
        assert against_the_table({module: {other}}) == [f"{module} -> {other}"]


def test_the_table_leads_down():
    """Rooms stand in the order of the table, and arrows point down: no cycle."""
    order = list(FLOORS)
    for room, floor in FLOORS.items():
        for other in ALLOWED[floor] - {room}:
            assert other in FLOORS, f"{room} -> {other}: no such room"
            same = FLOORS[other] == floor  # the files of one floor: by test_modules_form_no_cycle
            assert same or order.index(other) > order.index(room), f"{room} -> {other} leads up"


def test_rooms_exist_and_floors_are_drawn():
    drawn = re.findall(r"<text[^>]*>(.*?)<", PICTURE.read_text())
    for room, floor in FLOORS.items():
        assert room in MODULES, f"{room}: no such module"
        title = re.sub(r"^(tdjax|pallas_kernels)\.", "", floor)
        assert title == "__main__" or any(line.startswith(title) for line in drawn), floor


def test_modules_form_no_cycle():
    graph = {
        name: ours(imports(path, inside_functions=False)) - {name} for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for known in sorted(graph.get(name, ())):
                visit(known, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_first_floor_is_not_crowded():
    entries = [path.name for path in (ROOT / "tdjax").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ENTRIES, entries


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_what_others_wrote(path):
    """torch and its relatives are oracles of tests; kernels stand on jax and numpy alone."""
    names = top(imports(path))
    assert not names & {"torch", "diffusers", "transformers", "tests"}
    if path.is_relative_to(ROOT / "pallas_kernels"):
        assert not names & {"flax", "optax", "orbax"}


def test_no_try_around_imports():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                assert not any(
                    isinstance(child, ast.Import | ast.ImportFrom) for child in node.body
                ), path


IMPORTING = """
import sys
import tdjax
assert "jax" not in sys.modules
import tdjax.pipeline.pipeline, tdjax.checkpoints.published.checkpoint, pallas_kernels
import tdjax.pipeline.load
assert "orbax.checkpoint" not in sys.modules, "half a second, which published files do without"
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
"""


# Begin folders in which arrays are written. A signal while Orbax is imported ends a process at
# once, and would leave the folder.
BEGINNING = ("convert.model", "tdjax.train.tiny.stages.package", "tdjax.train.checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("module", BEGINNING)
def test_what_begins_a_folder_has_imported_what_writes_in_it(module):
    code = f"import sys, {module}; sys.exit('orbax.checkpoint' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_importing_starts_no_device():
    command = [sys.executable, "-c", IMPORTING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    import tdjax

    assert all(getattr(tdjax, name) is not None for name in tdjax.__all__)
    with pytest.raises(AttributeError, match="it has load"):
        tdjax.lode  # noqa: B018


def test_lines_have_at_most_100_characters():
    """Also those that the linter leaves out: a line that is one word."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if len(line) > 100
    ]
    assert not long, long
