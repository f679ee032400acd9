"""Folders of shards whose samples say their numbers."""

import io
import tarfile

import ml_dtypes
import numpy as np

from tdjax.train.shards import write_shard
from tdjax.train.sources import ShardSource

BF16 = ml_dtypes.bfloat16


SHAPE = (3, 2, 5, 4)  # t h w c


def samples(first, count, seed=0):
    """(latents, text, prompt) that say their number in every element."""
    rng = np.random.default_rng(seed + first)
    for i in range(first, first + count):
        yield (i + rng.random(SHAPE)).astype(BF16), np.full((7, 6), i, BF16), f"prompt {i} ü"


def data_set(folder, sizes=(3, 4, 2)):
    first = 0
    for number, size in enumerate(sizes):
        write_shard(folder / f"shard_{number:06}.tar", samples(first, size), first)
        first += size
    return folder


def several_sizes(folder):
    """Two sizes in folders of their own: 9 samples of SHAPE, and 8 that are wider, numbered from
    100 on."""
    data_set(folder / "a", (3, 4, 2))
    for number in range(2):
        wide = [(np.repeat(x, 2, 2)[:2], t, p) for x, t, p in samples(100 + 4 * number, 4)]
        write_shard(folder / "b" / f"shard_{number:06}.tar", wide, 4 * number)
    return folder


def source(folder, **changes):
    return ShardSource(folder, **{"frames": 2, "channels": 4, "text_dim": 6, **changes})


def rewritten(path, change):
    """The shard with its members passed through change({name: bytes})."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    with tarfile.open(path, "w") as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
