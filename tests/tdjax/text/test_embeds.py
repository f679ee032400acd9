"""Files of embeddings: the bits that went in, and no second copy of many rows."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tdjax.text.embeds import load_embeds, save_embeds


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_file_holds_the_bits_and_the_prompts(tmp_path, dtype):
    embeds = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(dtype)
    path = save_embeds(tmp_path / "e.safetensors", embeds[:, ::-1], ["a fox", "\u2028", "é"])
    back = load_embeds(path)
    assert back.dtype == dtype and back.tobytes() == embeds[:, ::-1].tobytes()
    with safe_open(path, framework="np") as f:
        assert f.metadata() == {"prompts": '["a fox", "\\u2028", "\\u00e9"]'}


def test_many_rows_are_not_copied_to_be_written(tmp_path):
    embeds = np.ones((64, 64, 1024), np.float32)
    tracemalloc.start()
    try:
        save_embeds(tmp_path / "e.safetensors", embeds, ["a"] * 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < embeds.nbytes / 8
