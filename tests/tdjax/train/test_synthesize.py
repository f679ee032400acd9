"""Prompts to shards: the latents and embeddings of the pipeline itself, or the text alone."""

import json

import numpy as np
import pytest
import random_model

import tdjax
from tdjax.train import synthesize as command
from tdjax.train.shards import DataError, index
from tdjax.train.sources import ShardSource

PROMPTS = [
    "a small red square moves left slowly on a gray background",
    "a large blue circle moves up quickly on a navy background",
]


def fails(capsys, *argv):
    assert command.main([str(word) for word in argv]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("error: ")
    return out.err


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt;seed\n" + "".join(f"{p};1\n" for p in PROMPTS))
    return tmp_path / "prompts.csv"


@pytest.mark.slow
def test_the_latents_of_the_pipeline(model, prompts, tmp_path, capsys):
    out = tmp_path / "shards"
    call = {"num_steps": 2, "sampler": "euler", "guidance_scale": 1.0}
    argv = [prompts, "--out", out, "--model", model, "--shard_size", 1, "--seed", 5, "-q"]
    argv += [word for name, value in call.items() for word in (f"--{name}", value)]
    argv = list(map(str, argv))
    assert command.main([*argv, "--part", "2/2"]) == 0
    paths = [out / f"shard_{i:06}.tar" for i in range(2)]
    assert capsys.readouterr().out == f"{paths[1]}\n" and not paths[0].exists()
    (entry,) = index(paths[1])
    assert entry.latent.name == "000000001.latent.pt"
    pipe = tdjax.load(str(model), prompt_cache=False)
    wanted = pipe(PROMPTS[1], seed=6, output_type="latent", **call).latents[0]
    got = entry.latent.array().transpose(1, 2, 3, 0)
    assert (got == wanted.astype(got.dtype)).all()
    assert (entry.embed.array() == pipe.embed(PROMPTS[1])[0].astype(got.dtype)).all()
    about = json.loads(paths[1].with_suffix(".json").read_text())
    assert about["seed"] == 6 and about["size"]["frames"] == random_model.SMALL["num_frames"]

    before = paths[1].read_bytes()
    assert command.main([*argv, "--part", "2/2"]) == 0 and paths[1].read_bytes() == before
    capsys.readouterr()
    changed = [*argv[:-2], "--guidance_scale", "3.0", "--part", "2/2"]
    assert command.main(changed) == 2 and "other sampler" in capsys.readouterr().err


@pytest.mark.slow
def test_text_alone_is_read_where_no_latents_are(model, prompts, tmp_path, capsys):
    out = tmp_path / "shards"
    argv = [prompts, "--out", out, "--model", model, "--text_only", "-q"]
    assert command.main(list(map(str, argv))) == 0
    entries = index(out / "shard_000000.tar")
    assert [entry.latent for entry in entries] == [None, None]
    sizes = {"frames": 2, "channels": 8, "text_dim": 64}
    source = ShardSource(out, **sizes, blank=(4, 6))
    latents, text, *_ = source.read(entries[1])
    assert latents.shape == (2, 4, 6, 8) and not latents.any() and np.asarray(text).any()
    with pytest.raises(DataError, match="prompts without latents") as error:
        ShardSource(out, **sizes)
    assert "data.size=832x480" in error.value.fix


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--out is not given"),
        (("--out", "x", "--shard_size", "0"), "--shard_size is 0"),
        (("--out", "x", "--seed", "-1"), "--seed is -1"),
        (("--out", "x", "--part", "2"), "it is I/N"),
    ],
)
def test_what_is_refused(prompts, capsys, words, said):
    assert said in fails(capsys, prompts, *words)


def test_prompt_files(tmp_path, prompts, capsys):
    assert command.read_prompts(prompts) == PROMPTS
    parts = command.divided(["a", "b", "c"], 2)
    assert [(p.number, p.first, p.prompts) for p in parts] == [(0, 0, ("a", "b")), (1, 2, ("c",))]
    (tmp_path / "p.txt").write_text("# none\n")
    assert "holds no prompts" in fails(capsys, tmp_path / "p.txt", "--out", "x")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "row 2: no prompt" in fails(capsys, tmp_path / "p.jsonl", "--out", "x")
    assert "does not exist" in fails(capsys, tmp_path / "q.txt", "--out", "x")
    assert command.main([str(prompts), "--out", "x", "--dry_run", "--shard_size", "1"]) == 0
    assert capsys.readouterr().out == "2 prompts in 2 shards, 2 here\n"
