"""Numbers of rows."""

import numpy as np

from tdjax.media.scenes import clips
from tdjax.train.evaluate import distances
from tdjax.train.tiny.evaluation import evaluate


def test_fidelity_of_bytes_is_that_of_numbers():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 2, 4, 4, 3), np.uint8)
    assert (
        abs(evaluate.psnr(a, b) - distances.psnr(clips.from_uint8(a), clips.from_uint8(b))) < 1e-3
    )
