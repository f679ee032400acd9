"""SentencePiece unigram models (spiece.model) as a tokenizer, read from the protobuf wire format
without a protobuf library.

Field numbers: google/sentencepiece src/sentencepiece_model.proto. Wire format:
               protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from tdjax.errors import CheckpointError

SPACE = "\u2581"  # the visible space that pieces are written with
UNKNOWN = 2  # the type of the <unk> piece
UNIGRAM = 1


@dataclasses.dataclass(frozen=True)
class Spiece:
    """A unigram model. pieces: (text, score, type) in order of id. The rest is as the file's
    trainer and normalizer sections say."""

    pieces: list[tuple[str, float, int]]
    model_type: int
    byte_fallback: bool
    space_suffix: bool
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool

    @property
    def supported(self) -> bool:
        return self.model_type == UNIGRAM and self.escape_spaces and not self.space_suffix


def read_spiece(path: Path, data: bytes) -> Tokenizer:
    """A tokenizer with the ids that SentencePiece itself would give; CheckpointError for a damaged
    file or another algorithm.

    Two differences, both shared with the published tokenizer.json: a prompt that spells a special
    piece such as </s> gets its id, and a combining mark that stands alone after a character which
    the map rewrites is lost with it.
    """
    try:
        model = parse(data)
    except Exception as error:  # a damaged file can fail anywhere
        raise _damaged(path, error) from error
    return tokenizer_of(path, model)


def tokenizer_of(path: Path, model: Spiece) -> Tokenizer:
    """Returns the tokenizer of the model in a file. Raises CheckpointError where it is of another
    kind, or the library does not take it."""
    if not model.supported:
        raise CheckpointError(
            f"{path} is a SentencePiece model of another kind",
            "umT5 uses a unigram model with spaces before words",
            "give spiece.model of google/umt5-xxl",
        )
    try:
        return _build(model)
    except Exception as error:  # the library raises bare Exception
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a SentencePiece model",
        f"reading it failed: {error!r}",
        "download it again",
    )


def _build(model: Spiece) -> Tokenizer:
    """Returns the tokenizer of a model."""
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.Unigram(
            [(text, score) for text, score, _ in model.pieces], unknown, model.byte_fallback
        )
    )
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence(steps)
    # split=False: words are cut by the model itself, so that pieces which span a space are found as
    # well.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=False)
    return tokenizer


def parse(data: bytes) -> Spiece:
    """ModelProto: 1 pieces, 2 trainer (3 model type, 24 suffix, 35 byte fallback), 3 normalizer (2
    map, 3, 4, 5 flags)."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append(
                (
                    piece[1].decode(),
                    struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0,
                    piece.get(3, 1),
                )
            )
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return Spiece(
        pieces=pieces,
        model_type=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        space_suffix=bool(trainer.get(24, 0)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
        escape_spaces=bool(normalizer.get(5, 1)),
    )


def _fields(data: bytes):
    """(number, value) of one protobuf message: int for varints, bytes for everything else (a later
    field overrides in a dict)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire} at byte {at}")
            if number == 0 or at + size > len(data):
                raise ValueError(f"the file ends inside field {number}")
            value, at = data[at : at + size], at + size
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"number too long at byte {at}")
