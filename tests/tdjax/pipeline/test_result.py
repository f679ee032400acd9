"""What a call returns: files of every format, and what a notebook shows."""

import numpy as np
import pytest

from tdjax.errors import UsageError
from tdjax.pipeline.result import Result


def result(frames) -> Result:
    latents = np.zeros((1, 2, 4, 4, 8), np.float32)
    return Result(frames=frames, latents=latents, seed=0, fps=16, timings={}, metadata={})


def test_formats(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 48, 3)).astype(np.uint8)
    made = result(frames)
    for name in ("v.mp4", "v.gif", "v.npy", "v.safetensors", "v.mkv"):
        assert made.save(tmp_path / name, metadata=False).exists()
    assert np.array_equal(np.load(tmp_path / "v.npy"), frames[0])
    assert "<video" in made._repr_html_() and "seed 0" in repr(made)
    assert made.frame(2).size == (48, 32)


def test_latents_alone_have_no_frames():
    with pytest.raises(UsageError, match="no frames"):
        result(None).pixels()
