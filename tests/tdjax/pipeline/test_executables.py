"""Executables on disk: the bits of those that were compiled here, found by all that they depend on,
and never in the way."""

import functools
import importlib
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tdjax
from tdjax.models import norms, wan_dit, wan_vae
from tdjax.pipeline import compilation, executables
from tdjax.pipeline.compilation import OverSpace
from tdjax.pipeline.executables import Asked
from tdjax.sampling import few_step

SMALL = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 2}
STATIC = {"steps": 2, "shape": (3, 5)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where executables are kept, however little time they take."""
    monkeypatch.setattr(executables, "folder", lambda: tmp_path)
    monkeypatch.setattr(executables, "WORTH_KEEPING", 0.0)
    return tmp_path


@pytest.fixture
def traced(monkeypatch):
    """Names of the functions that are compiled."""
    names, make = [], Asked.compile
    noted = lambda self, **options: (names.append(self.function.__name__), make(self, **options))[1]
    monkeypatch.setattr(Asked, "compile", noted)
    return names


def noise(**changes):
    given = {"function": compilation.start_noise, "args": (jax.random.key(3),), "static": STATIC}
    return Asked(**(given | changes))


def entries(folder):
    return sorted(folder.glob("*.executable"))


def run(asked):
    return np.asarray(executables.made(asked)(*asked.args))


def test_one_that_is_there_is_not_traced(folder, traced):
    first, second = run(noise()), run(noise())
    assert traced == ["start_noise"] and len(entries(folder)) == 1
    expected = compilation.start_noise(jax.random.key(3), **STATIC)
    assert np.array_equal(first, second) and np.array_equal(first, expected)
    count = lambda: executables.made(noise()).memory_analysis()
    assert count().output_size_in_bytes == count().output_size_in_bytes == 2 * 3 * 5 * 4


def test_one_that_jax_has_kept_is_compiled_anew(folder, traced):
    """What JAX's cache gives on a CPU cannot be serialised: functions are missing in it."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        for _ in range(2):
            noise().compile()
            jax.clear_caches()
        expected = run(noise())
        jax.clear_caches()
        assert np.array_equal(run(noise()), expected) and len(traced) == 3
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_nothing_is_kept_where_jax_keeps_nothing(tmp_path, monkeypatch, traced):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    for place in (None, "gs://bucket/folder"):
        jax.config.update("jax_compilation_cache_dir", place)
        try:
            assert executables._path(noise()) is None
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
    assert not list(tmp_path.iterdir())


def test_small_ones_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(executables, "WORTH_KEEPING", 1e3)
    run(noise())
    assert not entries(folder)


# -- what tells them apart -------------------------------------------------------------------------


def keys(*asked):
    found = [executables._path(each) for each in asked]
    assert None not in found
    return found


CHANGED = {
    "static": {"static": {"steps": 2, "shape": (3, 6)}},
    "a static argument more": {"static": {**STATIC, "more": None}},
    "function": {"function": few_step.start},
    "shape": {"args": (jnp.zeros(3),)},
    "dtype": {"args": (jnp.zeros(3, jnp.bfloat16),)},
    "weak type": {"args": (jnp.asarray(1.0),)},
    "strong type": {"args": (jnp.asarray(1.0, jnp.float32),)},
    "structure": {"args": ([jnp.zeros(3)],)},
    "donation": {"donate": (0,)},
    "mesh": {"mesh": Mesh(np.array(jax.devices()[:2]), ("sp",))},
    "other devices": {"mesh": Mesh(np.array(jax.devices()[1:3]), ("sp",))},
    "their order": {"mesh": Mesh(np.array(jax.devices()[1::-1]), ("sp",))},
    "axis": {"mesh": Mesh(np.array(jax.devices()[:2]), ("tp",))},
}


def test_each_thing_that_is_asked_for_counts(folder):
    asked = [noise(), *(noise(**change) for change in CHANGED.values())]
    assert len(set(keys(*asked))) == len(asked)
    assert keys(*asked) == keys(*asked)


def test_where_arguments_and_results_lie_counts(folder):
    mesh = Mesh(np.array(jax.devices()[:2]), ("sp",))
    swapped = Mesh(np.array(jax.devices()[1::-1]), ("sp",))
    places = [NamedSharding(m, PartitionSpec(*p)) for m in (mesh, swapped) for p in ((), ("sp",))]
    inputs = [jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place) for place in places]
    asked = [noise(args=(shape,), mesh=mesh) for shape in inputs]
    asked += [noise(out_shardings=place, mesh=mesh) for place in places]
    body = compilation.decode_first
    asked += [
        noise(function=OverSpace(body, m, inputs, (True,)))
        for m in (mesh, swapped)
        for inputs in ((True,), (False,))
    ]
    assert len(set(keys(*asked))) == len(asked)


def test_static_parts_of_modules_count(folder):
    from flax import nnx

    shapes = [
        jax.eval_shape(lambda eps=eps: norms.LayerNorm(4, eps, tdjax.precision.FLOAT32))
        for eps in (1e-5, 1e-6)
    ]
    assert all(isinstance(module, nnx.Module) for module in shapes)
    assert len(set(keys(*(noise(args=(module,)) for module in shapes)))) == 2


SETTINGS = {
    "jax_default_matmul_precision": "highest",
    "jax_numpy_rank_promotion": "raise",
    "jax_debug_nans": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_disable_most_optimizations": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_jax_count(folder, name):
    before, value = keys(noise()), jax.config.values[name]
    other = SETTINGS[name]
    if value == other:
        other = not value if isinstance(value, bool) else None
    jax.config.update(name, other)
    try:
        assert keys(noise()) != before
    finally:
        jax.config.update(name, value)
    assert keys(noise()) == before


def test_settings_of_a_thread_count(folder):
    before = keys(noise())
    with jax.debug_infs(True):
        assert keys(noise()) != before


@pytest.mark.parametrize(
    "name",
    [
        "XLA_FLAGS",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "MOSAIC_GPU_DUMP_PTX",
        "NVIDIA_TF32_OVERRIDE",
    ],
)
def test_variables_of_compilers_count(folder, monkeypatch, name):
    before = keys(noise())
    monkeypatch.setenv("MOSAIC_GPU_RUNTIME_LIB_PATH", "set by JAX")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # when memory is taken
    assert keys(noise()) == before
    monkeypatch.setenv(name, "1")
    assert keys(noise()) != before


@pytest.mark.parametrize("what", ["_machine", "_versions", "_sources"])
def test_machine_versions_and_sources_count(folder, monkeypatch, what):
    """A program for one processor stops another one, or computes otherwise."""
    before = keys(noise())
    monkeypatch.setattr(executables, what, lambda *_: "another")
    assert keys(noise()) != before


def test_the_processor_is_told(monkeypatch):
    if Path("/proc/cpuinfo").exists():
        text = executables._machine("cpu")
        assert "MHz" not in text and ("flags" in text or "Features" in text)


def test_every_module_that_is_traced_is_a_source():
    sources = set(executables._files())
    root = Path(tdjax.__file__).parents[1]
    assert {path.relative_to(root).parts[0] for path in sources} == {"tdjax", "pallas_kernels"}
    for name, module in sys.modules.items():
        if executables.TRACED.match(name) and module.__file__:
            assert Path(module.__file__) in sources, name
    assert root / "pallas_kernels" / "flash_attention" / "tiles.json" in sources


def test_every_module_is_as_its_source_says():
    """Or its programs would not be kept; and most constants and all functions are looked at."""
    for path in executables._files():
        if path.suffix == ".py":
            module = path.relative_to(Path(tdjax.__file__).parents[1]).with_suffix("")
            importlib.import_module(".".join(module.parts).removesuffix(".__init__"))
    modules = executables._traced()
    assert len(modules) > 60
    assert [module.__name__ for module in modules if executables._is_changed(module)] == []
    said = [executables._said(module.__file__) for module in modules]
    assert sum(len(each.values) for each in said) > 100
    assert sum(len(each.defined) for each in said) > 400


@pytest.mark.slow
def test_a_process_began_before_it_imported_anything():
    """A source edited between the two would be taken for the one that runs."""
    script = (
        "import time; began = time.time(); time.sleep(0.5);"
        "from tdjax.pipeline.executables import _STARTED; print(_STARTED - began)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(tdjax.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert -5 < float(done.stdout) < 0.1, done.stderr


def test_nothing_is_read_where_a_source_has_gone(folder, monkeypatch):
    monkeypatch.setattr(norms, "__file__", str(folder / "gone.py"))
    assert executables._path(noise()) is None


EDITED = """
import sys
from pathlib import Path
import jax
from tdjax.pipeline import compilation, executables
asked = executables.Asked(compilation.text_end, (), {})
executables.folder = lambda: Path(".")
print(executables._path(asked))
if len(sys.argv) > 1:
    Path(sys.argv[1]).write_text(Path(sys.argv[1]).read_text() + "# edited")
    print(executables._path(asked))
"""


@pytest.mark.slow
def test_an_edit_of_the_sources_counts(tmp_path):
    """The process in which it happens may run either: it keeps nothing and reads nothing."""
    root = Path(tdjax.__file__).parents[1]
    for name in ("tdjax", "pallas_kernels"):
        ignored = shutil.ignore_patterns("assets")  # bytecode comes along
        shutil.copytree(root / name, tmp_path / name, ignore=ignored)
    os.utime(tmp_path / "tdjax")
    time.sleep(0.1)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def printed(*argv):
        command = [sys.executable, "-c", EDITED, *argv]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first = printed()
    edited = printed(str(tmp_path / "pallas_kernels" / "rows.py"))
    after = printed()
    assert first == edited[:1] and edited[1:] == ["None"]
    assert after[0].startswith("text_end-") and after != first


# -- what is not kept ------------------------------------------------------------------------------


def another(x):
    return 2 * x


class Mine(dict):
    """A node of somebody else's."""


jax.tree_util.register_pytree_node(Mine, lambda x: (tuple(x.values()), None), lambda _, x: Mine())


@pytest.mark.parametrize(
    "changes",
    [
        {"function": another},
        {"function": lambda key, **_: key},
        {"function": OverSpace(another, Mesh(np.array(jax.devices()[:1]), ("sp",)), (), ())},
        {"static": {**STATIC, "how": object()}},
        {"static": {**STATIC, "how": another}},
        {"args": (Mine(a=jnp.ones(3)),)},
    ],
)
def test_what_cannot_be_told_is_not_kept(folder, changes):
    assert executables._path(noise(**changes)) is None


@pytest.mark.parametrize(
    "change",
    [
        (compilation, "start_noise", another),
        (norms, "modulate", another),
        (norms.LayerNorm, "__call__", another),
        (norms, "modulate", norms.LayerNorm),
        (norms, "modulate", jnp.add),
        (norms, "modulate", functools.partial(norms.modulate)),
        (wan_dit, "modulate", jax.nn.silu),
        (wan_dit, "modulate", jax.jit(another)),
        (wan_dit, "Block", wan_dit.Head),
        (wan_vae, "QUERIES", 2 * wan_vae.QUERIES),
        (wan_vae, "QUERIES", float(wan_vae.QUERIES)),
        (wan_vae, "QUERIES", np.zeros(2)),
    ],
    ids=lambda change: f"{change[0].__name__}.{change[1]}",
)
def test_nothing_is_read_where_something_was_replaced(folder, monkeypatch, change):
    """By a function of others, of a library or of ours; a constant by any other."""
    monkeypatch.setattr(*change)
    assert executables._path(noise()) is None
    monkeypatch.undo()
    monkeypatch.setattr(executables, "folder", lambda: folder)
    assert executables._path(noise()) is not None


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_damaged_and_foreign_entries_are_replaced(folder, traced):
    expected = run(noise())
    (entry,) = entries(folder)
    whole, random = entry.read_bytes(), np.random.default_rng(0)
    damaged = [b"", b"\0" * 40, whole[:-1], whole[: len(whole) // 2], whole + b"\0"]
    for place in random.integers(len(whole), size=4):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(8)
        damaged.append(bytes(changed))
    other = executables._digest(folder / "another", whole[32:]) + whole[32:]
    for data in (*damaged, other):
        entry.write_bytes(data)
        traced.clear()
        assert np.array_equal(run(noise()), expected) and traced == ["start_noise"]
        assert executables._read(entry, noise()) is not None
    assert entries(folder) == [entry]


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch, traced):
    (tmp_path / "file").touch()
    monkeypatch.setattr(executables, "folder", lambda: tmp_path / "file" / "x")
    monkeypatch.setattr(executables, "WORTH_KEEPING", 0.0)
    assert np.array_equal(run(noise()), run(noise())) and len(traced) == 2


def test_a_full_disk_costs_time_alone(folder, monkeypatch, traced):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executables, "written", full)
    assert np.array_equal(run(noise()), run(noise())) and len(traced) == 2
    assert not list(folder.iterdir())


def test_the_least_recently_used_go_first(folder, monkeypatch):
    asked = [noise(static={"steps": n, "shape": (3,)}) for n in (1, 2, 3)]
    for i, each in enumerate(asked[:2]):
        run(each)
        os.utime(executables._path(each), (i, i))
    run(asked[0])  # is used again
    monkeypatch.setattr(executables, "LIMIT", 2 * entries(folder)[0].stat().st_size + 1000)
    run(asked[2])
    assert set(entries(folder)) == {executables._path(asked[0]), executables._path(asked[2])}


# -- pipelines -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"mesh": "sp=2"},
        {"transformer_device": "stream", "text_encoder_device": "stream", "low_memory": True},
    ],
    ids=["one device", "mesh", "streamed"],
)
def test_a_pipeline_from_disk_makes_the_same_bits(model, folder, traced, how):
    """With what its programs donate and hand on."""
    make = lambda: tdjax.load(model, prompt_cache=False, **how)("a red circle", **SMALL)
    first = make()
    made = list(traced)
    assert {"decode_first", "decode_later", "start"} <= set(made)
    jax.clear_caches()
    traced.clear()
    second = make()
    assert not traced and len(entries(folder)) == len(made)
    assert np.array_equal(first.latents, second.latents)
    assert np.array_equal(first.frames, second.frames)


@pytest.mark.slow
def test_samplers_of_the_teacher_are_kept(model, folder, traced):
    """Their state and tables are nodes of our own."""
    call = {**SMALL, "sampler": "unipc", "guidance_scale": 3.0, "output_type": "latent"}
    make = lambda: tdjax.load(model, prompt_cache=False)("a red circle", **call).latents
    first = make()
    traced.clear()
    assert np.array_equal(make(), first) and not traced


# -- checks of kernels -----------------------------------------------------------------------------


def test_what_has_passed_is_remembered(folder, monkeypatch):
    names = ["fp8 linear", "int8 keys"]
    of = lambda names: executables.mark_of("kernels", names)
    mark = of(names)
    assert not executables.remembered(mark)
    executables.remember(mark)
    assert executables.remembered(of(names[::-1])) and not executables.remembered(of(names[:1]))
    monkeypatch.setattr(executables, "_machine", lambda kind: "another driver")
    assert not executables.remembered(of(names))
    mark.write_bytes(mark.read_bytes()[:-1])
    assert not executables.remembered(mark)
    executables.remember(folder / "kernels" / "x")  # where it cannot be written
    monkeypatch.setattr(executables, "folder", lambda: None)
    assert of(names) is None and not executables.remembered(None)


def test_a_backend_that_was_imported_is_imported_where_its_programs_are_loaded(folder, monkeypatch):
    """Kernels for Hopper need it, and a process that finds them on disk lowers none."""
    asked, imported = [], importlib.import_module
    monkeypatch.setitem(sys.modules, executables.MOSAIC, types.ModuleType("backend"))
    run(noise())
    monkeypatch.delitem(sys.modules, executables.MOSAIC)
    noted = lambda name: asked.append(name) if name == executables.MOSAIC else imported(name)
    monkeypatch.setattr(executables.importlib, "import_module", noted)
    run(noise())
    assert asked == [executables.MOSAIC]


class Busy(dict):
    """A table that other threads write to: whoever goes through it, and not through a copy, may
    find it changed."""

    def items(self):
        raise RuntimeError("dictionary changed size during iteration")

    values = items


def test_threads_import_while_entries_are_looked_for(folder, monkeypatch):
    before = keys(noise())
    monkeypatch.setattr(sys, "modules", Busy(sys.modules))
    assert keys(noise()) == before
