"""Captions as tokens, and batches that keep them with their latents."""

import jax
import numpy as np
import pytest
import tiny_cases

from tdjax.train.tiny import captions, clips, data


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def some(tokens):
    return tiny_cases.shades(tokens)


def test_tokens_are_those_of_the_pipeline(tokens):
    texts = [captions.random_prompt(seed) for seed in range(5)] + [""]
    rows, known = data.tokens_of(tokens, texts), tokens.encode(texts)
    assert np.array_equal(rows[..., 0], known.ids) and np.array_equal(rows[..., 1], known.mask)
    assert np.array_equal(data.negative(tokens), rows[-1])


def test_every_clip_has_whole_captions_and_a_short_one():
    said = jax.device_get(clips.sample(jax.random.key(1), 60).said)
    texts = data.texts_of(said, 7)
    assert len(texts) == data.FULL + 1 and texts == data.texts_of(said, 7) and texts != data.texts_of(said, 8)
    for i, group in enumerate(texts):
        read = captions.parse(group)
        for name in ("shape", "colour", "background", "motion"):
            assert np.array_equal(getattr(read, name), getattr(said, name))
        short = i == data.FULL
        assert np.array_equal(read.size == -1, np.full(60, short) & (np.arange(60) % 3 != 1))


def test_a_batch_keeps_latents_and_captions_together(some, tokens):
    latents, rows = some.draw(jax.random.key(2), 64)
    for x, row in zip(np.asarray(latents, np.float32), np.asarray(rows), strict=True):
        i = next(i for i in range(16) if any(np.array_equal(row, known) for known in np.asarray(some.tokens[i])))
        assert np.array_equal(x, np.asarray(some.latents[i], np.float32))
    assert len({bytes(np.asarray(row)) for row in rows}) > 16  # different captions of one clip
