"""The tokenizer of a closed vocabulary, as the tokenizer.json that `tdjax.text.tokenizer` reads."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

_CHARACTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.,'-!?"


def build(words: Sequence[str]) -> Tokenizer:
    """Returns a unigram tokenizer with one piece for each word, and characters for all others.
    `build(words).save(path)` writes it.

    As in T5, padding is 0, the end 1 and the unknown 2; a word's piece begins with the mark of a
    space.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("▁" + word, -3.0) for word in words]
    pieces += [(character, -9.0) for character in _CHARACTERS]
    out = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    out.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    out.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    out.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return out
