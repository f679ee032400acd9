"""Who may import whom (docs/architecture.md), read from the syntax trees; and that importing costs
no device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tdjax", "pallas_kernels", "convert")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Absolute names that a file imports, as `package.module` or `package.module.name`."""
    tree, out = ast.parse(path.read_text()), set()
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
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


def test_there_are_files():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p))
def test_arrows(path):
    package, names = module_name(path).split(".")[0], imports(path)
    allowed = {
        "pallas_kernels": {"pallas_kernels"},
        "convert": set(PACKAGES),
        "tdjax": {"tdjax", "pallas_kernels"},
    }[package]
    assert top(names) & set(PACKAGES) <= allowed
    assert not top(names) & {"torch", "diffusers", "transformers", "tests"}
    if package == "pallas_kernels":
        assert not top(names) & {"flax", "optax", "orbax", "einops"} - {"einops"}


def test_the_lower_rooms_do_not_know_the_upper_ones():
    knows = {name: ours(imports(path)) for name, path in MODULES.items()}
    for name, known in knows.items():
        if name.startswith(("tdjax.models", "tdjax.sampling", "tdjax.parallel")):
            assert not {m for m in known if m.startswith(("tdjax.pipeline", "tdjax.generate"))}
        if name.startswith("tdjax.sampling"):
            assert not {m for m in known if m.startswith("tdjax.models")}, name


def test_modules_form_no_cycle():
    graph = {
        name: ours(imports(path, inside_functions=False)) - {name} for name, path in MODULES.items()
    }
    for names in graph.values():
        names.discard("tdjax")  # the package's own door: it imports nothing
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for known in sorted(graph.get(name, ())):
                visit(known, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_try_around_imports():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                assert not any(
                    isinstance(child, ast.Import | ast.ImportFrom) for child in node.body
                ), path


def test_importing_starts_no_device():
    code = (
        "import sys, tdjax; assert 'jax' not in sys.modules; import tdjax.pipeline.pipeline, tdjax.checkpoints.published.checkpoint,"
        " pallas_kernels;from jax._src import xla_bridge; assert not xla_bridge._backends,"
        " xla_bridge._backends"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    import tdjax

    assert all(getattr(tdjax, name) is not None for name in tdjax.__all__)
    with pytest.raises(AttributeError, match="it has load"):
        tdjax.lode  # noqa: B018
