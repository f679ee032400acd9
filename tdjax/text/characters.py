"""Text as it arrives: characters that cannot be written as UTF-8."""

from __future__ import annotations


def repaired(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs: what is left of an emoji cut in two, or
    of bytes that were not UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
