"""The closed language of a small model, as its model.json has it, and what a prompt says in it.

{"words": all words, "knows": {factor: its values}, "needs": factors that every caption of training
named, "says": {word: [factor, place of the value]}, "phrases": {factor: readings of words that say
a value together}, "orders": [factors as a caption of training named them], "caption": such a
caption with factors in braces, "apart": [factor, place, factor that no caption names beside that
value], "stands": {factor: {"before": words, "after": lists of words, "between": words that may come
between}}, "near": {word: {factor: place}}}; older folders have the first ones. A reading is
{"when": words, "says": {word: place}}: the first one counts of which a word of `when` is in the
prompt; without words there it always does. A word that stands where another factor's values do ("on
a blue background", where blue is a colour of shapes) says nothing of its own factor, and of the
other one what is near.
"""

from __future__ import annotations

import random
import re
from typing import Any


def words_of(prompt: str) -> list[str]:
    """Returns the words of a prompt in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", prompt.lower())


def _mentions(language: dict[str, Any], prompt: str) -> list[tuple[str, int]]:
    """(factor, place of the value) for every word that says one, in the prompt's order."""
    return [mention for mention, _, _ in _read(language, prompt) if mention]


def _read(
    language: dict[str, Any], prompt: str
) -> list[tuple[tuple[str, int] | None, str, str | None]]:
    """For every word that says a value: (the factor and the place of the value, the word, the
    factor that it stands for instead of its own)."""
    words = words_of(prompt)
    says = {word: tuple(said) for word, said in language.get("says", {}).items()}
    for factor, readings in language.get("phrases", {}).items():
        reading = next(each for each in readings if not each["when"] or {*each["when"]} & {*words})
        says |= {word: (factor, place) for word, place in reading["says"].items()}
    stands, out = language.get("stands", {}), []
    for i, word in enumerate(words):
        if word not in says:
            continue
        own = says[word][0]
        here = [factor for factor, place in stands.items() if _is_at(place, words, i)]
        if own not in stands or own in here or not here:
            out.append((says[word], word, None))
        else:
            near = language["near"].get(word, {}).get(here[0])
            out.append((None if near is None else (here[0], near), word, here[0]))
    return out


def _is_at(place: dict[str, list], words: list[str], i: int) -> bool:
    """Whether word i stands where the values of a factor do."""
    if words[i + 1 : i + 2] and words[i + 1] in place["before"]:
        return True
    before = words[:i]
    while before and before[-1] in place["between"]:
        before.pop()
    return any(before[-len(after) :] == list(after) for after in place["after"])


def said(language: dict[str, Any], prompt: str) -> dict[str, list[int]]:
    """Returns {factor: places in its values that the prompt names, in order}. One value by several
    words of a phrase counts once."""
    phrases = language.get("phrases", {})
    out: dict[str, list[int]] = {}
    for factor, place in _mentions(language, prompt):
        places = out.setdefault(factor, [])
        if factor not in phrases or place not in places:
            places.append(place)
    return out


def asked(language: dict[str, Any], prompt: str) -> dict[str, int]:
    """Returns {factor: place of the value that a clip of this prompt should have}: the last one
    that it names, or the one that was drawn for it."""
    both = said(language, prompt) | _drawn(language, prompt)
    return {factor: places[-1] for factor, places in both.items()}


def caption_of(language: dict[str, Any], prompt: str) -> str:
    """Returns what a model of this language reads for a prompt: the prompt, if it is like a caption
    of training, else such a caption of what it says. Of a factor that is named twice the last value
    counts; factors that every caption names are drawn where they are missing, the same for the same
    prompt."""
    words, template = words_of(prompt), language.get("caption")
    if not words or template is None or _as_trained(language, prompt):
        return prompt
    named, knows = asked(language, prompt), language["knows"]
    texts = {factor: knows[factor][named[factor]] if factor in named else "" for factor in knows}
    text = " ".join(template.format(**texts).split())
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _as_trained(language: dict[str, Any], prompt: str) -> bool:
    """Whether a prompt has known words only, names what it must, nothing twice, and in an order of
    training."""
    found = said(language, prompt)
    order = list(dict.fromkeys(factor for factor, _ in _mentions(language, prompt)))
    return (
        set(words_of(prompt)) <= set(language["words"])
        and set(language.get("needs", ())) <= found.keys()
        and all(len(places) == 1 for places in found.values())
        and all(instead is None for _, _, instead in _read(language, prompt))
        and any(order == [f for f in each if f in found] for each in language["orders"])
    )


def _drawn(language: dict[str, Any], prompt: str) -> dict[str, list[int]]:
    """{factor: [place]} of those that a prompt lacks, drawn for it: what `caption_of` adds."""
    if "caption" not in language or not words_of(prompt):
        return {}
    rng, found = random.Random(" ".join(words_of(prompt))), said(language, prompt)
    never = {(factor, place) for factor, place, other in language["apart"] if other in found}
    out = {}
    for factor in language.get("needs", ()):
        if factor not in found:
            places = range(len(language["knows"][factor]))
            out[factor] = [rng.choice([i for i in places if (factor, i) not in never])]
    return out


def understood(language: dict[str, Any], prompt: str) -> str:
    """Returns a line that says what a model of this language reads in a prompt, what was drawn for
    it, and which factors are left to the model."""
    found, knows = said(language, prompt), language["knows"]
    drawn = _drawn(language, prompt)
    told = lambda each: ", ".join(f"{f} {knows[f][places[-1]]}" for f, places in each.items())
    line = f"understood: {told(found) or 'nothing'}"
    line += f"; drawn: {told(drawn)}" if drawn else ""
    left = [factor for factor in knows if factor not in found and factor not in drawn]
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
    moved = {(word, instead): said for said, word, instead in _read(language, prompt) if instead}
    for (word, factor), mention in moved.items():
        taken = "drawn" if mention is None else f"{knows[factor][mention[1]]} is taken"
        lines.append(
            f"no clip of this small model has the {factor} {word}, it knows"
            f" {', '.join(knows[factor])}: {taken}"
        )
    told = found.keys() | {factor for _, factor in moved}
    missing = [factor for factor in language.get("needs", ()) if factor not in told]
    if missing and not unknown:
        lines.append(
            f"the prompt names no {' and no '.join(missing)}, which every clip of this small model"
            " has: drawn"
        )
    for factor, places in found.items():
        if len(places) > 1:
            values = " and ".join(knows[factor][place] for place in places)
            lines.append(
                f"the prompt names the {factor} {len(places)} times ({values}): this small model"
                " knows one object, and takes the last"
            )
    return lines
