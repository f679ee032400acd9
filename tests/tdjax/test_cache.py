"""`python -m tdjax.cache`: what is there, and that rm removes what it names and nothing else."""

import json
import os

import numpy as np
import pytest

from tdjax import cache
from tdjax.text.prompt_cache import PromptCache


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path))
    for name in (
        "model/model.json",
        "other/dit/manifest.json",
        "compiled/a-cache",
        "compiled/b-cache",
        "mine/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345678")
    store = PromptCache(tmp_path / "prompts")
    for i in range(12):
        store.put(f"{i:02d}" * 32, np.ones((4, 8), np.float32), 4, f"prompt number {i}")
        os.utime(store.path(f"{i:02d}" * 32), (i * 86400, i * 86400))
    return tmp_path


def test_listing(root, capsys):
    assert cache.main(["ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {kind: row["entries"] for kind, row in found["kinds"].items()} == {
        "weights": 2,
        "compiled": 2,
        "prompts": 12,
    }
    assert found["kinds"]["compiled"]["bytes"] == 16 and found["kinds"]["weights"]["names"] == [
        "model",
        "other",
    ]
    assert found["prompts"][0]["prompt"] == "prompt number 11"
    assert cache.main(["ls"]) == 0
    text = capsys.readouterr().out
    assert (
        "prompt number 11" in text
        and "prompt number 1\n" not in text
        and "and 2 more prompts" in text
    )
    assert cache.main(["ls", "--all"]) == 0 and "prompt number 1\n" in capsys.readouterr().out


def test_removal(root, capsys):
    assert cache.main(["rm", "compiled"]) == 0
    assert capsys.readouterr().out == "removed 2 entries, 0.0 MiB\n"
    assert cache.main(["rm", "0303030303", "other"]) == 0
    assert not (root / "other").exists() and len(list((root / "prompts").iterdir())) == 11
    assert cache.main(["rm", "prompts", "weights"]) == 0
    assert sorted(p.name for p in root.iterdir() if any(p.rglob("*"))) == ["mine"]
    assert (root / "mine" / "notes.txt").read_text() == "12345678"


def test_removal_by_age(root, capsys):
    young = root / "prompts" / f"{'11' * 32}.safetensors"
    os.utime(young)
    assert cache.main(["rm", "prompts", "--older-than", "30"]) == 0
    assert list((root / "prompts").iterdir()) == [young]


@pytest.mark.parametrize("name", ["mine", "..", "model/../mine", "03", "nothing"])
def test_what_is_not_ours_is_refused(root, capsys, name):
    assert cache.main(["rm", name]) == 2
    assert "kinds are weights, compiled, prompts" in capsys.readouterr().err
    assert (root / "mine" / "notes.txt").exists() and len(list((root / "prompts").iterdir())) == 12


def test_an_empty_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path / "none"))
    assert cache.main(["ls"]) == 0 and cache.main(["rm", "prompts"]) == 0
    assert not (tmp_path / "none").exists()
