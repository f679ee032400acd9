"""Shards against torch; whatever is damaged or hostile is refused by name."""

import dataclasses
import io
import tarfile
import zipfile

import numpy as np
import pytest
from shard_cases import BF16, data_set, rewritten, samples, source

from tdjax.errors import UsageError
from tdjax.train import shards
from tdjax.train.shards import DataError, decode, index, torch_bytes, write_shard


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
        got = decode("x.pt", out.getvalue())
        assert got.shape == tuple(tensor.shape)
        assert (got.astype(np.float32) == tensor.float().numpy()).all()


def test_the_same_samples_give_the_same_bytes(tmp_path):
    a, b = (write_shard(tmp_path / name, samples(0, 2)) for name in ("a.tar", "b.tar"))
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write_shard(a, samples(0, 1))


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
    x, text, *_ = data.read(data.entries(0)[0])
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


def test_members_of_an_entry_are_named():
    assert shards._field_of("a.b/000.latent.pt") == ("latent", "a.b/000")
    assert shards._field_of("000.latent.safetensors") == (None, "000")
    assert [f.name for f in dataclasses.fields(shards.Entry)] == list(shards._FIELDS)


def test_a_damaged_header_is_not_the_end_of_a_shard(tmp_path):
    """The library stops there without a word, and samples would be missing."""
    path = tmp_path / "shard_000000.tar"
    write_shard(path, samples(0, 3))
    whole = path.read_bytes()
    assert len(index(path)) == 3
    at = whole.index(b"000000001.latent.pt")
    for place in (at + 4, at + 150):  # in its name, in its checksum
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match="cannot be read.*\\n.*header at byte"):
            index(path)
