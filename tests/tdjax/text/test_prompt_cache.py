"""Embeddings on disk: the same bits back, other weights never mistaken for these, a bounded folder,
no run that fails for it."""

import os
import time

import ml_dtypes
import numpy as np
import pytest
import random_model
from safetensors.numpy import save_file

import tdjax
from tdjax.checkpoints import orbax
from tdjax.generate import __main__ as generate
from tdjax.pipeline.components import Component
from tdjax.text.prompt_cache import PromptCache, entry_key, prompt_of

SMALL = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 1, "output_type": "latent"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def embeddings(seed: int, tokens: int = 3, shape=(8, 4)) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape).astype(BFLOAT16)
    rows[tokens:] = 0
    return rows


def read(cache, key, shape, dtype):
    """The entry of a key as [s d] with zeros behind it, or None."""
    rows = np.zeros(shape, dtype)
    return rows if cache.read(key, rows) else None


def test_an_entry_comes_back_to_the_bit(tmp_path):
    cache, rows = PromptCache(tmp_path / "prompts"), embeddings(0)
    assert read(cache, "k", rows.shape, rows.dtype) is None
    assert cache.put("k", rows, 3, "a fox") is None
    back = read(cache, "k", rows.shape, rows.dtype)
    assert back.dtype == rows.dtype and np.array_equal(back.view(np.uint16), rows.view(np.uint16))
    assert prompt_of(cache.path("k")) == "a fox"
    assert (
        read(cache, "k", (8, 5), rows.dtype) is None
        and read(cache, "k", (2, 4), rows.dtype) is None
    )
    assert read(cache, "k", rows.shape, np.dtype(np.float32)) is None
    cache.path("k").write_bytes(cache.path("k").read_bytes()[:50])
    assert read(cache, "k", rows.shape, rows.dtype) is None
    save_file({"other": np.zeros(1)}, cache.path("k"))
    assert read(cache, "k", rows.shape, rows.dtype) is None


def test_the_least_recently_used_entries_go(tmp_path):
    cache = PromptCache(tmp_path)
    for i, key in enumerate("abcd"):
        cache.put(key, embeddings(i), 3, key)
        os.utime(cache.path(key), ns=(i, i))
    assert read(cache, "a", (8, 4), BFLOAT16) is not None  # used now, so the youngest
    one = cache.path("a").stat().st_size
    cache.limit = 3 * one
    cache.put("e", embeddings(4), 3, "e")
    assert {p.stem for p in tmp_path.iterdir()} == {"a", "d", "e"}


def test_entries_of_a_clock_that_was_ahead_go_first(tmp_path):
    cache, ahead = PromptCache(tmp_path), time.time() + 10 * 365 * 86400
    for i, key in enumerate("abc"):
        cache.put(key, embeddings(i), 3, key)
        os.utime(cache.path(key), (ahead + i, ahead + i))
    cache.limit = 3 * cache.path("a").stat().st_size
    for i, key in enumerate("defg"):
        cache.put(key, embeddings(i), 3, key)
    assert sorted(path.stem for path, _ in cache.entries()) == ["e", "f", "g"]


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "file").touch()
    cache = PromptCache(tmp_path / "file" / "prompts")
    assert "cannot be written" in cache.put("k", embeddings(0), 3, "a")
    assert cache.put("k", embeddings(0), 3, "a") is None


def test_the_key_tells_what_matters():
    ids, mask = np.array([5, 6, 1, 0]), np.array([1, 1, 1, 0])
    key = entry_key(ids, mask, {"weights": "x"})
    assert key == entry_key(ids.copy(), mask.copy(), {"weights": "x"})
    others = [
        entry_key(ids, np.array([1, 1, 1, 1]), {"weights": "x"}),
        entry_key(np.array([5, 6, 1]), np.array([1, 1, 1]), {"weights": "x"}),
        entry_key(np.array([6, 5, 1, 0]), mask, {"weights": "x"}),
        entry_key(ids, mask, {"weights": "y"}),
    ]
    assert len({key, *others}) == 5


@pytest.mark.slow
def test_a_repeated_prompt_neither_loads_nor_compiles_the_encoder(model):
    first = tdjax.load(model)
    a = first("a red circle", **SMALL)
    assert "text" in a.timings
    again = tdjax.load(model)
    again.components["text"].load = lambda: pytest.fail("the text encoder was loaded")
    b = again("a red circle", **SMALL)
    assert np.array_equal(a.latents, b.latents)
    assert (
        not {"text", "load text", "compile text"} & set(b.timings) and "prompt cache" in b.timings
    )
    assert not any(function.__name__ == "encode_text" for function, *_ in again.programs.compiled)


def test_one_new_prompt_among_known_ones(model):
    pipe = tdjax.load(model)
    one, two = pipe.embed("a red circle"), pipe.embed("a blue square")
    asked = []
    encode = pipe.text_encoding.encode
    pipe.text_encoding.encode = lambda tokens, plan: (
        asked.append(len(tokens.ids)) or encode(tokens, plan)
    )
    three = pipe.embed(["a red circle", "a green cross", "a blue square"])
    assert asked == [1] and np.array_equal(three[[0, 2]], np.concatenate([one, two]))
    fresh = tdjax.load(model, prompt_cache=False)
    assert np.array_equal(fresh.embed("a green cross")[0], three[1])


def test_other_weights_are_other_entries(model, tmp_path):
    leaves = random_model.random_leaves("text", random_model.TEXT, 7)
    other = orbax.save(tmp_path / "text", leaves, kind="text", cfg=random_model.TEXT)
    a = tdjax.load(model).embed("a red circle")
    b = tdjax.load(model, text_encoder_path=other).embed("a red circle")
    assert not np.array_equal(a, b)
    assert np.array_equal(
        b, tdjax.load(model, text_encoder_path=other, prompt_cache=False).embed("a red circle")
    )


@pytest.mark.slow
def test_it_can_be_turned_off(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path / "cache"))
    argv = ["--model", str(model), "--prompt", "a red circle", "--num_frames", "5"]
    argv += ["--width", "32", "--height", "32", "--num_steps", "1", "--overwrite"]
    argv += ["--compile_cache_dir", "none", "--save_path", str(tmp_path / "v.safetensors")]
    assert generate.main([*argv, "--prompt_cache", "off"]) == 0
    assert not (tmp_path / "cache" / "prompts").exists()
    assert generate.main(argv) == 0
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 1
    calls = []
    monkeypatch.setattr(
        Component,
        "load",
        lambda self, run=Component.load: calls.append(self.kind) or run(self),
    )
    assert generate.main(argv) == 0 and "text" not in calls
    assert generate.main([*argv, "--prompt_cache", "off"]) == 0 and "text" in calls
