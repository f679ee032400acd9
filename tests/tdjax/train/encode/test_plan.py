"""Which clips are cut, and where each goes."""

import numpy as np
import pytest
from clip_cases import moving
from PIL import Image

from tdjax.errors import UsageError
from tdjax.media import video
from tdjax.train.encode.items import Item
from tdjax.train.encode.plan import Settings, Skipped, make_plan
from tdjax.train.shards import DataError


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """item(frames, width, height): a video of that length at 16 a second."""
    folder = tmp_path_factory.mktemp("clips")

    def item(frames, width=32, height=32):
        path = folder / f"{frames}_{width}x{height}.mp4"
        if not path.exists():
            side = max(width, height)
            video.write(path, moving(frames, side=side)[:, :height, :width], fps=16)
        return Item(path, path.name, "a square")

    return item


def planned(items, skipped=None, **settings):
    usual = {"sizes": ((32, 32),), "frames": (5,)}
    return make_plan(items, Settings(**(usual | settings)), skipped or Skipped(0), 2)


def starts(shards):
    return [(clip.start, clip.size.frames) for shard in shards for clip in shard.clips]


@pytest.mark.parametrize(
    ("frames", "settings", "wanted"),
    [
        (5, {}, [(0, 5)]),
        (16, {}, [(0, 5), (5, 5), (10, 5)]),
        (16, {"stride": 4}, [(0, 5), (4, 5), (8, 5)]),
        (16, {"stride": 20}, [(0, 5)]),
        (16, {"most": 2}, [(0, 5), (5, 5)]),
        (16, {"frames": (5, 9)}, [(0, 9)]),
        (7, {"frames": (5, 9)}, [(0, 5)]),
        (16, {"fps": 8}, [(0, 5)]),
        (16, {"fps": 32, "frames": (17,)}, [(0, 17)]),
    ],
)
def test_clips_of_a_video(clips, frames, settings, wanted):
    assert starts(planned([clips(frames)], **settings)) == wanted


def test_what_the_settings_leave_out(clips):
    skipped = Skipped(0)
    items = [clips(5), clips(4), clips(5, 16, 32), Item(clips(5).path, "x.mp4", None)]
    assert starts(planned(items, skipped)) == [(0, 5)]
    left = {"shorter than 5 frames, 0.31 s": ["4_32x32.mp4"], "no caption": ["x.mp4"]}
    assert skipped.left_out == left | {"smaller than 32x32": ["5_16x32.mp4"]}
    assert skipped.broken == []
    assert len(starts(planned(items[:3:2], upscale=True))) == 2
    with pytest.raises(UsageError, match="none of 1 videos"):
        planned([clips(4)])


def test_a_video_goes_to_the_size_most_like_it(clips):
    items = [clips(5, 64, 32), clips(5, 32, 64), clips(5, 48, 48), clips(5, 64, 48)]
    shards = planned(items, sizes=((32, 32), (32, 16), (16, 32)))
    found = {clip.item.name: shard.name for shard in shards for clip in shard.clips}
    assert found == {
        "5_64x32.mp4": "32x16-5/shard_000000.tar",
        "5_32x64.mp4": "16x32-5/shard_000000.tar",
        "5_48x48.mp4": "32x32-5/shard_000000.tar",
        "5_64x48.mp4": "32x32-5/shard_000000.tar",
    }


def test_shards_number_their_samples(clips):
    shards = planned([clips(16), clips(5), clips(16, 48, 48)], samples=3)
    assert [(s.number, s.first, len(s.clips)) for s in shards] == [(0, 0, 3), (1, 3, 3), (2, 6, 1)]
    assert len({shard.identity() for shard in shards}) == 3
    again = planned([clips(16), clips(5), clips(16, 48, 48)], samples=3)
    assert [s.identity() for s in again] == [s.identity() for s in shards]


def test_images_are_clips_of_one_frame(clips, tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    shards = planned([Item(tmp_path / "a.png", "a.png", "black"), clips(5)])
    assert [(shard.name, shard.clips[0].item.name) for shard in shards] == [
        ("32x32-1/shard_000000.tar", "a.png"),
        ("32x32-5/shard_000000.tar", "5_32x32.mp4"),
    ]


def test_damaged_files_are_counted_up_to_a_limit(clips, tmp_path):
    (tmp_path / "bad.mp4").write_text("hello")
    bad = [Item(tmp_path / "bad.mp4", "bad.mp4", "x"), Item(tmp_path / "no.mp4", "no.mp4", "x")]
    skipped = Skipped(2)
    assert starts(planned([*bad, clips(5)], skipped)) == [(0, 5)]
    assert [name for name, _ in skipped.broken] == ["bad.mp4", "no.mp4"]
    assert "does not exist" in skipped.broken[1][1] and "damaged: 2" in skipped.lines()[0]
    with pytest.raises(DataError, match="2 videos or captions") as error:
        planned([*bad, clips(5)], Skipped(1))
    assert "max_skipped is 1" in error.value.why and "no.mp4" in error.value.why
    trouble = Item(clips(5).path, "y.mp4", None, "y.txt: not UTF-8")
    with pytest.raises(DataError, match="not UTF-8"):
        planned([trouble, clips(5)], Skipped(0))
