"""`python -m tdjax.cache`: what is there, and that rm removes what it names and nothing else."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from tdjax import cache
from tdjax.checkpoints.demo import PACKAGED
from tdjax.text.prompt_cache import PromptCache

PROGRAMS = (
    f"compiled/jit_run-{'a1' * 32}-cache",
    f"compiled/jit_<lambda>-{'b2' * 32}-atime",
    f"compiled/denoise-{'c3' * 32}.executable",
    f"compiled/kernels-{'d4' * 32}.passed",
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path))
    for name in ("model/vae", "other"):
        (tmp_path / name / "params").mkdir(parents=True)
        shutil.copy(PACKAGED / "vae" / "manifest.json", tmp_path / name)
    for name in ("model/model.json", *PROGRAMS, "mine/notes.txt"):
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
        "compiled": 4,
        "prompts": 12,
    }
    assert found["kinds"]["compiled"]["bytes"] == 32 and found["kinds"]["weights"]["names"] == [
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
    assert capsys.readouterr().out == "removed 4 entries, 0.0 MiB\n"
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


def test_what_a_wrong_clock_has_dated_is_removed(root):
    ahead = time.time() + 10 * 365 * 86400
    for path in root.rglob("*"):
        os.utime(path, (ahead, ahead))
    assert cache.main(["rm", "prompts", "--older-than", "1"]) == 0
    assert len(list((root / "prompts").iterdir())) == 12
    assert cache.main(["rm", "prompts", "compiled", "weights"]) == 0
    assert sorted(p.name for p in root.iterdir() if any(p.rglob("*"))) == ["mine"]


@pytest.mark.parametrize("name", ["mine", "..", "model/../mine", "03", "nothing"])
def test_what_is_not_ours_is_refused(root, capsys, name):
    assert cache.main(["rm", name]) == 2
    assert "kinds are weights, compiled, prompts" in capsys.readouterr().err
    assert (root / "mine" / "notes.txt").exists() and len(list((root / "prompts").iterdir())) == 12


def test_an_empty_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path / "none"))
    assert cache.main(["ls"]) == 0 and cache.main(["rm", "prompts"]) == 0
    assert not (tmp_path / "none").exists()


FOREIGN = {  # what people keep in a folder that they give as the cache
    "web app": ["site/manifest.json"],
    "web app, one level down": ["projects/site/manifest.json", "projects/thesis.tex"],
    "model.json of another program": ["viewer/model.json"],
    "checkpoint with a file of mine": ["x/manifest.json", "x/params/", "x/notes.txt"],
    "model folder with a file of mine": ["m/vae/manifest.json", "m/vae/params/", "m/notes.txt"],
    "model folder with a folder of mine": ["m/vae/manifest.json", "m/vae/params/", "m/tex/a.tex"],
    "checkpoint of a training run": ["run/step_000001/manifest.json", "run/step_000001/state/"],
    "folder of programs": ["compiled/main.c", "compiled/my-cache", "compiled/my.executable"],
    "folder of prompts": ["prompts/fox.txt", "prompts/fox.safetensors"],
    "empty folder": ["empty/"],
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("manifest", ["ours", '{"name": "my web app"}', "[]", "not json"])
def test_foreign_files_beside_the_cache_stay(tmp_path, monkeypatch, capsys, kind, manifest):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path))
    ours = (PACKAGED / "vae" / "manifest.json").read_text()
    alone = "mine" not in kind  # then the manifest must not be one of ours
    for name in FOREIGN[kind]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (tmp_path / name).mkdir(exist_ok=True)
        else:
            text = '{"format": 1}' if manifest == "ours" and alone else manifest
            (tmp_path / name).write_text(ours if text == "ours" else text)
    before = sorted(tmp_path.rglob("*"))
    cache.main(["ls"])
    for name in (*cache.KINDS, *(p.name for p in tmp_path.iterdir())):
        cache.main(["rm", name])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["model", "model/vae", "compiled", "prompts"])
def test_links_are_not_followed(root, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "kept"
    shutil.move(root / name, elsewhere)
    (root / name).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    assert cache.main(["rm", *cache.KINDS]) == 0
    assert sorted(elsewhere.rglob("*")) == before and (root / name).is_symlink()
