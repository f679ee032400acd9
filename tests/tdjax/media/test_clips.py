"""Frames of video files at given times, against the frames that were written."""

import numpy as np
import pytest
from clip_cases import moving

from tdjax.errors import UsageError
from tdjax.media import video
from tdjax.media.clips import frames_at, probe


def lossless(path, frames, fps):
    """ffv1: what is read is what was written."""
    return video.write(path, frames, fps=fps)


def at(path, *frames, fps=16):
    return np.stack(list(frames_at(path, [frame / fps for frame in frames])))


def test_frames_of_the_same_rate_are_the_files(tmp_path):
    wanted = moving(20)
    path = lossless(tmp_path / "a.mkv", wanted, 16)
    assert (at(path, *range(20)) == wanted).all()
    assert (at(path, *range(7, 12)) == wanted[7:12]).all()  # from the middle
    facts = probe(path)
    assert (facts.width, facts.height) == (32, 32) and facts.bytes == path.stat().st_size
    assert facts.seconds == pytest.approx(20 / 16, abs=2e-3)


@pytest.mark.parametrize(("fps", "wanted"), [(32, [0, 2, 4, 6]), (8, [0, 0, 1, 1])])
def test_other_rates_show_what_is_on_the_screen(tmp_path, fps, wanted):
    frames = moving(12)
    path = lossless(tmp_path / "a.mkv", frames, fps)
    assert (at(path, 0, 1, 2, 3) == frames[wanted]).all()


def test_a_rate_that_does_not_divide(tmp_path):
    """At 16 a second, of 24: frame k is the last one that began by k/16 s."""
    frames = moving(30)
    path = video.write(tmp_path / "a.mp4", frames, fps=24, crf=1)
    got = at(path, *range(15))
    wanted = frames[[int(k * 24 / 16 + 1e-6) for k in range(15)]]
    places = [np.argmin([np.abs(g.astype(int) - f).mean() for f in frames[:24]]) for g in got]
    assert places == [int(k * 24 / 16 + 1e-6) % 16 for k in range(15)]  # the motion repeats
    assert np.abs(got.astype(int) - wanted).mean() < 4


def test_every_frame_of_a_compressed_video_can_be_a_beginning(tmp_path):
    frames = moving(40)
    path = video.write(tmp_path / "a.mp4", frames, fps=16, crf=1)
    whole = video.read_video(path)
    for start in (1, 13, 37):
        assert (at(path, *range(start, start + 3)) == whole[start : start + 3]).all()


def test_turned_as_phones_turn(tmp_path):
    """The matrix of an mp4 that turns a picture by a quarter, clockwise."""
    frames = moving(3)[:, :16]  # 32 wide, 16 high
    path = video.write(tmp_path / "a.mp4", frames, fps=16, crf=1)
    plain = video.read_video(path)
    one, turn = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero, end = bytes(4), (1 << 30).to_bytes(4, "big")
    upright = one + zero * 3 + one + zero * 3 + end
    turned = zero + one + zero + turn + zero * 4 + end
    data = path.read_bytes()
    place = data.rindex(upright)  # the track's; the movie's comes before it
    path.write_bytes(data[:place] + turned + data[place + len(upright) :])
    assert (probe(path).width, probe(path).height) == (16, 32)
    assert (at(path, 0, 1) == np.rot90(plain[:2], -1, (1, 2))).all()


def test_what_is_no_video_or_ends_early(tmp_path):
    path = video.write(tmp_path / "a.mp4", moving(16), fps=16)
    with pytest.raises(UsageError, match="ends after 1.00 s"):
        at(path, 14, 15, 16)
    (tmp_path / "half.mp4").write_bytes(path.read_bytes()[:400])
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    for name in ("half.mp4", "text.mp4", "empty.mp4", "none.mp4"):
        with pytest.raises(UsageError, match="cannot be read as a video"):
            probe(tmp_path / name)
