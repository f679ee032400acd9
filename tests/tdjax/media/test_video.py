"""Files written and read back: exact where the format is, PSNR where it is not; complete or absent;
refusals."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tdjax.errors import UsageError
from tdjax.media import video
from tdjax.media.image import read_image

META = json.dumps({"prompt": "a wörld of 猫", "seed": 3})
LOSSLESS = ("clip.mkv", "clip.npy", "clip")
LOSSY = ("clip.mp4", "clip.webm")


def waves(frames=9, height=48, width=80):
    """A smooth moving clip over the whole range of colours."""
    t, y, x = np.meshgrid(
        np.arange(frames) / 16, np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    )
    phases = (x + 0.5 * y + 0.3 * t, 0.3 * x + y - 0.4 * t, 0.7 * x - 0.6 * y + 0.5 * t)
    return np.round(np.stack([127.5 + 120 * np.sin(2 * np.pi * p) for p in phases], -1)).astype(
        np.uint8
    )


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-12))


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_round_trip(tmp_path, name):
    clip = waves()
    assert video.write(tmp_path / name, clip) == tmp_path / name
    assert np.array_equal(video.read_video(tmp_path / name), clip)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_odd_sizes(tmp_path, name):
    clip = waves(3, 33, 51)
    video.write(tmp_path / name, clip)
    assert np.array_equal(video.read_video(tmp_path / name), clip)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_round_trip(tmp_path, name):
    """Measured 43 to 45 dB at this size, of which most is lost to halving the colour planes; a
    wrong matrix would cost 15 dB."""
    clip = waves(9, 96, 160)
    out = video.read_video(video.write(tmp_path / name, clip))
    assert out.shape == clip.shape
    assert psnr(out, clip) > 42
    assert np.abs((out.astype(float) - clip).mean((0, 1, 2))).max() < 0.5  # no channel is shifted


@pytest.mark.parametrize("name", LOSSY)
def test_colours_are_tagged_and_right(tmp_path, name):
    """Plain patches come back within the rounding of limited-range YUV, and the file names its
    matrix."""
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]],
        np.uint8,
    )
    clip = np.repeat(np.repeat(colours[:, None, None], 32, 1), 32, 2)
    path = video.write(tmp_path / name, clip, crf=1)
    middle = video.read_video(path)[:, 8:24, 8:24].astype(float).mean((1, 2))
    assert np.abs(middle - colours).max() <= 4
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


@pytest.mark.parametrize("name", LOSSY)
def test_odd_sizes_gain_a_repeated_edge(tmp_path, name):
    clip = waves(3, 97, 161)
    out = video.read_video(video.write(tmp_path / name, clip))
    assert out.shape == (3, 98, 162, 3)
    assert psnr(out[:, :97, :161], clip) > 40
    assert psnr(out[:, 97:, :161], clip[:, 96:]) > 30


def test_crf_trades_size_for_quality(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3)).astype(np.uint8)
    good, bad = (
        video.write(tmp_path / f"{crf}.mp4", clip, crf=crf).stat().st_size for crf in (5, 40)
    )
    assert good > 2 * bad


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.mkv"])
@pytest.mark.parametrize("fps", [16, 24, 23.976])
def test_frame_rate(tmp_path, name, fps):
    with av.open(str(video.write(tmp_path / name, waves(4), fps=fps))) as container:
        assert abs(float(container.streams.video[0].average_rate) - fps) < 0.01


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.mkv", "clip.gif", "clip"])
def test_metadata_is_in_the_file(tmp_path, name):
    path = video.write(tmp_path / name, waves(2), metadata=META)
    if name == "clip":
        with Image.open(path / "00000.png") as image:
            assert image.text["Comment"] == META
    elif name == "clip.gif":
        with Image.open(path) as image:
            assert image.info["comment"].decode() == META
    else:
        with av.open(str(path)) as container:
            assert {k.lower(): v for k, v in container.metadata.items()}["comment"] == META
        assert video.comment_of(path) == META


def test_gif_loops_keeps_its_frames_and_its_length(tmp_path):
    clip = waves(17)
    path = video.write(tmp_path / "clip.gif", clip, fps=16)
    with Image.open(path) as image:
        assert image.n_frames == 17 and image.info["loop"] == 0
        total = 0
        for i in range(17):
            image.seek(i)
            total += image.info["duration"]
    assert total == 1060  # 17/16 s in hundredths: steps of 60 and 70 ms
    out = video.read_video(path).astype(float)
    cells = lambda a: a.reshape(17, 6, 8, 10, 8, 3).mean((2, 4))  # what an eye sees of dithering
    assert (
        psnr(cells(out), cells(clip.astype(float))) > 25
    )  # all colours in one clip: the worst case for 256


def test_gif_of_few_colours_is_nearly_exact(tmp_path):
    clip = np.zeros((4, 32, 32, 3), np.uint8)
    for i in range(4):
        clip[i, 8 * i : 8 * i + 8] = 250, 60 * i, 20
    out = video.read_video(video.write(tmp_path / "clip.gif", clip))
    assert np.abs(out.astype(int) - clip).max() <= 2


def test_png_is_one_frame(tmp_path):
    clip = waves(1)
    video.write(tmp_path / "one.png", clip, metadata=META)
    assert np.array_equal(read_image(tmp_path / "one.png"), clip[0])
    with pytest.raises(UsageError, match=r"several frames[\s\S]*two\.mp4"):
        video.write(tmp_path / "two.png", waves(2))
    assert not (tmp_path / "two.png").exists()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.gif", "clip.npy", "clip"])
def test_chunks_are_encoded_as_they_come(tmp_path, name):
    clip = waves(9)
    made = (clip[i:j] for i, j in ((0, 1), (1, 5), (5, 9)))
    # crf 0 is lossless. At others x264 now and then chose other quantisers for the same frames in
    # another run: seen with its AVX-512 code and mbtree at 80x48 and 416x240; not with AVX2 or
    # without mbtree at 80x48, nor at 128x48, 128x128 and 256x64
    whole, parts = (
        video.write(tmp_path / f"a-{name}", clip, crf=0),
        video.write(tmp_path / f"b-{name}", made, crf=0),
    )
    assert np.array_equal(video.read_video(whole), video.read_video(parts))


def files(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    "name", ["clip.mp4", "clip.webm", "clip.mkv", "clip.gif", "clip.npy", "clip"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(tmp_path, name, error):
    def chunks():
        yield waves(5)
        raise error("stop")

    with pytest.raises(error):
        video.write(tmp_path / name, chunks())
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip"])
def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path, name):
    old = video.read_video(video.write(tmp_path / name, waves(2)))

    def chunks():
        yield waves(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        video.write(tmp_path / name, chunks(), overwrite=True)
    assert files(tmp_path) == [name]
    assert np.array_equal(video.read_video(tmp_path / name), old)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.npy", "clip"])
def test_overwrite_only_when_asked(tmp_path, name):
    path = video.write(tmp_path / name, waves(2))
    with pytest.raises(UsageError, match="or `overwrite`"):
        video.write(path, waves(3))
    assert len(video.read_video(path)) == 2
    video.write(path, waves(3), overwrite=True)
    assert len(video.read_video(path)) == 3
    assert files(tmp_path) == [name]


@pytest.mark.parametrize("name", ["results", "results.mp4"])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="only a folder that tdjax wrote"):
        video.write(tmp_path / name, waves(2), overwrite=True)
    assert (tmp_path / name / "thesis.txt").exists()


def test_parent_folders_are_made(tmp_path):
    assert video.write(tmp_path / "a" / "b" / "clip.npy", waves(1)).is_file()


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("clip.avi", {}, ("'.avi'", ".mp4, .webm, .mkv, .gif, .png, .npy", "folder of PNG")),
        ("clip.mp4", {"fps": 0}, ("fps is 0", "positive")),
        ("clip.mp4", {"crf": 52}, ("crf is 52", "0 (best) to 51")),
        ("clip.webm", {"crf": -1}, ("crf is -1", "0 (best) to 63")),
    ],
)
def test_refusals(tmp_path, name, options, parts):
    with pytest.raises(UsageError) as error:
        video.write(tmp_path / name, waves(1), **options)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert files(tmp_path) == []


def test_missing_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(video.CODECS, ".mp4", video.Codec("libnothing", "yuv420p", 51))
    with pytest.raises(UsageError, match=r"libnothing is missing[\s\S]*reinstall av"):
        video.write(tmp_path / "clip.mp4", waves(1))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        [],
        [np.zeros((0, 8, 8, 3), np.uint8)],
        [waves(1, 16, 16), waves(1, 16, 32)],
    ],
    ids=["float", "one-frame", "alpha", "nothing", "empty", "two-sizes"],
)
def test_wrong_frames_are_programming_errors(tmp_path, frames):
    with pytest.raises(ValueError, match="frames"):
        video.write(tmp_path / "clip.mp4", frames)
    assert files(tmp_path) == []


# -- images ----------------------------------------------------------------------------------------


def test_first_frame_of_an_animation(tmp_path):
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    clip[0] = 250
    assert (read_image(video.write(tmp_path / "clip.gif", clip)) >= 248).all()


def test_video_errors(tmp_path):
    for name, content in (
        ("none.mp4", None),
        ("text.mp4", b"not a video" * 99),
        ("empty.mp4", b""),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            video.read_video(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no PNG files"):
        video.read_video(tmp_path / "folder")


# -- imports ---------------------------------------------------------------------------------------


def test_importing_video_does_not_import_jax():
    code = "import sys, tdjax.media.video, tdjax.media.resolution; sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=os.getcwd(),
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        ).returncode
        == 0
    )


# -- writing in a thread ---------------------------------------------------------------------------


def test_writer_is_write(tmp_path):
    clip = waves(7)
    writer = video.Writer(tmp_path / "a.npy")
    for start in range(0, 7, 3):
        writer.put(clip[start : start + 3])
    writer.close()
    assert (tmp_path / "a.npy").read_bytes() == video.write(tmp_path / "b.npy", clip).read_bytes()
    writer = video.Writer(tmp_path / "a.mkv", fps=16, metadata=META)
    writer.put(clip)
    writer.close()
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert container.metadata["COMMENT"] == META
    assert np.array_equal(video.read_video(tmp_path / "a.mkv"), clip)


def test_writer_encodes_before_the_last_chunk_is_there(tmp_path, monkeypatch):
    seen, first = [], threading.Event()

    def slow(part, images, *rest):
        for image in images:
            seen.append(image)
            first.set()
        part.write_bytes(b"x")

    monkeypatch.setattr(video, "encode", slow)
    writer = video.Writer(tmp_path / "a.mp4")
    writer.put(waves(1))
    assert first.wait(10) and len(seen) == 1 and not (tmp_path / "a.mp4").exists()
    writer.put(waves(2))
    writer.close()
    assert len(seen) == 3 and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    writer.cancel()  # too late to matter
    assert (tmp_path / "a.mp4").read_bytes() == b"x"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_writer_gives_way_to_who_makes_the_frames(tmp_path, monkeypatch):
    found = []

    def encode(part, *rest):
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        part.write_bytes(b"x")

    monkeypatch.setattr(video, "encode", encode)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    writer = video.Writer(tmp_path / "a.mp4")
    writer.put(waves(1))
    writer.close()
    assert found == [max(before, video.NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_an_mp4_has_no_slices(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (2, 256, 64, 3), np.uint8)
    video.write(tmp_path / "a.mp4", clip)
    with av.open(str(tmp_path / "a.mp4")) as container:
        packet = next(packet for packet in container.demux(video=0) if packet.size)
        data, kinds = bytes(packet), []
    while data:
        size = int.from_bytes(data[:4], "big")
        kinds.append(data[4] & 31)
        data = data[4 + size :]
    assert kinds.count(5) == 1  # NAL units of slices of a key frame


def test_cancelled_writer_leaves_nothing(tmp_path):
    writer = video.Writer(tmp_path / "a.mp4")
    writer.put(waves(2))
    writer.cancel()
    assert not list(tmp_path.iterdir()) and not writer.thread.is_alive()


def test_errors_of_the_thread_come_back(tmp_path):
    writer = video.Writer(tmp_path / "a.mp4", crf=99)
    with pytest.raises(UsageError, match="crf is 99"):
        writer.close()
    writer = video.Writer(tmp_path / "b.mp4")
    writer.put(np.zeros((1, 4, 4, 3), np.float32))
    writer.thread.join(10)
    with pytest.raises(ValueError, match="uint8"):
        writer.put(waves(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [1, 16, 24, 30, 50, 51, 60, 120, 1000])
def test_players_take_the_times_of_a_gif(fps):
    kept, durations = video._gif_times(33, fps)
    assert min(durations) >= 20 and abs(sum(durations) - 33e3 / fps) <= 25
    assert kept == sorted(set(kept)) and kept[0] == 0
    assert (len(kept) < 33) == (fps > 50) == bool(video.target_notes(Path("a.gif"), fps))


def test_settings_that_a_file_cannot_have_are_told():
    notes = lambda name, **settings: video.target_notes(Path(name), 16, **settings)
    assert not notes("a.mp4", crf=5) and not notes("a.gif") and not notes("a.webm", crf=0)
    assert "do not play" in notes("a.mp4", crf=0)[0]
    for name in ("a.gif", "a.mkv", "a.npy", "a", "a.safetensors"):
        assert "no effect" in notes(name, crf=5)[0]
