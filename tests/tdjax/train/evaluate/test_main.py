"""A prompt set to files under VBench's names, made once; the table of two folders."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tdjax.errors import UsageError
from tdjax.train.evaluate import __main__ as command
from tdjax.train.evaluate import distances, measures

PROMPTS = ["a cat", "a dog / a bird"]


@pytest.fixture
def made(monkeypatch):
    """What a model was asked for; its videos are noise of their seed around their prompt's
    brightness."""
    calls = []

    def make(prompt, seed, **options):
        calls.append((prompt, seed, options["num_steps"]))
        rng = np.random.default_rng(seed)
        level = 100 + 50 * PROMPTS.index(prompt)
        frames = (level + rng.integers(0, 9, (5, 16, 16, 3))).astype(np.uint8)
        latents = rng.normal(size=(1, 2, 4, 4, 3)).astype(np.float32) + options["num_steps"]
        return SimpleNamespace(pixels=lambda: frames, latents=latents, fps=16)

    class Pipe:
        def __init__(self, model):
            self.model = model

        __call__ = staticmethod(make)

        def request(self, prompt, **options):
            return options

        def metadata(self, request):
            return dict.fromkeys(command._COMPARED) | {"model": self.model, "sampler": request}

    def load(model, **options):
        calls.append((model, options["dit_path"]))
        return Pipe(model)

    monkeypatch.setattr("tdjax.pipeline.load.load", load)
    return calls


def call(tmp_path, *words):
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n\n" for text in PROMPTS))
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "2", "-q"]
    return command.main([*given, *words])


def test_a_prompt_set_becomes_files_that_vbench_reads(tmp_path, made, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(tmp_path, "student", "--out", str(one), "--num_steps", "4") == 0
    assert capsys.readouterr().out == f"{one / 'table.md'}\n"
    assert sorted(path.name for path in one.glob("*.mp4")) == [
        "a cat-0.mp4",
        "a cat-1.mp4",
        "a dog a bird-0.mp4",
        "a dog a bird-1.mp4",
    ]
    assert made[0] == ("student", None)
    assert made[1:] == [(prompt, seed, 4) for prompt in PROMPTS for seed in (0, 1)]
    (one / "a cat-1.mp4").unlink()
    assert call(tmp_path, "student", "--out", str(one), "--num_steps", "4") == 0
    assert made[5:] == [("student", None), ("a cat", 1, 4)]  # and nothing else again
    for words in (["student", "--num_steps", "5"], ["other", "--num_steps", "4"]):
        made.clear()
        capsys.readouterr()
        assert call(tmp_path, *words, "--out", str(one)) == 2 and len(made) == 1
        assert "holds videos that were made otherwise\nother " in capsys.readouterr().err

    assert call(tmp_path, "teacher", "--out", str(two), "--num_steps", "5") == 0
    made.clear()
    assert call(tmp_path, "--out", str(one), "--against", str(two)) == 0 and not made
    found = json.loads((one / "measures.json").read_text())
    latents = [
        np.concatenate(
            [
                distances.latent_features(np.load(path))
                for path in sorted((folder / "latents").glob("*.npy"))
            ]
        )
        for folder in (one, two)
    ]
    apart = distances.frechet(*map(distances.gaussian, latents))
    assert found["means"]["frechet"] == pytest.approx(apart) and apart > 1
    assert len(found["videos"]) == found["means"]["videos"] == 4
    assert found["means"]["flicker"] == np.mean([row["flicker"] for row in found["videos"]])
    assert found["means"]["psnr"] > 40 and found["means"]["ssim"] > 0.9  # the same seeds
    head = (one / "table.md").read_text().splitlines()
    assert head[0].count("|") == 8 and head[2].startswith("| one against two | 4 |")
    assert (one / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_vbench_is_read(tmp_path):
    rows = [{"prompt_en": "one", "dimension": ["x"]}, {"prompt": "two"}, "three", {"prompt": "one"}]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    assert command.prompt_set(tmp_path / "all.json") == ["one", "two", "three"]
    assert command.prompt_set(tmp_path / "all.json", 2) == ["one", "two"]


def test_names_that_are_too_long():
    (name, prompt, index), *_ = command.named(["é" * 200], 1)
    assert (prompt, index) == ("é" * 200, 0) and name == "é" * 120 + "-0"
    with pytest.raises(UsageError, match="two prompts would have the files"):
        command.named(["x" * 240 + "a", "x" * 240 + "b"], 1)


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ([], "x", "--out is not given"),
        (["--out", "OUT", "--samples", "0"], "x", "--samples is 0"),
        (["--out", "OUT", "--against", "nowhere"], "x", "--against nowhere is not a folder"),
        (["--out", "OUT"], "\n", "is empty"),
        (["--out", "OUT"], "x", "OUT lacks 2 of 2 videos"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, words, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(text)
    given = ["--prompts", "p.txt", "--samples", "2", *words]
    assert command.main(given) == 2
    assert expected in capsys.readouterr().err


def test_videos_of_two_sizes_are_not_compared(tmp_path):
    for name, size in (("a", 16), ("b", 32)):
        frames = np.zeros((5, size, 16, 3), np.uint8)
        measures.keep(tmp_path / name, "x-0", frames, np.zeros((2, 2, 2, 3)))
    with pytest.raises(UsageError, match="x-0.mp4 is 16x16, 5 frames here and 16x32"):
        measures.write(tmp_path / "a", [("x-0", "x", 0)], tmp_path / "b")
