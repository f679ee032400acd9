"""Every word one piece, through our own reader; captions fit the text encoder; other words become
characters."""

import pytest

from tdjax.text.tokenizer import Tokenizer
from tdjax.train.tiny import configs
from tdjax.train.tiny.data import captions, tokenizer


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.build(captions.vocabulary()).save(str(path))
    return Tokenizer(path, configs.TEXT.text_len)


def test_every_word_is_one_piece(read):
    ids = [read.pieces(word) for word in captions.vocabulary()]
    assert all(len(pieces) == 2 and pieces[1] == read.end == 1 for pieces in ids)
    assert len({pieces[0] for pieces in ids}) == len(ids) and min(pieces[0] for pieces in ids) > 2


def test_ids_fit_the_text_encoder(read):
    assert read.size <= configs.TEXT.vocab


def test_captions_fit_and_keep_their_words(read):
    texts = [
        captions.random_prompt(seed, "all", template)
        for seed in range(300)
        for template in (None, captions.EVALUATION)
    ]
    assert max(read.count(text) for text in texts) <= 20  # of the encoder's 32
    for text in texts:
        words = text.replace(",", " ,").split()
        assert read.count(text) == len(words) + 1
        pieces = [read.library.id_to_token(i) for i in read.pieces(text)]
        assert "".join(pieces).replace("▁", " ") == f" {text}</s>"


def test_case_and_unknown_words(read):
    assert read.pieces("A Red Circle") == read.pieces("a red circle")
    assert read.library.encode("leftover", add_special_tokens=False).tokens == [
        "▁left",
        "o",
        "v",
        "e",
        "r",
    ]
    assert 2 in read.pieces("猫") and read.pieces("") == [1]
