"""One protocol over three kinds of source: what a stored and a published checkpoint of the same
weights give is the same, and a planned one has none."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import random_model

import tdjax
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published import checkpoint as published
from tdjax.errors import CheckpointError
from tdjax.pipeline.components import (
    PlannedComponent,
    PublishedComponent,
    StoredComponent,
    open_component,
)


@pytest.fixture(scope="module")
def pair(states, write_safetensors, tmp_path_factory):
    """The same tiny text encoder (published, in our layout)."""
    folder = tmp_path_factory.mktemp("text")
    file = folder / "models_t5.safetensors"
    write_safetensors(file, states("text"))
    opened = published.open_checkpoint(file)
    orbax.save(folder / "ours", opened.lazy(), kind="text", cfg=opened.config)
    return open_component(file, "text"), open_component(folder / "ours", "text")


def same(a, b) -> bool:
    a, b = (orbax.named_leaves(x) for x in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_both_kinds_give_the_same(pair):
    theirs, ours = pair
    assert isinstance(theirs, PublishedComponent) and isinstance(ours, StoredComponent)
    assert theirs.config == ours.config and theirs.kind == ours.kind == "text"
    assert same(theirs.read(), ours.read()) and same(theirs.read_to_host(), ours.read_to_host())
    ids = np.array([3, 9, 2])
    table = "embed.embedding"
    assert np.array_equal(theirs.leaf(table), ours.leaf(table))
    assert np.array_equal(theirs.rows(table, ids), ours.rows(table, ids))
    assert np.array_equal(ours.rows(table, ids), ours.leaf(table)[ids])
    layers = [list(component.layers("blocks.")) for component in pair]
    assert len(layers[0]) == len(layers[1]) == ours.config.layers
    for a, b in zip(*layers, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_identities_tell_weights_apart(pair, model):
    theirs, ours = pair
    assert theirs.identity() == theirs.identity() != ours.identity()
    assert all(file.is_file() for component in pair for file in component.files())
    assert set(theirs.fingerprint()) == {"name", "bytes", "quick_sha256"}
    source = open_component(model / "text", "text").fingerprint()["source"]
    assert source == {"name": "random numbers, seed 2"}


def test_a_fingerprint_is_made_again_only_where_the_file_has_changed(pair, tmp_path, monkeypatch):
    file = shutil.copy(pair[0].path, tmp_path)
    theirs, read = open_component(Path(file), "text"), []
    quick_hash = PublishedComponent._quick_hash
    monkeypatch.setattr(
        PublishedComponent, "_quick_hash", lambda self: read.append(self) or quick_hash(self)
    )
    before = theirs.fingerprint()
    assert theirs.fingerprint() == before and len(read) == 1
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(1, 1))
    assert theirs.fingerprint() != before and len(read) == 2


def test_what_is_published_of_them_names_no_folder_of_the_machine(pair):
    for component in pair:
        assert component.fingerprint()["name"] == component.path.name
        assert str(component.path.parent) not in json.dumps(component.fingerprint())


def test_a_planned_component_has_shapes_and_no_weights():
    planned = PlannedComponent("Wan2.1_VAE.pth", "vae", random_model.VAE)
    shapes = orbax.named_leaves(orbax.abstract("vae", random_model.VAE))
    assert orbax.table(orbax.named_leaves(planned.abstract())) == orbax.table(shapes)
    for ask in (planned.load, planned.files, lambda: planned.leaf("x"), planned.identity):
        with pytest.raises(CheckpointError, match=r"Wan2.1_VAE.pth has no weights here"):
            ask()


def test_what_is_opened_as_something_else_is_refused(model):
    with pytest.raises(CheckpointError, match="is a umT5 text encoder, not a video VAE"):
        open_component(model / "text", "vae")


@pytest.mark.slow
def test_weights_loaded_ahead_are_the_weights(model):
    here, ahead = (open_component(model / "vae", "vae") for _ in range(2))
    ahead.load_ahead()
    ahead.load_ahead()
    assert same(here.load(), ahead.load()) and ahead.load() is ahead.load()
    ahead.free()
    ahead.load_ahead()
    ahead.free()
    assert ahead.module is None and ahead.coming is None


@pytest.mark.slow
def test_weights_held_by_the_host_are_the_weights(model):
    here, held = (open_component(model / "vae", "vae") for _ in range(2))
    held.load_ahead(host=True)
    waiting = held.coming.result()
    kinds = lambda module: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(module)}
    assert kinds(waiting) == {"pinned_host"}
    assert same(here.load(), held.load())
    assert kinds(held.module) == {jax.devices()[0].default_memory().kind}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(waiting))


def test_what_is_quantised_at_load_cannot_wait(model):
    stageable = lambda **options: tdjax.load(model, **options).components["dit"].stageable
    assert stageable() and not stageable(quant="fp8")
