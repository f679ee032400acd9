"""The order of samples, places in it, and the thread that reads ahead."""

import json
import threading

import jax
import numpy as np
import pytest
from shard_cases import SHAPE, data_set, rewritten, samples, several_sizes, source
from train_cases import ArraySource

from tdjax.errors import UsageError
from tdjax.train.shards import DataError, write_shard
from tdjax.train.stream import Position, ReadAhead, Stream, on_device, permutation


def numbers(batch):
    """Which samples a batch of `samples` holds."""
    return [int(row[0, 0]) for row in np.asarray(batch.text, np.float32)]


def taken(stream, count, position=None):
    """Numbers of the next `count` batches, and the place behind them."""
    out, position = [], position or Position()
    for _ in range(count):
        batch, position = stream.batch(position)
        out.append(numbers(batch))
    return out, position


def test_an_order_never_changes():
    assert permutation(8, 3, 1).tolist() == [0, 6, 2, 1, 3, 7, 4, 5]
    assert sorted(permutation(1000, 5)) == list(range(1000))
    assert not (permutation(1000, 5) == permutation(1000, 6)).all()


@pytest.mark.parametrize("mix", [1, 2, 3])
def test_every_epoch_holds_every_sample_once(tmp_path, mix):
    stream = Stream(source(data_set(tmp_path)), batch=3, seed=7, mix=mix)
    batches, position = taken(stream, 9)  # three epochs of nine
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(9))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert taken(Stream(stream.source, batch=3, seed=7, mix=mix), 9)[0] == batches
    assert taken(Stream(stream.source, batch=3, seed=8, mix=mix), 9)[0] != batches


def test_a_place_is_exact(tmp_path):
    stream = Stream(
        source(data_set(tmp_path)), batch=4, mix=2
    )  # batches cross the ends of groups and epochs
    all_of, _ = taken(stream, 11)
    for done in range(11):
        place = taken(stream, done)[1]
        saved = json.loads(json.dumps(stream.saved(place)))
        again = Stream(source(tmp_path), batch=4, mix=2)
        assert taken(again, 11 - done, again.restored(saved))[0] == all_of[done:]


def test_hosts_divide_each_batch(tmp_path):
    folder = data_set(tmp_path)
    whole, end = taken(Stream(source(folder), batch=6), 5)
    hosts = [range(2 * i, 2 * i + 2) for i in range(3)]
    parts = [taken(Stream(source(folder), batch=6, rows=rows), 5) for rows in hosts]
    assert [sum((part[0][n] for part in parts), []) for n in range(5)] == whole
    assert {part[1] for part in parts} == {end}


def test_a_place_in_other_data_is_refused(tmp_path):
    stream = Stream(source(data_set(tmp_path)), batch=2, mix=2)
    saved = stream.saved(taken(stream, 3)[1])
    with pytest.raises(UsageError, match="mix was 2, is 3"):
        Stream(stream.source, batch=2, mix=3).restored(saved)
    write_shard(tmp_path / "shard_000003.tar", samples(9, 1), 9)
    with pytest.raises(UsageError, match="data was") as error:
        Stream(source(tmp_path), batch=2, mix=2).restored(saved)
    assert "another data.seed" in error.value.fix
    assert Stream(source(tmp_path), batch=2, mix=2, seed=1).restored(saved) == Position()


def test_samples_may_be_in_memory_and_have_an_image():
    text = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None, None], (5, 7, 6))
    latents = np.broadcast_to(
        np.arange(5, dtype=np.float64)[:, None, None, None, None], (5, *SHAPE)
    )
    stream = Stream(ArraySource(latents, text, image=latents), batch=5)
    batch, position = stream.batch(Position())
    assert sorted(numbers(batch)) == list(range(5)) and batch.latents.dtype == np.float32
    assert [int(x[0, 0, 0, 0]) for x in batch.latents] == numbers(batch)
    assert [int(x[0, 0, 0, 0]) for x in batch.image] == numbers(batch)
    assert stream.restored(stream.saved(position)) == position
    with pytest.raises(UsageError, match="other samples|not what"):
        Stream(ArraySource(latents + 1, text), batch=5).restored(stream.saved(position))


def test_batches_of_several_sizes_hold_one_each(tmp_path):
    """Nine samples of one size and eight of another: whole batches of three of each, in a shuffled
    order; a place among them is exact, and hosts divide them."""
    folder = several_sizes(tmp_path)
    stream = Stream(source(folder), batch=3, mix=5, seed=2)
    batches, _ = taken(stream, 5)  # an epoch
    kinds = [{number >= 100 for number in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds) and len(set(map(str, kinds))) == 2
    flat = sum(batches, [])
    assert len(set(flat)) == 15 and set(range(9)) <= set(flat)
    shapes = [stream.batch(taken(stream, n)[1])[0].latents.shape for n in range(5)]
    assert {shape[2:4] for shape in shapes} == {(2, 5), (2, 10)}

    all_of, _ = taken(stream, 12)
    for done in (1, 6, 11):
        saved = json.loads(json.dumps(stream.saved(taken(stream, done)[1])))
        again = Stream(source(folder), batch=3, mix=5, seed=2)
        assert taken(again, 12 - done, again.restored(saved))[0] == all_of[done:]
    small = Stream(source(folder), batch=2, mix=2, seed=2)
    epoch = sum(taken(small, 7)[0], [])
    assert len(set(epoch)) == 14  # no sample comes twice in an epoch
    with pytest.raises(UsageError, match="no size of 'a', 'b' has so many samples"):
        Stream(source(folder), batch=10, mix=5).batch(Position())


def test_a_damaged_sample_is_counted_and_the_next_stands_in_its_place(tmp_path):
    path = data_set(tmp_path, (6,)) / "shard_000000.tar"
    whole, end = taken(Stream(source(tmp_path), batch=3), 2)
    rewritten(path, lambda m: {**m, "000000004.latent.pt": b"hello"})
    notes = []
    stream = Stream(source(tmp_path), batch=3, max_skipped=1, note=notes.append)
    got, place = taken(stream, 2)
    for batch, wanted in zip(got, whole, strict=True):
        for row, number in enumerate(wanted):
            assert batch[row] == (wanted[(row + 1) % 3] if number == 4 else number)
    assert place == end and len(notes) == 1 and "000000004.latent.pt" in notes[0]
    assert len(taken(stream, 6)[0]) == 6 and len(notes) == 1  # its turn comes again
    rewritten(path, lambda m: {**m, "000000002.latent.pt": b"hello"})
    stream = Stream(source(tmp_path), batch=3, max_skipped=1)
    with pytest.raises(DataError, match="2 samples cannot be read") as error:
        taken(stream, 2)
    assert "data.max_skipped is 1" in error.value.why


def threads():
    return [t for t in threading.enumerate() if t.name == "tdjax data"]


def test_reading_ahead_gives_the_stream_and_ends(tmp_path):
    stream = Stream(source(data_set(tmp_path)), batch=4, mix=2)
    wanted, end = taken(stream, 7)
    with ReadAhead(stream, Position()) as batches:
        got = [batches.next() for _ in range(7)]
        assert len(threads()) == 1
    assert threads() == []  # it was standing before a full queue
    assert [numbers(batch) for batch, _ in got] == wanted
    assert got[-1][1] == end  # not where the thread had come to
    assert all(isinstance(x, jax.Array) for batch, _ in got for x in (batch.latents, batch.text))


def test_the_thread_leaves_the_device_alone(tmp_path):
    stream, where = Stream(source(data_set(tmp_path)), batch=4), []
    with ReadAhead(
        stream, Position(), lambda batch: where.append(threading.current_thread()) or batch
    ) as batches:
        batch, _ = batches.next()
    assert where == [threading.main_thread()] and isinstance(batch.latents, np.ndarray)


def test_an_error_of_the_thread_comes_with_its_batch(tmp_path):
    path = data_set(tmp_path, (4,)) / "shard_000000.tar"
    stream = Stream(source(tmp_path), batch=1)
    bad = taken(stream, 3)[0][2][0]
    rewritten(path, lambda m: {**m, f"00000000{bad}.latent.pt": b"hello"})
    assert bad, "the first sample gives the source its shape: choose another seed"
    stream = Stream(source(tmp_path), batch=1)
    with ReadAhead(stream, Position()) as batches:
        batches.next(), batches.next()
        with pytest.raises(DataError, match=f"00000000{bad}.latent.pt"):
            batches.next()
    assert threads() == []


def test_batches_lie_over_the_mesh(tmp_path):
    stream = Stream(source(data_set(tmp_path)), batch=4)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    host, _ = stream.batch(Position())
    batch = on_device(host, mesh)
    assert batch.latents.sharding.spec[0] == "fsdp" and batch.image is None
    assert {s.data.shape[0] for s in batch.latents.addressable_shards} == {2}
    for name in ("latents", "text"):
        assert (np.asarray(getattr(batch, name)) == getattr(host, name)).all()
