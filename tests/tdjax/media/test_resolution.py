"""Choice of size: the published tables and adaptive cases exactly, every refusal with its advice;
fitting of images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tdjax.config import VIDEO_SIZES, VideoSize
from tdjax.errors import UsageError
from tdjax.media.resolution import adaptive_size, choose_size, fit_image, nearest_aspect, size_notes

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "resolution.json").read_text())


def test_published_tables():
    as_lists = {
        name: {ratio: list(size) for ratio, size in table.items()}
        for name, table in VIDEO_SIZES.items()
    }
    assert as_lists == GOLDEN["video_sizes_all"]


def test_latent_frames():
    for case in GOLDEN["latent_frames"]:
        if case["frames"] % 4 == 1:
            assert VideoSize(frames=case["frames"]).latent_frames == case["latent_frames"]


@pytest.mark.parametrize(
    "case",
    GOLDEN["cases"],
    ids=lambda c: "{image_w}x{image_h}-{resolution}-{aspect_ratio}".format(**c),
)
def test_adaptive_cases(case):
    image, arguments = (
        (case["image_w"], case["image_h"]),
        {"resolution": case["resolution"], "aspect_ratio": case["aspect_ratio"]},
    )
    area = math.prod(VIDEO_SIZES[case["resolution"]][case["aspect_ratio"]])
    assert adaptive_size(image, area) == (case["w"], case["h"])
    if min(case["w"], case["h"]) < 16:
        with pytest.raises(UsageError, match="at least 16 pixels"):
            choose_size(**arguments, image_size=image, fit="adaptive")
        return
    size = choose_size(**arguments, image_size=image, fit="adaptive")
    assert (size.width, size.height) == (case["w"], case["h"])


@pytest.mark.parametrize("resolution", VIDEO_SIZES)
@pytest.mark.parametrize("aspect", ["16:9", "9:16", "4:3", "3:4", "1:1"])
def test_table_sizes(resolution, aspect):
    size = choose_size(resolution=resolution, aspect_ratio=aspect, num_frames=5)
    assert (size.width, size.height) == VIDEO_SIZES[resolution][aspect]
    assert size.frames == 5


def test_defaults():
    assert choose_size() == VideoSize(frames=81, height=480, width=832)
    assert choose_size(width=64, height=96, num_frames=33) == VideoSize(
        frames=33, height=96, width=64
    )


@pytest.mark.parametrize(
    ("image", "aspect"),
    [
        ((1920, 1080), "16:9"),
        ((1080, 1920), "9:16"),
        ((800, 600), "4:3"),
        ((600, 790), "3:4"),
        ((500, 510), "1:1"),
        ((9000, 10), "16:9"),
    ],
)
def test_an_image_gets_the_nearest_aspect(image, aspect):
    assert nearest_aspect("720p", image[0] / image[1]) == aspect
    size = choose_size(resolution="720p", image_size=image)
    assert (size.width, size.height) == VIDEO_SIZES["720p"][aspect]


def test_adaptive_without_an_aspect_ratio_takes_the_area_of_16_9():
    square = choose_size(resolution="480p", image_size=(500, 500), fit="adaptive")
    assert (square.width, square.height) == (adaptive_size((500, 500), 832 * 480))
    small = choose_size(width=64, height=64, image_size=(300, 100), fit="adaptive")
    assert (small.width, small.height) == (112, 32)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"width": 832}, ("width is 832", "height is not given", "together")),
        ({"height": 480}, ("height is 480", "width is not given")),
        (
            {"width": 832, "height": 480, "aspect_ratio": "16:9"},
            ("aspect_ratio 16:9", "already fix"),
        ),
        ({"resolution": "1080p"}, ("'1080p'", "480p, 720p, 480, 512, 720", "nearest: 720p")),
        ({"resolution": "480P"}, ("'480P'", "nearest: 480p")),
        ({"resolution": "hd"}, ("'hd'", "nearest: ")),
        ({"aspect_ratio": "2:1"}, ("'2:1'", "16:9, ", "nearest: 16:9")),
        ({"aspect_ratio": "0.8"}, ("'0.8'", "nearest: 3:4")),
        ({"aspect_ratio": "3:0"}, ("'3:0'", "nearest: ")),
        ({"aspect_ratio": "wide"}, ("'wide'", "nearest: ")),
        ({"fit": "cover"}, ("'cover'", "crop, pad, stretch, adaptive", "nearest: ")),
        ({"fit": "adaptive"}, ("no image", "aspect ratio")),
        ({"width": 830, "height": 480}, ("width is 830", "816 and 832")),
        ({"num_frames": 80}, ("num_frames is 80", "77 and 81")),
        ({"image_size": (10000, 1), "fit": "adaptive"}, ("10000x1", "63200x0", "fit crop or pad")),
    ],
    ids=str,
)
def test_refusals_say_what_is_allowed(arguments, parts):
    with pytest.raises(UsageError) as error:
        choose_size(**arguments)
    for part in parts:
        assert part in str(error.value)
    assert error.value.exit_code == 2 and error.value.fix


def test_size_notes():
    assert size_notes(VideoSize(height=480, width=832), "480p") == []
    (line,) = size_notes(VideoSize(height=512, width=832))
    assert "832x512" in line and "nearest 832x480" in line and "compiles once more" in line
    lines = size_notes(choose_size(resolution="480"), "480")
    assert len(lines) == 2 and '"480" is 768x432' in lines[0]


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 77)], -1
    ).astype(np.uint8)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch", "adaptive"])
@pytest.mark.parametrize("shape", [(48, 64), (200, 50), (50, 200), (7, 9), (1, 300)])
def test_fit_gives_the_size(fit, shape):
    image = np.full((*shape, 3), 200, np.uint8)
    out = fit_image(image, VideoSize(frames=1, height=48, width=64), fit)
    assert out.shape == (48, 64, 3) and out.dtype == np.uint8
    inside = out[(out != 0).any(-1)]
    assert (inside == 200).all() and len(inside) > 0
    if fit != "pad":
        assert inside.shape[0] == 48 * 64


def test_fit_of_the_right_size_changes_nothing():
    image = gradient(48, 64)
    for fit in ("crop", "pad", "stretch", "adaptive"):
        assert np.array_equal(
            fit_image(image, VideoSize(frames=1, height=48, width=64), fit), image
        )


def test_crop_keeps_the_middle():
    image = gradient(64, 256)
    image[:, :96] = image[:, 160:] = 0  # what a square crop must not show
    image[:, 96:160, 2] = 255
    out = fit_image(image, VideoSize(frames=1, height=64, width=64), "crop")
    assert np.array_equal(out, image[:, 96:160])


def test_pad_shows_everything_in_the_middle():
    out = fit_image(
        np.full((64, 128, 3), 9, np.uint8), VideoSize(frames=1, height=64, width=64), "pad"
    )
    assert (out[16:48] == 9).all() and (out[:16] == 0).all() and (out[48:] == 0).all()


@pytest.mark.slow
def test_stretch_agrees_with_the_published_resize():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 256, (90, 131, 3)).astype(np.uint8)
    out = fit_image(image, VideoSize(frames=1, height=48, width=64), "stretch")
    chw = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float()
    expected = torch.nn.functional.interpolate(
        chw, (48, 64), mode="bilinear", antialias=True, align_corners=False
    )
    error = np.abs(out.astype(np.float32) - expected[0].numpy().transpose(1, 2, 0))
    assert error.max() <= 1.0  # one rounding after each of the two passes


def test_fit_refuses_other_arrays():
    with pytest.raises(ValueError, match="uint8"):
        fit_image(np.zeros((4, 4, 3), np.float32), VideoSize(frames=1, height=16, width=16))
