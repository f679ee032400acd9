"""The worker's own part, in this process: orders in, lines out."""

import io
import json
import os
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_model import photograph
from server_cases import until

from tdjax.errors import CheckpointError, NotFinite, UsageError
from tdjax.media import video
from tdjax.media.video import read_video
from tdjax.pipeline.result import Result
from tdjax.server import worker
from tdjax.server.__main__ import build_parser, worker_command
from tdjax.server.asking import asked, model_of
from tdjax.server.limits import Limits
from tdjax.server.worker import PipelineMaker, Worker


@pytest.mark.slow
def test_many_shapes_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(worker, "SHAPES", 2)
    cleared = []
    maker = PipelineMaker({})
    programs = types.SimpleNamespace(clear=lambda: cleared.append(len(maker.shapes)))
    maker.pipe = types.SimpleNamespace(programs=programs)
    for width in (16, 32, 16, 32, 48, 48, 16, 64):
        maker._make_room({"width": width, "height": 16, "num_frames": 5, "num_steps": 1})
    assert cleared == [2, 2]  # at 48 and at 64


class Merging:
    """A pipeline that takes LoRA files, but none named "damaged"."""

    def __init__(self):
        self.set = []

    def set_loras(self, **files):
        if "damaged" in str(files):
            raise CheckpointError("/a/path/damaged", "it is cut", "fetch it again")
        self.set.append(files)


def test_lora_files_are_set_when_they_change_and_damaged_ones_harm_one_job(capsys):
    maker = PipelineMaker({})
    maker.pipe = pipe = Merging()
    one, two = {"lora": [("a", 0.5)]}, {"lora": [("a", 0.5)], "lora_low": [("b", 1.0)]}
    for files in ({}, one, one, two, {}, one):
        maker._set_loras(files)
    assert pipe.set == [one, two, {}, one]
    with pytest.raises(UsageError, match="cannot be put") as error:
        maker._set_loras({"lora": [("damaged", 1.0)]})
    assert "/a/path" not in str(error.value) and "/a/path" in capsys.readouterr().err
    maker._set_loras(one)  # which are on it still
    assert len(pipe.set) == 4


def test_a_lora_file_that_was_replaced_is_set_again(tmp_path):
    maker, file = PipelineMaker({}), tmp_path / "a.safetensors"
    maker.pipe = pipe = Merging()
    for content in ("one", "one", "other"):
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        maker._set_loras({"lora": [(str(file), 1.0)]})
    assert len(pipe.set) == 2


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="another system")
def test_memory_that_was_let_go_is_given_back():
    size, count = 50_000, 2000
    blocks = [b"x" * size for _ in range(count)]  # of the heap: below glibc's threshold for mmap
    last = [b"x" * size]  # lies behind them, so that the heap cannot shrink
    full = resident()
    del blocks
    worker.trim()
    assert full - resident() > size * count // 2 and last


def stream(*orders):
    """Lines of orders, and then none for as long as the test takes."""
    yield from map(json.dumps, orders)
    threading.Event().wait()


def told(maker, *orders) -> list[dict]:
    out = io.StringIO()
    Worker(maker, stream(*orders), out).run()
    return [json.loads(line) for line in out.getvalue().splitlines()]


class Broken:
    """A maker that makes one video and then meets a fault."""

    count = 0

    def open(self):
        return {}

    def warm(self):
        pass

    def make(self, order, told, cancel):
        self.count += 1
        if self.count > 1:
            raise RuntimeError("device lost at /a/path")
        told(progress=50, stage="denoise", preview=0)
        return "made"

    def write(self, order, made):
        return {"made": made}


def test_a_video_that_is_made_is_written_also_when_the_next_one_breaks(capsys):
    lines = told(Broken(), *({"do": "make", "id": id} for id in "ab"))
    events = [line["event"] for line in lines]
    assert events[:4] == ["model", "ready", "progress", "made"]
    assert sorted(events[4:]) == ["done", "failed"]
    failed = next(line for line in lines if line["event"] == "failed")
    assert failed["id"] == "b" and "/a/path" not in failed["message"]
    assert "device lost" in capsys.readouterr().err  # the log has it


class Late(Broken):
    """A maker that has something to do after the frames, until the test has seen them told of."""

    def __init__(self, lines):
        self.lines = lines

    def make(self, order, told, cancel):
        told(progress=97, stage="decode", preview=0)
        until(lambda: self.lines().count("made") == 1)
        told(progress=97, stage="decode", preview=0)
        return "made"


def test_another_video_may_come_when_the_last_frames_do():
    out = io.StringIO()
    events = lambda: [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    work = Worker(Late(events), stream({"do": "make", "id": "a"}), out)
    threading.Thread(target=work.run, daemon=True).start()
    until(lambda: "done" in events())
    assert events() == ["model", "ready", "progress", "made", "progress", "done"]


class Frames:
    """A pipeline of five grey frames, in two chunks. between: called between the two."""

    def __init__(self, between):
        self.between = between
        self.info = types.SimpleNamespace(language=None)

    def request(self, prompt, **arguments):
        return prompt

    def metadata(self, request):
        return {"prompts": [request]}

    def __call__(self, prompt, *, on_frames, fps, **arguments):
        frames = np.full((1, 5, 16, 16, 3), 99, np.uint8)
        on_frames(0, frames[0, :1])
        self.between()
        on_frames(0, frames[0, 1:])
        metadata = {**self.metadata(prompt), "timings": {"denoise": 1.0}}
        none = np.zeros((1, 2, 2, 2, 16), np.float32)
        return Result(frames, none, 3, fps, metadata["timings"], metadata)


def order_of(folder, suffix=".mkv"):
    size = {"width": 16, "height": 16, "num_frames": 5, "num_steps": 1}
    request = {"prompt": "a boat", "fps": 16, **size}
    paths = {"video": str(folder / f"v{suffix}"), "thumbnail": str(folder / "v.jpg")}
    return {"id": "a", "request": request, "image": None, "loras": {}, **paths}


def made_by(between, order):
    maker = PipelineMaker({})
    maker.pipe = Frames(between)
    return maker, maker.make(order, lambda **values: None, threading.Event())


def test_a_file_is_begun_with_its_first_frame(tmp_path, monkeypatch):
    begun, encode = threading.Event(), video.encode

    def seen(part, images, *rest):
        encode(part, (begun.set() or image for image in images), *rest)

    monkeypatch.setattr(video, "encode", seen)
    order = order_of(tmp_path, ".mp4")
    maker, made = made_by(lambda: until(begun.is_set), order)
    assert not Path(order["video"]).exists()
    assert maker.write(order, made)["timings"] == {"denoise": 1.0}
    assert read_video(order["video"]).shape == (5, 16, 16, 3)
    beside = json.loads((tmp_path / "v.mp4.json").read_text())
    inside = json.loads(video.comment_of(Path(order["video"])))
    assert beside == {**inside, "timings": {"denoise": 1.0}}
    assert inside == {"prompts": ["a boat"], "index": 0, "fps": 16}


def test_of_a_video_that_breaks_off_nothing_is_left(tmp_path):
    def breaks():
        raise NotFinite("NaN", "no number", "another seed")

    with pytest.raises(NotFinite):
        made_by(breaks, order_of(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["v.jpg"]


def test_a_file_that_cannot_be_written_does_not_end_the_process(tmp_path, monkeypatch, capsys):
    failed = threading.Event()

    def full(*arguments):
        failed.set()
        raise OSError("disk full at /a/path")

    monkeypatch.setattr(video, "encode", full)
    maker = PipelineMaker({})
    maker.pipe = Frames(lambda: until(failed.is_set))
    maker.open, maker.warm = dict, lambda: None
    out = io.StringIO()
    work = Worker(maker, stream({"do": "make", **order_of(tmp_path)}), out)
    threading.Thread(target=work.run, daemon=True).start()
    until(lambda: "failed" in out.getvalue())
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines if line["event"] != "progress"] == [
        "model",
        "ready",
        "made",
        "failed",
    ]
    assert lines[-1]["code"] == "not_written" and "/a/path" not in lines[-1]["message"]


@pytest.mark.slow  # a pipeline compiles
@pytest.mark.parametrize("fit", ["pad", "adaptive"])
def test_videos_are_those_of_the_pipeline(i2v_model, tmp_path, fit):
    image = photograph()
    words = ["--model", str(i2v_model), "--compile_cache_dir", "none"]
    options = worker_command(build_parser().parse_args(words))[-1]
    maker = PipelineMaker(json.loads(options))
    info = model_of(json.loads(json.dumps(maker.open())))
    assert info == maker.pipe.info
    fields = {"prompt": "a boat", "seed": 3, "fit": fit, "size": "32x32", "num_steps": 1}
    fields["previews"] = fit == "pad"
    fields["num_frames"] = 5 if fit == "pad" else 1  # of another size: programs of its own
    what = asked(fields, image, info, Limits())
    Image.fromarray(image).save(tmp_path / "image.png")
    order = {
        "id": "a",
        "request": what.arguments,
        "image": str(tmp_path / "image.png"),
        "loras": {},
        "video": str(tmp_path / "v.mkv"),  # lossless
        "thumbnail": str(tmp_path / "v.jpg"),
    }
    told = []
    made = maker.make(order, lambda **values: told.append(values), threading.Event())
    result = maker.write(order, made)
    size = {"width": 32, "height": 32, "num_steps": 1, "num_frames": fields["num_frames"]}
    expected = maker.pipe("a boat", image=image, seed=3, fit=fit, **size)
    np.testing.assert_array_equal(read_video(tmp_path / "v.mkv"), expected.frames[0])
    assert (tmp_path / "v.jpg").stat().st_size > 100 and result["timings"]
    percent = [each["progress"] for each in told]
    assert percent == sorted(percent) and percent[0] == 5 and percent[-1] == 97
    assert told[-1]["preview"] == 1 + (fit == "pad")  # of one step, and the first frame
