"""Captions as tokens, and batches that keep them with their latents."""

import jax
import numpy as np
import pytest
import tiny_cases
import train_cases
from tolerances import assert_close

from tdjax.media.scenes import clips
from tdjax.train import shards
from tdjax.train.sources import ShardSource
from tdjax.train.stream import Position, Stream
from tdjax.train.tiny import work
from tdjax.train.tiny.data import captions, encoded


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def some(tokens):
    return tiny_cases.shades(tokens)


def test_tokens_are_those_of_the_pipeline(tokens):
    texts = [captions.random_prompt(seed) for seed in range(5)] + [""]
    rows, known = encoded.tokens_of(tokens, texts), tokens.encode(texts)
    assert np.array_equal(rows[..., 0], known.ids) and np.array_equal(rows[..., 1], known.mask)
    assert np.array_equal(encoded.negative(tokens), rows[-1])


@pytest.mark.slow
def test_every_clip_has_whole_captions_and_a_short_one():
    said = jax.device_get(clips.sample(jax.random.key(1), 60).said)
    texts = encoded.texts_of(said, 7)
    assert (
        len(texts) == encoded.FULL + 1
        and texts == encoded.texts_of(said, 7)
        and texts != encoded.texts_of(said, 8)
    )
    for i, group in enumerate(texts):
        read = captions.parse(group)
        for name in ("shape", "colour", "background", "motion"):
            assert np.array_equal(getattr(read, name), getattr(said, name))
        short = i == encoded.FULL
        assert np.array_equal(read.size == -1, np.full(60, short) & (np.arange(60) % 3 != 1))


@pytest.mark.slow
def test_a_batch_keeps_latents_and_captions_together(some, tokens):
    latents, rows = some.draw(jax.random.key(2), 64)
    for x, row in zip(np.asarray(latents, np.float32), np.asarray(rows), strict=True):
        i = next(
            i
            for i in range(16)
            if any(np.array_equal(row, known) for known in np.asarray(some.tokens[i]))
        )
        assert np.array_equal(x, np.asarray(some.latents[i], np.float32))
    assert len({bytes(np.asarray(row)) for row in rows}) > 16  # different captions of one clip


@pytest.mark.slow
def test_devices_encode_some_of_the_clips_each(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "_AT_ONCE", 2)
    vae = tiny_cases.vae()
    run = lambda mesh: work.Run(folder=tmp_path, settings={}, sizes=tiny_cases.PACKED, mesh=mesh)
    one, two = (encoded.make(run(mesh), vae, 4) for mesh in (None, train_cases.mesh(data=2)))
    assert two.latents.devices() == one.latents.devices()
    assert_close(two.latents.astype("float32"), one.latents.astype("float32"), "bf16")
    assert np.array_equal(two.tokens, one.tokens)


def test_clips_as_shards_are_what_the_loader_reads(tmp_path, some):
    """Latents and text rows written in the official layout come back to the bit."""
    text = np.asarray(jax.random.normal(jax.random.key(0), (16, 32, 16)), shards.BF16)
    latents = np.asarray(some.latents)
    for shard in range(2):
        rows = range(8 * shard, 8 * shard + 8)
        shards.write_shard(
            tmp_path / f"shard_{shard:06}.tar",
            ((latents[i], text[i], f"clip {i}") for i in rows),
            first=8 * shard,
        )
    stream = Stream(ShardSource(tmp_path, frames=3, channels=8, text_dim=16), batch=16)
    batch, _ = stream.batch(Position())
    keys = [row.tobytes() for row in text]
    order = [keys.index(np.asarray(row, shards.BF16).tobytes()) for row in batch.text]
    assert sorted(order) == list(range(16)) and np.array_equal(
        np.asarray(batch.latents, shards.BF16), latents[order]
    )
