"""Files that other people wrote, changed in every way a disk, a network or an attacker changes
them, through each reader.

For each reader a small valid file is made, and how it is taken apart: its header, the pickle or the
array inside it, its JSON. A mutation changes bytes of the file, or of a part, which is then put
back with lengths and checksums that are right again. `outcome` says what the reader made of it.

A longer run than the suite's, of all readers or of those named:

    PYTHONPATH=.:tests python tests/fuzz/readers.py 100000 [reader ...]

`guided.py` beside it looks for mutations that reach new code.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from published_fixtures import Named, StoragePickler
from random_model import random_leaves
from safetensors.numpy import save_file

from convert import golden
from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import demo, folders, orbax
from tdjax.checkpoints.locate import Located
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.checkpoints.published.files import open_source
from tdjax.config import DiTConfig
from tdjax.errors import TdjaxError
from tdjax.pipeline.request import model_info
from tdjax.pipeline.text_encoding import open_tokenizer
from tdjax.precision import FLOAT32
from tdjax.text.embeds import load_embeds, load_latents, save_embeds
from tdjax.text.language import language_notes, understood
from tdjax.text.prompt_cache import PromptCache
from tdjax.text.tokenizer import Tokenizer
from tdjax.train import checkpoints, shards
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.data.tokenizer import build

SECONDS = 10  # that a reader may take
MEMORY = 2**31  # bytes that it may take
DIT = DiTConfig(
    dim=8,
    ffn_dim=4,
    layers=2,
    heads=2,
    in_channels=2,
    out_channels=2,
    patch=(1, 2, 2),
    freq_dim=4,
    text_dim=4,
    text_len=4,
    policy=FLOAT32,
)


class Hang(BaseException):
    """A reader took longer than `SECONDS`. No reader catches it."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something inside a file: take(file) gives its bytes, put(file, bytes) the file with others.
    json: whether it is JSON, whose values are changed too."""

    take: Callable[[bytes], bytes]
    put: Callable[[bytes, bytes], bytes]
    json: bool = False


WHOLE = Part(lambda data: data, lambda data, part: part)
TEXT = dataclasses.replace(WHOLE, json=True)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader, the valid file that it reads, and how that is taken apart.

    read:    gives something that stands for all values of the file.
    summed:  whether the file has checksums, so that changed bytes must not give other values.
    """

    name: str
    file: Path
    read: Callable[[Path], Any]
    parts: tuple[Part, ...] = (WHOLE,)
    summed: bool = False


# Parts
# --------------------------------------------------------------------------------------------------


def zip_entry(name: str, json: bool = False) -> Part:
    """The entry of a zip file whose name ends so, put back with its checksum."""

    def take(data):
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            return next(z.read(n) for n in z.namelist() if n.endswith(name))

    def put(data, part):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as z, zipfile.ZipFile(out, "w") as new:
            for entry in z.namelist():
                new.writestr(entry, part if entry.endswith(name) else z.read(entry))
        return out.getvalue()

    return Part(take, put, json)


def _safetensors_put(data: bytes, part: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return len(part).to_bytes(8, "little") + part + data[8 + length :]


SAFETENSORS = Part(
    lambda data: data[8 : 8 + int.from_bytes(data[:8], "little")], _safetensors_put, json=True
)


def metadata_of(key: str) -> Part:
    """A text field of a safetensors file's metadata that holds JSON."""

    def take(data):
        return json.loads(SAFETENSORS.take(data))["__metadata__"][key].encode()

    def put(data, part):
        header = json.loads(SAFETENSORS.take(data))
        header["__metadata__"][key] = part.decode("utf-8", "replace")
        return _safetensors_put(data, json.dumps(header).encode())

    return Part(take, put, json=True)


def _npy_put(data: bytes, part: bytes) -> bytes:
    end = 10 + int.from_bytes(data[8:10], "little")
    return data[:8] + struct.pack("<H", len(part) & 0xFFFF) + part + data[end:]


NPY = Part(lambda data: data[10 : 10 + int.from_bytes(data[8:10], "little")], _npy_put)


def inside(outer: Part, inner: Part) -> Part:
    """A part of a part."""
    return Part(
        lambda data: inner.take(outer.take(data)),
        lambda data, part: outer.put(data, inner.put(outer.take(data), part)),
        inner.json,
    )


def tar_member(name: str) -> Part:
    """The contents of a tar file's member whose name ends so."""

    def take(data):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            return next(tar.extractfile(m).read() for m in tar if m.name.endswith(name))

    def put(data, part):
        out = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(data)) as tar,
            tarfile.open(fileobj=out, mode="w") as new,
        ):
            for member in tar:
                content = part if member.name.endswith(name) else tar.extractfile(member).read()
                info = tarfile.TarInfo(member.name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
        return out.getvalue()

    return Part(take, put)


# Valid files
# --------------------------------------------------------------------------------------------------


def digest(arrays) -> str:
    """What stands for the values of {name: array}."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def write_torch(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A trainer's file: the weights under "model", a step and an object beside them."""
    storages = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}

    def tensor(i, array):
        kind = Named("torch", "FloatStorage", None)
        storage = ("storage", kind, str(i), "cpu", array.size)
        strides = tuple(s // array.itemsize for s in array.strides)
        call = (storage, 0, array.shape, strides, False, {})
        return Named("torch._utils", "_rebuild_tensor_v2", call)

    state = {name: tensor(i, array) for i, (name, array) in enumerate(arrays.items())}
    out = io.BytesIO()
    beside = Named("os", "mkdir", (str(path.parent / "executed"),))
    StoragePickler(out, protocol=2).dump({"model": state, "step": 3, "beside": beside})
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", out.getvalue())
        z.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            z.writestr(f"archive/data/{key}", data)
    return path


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """By the format's own library: a tensor in blocks, one whose shape is in the metadata, and a
    tokenizer among the rest."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_tokenizer_model("t5")
    writer.add_token_list(["\u2581a", "b", "<unk>", "</s>", "<pad>"])
    writer.add_token_scores([-0.5, -1.5, 0.0, 0.0, 0.0])
    writer.add_token_types([1, 1, 2, 3, 3])
    writer.add_add_space_prefix(True)
    for key, value in list(tensors.items())[:6]:
        writer.add_tensor(key, np.ascontiguousarray(value))
    writer.add_array("comfy.gguf.orig_shape.y", [2, 1, 3])
    writer.add_tensor("y", np.ones((2, 3), np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("x", gguf.quants.quantize(np.ones((2, 32), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def spiece() -> bytes:
    """A small SentencePiece model in the wire format."""

    def field(number, value):
        if isinstance(value, int):
            return bytes([number << 3, value])
        if isinstance(value, float):
            return bytes([number << 3 | 5]) + struct.pack("<f", value)
        return bytes([number << 3 | 2, len(value)]) + value

    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces += [("\u2581a", -1.0, 1), ("b", -2.0, 1), ("ab", -1.5, 1), ("\u2581", -2.5, 1)]
    rows = [field(1, t.encode()) + field(2, s) + field(3, k) for t, s, k in pieces]
    return b"".join(field(1, row) for row in rows) + field(2, field(3, 1)) + field(3, field(3, 1))


def readers(folder: Path) -> list[Reader]:
    """Every reader with its valid file, which is written below `folder`."""
    leaves = random_leaves("dit", DIT, 0)
    ours = orbax.save(folder / "model" / "dit", leaves, "dit", DIT, source="random numbers")
    plain = export(open_leaves(ours), folder / "plain" / "dit.safetensors", "wan")
    tensors = {key: t.read() for key, t in open_source(plain).tensors.items()}
    few = dict(list(tensors.items())[:6])
    return [
        *_weights(folder, plain, tensors, few),
        *_loras(folder, plain),
        *_folders(folder, ours, few),
        *_texts(folder),
        *_arrays(folder),
    ]


def _weights(folder: Path, plain: Path, tensors, few) -> list[Reader]:
    read_all = lambda path: digest({k: t.read() for k, t in open_source(path).tensors.items()})

    def checkpoint(path):
        file = open_checkpoint(path)
        file.facts()
        return digest({name: lazy.read() for name, lazy in file.lazy().items()})

    pth = write_torch(folder / "trainer.pth", few)
    shards_folder = folder / "shards"
    shards_folder.mkdir()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    keys = list(few)
    save_file({k: few[k] for k in keys[:3]}, shards_folder / names[0])
    save_file({k: few[k] for k in keys[3:]}, shards_folder / names[1])
    index = shards_folder / "model.safetensors.index.json"
    table = {key: names[i >= 3] for i, key in enumerate(keys)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    quantised = folder / "wan.gguf"
    write_gguf(quantised, tensors)
    tokens = lambda path: open_tokenizer(path, 8).encode(["a bab"]).ids.tolist()
    return [
        Reader("gguf", quantised, read_all),
        Reader("gguf's tokenizer", quantised, tokens),
        Reader("torch", pth, read_all, (WHOLE, WHOLE, zip_entry("data.pkl")), summed=True),
        Reader("safetensors", plain, checkpoint, (SAFETENSORS, SAFETENSORS, metadata_of("tdjax"))),
        Reader("shard index", index, read_all, (TEXT,)),
        Reader("shard", shards_folder / names[0], lambda path: read_all(path.parent)),
    ]


def _loras(folder: Path, plain: Path) -> list[Reader]:
    q = "diffusion_model.blocks.0.self_attn.q"
    ones = np.ones((8, 2), np.float32)
    factors = {f"{q}.lora_B.weight": ones, f"{q}.lora_A.weight": ones.T.copy()}
    lora = folder / "adapter_model.safetensors"
    more = {f"{q}.alpha": np.float32(4), "diffusion_model.blocks.1.norm3.diff": np.float32([1] * 8)}
    flat = "lora_unet_blocks_0_self_attn_q"
    kohya = folder / "kohya.safetensors"
    names = {f"{flat}.lora_up.weight": ones, f"{flat}.lora_down.weight": ones.T.copy()}
    save_file(names | {f"{flat}.dora_scale": ones[:, :1].copy()}, kohya, {"ss_network_alpha": "2"})
    inside_it = {"lora_adapter_metadata": json.dumps({"transformer.r": 2})}
    save_file(factors | {k: np.asarray(v) for k, v in more.items()}, lora, inside_it)
    beside = folder / "peft"
    beside.mkdir()
    save_file(factors, beside / "adapter_model.safetensors")
    adapter = beside / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}))

    def added(path):
        file = open_checkpoint(plain, lora=((str(path), 1.0),))
        return digest({k: file.tensors[k].read() for k in file.tensors if "blocks" in k})

    return [
        Reader("lora", lora, added, (SAFETENSORS, metadata_of("lora_adapter_metadata"))),
        Reader("kohya's lora", kohya, added, (SAFETENSORS, WHOLE)),
        Reader("adapter config", adapter, lambda path: added(path.parent), (TEXT,)),
    ]


def _folders(folder: Path, ours: Path, few) -> list[Reader]:
    model = folder / "model"
    about = {"name": "tiny", "frames": 5, "height": 16, "width": 16, "prompts": ["a"]}
    about |= {"sampler": {"steps": 2, "mid_t": [1.0]}}
    about["language"] = json.loads((demo.folder() / "model.json").read_text())["language"]
    (model / "model.json").write_text(json.dumps(about))

    def described(path):
        found = folders.local(path.parent)
        located = Located(name="x", layout="ours", preset=found.preset, facts=found.facts)
        info = model_info(located, DIT, None, experts=False)
        prompt = "a red circle moves left"
        lines = language_notes(info.language, prompt) if info.language else []
        return repr((found, info, lines, info.language and understood(info.language, prompt)))

    def manifest(path):
        kind, config = orbax.checked(path.parent)
        return repr((kind, config, folders.is_model(path.parent), folders.local(path.parent)))

    def restored(path):
        return digest(orbax.named_leaves(orbax.restore(ours)[1]))

    state = {"params": {"w": jnp.arange(6.0)}}
    run = folder / "run"
    saved = checkpoints.save(run, 5, state, {"config": {}}) / "manifest.json"
    values = next(p for p in (ours / "params" / "d").iterdir() if p.is_file())
    return [
        Reader("model.json", model / "model.json", described, (TEXT,)),
        Reader("manifest", ours / "manifest.json", manifest, (TEXT,)),
        Reader("arrays", values, restored),
        Reader("arrays' own table", ours / "params" / "_METADATA", restored, (TEXT,)),
        Reader("train state", saved, lambda path: repr(checkpoints.inspect(path.parent)), (TEXT,)),
    ]


def _texts(folder: Path) -> list[Reader]:
    tokenizer, pieces = folder / "tokenizer.json", folder / "spiece.model"
    build(captions.vocabulary()).save(str(tokenizer))
    pieces.write_bytes(spiece())

    def encoded(path):
        found = Tokenizer(path, 8)
        return found.size, found.encode(["a small red circle", "ab  ba é"]).ids.tolist()

    return [
        Reader("tokenizer.json", tokenizer, encoded, (TEXT,)),
        Reader("spiece.model", pieces, encoded),
    ]


def _arrays(folder: Path) -> list[Reader]:
    rng = np.random.default_rng(0)
    noise = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    embeds = save_embeds(folder / "embeds.safetensors", noise(1, 4, 4), ["a"])
    latents, in_tensors = folder / "latents.npy", folder / "latents.safetensors"
    np.save(latents, noise(1, 2, 2, 2, 2))
    save_file({"latents": noise(1, 2, 2, 2, 2)}, in_tensors)
    cache = PromptCache(folder / "cache")
    cache.put("0" * 64, noise(4, 4), 3, "a")
    entry = cache.path("0" * 64)
    shard = folder / "shard_000000.tar"
    shards.write_shard(shard, [(noise(3, 2, 2, 2), noise(4, 4), "a")])
    vectors = folder / "golden.npz"
    config = {"num_layers": 1, "num_heads": 1, "text_len": 4, "eps": 1e-6, "patch_size": [1, 2, 2]}
    values = {"w/a": noise(2, 3), "out/v": noise(3)}
    np.savez(vectors, config=np.frombuffer(json.dumps(config).encode(), np.uint8), **values)

    def members(path):
        found = {}
        for i, sample in enumerate(shards.index(path)):
            found |= {f"{i} latent": sample.latent.array(), f"{i} embed": sample.embed.array()}
        return digest(found)

    def golden_arrays(path):
        found = golden._Golden(path)
        golden._check_of(found)
        return digest(found.arrays), repr(found.config)

    def cached(path):
        rows = np.zeros((4, 4), np.float32)
        return PromptCache(path.parent).read(path.stem, rows) and digest({"": rows})

    one = lambda array: digest({"": array})
    tensor, array = tar_member("latent.pt"), zip_entry("w/a.npy")
    pickled = inside(tensor, zip_entry(".pkl"))
    return [
        Reader("embeds", embeds, lambda path: one(load_embeds(path)), (WHOLE, SAFETENSORS)),
        Reader("latents", latents, lambda path: one(load_latents(path)), (WHOLE, NPY)),
        Reader("latents' tensors", in_tensors, lambda path: one(load_latents(path))),
        Reader("prompt cache", entry, cached, (WHOLE, SAFETENSORS)),
        Reader("training shard", shard, members, (WHOLE, tensor, pickled), summed=True),
        Reader("golden", vectors, golden_arrays, (WHOLE, array, inside(array, NPY)), summed=True),
    ]


# Mutations
# --------------------------------------------------------------------------------------------------

DEEP = 100_000
VALUES = [
    *(None, True, False, 0, -1, 1, 7, 0.5, 2**31, 2**63, 10**30, -(10**30), 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "\0", "9" * 5000, "../../x", "/etc/passwd"),
    *([], {}, [1], [[]], {"a": 1}, [0] * 70, "bfloat16", "float32", "dit", [2**40, 2**40]),
]
RAW = [b"", b"\0", b"\xff" * 8, b"\0" * 8, b"[" * DEEP, b'{"a":' * DEEP, b"(" * DEEP, b"9" * 5000]
RAW += [(2**n - 1).to_bytes(8, "little") for n in (16, 31, 32, 40, 62, 63)]
RAW += [b"cposix\nsystem\n", b"R", b"(", b"t", b"0", b".", b"\x93", b"\x81", b"b", b"blocks.99999."]

PLACES = 2**20  # where, as a share of the length
KINDS = {  # and how many values each has
    "flip": 8,
    "set": 256,
    "cut": 65,
    "end": 1,
    "repeat": 65,
    "insert": len(RAW),
    "over": len(RAW),
    "value": len(VALUES),
    "drop": 1,
    "rename": len(VALUES),
}


def drawn(rng: random.Random) -> tuple[int, list[tuple[str, int, int]]]:
    """The number of a part and one to three mutations: kind, place, value. A tenth of the places is
    the beginning or the end, where formats have their headers and tables."""
    mutations = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(list(KINDS))
        edge = rng.random() < 0.1
        place = rng.choice((0, PLACES - 1)) if edge else rng.randrange(PLACES)
        mutations.append((kind, place, rng.randrange(KINDS[kind])))
    return rng.randrange(12), mutations


def mutated(part: Part, data: bytes, mutations) -> bytes:
    """The bytes of a part, changed."""
    for kind, where, value in mutations:
        at = where * len(data) >> 20
        if kind in ("value", "drop", "rename"):
            data = _json_changed(data, kind, where, VALUES[value]) if part.json else data
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "end":
            data = data[:at]
        elif kind == "repeat":
            data = data[: at + value] + data[at:]
        elif kind == "insert":
            data = data[:at] + RAW[value] + data[at:]
        elif kind == "over":
            data = data[:at] + RAW[value] + data[at + len(RAW[value]) :]
    return data


def _json_changed(data: bytes, kind: str, where: int, value) -> bytes:
    """JSON with one of its values replaced, left out or renamed; other bytes as they are."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    nodes = list(_nodes(tree)) if isinstance(tree, dict | list) else []
    if not nodes:
        return json.dumps(value).encode()
    holder, key = nodes[where * len(nodes) >> 20]
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(value)] = holder.pop(key)
    else:
        holder[key] = value
    return json.dumps(tree).encode()


def _nodes(tree):
    """(holder, key) of every value inside JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _nodes(value)


# Outcomes
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alarm(seconds: int):
    """Raises Hang in the block that takes longer."""

    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Case:
    """One reader, whose file is changed and put back."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.valid = reader.file.read_bytes()
        self.want = repr(reader.read(reader.file))
        self.files = self._names()
        self.counts: collections.Counter[str] = collections.Counter()

    def _names(self) -> set[Path]:
        return set(self.reader.file.parent.rglob("*"))

    def _write(self, data: bytes) -> None:
        """Into the file that is there: file systems bring one that was emptied first to the disk at
        once."""
        with self.reader.file.open("r+b") as file:
            file.write(data)
            file.truncate()

    def outcome(self, number: int, mutations) -> str:
        """What the reader made of mutations of a part."""
        part = self.part(number)
        return self.fed(part, mutated(part, part.take(self.valid), mutations))

    def part(self, number: int) -> Part:
        return self.reader.parts[number % len(self.reader.parts)]

    def fed(self, part: Part, data: bytes) -> str:
        """ "refused", "same" or "other" for a file with these bytes in a part's place; raises
        whatever a user would see as a traceback, Hang, and AssertionError for values that a
        checksum denies."""
        self._write(part.put(self.valid, data))
        try:
            with alarm(SECONDS):
                got = repr(self.reader.read(self.reader.file))
            found = "same" if got == self.want else "other"
        except (TdjaxError, OSError):  # the commands show both as three lines
            found = "refused"
        finally:
            self._write(self.valid)
        self.counts[found] += 1
        if self.reader.summed and part is WHOLE:
            assert found != "other", "changed bytes of a file with checksums were taken"
        return found

    def check_left_behind(self) -> None:
        """Nothing was executed, and no file has appeared."""
        assert self._names() == self.files


def run(reader: Reader, count: int, seed: int | None = None) -> Case:
    """Feeds `count` mutations to a reader. Raises what the first failure raised, of as few of its
    mutations as fail, which a note names.

    seed: of the mutations; others each time without.
    """
    case, rng = Case(reader), random.Random(seed)
    for _ in range(count):
        number, mutations = drawn(rng)
        try:
            case.outcome(number, mutations)
        except (Exception, Hang):
            smallest(case, number, mutations)
            raise
    case.check_left_behind()
    return case


def smallest(case: Case, number: int, mutations) -> None:
    """Raises the failure of one mutation among several, or of all of them, and names them."""
    for some in [*([one] for one in mutations), mutations]:
        try:
            case.outcome(number, some)
        except (Exception, Hang) as error:
            error.add_note(f"{case.reader.name}, part {number}, mutations {some}")
            raise


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str]) -> int:
    count, names = int(argv[0]), argv[1:]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for reader in readers(Path(folder)):
            if names and reader.name not in names:
                continue
            start, before = time.perf_counter(), peak_bytes()
            try:
                case = run(reader, count)
                told = dict(case.counts)
            except BaseException as error:  # noqa: B036 - Hang is none of Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                told = "FAILED\n" + "".join(traceback.format_exception(error)[-8:])[-3000:]
            grown = (peak_bytes() - before) / 2**20
            seconds = time.perf_counter() - start
            print(f"{reader.name:20} {seconds:6.1f} s {grown:6.0f} MiB  {told}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
