"""Samples of a folder of shards, and one embedding."""

import numpy as np
import pytest
from shard_cases import BF16, data_set, samples, several_sizes, source

from tdjax.train.shards import DataError, torch_bytes, write_shard
from tdjax.train.sources import read_embedding


def test_samples_come_back(tmp_path):
    data = source(data_set(tmp_path))
    assert data.units == 3
    entries = [entry for unit in range(3) for entry in data.entries(unit)]
    wanted = [*samples(0, 3), *samples(3, 4), *samples(7, 2)]
    for entry, (latents, text, _) in zip(entries, wanted, strict=True):
        x, t, *others = data.read(entry)
        assert x.dtype == np.float32 and t.dtype == BF16 and others == [None, None]
        assert (x == latents[:2].astype(np.float32)).all()  # cut to two frames
        assert (t == text).all()


def test_an_image_is_the_mask_and_the_latents_of_the_first_frame(tmp_path):
    x, text, prompt = next(samples(0, 1))
    write_shard(tmp_path / "shard_000000.tar", [(x, text, prompt, -x)])
    data = source(tmp_path, condition=4 + 4)
    latents, _, image, _ = data.read(data.first(0))
    assert image.shape == (2, 2, 5, 8) and image.dtype == np.float32
    assert (image[0, ..., :4] == 1).all() and (image[1, ..., :4] == 0).all()
    assert (image[..., 4:] == -latents).all()
    assert source(tmp_path).read(data.first(0))[2] is None  # a text-to-video network reads none
    write_shard(tmp_path / "shard_000001.tar", [(x, text, prompt)])
    with pytest.raises(DataError, match="no latents of its first frame") as error:
        data.read(source(tmp_path).first(1))
    assert "--image_latents" in error.value.fix


def test_clip_features_are_read_where_the_network_has_a_branch_for_them(tmp_path):
    x, text, prompt = next(samples(0, 1))
    features = np.random.default_rng(1).normal(size=(257, 8)).astype(BF16)
    write_shard(tmp_path / "shard_000000.tar", [(x, text, prompt, -x, features)])
    data = source(tmp_path, condition=4 + 4, features=8)
    _, _, image, found = data.read(data.first(0))
    assert found.dtype == np.float32 and (found == features).all() and image is not None
    assert source(tmp_path, condition=8).read(data.first(0))[3] is None
    with pytest.raises(DataError, match=r"clip.pt has shape \[257, 8\]") as error:
        source(tmp_path, condition=8, features=9).read(data.first(0))
    assert "expected [257, 9]" in error.value.why
    write_shard(tmp_path / "shard_000001.tar", [(x, text, prompt, -x)], first=7)
    with pytest.raises(DataError, match="has no CLIP features beside it") as error:
        data.read(source(tmp_path).first(1))
    assert "000000007.clip.pt, [257, 8]" in error.value.why


def test_folders_of_several_sizes(tmp_path):
    """Each is read at its size; those that are shorter than what is asked for stay so."""
    data = source(several_sizes(tmp_path), frames=3)
    assert [data.size(unit) for unit in range(5)] == ["a", "a", "a", "b", "b"]
    shapes = [data.read(data.first(unit))[0].shape for unit in data.firsts.values()]
    assert sorted(shapes) == [(2, 2, 10, 4), (3, 2, 5, 4)]


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
