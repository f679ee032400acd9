"""Prompts to token ids: cleaning, umT5's tokenizer from tokenizer.json or spiece.model, padding and
truncation."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path

import ftfy
import jax
import numpy as np
import tokenizers

from tdjax.errors import CheckpointError
from tdjax.text.sentencepiece import read_spiece

PAD = 0
END = "</s>"
# In this order below the folder that is given; the last two are where the Wan repositories keep
# theirs.
NAMES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer/tokenizer.json",
    "tokenizer/spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/spiece.model",
)
FEW_WORDS, FEW_TOKENS = 8, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """ids, mask: i32[b s]; mask is 1 up to and including the end token, ids are 0 after it."""

    ids: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray


def clean(text: str) -> str:
    """The prompt as the encoder was trained to see it: encodings repaired, HTML entities resolved,
    whitespace made single.

    The order of steps is Wan's (Wan-Video/Wan2.1 wan/modules/tokenizers.py).
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """umT5's tokenizer.

    path:    a tokenizer.json, a SentencePiece unigram .model, or a folder that holds one of them.
    library: the tokenizer where it was read from `path` already.
    """

    def __init__(
        self,
        path: str | Path,
        text_len: int = 512,
        library: tokenizers.Tokenizer | None = None,
    ):
        self.path, self.text_len = _find(Path(path)), text_len
        self.library = library or _read(self.path)
        self.end = self.library.token_to_id(END)
        if self.end is None:
            raise CheckpointError(
                f"{self.path} has no {END} token",
                "umT5 prompts end with it",
                "give the tokenizer of google/umt5-xxl",
            )

    @property
    def size(self) -> int:
        """Number of ids; the text encoder's vocabulary must not be smaller."""
        return self.library.get_vocab_size(with_added_tokens=True)

    def pieces(self, prompt: str) -> list[int]:
        """All ids of a prompt, cleaned, with the end token, not truncated. Raises CheckpointError
        where the file has no token for a part of it."""
        try:
            ids = self.library.encode(clean(prompt), add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{self.path} does not encode every text",
                str(error)[:200],
                "give the tokenizer of google/umt5-xxl",
            ) from error
        return [*ids, self.end]

    def count(self, prompt: str) -> int:
        """Number of tokens with the end token, before truncation."""
        return len(self.pieces(prompt))

    def encode(self, prompts: list[str]) -> Tokens:
        """-> Tokens of numpy i32[b text_len]. A longer prompt loses its last words, not its end
        token."""
        ids = np.full((len(prompts), self.text_len), PAD, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            pieces = self.pieces(prompt)
            if len(pieces) > self.text_len:
                pieces = [*pieces[: self.text_len - 1], self.end]
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = 1
        return Tokens(ids, mask)


def prompt_warnings(tokenizer: Tokenizer | None, prompt: str) -> list[str]:
    """Lines for the user about a prompt that is empty, very short or too long."""
    if tokenizer is None:
        return []
    count, words = tokenizer.count(prompt), len(clean(prompt).split())
    shown = repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
    if count == 1:
        return ["the prompt is empty: the video follows no text"]
    if count > tokenizer.text_len:
        dropped = count - tokenizer.text_len
        return [
            f"prompt {shown} has {count} tokens, the model takes {tokenizer.text_len}: the last"
            f" {dropped} before the end were dropped"
        ]
    # Both limits, because writing without spaces has few "words" and long words have many tokens.
    if words < FEW_WORDS and count - 1 < FEW_TOKENS:
        plural = "" if words == 1 else "s"
        return [
            f"prompt {shown} has {words} word{plural}: the models were trained on long captions, a"
            " sentence or more gives better video"
        ]
    return []


def _find(path: Path) -> Path:
    """The tokenizer file itself; CheckpointError names every place that was looked at."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"tokenizer {path} does not exist",
            "a file or a folder was expected",
            "give tokenizer_path",
        )
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"no tokenizer in {path}",
        f"looked for {', '.join(NAMES)}",
        "copy tokenizer.json of google/umt5-xxl there, or give tokenizer_path",
    )


def _read(path: Path) -> tokenizers.Tokenizer:
    """Either format; anything unreadable is a CheckpointError."""
    data = path.read_bytes()
    if data.lstrip()[:1] != b"{":
        return read_spiece(path, data)
    try:
        library = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(
            f"{path} is not a tokenizer.json", f"reading it failed: {error}", "download it again"
        ) from error
    library.no_truncation()
    library.no_padding()
    return library
