"""Images are the same pixels by every way: path, bytes, Pillow image, array."""

import io
import os
import threading

import numpy as np
import pytest
from PIL import Image

from tdjax.errors import UsageError
from tdjax.media.image import as_image, read_image


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns of the scene
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = 200, 100, 50, 255
    pixels[2] = 0, 0, 0, 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = read_image(tmp_path / "a.png")
    assert (
        (out[:2] == [200, 100, 50]).all()
        and (abs(out[2].astype(int) - 127) <= 1).all()
        and (out[3] == 255).all()
    )


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    grey = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None], 16, 0)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(np.stack([grey] * 3, -1))
        image = image.quantize(64) if mode == "P" else image.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    out = read_image(path)
    assert out.shape == (16, 16, 3) and out.dtype == np.uint8
    if mode != "1":
        assert np.abs(out.astype(int) - grey[..., None]).max() <= 6


def test_image_errors(tmp_path):
    def message(path):
        with pytest.raises(UsageError) as error:
            read_image(path)
        assert str(path) in str(error.value) and error.value.fix
        return str(error.value)

    assert "does not exist" in message(tmp_path / "none.png")
    assert "is a folder" in message(tmp_path)
    (tmp_path / "text.png").write_text("not an image at all")
    assert "not an image" in message(tmp_path / "text.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert "cut short or damaged" in message(tmp_path / name), name
    (tmp_path / "empty.png").write_bytes(b"")
    assert "not an image" in message(tmp_path / "empty.png")


def test_pillow_images_that_cannot_be_read(tmp_path):
    closed, noise = Image.new("RGB", (4, 4)), io.BytesIO()
    closed.close()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(noise, "JPEG")
    cut = Image.open(io.BytesIO(noise.getvalue()[:-500]))
    odd = Image.new("LA", (4, 4)).convert("La")
    for image in (closed, cut, odd, Image.new("RGB", (0, 4)), Image.new("F", (4, 0))):
        with pytest.raises(UsageError, match="the image cannot be read"):
            as_image(image)
    for image in ([[1], [1, 2]], object(), [], np.ma.masked_array([1.0])):
        with pytest.raises(UsageError, match="the image is an array"):
            as_image(image)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_exif_that_cannot_be_read_says_nothing(tmp_path, exif):
    """The picture is whole, and viewers show it."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "x.png"), pixels)
    image = Image.fromarray(pixels)
    image.info["exif"] = exif
    assert np.array_equal(as_image(image), pixels)


def test_huge_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (64, 64)).save(tmp_path / "big.png")
    with pytest.raises(UsageError, match="too large"):
        read_image(tmp_path / "big.png")


def test_huge_photographs_give_no_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # Pillow warns from here, refuses at twice
    Image.new("RGB", (64, 64)).save(tmp_path / "big.png")
    assert read_image(tmp_path / "big.png").shape == (64, 64, 3) and not recwarn.list


@pytest.mark.parametrize(
    ("top", "kind", "name"),
    [
        (1, np.float32, "x.tif"),
        (255, np.float32, "x.tif"),
        (255, np.int32, "x.tif"),
        (65535, np.int32, "x.tif"),
        (65535, np.uint16, "x.tif"),
        (65535, np.uint16, "x.png"),
    ],
)
def test_grey_of_many_bits_keeps_its_brightness(tmp_path, top, kind, name):
    ramp = np.linspace(0, 1, 5400).reshape(60, 90)
    Image.fromarray((top * ramp).astype(kind)).save(tmp_path / name)
    out = read_image(tmp_path / name)
    assert np.abs(out.astype(int) - (255 * ramp)[..., None]).max() <= 1.5


def test_dark_16_bit_grey_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 255, np.uint16)).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == 0).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_one_image_by_every_way(tmp_path, mode, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 4)).astype(np.uint8)
    image = Image.fromarray(pixels).convert("RGB") if mode == "P" else Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = image.quantize(16) if mode == "P" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    expected = read_image(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    ways = [str(tmp_path / "x.png"), tmp_path / "x.png", data, bytearray(data), memoryview(data)]
    with Image.open(tmp_path / "x.png") as opened:
        for way in [*ways, opened]:
            np.testing.assert_array_equal(as_image(way), expected)
    assert expected.shape == ((8, 6, 3) if orientation == 6 else (6, 8, 3))


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 4), (6, 8), (6, 8, 1)])
def test_arrays_are_the_pixels_of_the_file(tmp_path, shape):
    array = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(array[..., 0] if shape[-1] == 1 else array).save(tmp_path / "x.png")
    np.testing.assert_array_equal(as_image(array), read_image(tmp_path / "x.png"))


@pytest.mark.parametrize(
    "image", [np.zeros((6, 8, 3)), np.zeros((6, 8, 2), np.uint8), np.zeros((0, 8, 3), np.uint8), 3]
)
def test_arrays_of_another_kind_are_refused(image):
    with pytest.raises(UsageError, match="the image is an array of"):
        as_image(image)


def test_photographs_of_phones_and_addresses_are_named(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(UsageError, match="HEIC(.|\n)*save it as JPEG"):
        read_image(tmp_path / "photo.jpg")
    for address in ("https://example.com/a.jpg", "s3://a/b.png"):
        with pytest.raises(UsageError, match=f"{address} is an address"):
            as_image(address)


def test_a_pipe_is_a_file(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe")
    data = (tmp_path / "x.png").read_bytes()
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    thread.start()
    np.testing.assert_array_equal(read_image(tmp_path / "pipe"), read_image(tmp_path / "x.png"))
    thread.join()


def test_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (6, 4), "red").save(tmp_path / "x.png")
    assert as_image("~/x.png").shape == (4, 6, 3)
