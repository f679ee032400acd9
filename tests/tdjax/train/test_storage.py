"""Shards of object storage: the samples of the same folder on a disk, whole copies of which few
stay."""

import fsspec
import numpy as np
import pytest
from shard_cases import data_set, several_sizes, source

from tdjax.errors import UsageError
from tdjax.train.shards import DataError
from tdjax.train.storage import open_storage
from tdjax.train.stream import Position, Stream


@pytest.fixture
def remote():
    """remote(folder): its address in the memory of fsspec."""
    files = fsspec.filesystem("memory")

    def put(folder):
        files.put(str(folder), "/bucket/shards", recursive=True)
        return "memory://bucket/shards"

    yield put
    files.rm("/", recursive=True)


@pytest.mark.parametrize("make", [data_set, several_sizes])
def test_the_batches_of_the_folder(tmp_path, remote, make):
    folder = make(tmp_path / "here")
    address = remote(folder)
    streams = [
        Stream(source(folder), batch=3, mix=2),
        Stream(source(address, cache=tmp_path / "cache", keep=6), batch=3, mix=2),
    ]
    places = [Position(), Position()]
    assert streams[0].source.fingerprint == streams[1].source.fingerprint
    for _ in range(8):
        pairs = [stream.batch(place) for stream, place in zip(streams, places, strict=True)]
        (here, _), (there, _) = pairs
        places = [place for _, place in pairs]
        assert (here.latents == there.latents).all() and (here.text == there.text).all()
    assert places[0] == places[1]


def test_few_copies_stay_and_a_good_one_is_not_fetched_again(tmp_path, remote):
    address = remote(data_set(tmp_path / "here", (1, 1, 1, 1)))
    data = source(address, cache=tmp_path / "cache", keep=2)
    for unit in range(4):
        data.read(data.first(unit))
    names = lambda: sorted(path.name for path in (tmp_path / "cache").glob("*.tar"))
    assert names() == ["shard_000002.tar", "shard_000003.tar"]
    storage = open_storage(address, tmp_path / "cache", 2)
    storage.files = None  # it is not asked
    assert storage.fetch(3).stat().st_size == storage.sizes[3]
    (tmp_path / "cache/shard_000002.tar").write_bytes(b"cut short")
    again = source(address, cache=tmp_path / "cache", keep=2)
    assert np.isfinite(again.read(again.first(2))[0]).all()


def test_an_address_of_files(tmp_path):
    folder = data_set(tmp_path / "here")
    data = source(folder.as_uri(), cache=tmp_path / "cache")
    assert data.units == 3 and data.fingerprint == source(folder).fingerprint


def test_addresses_that_are_refused(tmp_path, remote):
    for address, words in (
        ("nothing://bucket/shards", "cannot be read"),
        ("s4://bucket", "cannot be read"),
        ("file:///nowhere/at/all", "has no shards|cannot be read"),
        ("memory://empty", "has no shards|cannot be read"),
    ):
        with pytest.raises((UsageError, DataError), match=words) as error:
            source(address, cache=tmp_path)
        assert len(str(error.value).splitlines()) == 3
