"""Shards against torch, the order of samples, places in it, and the thread that reads ahead."""

import dataclasses
import io
import json
import tarfile
import threading
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from tdjax.errors import UsageError
from tdjax.train import shards
from tdjax.train.data import (
    ArraySource,
    Position,
    ReadAhead,
    ShardSource,
    Stream,
    on_device,
    permutation,
    read_embedding,
)
from tdjax.train.shards import DataError, index, torch_array, torch_bytes, write_shard

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


def source(folder, **changes):
    return ShardSource(folder, **{"frames": 2, "channels": 4, "text_dim": 6, **changes})


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


def rewritten(path, change):
    """The shard with its members passed through change({name: bytes})."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    with tarfile.open(path, "w") as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# Shards
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def bits(torch, tensor):
    return tensor.contiguous().view(torch.int16).numpy()


def test_torch_reads_what_is_written(torch, tmp_path):
    path = write_shard(tmp_path / "shard_000000.tar", samples(0, 2))
    with tarfile.open(path) as tar:
        assert tar.getnames() == [
            f"00000000{i}.{part}"
            for i in (0, 1)
            for part in ("latent.pt", "embed.pt", "prompt.txt")
        ]
        latent, text, prompt = list(samples(0, 2))[1]
        got = torch.load(tar.extractfile("000000001.latent.pt"), weights_only=True)
        assert tar.extractfile("000000001.prompt.txt").read().decode() == prompt
    assert got.dtype == torch.bfloat16 and got.shape == (4, 3, 2, 5) and got.is_contiguous()
    assert (bits(torch, got) == np.moveaxis(latent, -1, 0).view(np.int16)).all()


def test_what_torch_writes_is_read(torch):
    base = torch.arange(120.0).reshape(4, 5, 6).to(torch.bfloat16)
    for tensor in (
        base,
        base.float(),
        base.half(),
        base.permute(2, 0, 1),
        base[1:, 2:, ::3],
        base[1, 1],
        base.expand(2, 4, 5, 6),
    ):
        out = io.BytesIO()
        torch.save(tensor, out)
        got = torch_array(out.getvalue())
        assert got.shape == tuple(tensor.shape)
        assert (got.astype(np.float32) == tensor.float().numpy()).all()


def test_the_same_samples_give_the_same_bytes(tmp_path):
    a, b = (write_shard(tmp_path / name, samples(0, 2)) for name in ("a.tar", "b.tar"))
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write_shard(a, samples(0, 1))


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


def test_folders_in_names_and_other_endings_are_read(tmp_path):
    path = data_set(tmp_path, (1,)) / "shard_000000.tar"
    array = np.load(io.BytesIO(npy(np.full((7, 6), 2.5, BF16))), allow_pickle=False)
    assert array.dtype != BF16  # numpy forgets it
    change = lambda m: {
        "000000000/000000000.latent.pth": m["000000000.latent.pt"],
        "000000000/000000000.embed.npy": npy(np.full((7, 6), 2.5, BF16)),
        "000000000/000000000.json": b"{}",
    }
    rewritten(path, change)
    data = source(tmp_path)
    x, text, _ = data.read(data.entries(0)[0])
    assert x.shape == (2, 2, 5, 4) and (text == 2.5).all()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def repacked(data, change):
    """The archive with its pickle changed and the checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as z, zipfile.ZipFile(out, "w") as new:
        for name in z.namelist():
            new.writestr(name, change(z.read(name)) if name.endswith("data.pkl") else z.read(name))
    return out.getvalue()


def flipped(data):
    """One bit of the values changed."""
    at = data.index(b"archive/data/0") + 40
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


LATENT, EMBED = "000000001.latent.pt", "000000001.embed.pt"
latents = lambda *shape, value=0.0: torch_bytes(np.full(shape, value, BF16))
BAD = {
    "hostile": (
        LATENT,
        lambda data: repacked(data, lambda _: b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R."),
        "os.system",
    ),
    "damaged": (LATENT, flipped, "CRC"),
    "cut": (LATENT, lambda data: data[: len(data) // 2], "BadZipFile"),
    "not torch": (LATENT, lambda data: b"hello", "BadZipFile"),
    "nan": (LATENT, lambda data: latents(4, 3, 2, 5, value=np.nan), "NaN or infinity"),
    "channels": (
        LATENT,
        lambda data: latents(5, 3, 2, 5),
        r"shape \[5, 3, 2, 5\].*\n.*\[4, 'any', 2, 5\]",
    ),
    "size": (LATENT, lambda data: latents(4, 3, 2, 6), r"shape \[4, 3, 2, 6\]"),
    "frames": (LATENT, lambda data: latents(4, 1, 2, 5), "1 latent frames\n2 are asked for"),
    "rank": (EMBED, lambda data: latents(7), r"shape \[7\]"),
    "width": (EMBED, lambda data: latents(7, 5), r"shape \[7, 5\].*\n.*\[7, 6\]"),
    "integers": (
        EMBED,
        lambda data: repacked(
            data, lambda pickle: pickle.replace(b"BFloat16Storage", b"ShortStorage")
        ),
        "int16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_members_are_refused_by_name(name, tmp_path):
    member, change, words = BAD[name]
    path = data_set(tmp_path, (3,)) / "shard_000000.tar"
    rewritten(path, lambda m: {**m, member: change(m[member])})
    data = source(tmp_path)
    data.read(data.entries(0)[0])
    with pytest.raises(DataError, match=words) as error:
        data.read(data.entries(0)[1])
    assert f"shard_000000.tar: {member}" in str(error.value)
    assert error.value.exit_code == 3


def test_bad_shards_are_refused_by_name(tmp_path):
    path = data_set(tmp_path, (3,)) / "shard_000000.tar"
    whole = path.read_bytes()
    for change, words in (
        (
            lambda m: {n: d for n, d in m.items() if n != EMBED},
            "000000001.latent.pt has no 000000001.embed.pt",
        ),
        (lambda m: {**m, "000000001.embed.npy": m[EMBED]}, "second embed"),
        (lambda m: {"readme.txt": b""}, "holds no sample"),
    ):
        rewritten(path, change)
        with pytest.raises(DataError, match=words):
            index(path)
        path.write_bytes(whole)
    for damaged in (whole[:700], b"hello" * 300):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="shard_000000.tar cannot be read"):
            index(path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo(LATENT)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="no plain file"):
        index(path)


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    path = data_set(tmp_path, (3,)) / "shard_000000.tar"
    data = source(tmp_path)
    entry = data.entries(0)[2]
    path.write_bytes(path.read_bytes()[: entry.latent.start + 100])
    with pytest.raises(DataError, match="000000002.latent.pt ends early"):
        data.read(entry)


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


# Order
# -------------------------------------------------------------------------------------------------------------------


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
    parts = [taken(Stream(source(folder), batch=6, host=(i, 3)), 5) for i in range(3)]
    assert [sum((part[0][n] for part in parts), []) for n in range(5)] == whole
    assert {part[1] for part in parts} == {end}
    with pytest.raises(UsageError, match="multiple of 4"):
        Stream(source(folder), batch=6, host=(0, 4))


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


def test_arrays_are_a_source():
    text = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None, None], (5, 7, 6))
    latents = np.broadcast_to(
        np.arange(5, dtype=np.float64)[:, None, None, None, None], (5, *SHAPE)
    )
    stream = Stream(ArraySource(latents, text, image=latents), batch=5)
    batch, position = stream.batch(Position())
    assert sorted(numbers(batch)) == list(range(5)) and batch.latents.dtype == np.float32
    assert (
        [int(x[0, 0, 0, 0]) for x in batch.latents]
        == numbers(batch)
        == [int(x[0, 0, 0, 0]) for x in batch.image]
    )
    assert stream.restored(stream.saved(position)) == position
    with pytest.raises(UsageError, match="same samples"):
        ArraySource(latents, text[:4])
    with pytest.raises(UsageError, match="other samples|not what"):
        Stream(ArraySource(latents + 1, text), batch=5).restored(stream.saved(position))


# Reading ahead
# -----------------------------------------------------------------------------------------------------------


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


def test_members_of_an_entry_are_named():
    assert shards.field_of("a.b/000.latent.pt") == ("latent", "a.b/000")
    assert shards.field_of("000.latent.safetensors") == (None, "000")
    assert [f.name for f in dataclasses.fields(shards.Entry)] == list(shards.FIELDS)
