"""What a call returns: files of every format, and what a notebook shows."""

import numpy as np
import pytest

from tdjax.errors import UsageError
from tdjax.pipeline.result import Result
from tdjax.text.embeds import load_latents as load_noise


def result(frames) -> Result:
    latents = np.zeros((1, 2, 4, 4, 8), np.float32)
    return Result(frames=frames, latents=latents, seed=0, fps=16, timings={}, metadata={})


def test_formats(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 48, 3)).astype(np.uint8)
    made = result(frames)
    for name in ("v.mp4", "v.gif", "v.npy", "v.safetensors", "v.mkv"):
        assert made.save(tmp_path / name, metadata=False).exists()
    assert np.array_equal(np.load(tmp_path / "v.npy"), frames[0])
    assert "<video" in made._repr_html_() and "seed 0" in repr(made)
    assert made.frame(2).size == (48, 32)


def test_latents_alone_have_no_frames():
    with pytest.raises(UsageError, match="no frames"):
        result(None).pixels()


def several() -> Result:
    frames = np.random.default_rng(0).integers(0, 256, (4, 1, 16, 16, 3)).astype(np.uint8)
    metadata = {"prompts": ["a <fox>", "b"], "seed": [5, 6], "num_samples": 2}
    latents = np.zeros((4, 1, 2, 2, 8), np.float32)
    return Result(frames, latents, seed=(5, 6), fps=12, timings={}, metadata=metadata)


def test_each_video_knows_its_prompt_and_seed():
    made = several()
    about = [(*v.metadata["prompts"], v.seed, v.metadata["index"], v.metadata["fps"]) for v in made]
    assert about == [("a <fox>", 5, 0, 12), ("a <fox>", 5, 1, 12), ("b", 6, 0, 12), ("b", 6, 1, 12)]
    assert all(np.array_equal(v.frames[0], made.frames[i]) for i, v in enumerate(made))
    assert made[-1][0].metadata == made[3].metadata
    with pytest.raises(IndexError, match="4 videos"):
        made[4]


def test_several_are_all_written_or_none(tmp_path):
    (tmp_path / "v_2.npy").touch()
    with pytest.raises(UsageError, match="v_2.npy exists"):
        several().save(tmp_path / "v.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["v_2.npy"]
    assert several().save(tmp_path / "w.npy", index=3) == tmp_path / "w.npy"


def test_small_videos_are_shown_large():
    page = several()._repr_html_()
    assert page.count("max-width:384px") == page.count("image-rendering:pixelated") == 4
    assert "a &lt;fox&gt; (seed 5, sample 1)" in page and "b (seed 6, sample 0)" in page


def test_pixels_as_squares(tmp_path):
    made = several()
    made.save(tmp_path / "v.npy", index=0, upscale=3)
    large = np.load(tmp_path / "v.npy")
    assert large.shape == (1, 48, 48, 3) and np.array_equal(large[:, ::3, 2::3], made.frames[0])
    for factor in (0, 65, 1.5, "2"):
        with pytest.raises(UsageError, match="upscale"):
            made.save(tmp_path / "w.npy", index=0, upscale=factor)


def test_latents_come_back_with_their_metadata(tmp_path):
    path = several().save(tmp_path / "v.safetensors", index=2)
    back = Result.load(path)
    assert (back.seed, back.fps, back.metadata["prompts"]) == (6, 12, ["b"])
    (tmp_path / "v.safetensors.json").unlink()
    assert Result.load(path).fps == 16
    with pytest.raises(UsageError, match="finished video"):
        load_noise(path)
    with pytest.raises(UsageError, match="is not .safetensors"):
        Result.load(tmp_path / "v.mp4")
    with pytest.raises(UsageError, match="absent.safetensors does not exist"):
        Result.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("about", ["", "[]", '{"seed": "x"}', '{"num_samples": 0}', '{"fps": -1}'])
def test_damaged_metadata_beside_latents_is_told(tmp_path, about):
    path = several().save(tmp_path / "v.safetensors", index=2)
    (tmp_path / "v.safetensors.json").write_text(about)
    with pytest.raises(UsageError, match="v.safetensors.json cannot be read"):
        Result.load(path)


WRONG = [{"path": 3}, {"path": "a\0.npy"}, {"path": ""}, {"index": 4}, {"index": -1}]
WRONG += [{"metadata": None}, {"metadata": "no"}, {"overwrite": "no"}, {"overwrite": 1}]
WRONG += [
    {"path": "n" * 248 + ".npy"},
    {"path": "é" * 124 + ".npy"},
    {"path": "~nobody-here/v.npy"},
]
WRONG += [{"index": "0"}, {"fps": 0}, {"fps": "16"}, {"crf": 1.5}, {"path": "n" * 300 + ".npy"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_arguments_of_save_are_refused_by_name(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=next(iter(wrong))):
        several().save(**{"path": "v.npy", "index": 0, **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.int64(1), np.array(1), 1.0, np.uint8(1)], ids=repr)
def test_numbers_of_other_types_choose_a_video(tmp_path, number):
    one = several().save(tmp_path / "v.npy", index=number, upscale=number, fps=number)
    assert np.array_equal(np.load(one), several().pixels(1))


@pytest.mark.parametrize("other", ["a text", "{}", '{"id": "video", "fps": 30}', None], ids=str)
def test_metadata_takes_no_other_files_place(tmp_path, other):
    """Its name is nobody's wish: `overwrite` is for the video, and for what tdjax wrote beside."""
    path, beside = tmp_path / "v.npy", tmp_path / "v.npy.json"
    path.write_bytes(b"mine")
    beside.mkdir() if other is None else beside.write_text(other)
    with pytest.raises(UsageError, match="v.npy.json exists"):
        several().save(path, index=0, overwrite=True)
    assert path.read_bytes() == b"mine" and beside.exists()
    several().save(path, index=0, overwrite=True, metadata=False)
    beside.rmdir() if other is None else beside.unlink()
    for _ in range(2):
        several().save(path, index=0, overwrite=True)


def test_frames_beyond_their_range_are_cut():
    frames = np.float32([-0.5, 0, 0.5, 1, 1.5]).reshape(1, 1, 1, 5, 1).repeat(3, axis=-1)
    assert result(frames).pixels()[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_video_is_saved_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert several().save("~/v.npy", index=0) == tmp_path / "v.npy"
