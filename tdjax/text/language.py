"""The closed language of a small model, as its model.json has it, and what a prompt says in it.

{"words": all words, "knows": {factor: its values}, "needs": factors that every caption of training
named, "says": {word: [factor, place of the value]}, "phrases": {factor: readings of words that say
a value together}}; folders of 0.1.0 have the first two. A reading is {"when": words, "says": {word:
place}}: the first one counts of which a word of `when` is in the prompt; without words there it
always does.
"""

from __future__ import annotations

import re
from typing import Any


def words_of(prompt: str) -> list[str]:
    """Returns the words of a prompt in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", prompt.lower())


def said(language: dict[str, Any], prompt: str) -> dict[str, list[int]]:
    """Returns {factor: places in its values that the prompt names, in order}. One value by several
    words of a phrase counts once."""
    words = words_of(prompt)
    out: dict[str, list[int]] = {}
    for word in words:
        if word in language.get("says", {}):
            factor, place = language["says"][word]
            out.setdefault(factor, []).append(place)
    for factor, readings in language.get("phrases", {}).items():
        reading = next(each for each in readings if not each["when"] or {*each["when"]} & {*words})
        places = [reading["says"][word] for word in words if word in reading["says"]]
        if places:
            out[factor] = list(dict.fromkeys(places))
    return out


def understood(language: dict[str, Any], prompt: str) -> str:
    """Returns a line that says what a model of this language reads in a prompt, and which factors
    it will draw by chance."""
    found, knows = said(language, prompt), language["knows"]
    named = [f"{factor} {knows[factor][places[-1]]}" for factor, places in found.items()]
    line = f"understood: {', '.join(named) or 'nothing'}"
    left = [factor for factor in knows if factor not in found]
    return f"{line}; left to chance: {', '.join(left)}" if left else line


def language_notes(language: dict[str, Any], prompt: str) -> list[str]:
    """Returns lines about a prompt that the model was not trained for: unknown words, and what is
    missing or named twice."""
    words, knows = words_of(prompt), language["knows"]
    if not words:
        return ["the prompt is empty: the video follows no text"]
    lines = []
    unknown = [word for word in dict.fromkeys(words) if word not in set(language["words"])]
    if unknown:
        known = "; ".join(f"{factor}: {', '.join(values)}" for factor, values in knows.items())
        shown = ", ".join(map(repr, unknown))
        lines.append(f"this small model has never seen {shown}; it knows only {known}")
    found = said(language, prompt)
    missing = [factor for factor in language.get("needs", ()) if factor not in found]
    if missing and not unknown:
        lines.append(
            f"the prompt names no {' and no '.join(missing)}: this small model was trained on"
            " prompts that do, and may fail without"
        )
    for factor, places in found.items():
        if len(places) > 1:
            values = " and ".join(knows[factor][place] for place in places)
            lines.append(
                f"the prompt names the {factor} {len(places)} times ({values}): this small model"
                " knows one object, and may fail"
            )
    return lines
