"""Samples of a folder of shards, and one embedding."""

import numpy as np
import pytest
from shard_cases import BF16, data_set, samples, source

from tdjax.train.shards import DataError, torch_bytes
from tdjax.train.sources import read_embedding


def test_samples_come_back(tmp_path):
    data = source(data_set(tmp_path))
    assert data.units == 3
    entries = [entry for unit in range(3) for entry in data.entries(unit)]
    wanted = [*samples(0, 3), *samples(3, 4), *samples(7, 2)]
    for entry, (latents, text, _) in zip(entries, wanted, strict=True):
        x, t, image = data.read(entry)
        assert x.dtype == np.float32 and t.dtype == BF16 and image is None
        assert (x == latents[:2].astype(np.float32)).all()  # cut to two frames
        assert (t == text).all()


@pytest.mark.parametrize(
    ("files", "words"), [((), "nothing"), (("a.tar",), "a.tar"), (None, "not a folder")]
)
def test_a_folder_without_shards(tmp_path, files, words):
    for name in files or ():
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=words):
        source(tmp_path if files is not None else tmp_path / "none")


def test_one_embedding(tmp_path):
    text = np.arange(42, dtype=np.float32).reshape(7, 6)
    (tmp_path / "umT5_wan_negative_emb.pt").write_bytes(torch_bytes(text.astype(BF16)))
    np.save(tmp_path / "n.npy", text[None])
    for name in ("umT5_wan_negative_emb.pt", "n.npy"):
        assert (read_embedding(tmp_path / name).astype(np.float32) == text).all()
    np.save(tmp_path / "two.npy", np.stack([text, text]))
    (tmp_path / "x.pt").write_bytes(b"x")
    for name, words in (
        ("two.npy", "one prompt"),
        ("x.pt", "no prompt embedding"),
        ("none.pt", "No such file"),
    ):
        with pytest.raises(DataError, match=words):
            read_embedding(tmp_path / name)
