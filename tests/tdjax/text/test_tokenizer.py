"""Prompt cleaning against the golden pairs, and token ids against sentencepiece itself."""

import io
import json
import random
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from tdjax.errors import CheckpointError
from tdjax.text.sentencepiece import parse
from tdjax.text.tokenizer import NAMES, Tokenizer, clean, prompt_warnings

TEXTS = (
    "a red fox runs through the snow at night",
    "the quick brown fox jumps over the lazy dog",
    "a large blue circle moves slowly to the left",
    "一只猫在草地上奔跑",
    "naïve café déjà vu",
    "numbers 1234 and 567.89",
    "A stylish woman walks down a Tokyo street filled with warm glowing neon",
)
STRINGS = (
    "",
    " ",
    "  two  spaces ",
    "▁x",
    "a▁b",
    "¨hi",
    "x ¨ y",
    "ﬁne ２３",
    "e\u0301",
    "日本 語",
    "😀 fox",
    "\u3000wide",
    "tab\tnl\n",
    "a" * 300,
    "½",
    "\u200bzero width",
    "ＡＢＣ!",
    "İstanbul",
    "각",
    "🇯🇵 flag 😀\u200d🚀",
    "the fox",
    "of the",
    "…",
    "fox.fox,fox",
)


def clean_cases():
    from pathlib import Path

    return json.loads((Path(__file__).parents[2] / "golden" / "text_clean.json").read_text())[
        "cases"
    ]


@pytest.mark.parametrize("case", clean_cases(), ids=lambda c: ascii(c["input"])[:24])
def test_clean(case):
    assert clean(case["input"]) == case["expected"]


def train(**options):
    """Bytes of a small unigram model with T5's ids for padding (0), end (1) and unknown (2)."""
    spm = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    options = {
        "model_type": "unigram",
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 0.99,
        **options,
    }
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=out,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=3,
        **options,
    )
    return out.getvalue(), spm.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    data, oracle = train()
    path = tmp_path_factory.mktemp("spiece") / "spiece.model"
    path.write_bytes(data)
    return path, oracle


def agree(tokenizer, oracle, texts):
    for text in texts:
        ours = tokenizer.library.encode(text, add_special_tokens=False).ids
        assert ours == oracle.encode(text), repr(text)


def random_texts(count, seed=0):
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz    ABC0123456789.,!?éàüñ草地猫😀½ﬁ¨ªº\t\u3000ＡＢ①㍿▁"
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def test_sentencepiece_gives_the_same_ids(spiece):
    path, oracle = spiece
    tokenizer = Tokenizer(path)
    assert tokenizer.size == oracle.vocab_size()
    agree(tokenizer, oracle, (*TEXTS, *STRINGS, *random_texts(1500)))


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": False},
        {"normalization_rule_name": "identity"},
        {"remove_extra_whitespaces": False, "normalization_rule_name": "nmt_nfkc_cf"},
        {"add_dummy_prefix": False, "split_by_whitespace": False},
    ],
    ids=lambda o: "-".join(o),
)
def test_other_sentencepiece_settings(tmp_path, options):
    data, oracle = train(**options)
    (tmp_path / "spiece.model").write_bytes(data)
    # A visible space in the prompt is a space to some settings and not to others; only the
    # published ones matter there.
    texts = [t for t in (*TEXTS, *STRINGS, *random_texts(300, 1)) if "▁" not in t]
    agree(Tokenizer(tmp_path), oracle, texts)


def test_encode_pads_masks_and_ends(spiece):
    path, oracle = spiece
    tokens = Tokenizer(path.parent, text_len=20).encode(["a red fox", "", "  a &amp;  red\nfox "])
    assert tokens.ids.shape == tokens.mask.shape == (3, 20)
    assert tokens.ids.dtype == tokens.mask.dtype == np.int32
    assert tokens.ids[0].tolist() == [*oracle.encode("a red fox"), 1] + [0] * (
        19 - len(oracle.encode("a red fox"))
    )
    assert tokens.ids[1].tolist() == [1] + [0] * 19 and tokens.mask[1].sum() == 1
    assert tokens.ids[2, : tokens.mask[2].sum()].tolist() == [*oracle.encode("a & red fox"), 1]


def test_truncation_keeps_the_end_token_and_is_counted(spiece):
    path, oracle = spiece
    prompt = "the quick brown fox " * 40
    tokenizer = Tokenizer(path, text_len=16)
    row = tokenizer.encode([prompt]).ids[0]
    full = [*oracle.encode(prompt.strip()), 1]
    assert row.tolist() == [*full[:15], 1]
    assert tokenizer.count(prompt) == len(full)
    (line,) = prompt_warnings(tokenizer, prompt)
    assert (
        f"{len(full)} tokens" in line and "takes 16" in line and f"last {len(full) - 16} " in line
    )


def test_prompt_warnings(spiece):
    tokenizer = Tokenizer(spiece[0])
    assert "empty" in prompt_warnings(tokenizer, "  ")[0]
    (line,) = prompt_warnings(tokenizer, "a fox")
    assert "2 words" in line and "long captions" in line
    assert prompt_warnings(tokenizer, TEXTS[-1]) == []
    assert (
        prompt_warnings(tokenizer, 2 * TEXTS[3]) == []
    )  # one "word" of many tokens: writing without spaces
    assert prompt_warnings(None, "a fox") == []


def test_json_and_spiece_of_one_model_agree(spiece, tmp_path):
    path, _ = spiece
    tokenizer = Tokenizer(path, text_len=32)
    library = Library.from_str(tokenizer.library.to_str())
    library.enable_truncation(4)
    library.enable_padding(
        length=64
    )  # settings of a file must not reach our own padding and counting
    library.save(str(tmp_path / "tokenizer.json"))
    other = Tokenizer(tmp_path, text_len=32)
    for a, b in zip(tokenizer.encode(list(TEXTS)).ids, other.encode(list(TEXTS)).ids, strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_found_in_a_folder(spiece, tmp_path, name):
    target = tmp_path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("json"):
        Tokenizer(spiece[0]).library.save(str(target))
    else:
        target.write_bytes(spiece[0].read_bytes())
    assert Tokenizer(tmp_path).path == target


def test_missing(tmp_path):
    with pytest.raises(CheckpointError) as error:
        Tokenizer(tmp_path)
    for part in (str(tmp_path), *NAMES, "tokenizer_path"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer(tmp_path / "nowhere")


def test_damaged_json(tmp_path):
    path = tmp_path / "tokenizer.json"
    for text in ('{"version": "1.0", "model": {"type": "Unig', "{}", '{"model": 3}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="not a tokenizer.json"):
            Tokenizer(path)


def test_json_without_an_end_token(tmp_path):
    library = Library(models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), ("a", -1.0)], 1))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no </s> token"):
        Tokenizer(tmp_path)


def test_without_a_token_for_what_is_unknown(tmp_path):
    library = Library(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("a", -1.0)], None))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.pieces("a") == [2, 1]
    with pytest.raises(CheckpointError, match="does not encode every text\nEncountered an unknown"):
        tokenizer.pieces("b")


def test_damaged_spiece(spiece, tmp_path):
    data, path = spiece[0].read_bytes(), tmp_path / "spiece.model"
    broken = [
        b"",
        b"\x00" * 64,
        b"\xff" * 64,
        b"PK\x03\x04 a zip",
        data[: len(data) // 2],
        data[:1001],
        b"\x0a\x02\x10\x01" + data,
    ]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a SentencePiece model"):
            Tokenizer(path)


def test_flipped_bytes_give_no_other_error(spiece, tmp_path):
    data, path, rng = spiece[0].read_bytes(), tmp_path / "spiece.model", random.Random(5)
    for _ in range(60):
        content = bytearray(data)
        for _ in range(4):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            Tokenizer(path).encode(["a red fox"])
        except CheckpointError:
            continue


def test_bpe_models_are_refused(tmp_path):
    data, _ = train(model_type="bpe", vocab_size=330)
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(CheckpointError, match="unigram"):
        Tokenizer(tmp_path)


def test_wire_format_by_hand():
    piece = lambda text, score, kind: (
        b"\x0a"
        + bytes([len(text)])
        + text
        + b"\x15"
        + struct.pack("<f", score)
        + b"\x18"
        + bytes([kind])
    )
    field = lambda number, data: bytes([number << 3 | 2, len(data)]) + data
    data = (
        field(1, piece(b"<pad>", 0.0, 3))
        + field(1, piece("▁é".encode(), -2.5, 1))
        + field(2, b"\x18\x01\x98\x02\x01")
    )
    model = parse(data + field(3, b"\x20\x00"))
    assert model.pieces == [("<pad>", 0.0, 3), ("▁é", -2.5, 1)]
    assert (
        model.model_type == 1
        and model.byte_fallback
        and model.dummy_prefix
        and not model.remove_extra_spaces
    )
