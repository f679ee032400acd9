"""`python -m tdjax.train.encode`: shards against the networks that make them, and the same command
again."""

import json

import numpy as np
import pytest
from clip_cases import caption, folder_of_clips, moving

import tdjax
from tdjax.config import VideoSize
from tdjax.media import video
from tdjax.media.resolution import fit_image
from tdjax.pipeline.conditioning import first_frame
from tdjax.train.encode import __main__ as command
from tdjax.train.made import parse_part
from tdjax.train.shards import index
from tdjax.train.sources import ShardSource


def fails(capsys, *argv, code=2):
    assert command.main([str(word) for word in argv]) == code
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 3, out.err
    return out.err


@pytest.mark.slow
def test_the_same_numbers_as_the_networks(model, tmp_path, capsys):
    """Latents of the frames as they are read and fitted, embeddings of the captions; a video that
    ends early is counted."""
    clips = folder_of_clips(tmp_path / "clips", 2, suffix=".mkv")
    video.write(clips / "wide.mp4", moving(14, side=64)[:, 8:56], fps=16)
    (clips / "wide.txt").write_text(caption("blue", "up"))
    (clips / "text.mp4").write_text("hello")
    (clips / "text.txt").write_text("no video")
    out = tmp_path / "shards"
    argv = ["--model", str(model), "--out", str(out), "--shard_size", "3", "--image_latents"]
    assert command.main([str(clips), *argv]) == 0
    folder = out / "32x32-5"
    paths = [folder / f"shard_{i:06}.tar" for i in range(2)]
    said = capsys.readouterr()
    assert said.out.splitlines() == list(map(str, paths))
    assert "4 clips" in said.err and "1 damaged" in said.err

    entries = [entry for path in paths for entry in index(path)]
    assert [entry.latent.name for entry in entries] == [f"00000000{i}.latent.pt" for i in range(4)]
    size = VideoSize(frames=5, width=32, height=32)
    fitted = lambda path: np.stack([fit_image(f, size) for f in video.read_video(path)])
    names = [clips / "clip_00.mkv", clips / "clip_01.mkv"]
    pixels = [*map(fitted, names), *(fitted(clips / "wide.mp4")[i : i + 5] for i in (0, 5))]
    pipe = tdjax.load(str(model), prompt_cache=False)
    coding, vae = pipe.vae_coding, pipe.components["vae"].load()
    texts = [p.with_suffix(".txt").read_text().strip() for p in names] + [caption("blue", "up")] * 2
    for entry, frames, text in zip(entries, pixels, pipe.embed(texts), strict=True):
        wanted = {
            "latent": coding.encode_frames(vae, frames, size)[0],
            "image": coding.encode(vae, first_frame(frames[0], size), size)[0],
        }
        for name, latents in wanted.items():
            got = getattr(entry, name).array().transpose(1, 2, 3, 0)
            assert (got == latents.astype(got.dtype)).all(), name
        assert (entry.embed.array() == text.astype(got.dtype)).all()

    about = json.loads((folder / "shard_000000.json").read_text())
    assert about["from"] == ["clip_00.mkv", "clip_01.mkv", "wide.mp4"] and about["samples"] == 3
    report = json.loads((out / "report.json").read_text())
    assert report["clips"] == 4 and report["damaged"][0][0] == "text.mp4"
    assert video.read_video(out / "report.png").shape == (1, 160, 4 * 160, 3)
    source = ShardSource(out, frames=2, channels=8, text_dim=64)
    assert source.units == 2 and source.read(source.entries(1)[0])[0].shape == (2, 4, 4, 8)

    # The same command goes on; one with other options, or other files, does not write over it.
    before = paths[0].read_bytes()
    paths[0].unlink()
    assert command.main([str(clips), *argv]) == 0
    said = capsys.readouterr()
    assert "1 of 2 shards are there already" in said.err
    assert sorted(said.out.splitlines()) == list(map(str, paths))
    assert paths[0].read_bytes() == before
    changed = [word for word in argv if word != "--image_latents"]
    assert "other image" in fails_after_notes(capsys, str(clips), *changed)
    (clips / "clip_00.txt").write_text("another caption")
    assert "other clips" in fails_after_notes(capsys, str(clips), *argv)


def fails_after_notes(capsys, *argv):
    """The error of a call that tells what it skips first."""
    assert command.main(list(argv)) == 2
    return capsys.readouterr().err


def test_processes_share_the_shards(tmp_path, capsys):
    clips = folder_of_clips(tmp_path / "clips", 5)
    base = [str(clips), "--sizes", "32x32", "--num_frames", "5", "--shard_size", "1", "--dry_run"]
    assert command.main([*base, "--out", "x"]) == 0
    assert "5 clips in 5 shards" in capsys.readouterr().out
    assert [parse_part(f"{i}/3") for i in (1, 3)] == [(0, 3), (2, 3)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--out is not given"),
        (("--out", "x", "--sizes", "720q"), "--sizes is '720q'"),
        (("--out", "x", "--sizes", "30x32"), "width is 30"),
        (("--out", "x", "--num_frames", "5,6"), "num_frames is 6"),
        (("--out", "x", "--num_frames", "5,x"), "4k+1"),
        (("--out", "x", "--part", "0/2"), "I from 1 to N"),
        (("--out", "x", "--part", "3/2"), "I from 1 to N"),
        (("--out", "x", "--stride", "0"), "--stride is 0"),
        (("--out", "x", "--shard_size", "0"), "--shard_size is 0"),
        (("--out", "x", "--fps", "0"), "--fps is 0"),
        (("--out", "x", "--threads", "0"), "--threads is 0"),
        (("--out", "x", "--max_clips", "-1"), "--max_clips is -1"),
        (("--out", "x", "--captions", "none.csv"), "none.csv does not exist"),
    ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    assert said in fails(capsys, tmp_path, *words)
