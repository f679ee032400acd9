"""docs/files.md against the tables that it speaks of: it cannot say what is not so."""

import re
from pathlib import Path

import pytest

from tdjax.checkpoints import filenames, recipes
from tdjax.checkpoints.published import read_gguf, scaled
from tdjax.checkpoints.published.files import LEADING
from tdjax.config import DiTConfig

PAGE = (Path(__file__).resolve().parents[4] / "docs/files.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of the first table under a title, without its head."""
    text = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (.*) \|$", text, re.M)
    return [line.split(" | ") for line in table[1:]]


SAMPLERS = {cells[0]: cells[1:] for cells in rows("Samplers")}


def test_every_recipe_has_a_row_and_no_other():
    assert set(SAMPLERS) == {r.kind for r in recipes.RECIPES} | {recipes.UNDISTILLED}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_examples_get_the_sampler_of_their_row(kind):
    examples, sampler, steps = SAMPLERS[kind]
    for name in re.findall(r"`(.+?)`", examples):
        found = recipes.recognise([name], DiTConfig())
        assert found.kind == kind
        assert (found.sampler.sampler, str(found.sampler.num_steps)) == (sampler, steps)


def test_containers():
    (kinds,) = [cells[1] for cells in rows("Containers") if cells[0] == "`.gguf`"]
    listed = kinds.split(";")[0].split(", ")
    assert set(listed) == {kind.name for kind in read_gguf.READ}
    named = " ".join(cells[0] for cells in rows("Containers"))
    assert all(suffix in named or suffix.endswith(".json") for suffix in filenames.WEIGHTS)


def test_prefixes():
    assert all(f"`{prefix}`" in PAGE for prefix in LEADING)


def test_formats():
    told = PAGE.split("## Weights of 8 bits")[1].split("\n## ")[0]
    for kind in scaled.KINDS.values():
        assert f"`{kind}`" in told
    for _, what in scaled.REFUSED:
        word = re.search(r"NVFP4|MXFP8|MXFP4|AWQ|4-bit|convrot", what)
        assert word and word[0] in told
