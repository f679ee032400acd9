"""The process that makes videos: `python -m tdjax.server.worker JSON`, started by the server.

It reads orders from its standard input and tells of them on its standard output, a JSON value a
line. It ends when its input does, so that none outlives the server. A file is written from the
first frame on, and while it is the next video is made.

orders: {"do": "make", "id", "request", "image", "loras", "video", "thumbnail"} and {"do":
        "cancel", "id"}.
told:   {"event": "model", "info"}, "ready", and of a job, with its "id": "progress" ("progress" in
        percent, "stage", "preview": the number of the picture that the thumbnail is), "made"
        (its last frames are being decoded, and another one may come), then one of "done"
        ("result"), "failed" ("code", "message") and "cancelled".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

from PIL import Image

from tdjax.errors import (
    Cancelled,
    CheckpointError,
    NotFinite,
    OutOfMemory,
    TdjaxError,
    UsageError,
)
from tdjax.files import written
from tdjax.media.image import read_image
from tdjax.media.video import Writer, enlarged

if TYPE_CHECKING:
    from tdjax.pipeline.result import Result

Tell = Callable[..., None]
SHAPES = 8  # sizes and numbers of steps whose programs stay in memory
# Videos that are made and not yet written; another one waits until there is room. To encode one can
# take longer than to make it on a GPU, and one encoder does not fill the cores beside it.
WRITING = 4
TEXT, STEPS, FRAMES = 5, 80, 97  # percent that are done after each part
SOON = 94  # from there on the server finds the next job, so that it is here when this one ends
# Errors whose lines a client may read; those of weight files name folders of this machine.
CODES = {UsageError: "invalid_request", OutOfMemory: "out_of_memory", NotFinite: "not_finite"}


class Maker(Protocol):
    """What a worker does its work with."""

    def open(self) -> dict[str, Any]:
        """Returns what the server tells clients of the model, as JSON values."""

    def warm(self) -> None:
        """Compiles what most requests will need."""

    def make(self, order: dict[str, Any], told: Tell, cancel: threading.Event) -> Any:
        """Returns a video that is not yet written to its end. told: called with percent and
        stage."""

    def write(self, order: dict[str, Any], made: Any) -> dict[str, Any]:
        """Completes its file, and returns what the server keeps of it, as JSON values."""


class PipelineMaker:
    """Videos by a pipeline. options: those of `python -m tdjax.server` that name and open the
    model."""

    def __init__(self, options: dict[str, Any]):
        self.args = argparse.Namespace(**options)
        self.pipe: Any = None
        self.shapes: set[tuple[int, ...]] = set()
        self.loras: dict[str, Any] | None = {}

    def open(self) -> dict[str, Any]:
        """Opens the model; no weights are read yet."""
        note = cli.set_compile_cache(self.args.compile_cache_dir)
        from tdjax.checkpoints.locate import PATHS
        from tdjax.generate.__main__ import pipeline_options
        from tdjax.pipeline.load import open_pipeline
        from tdjax.progress import LibraryStages

        stages = LibraryStages(False)
        if note:
            stages.note(note)
        cli.start_jax(stages.note)
        args = self.args
        self.pipe = open_pipeline(
            args.model,
            pipeline_options(args, args.text_encoder_device),
            {name: getattr(args, name) for name in PATHS},
            revision=args.revision,
            offline=args.offline,
            stages=stages,
        )
        return dataclasses.asdict(self.pipe.info)

    def warm(self) -> None:
        """Compiles for the model's own size and steps, which jobs run one by one."""
        self.pipe.warmup(on_step=lambda step, steps: None, on_preview=lambda step, frames: None)

    def make(
        self, order: dict[str, Any], told: Tell, cancel: threading.Event
    ) -> tuple[Result, Writer]:
        """Runs the pipeline, and has its frames written as they come."""
        from tdjax.generate.outputs import DEMO_UPSCALE

        arguments = dict(order["request"])
        self._make_room(arguments)
        previews = arguments.pop("previews", False)
        for name in ("model", "format", "lora", "webhook"):  # not of the call
            arguments.pop(name, None)
        self._set_loras(order["loras"])
        if order["image"]:
            arguments["image"] = read_image(order["image"])
        frames = arguments["num_frames"]
        prompt = arguments.pop("prompt")
        about = self.pipe.metadata(self.pipe.request(prompt, **arguments))
        about |= {"index": 0, "fps": arguments["fps"]}
        factor = DEMO_UPSCALE if self.pipe.info.language else 1
        writer: Writer | None = None
        shown = pictures = percent = 0

        def picture(frame) -> None:
            nonlocal pictures
            with written(Path(order["thumbnail"]), overwrite=True) as part:
                Image.fromarray(frame).save(part, quality=85)
            pictures += 1

        def tell(now: int, stage: str) -> None:
            nonlocal percent
            percent = now
            told(progress=percent, stage=stage, preview=pictures)

        def on_stage(name: str) -> None:
            if name == "denoise":
                tell(TEXT, name)

        def on_step(step: int, steps: int) -> None:
            tell(TEXT + (STEPS - TEXT) * step // steps, "denoise")

        def on_preview(step: int, prediction) -> None:
            picture(prediction[len(prediction) // 2])
            tell(percent, "denoise")

        def on_frames(number: int, chunk) -> None:
            nonlocal shown, writer
            if writer is None:  # clients see the first frame while the others are decoded
                picture(chunk[0])
                path = Path(order["video"])
                facts = json.dumps(about)
                writer = Writer(path, fps=about["fps"], metadata=facts, overwrite=True)
            with contextlib.suppress(Exception):  # an error of the file is raised by `write`
                writer.put(enlarged(chunk, factor))
            shown += len(chunk)
            tell(STEPS + (FRAMES - STEPS) * shown // frames, "decode")

        try:
            result = self.pipe(
                prompt,
                **arguments,
                on_stage=on_stage,
                on_step=on_step,
                on_frames=on_frames,
                on_preview=on_preview if previews else None,
                cancel=cancel,
            )
        except BaseException:
            if writer is not None:
                writer.cancel()
            raise
        assert writer is not None
        return result, writer

    def _set_loras(self, loras: dict[str, Any]) -> None:
        """Puts the LoRA files of a job on the weights, if they are not those of the last one, as
        they were then."""
        wanted = {
            name: [(*pair, _version(pair[0])) for pair in each] for name, each in loras.items()
        }
        if wanted == self.loras:
            return
        before, self.loras = self.loras, None
        try:
            self.pipe.set_loras(**loras)
        except (CheckpointError, UsageError) as error:  # before any change
            traceback.print_exc()
            self.loras = before
            raise UsageError(
                "the LoRA cannot be put on this model",
                "it is for another one, or its file is damaged or gone; the server's log says more",
                "leave it away, or tell who runs the server",
            ) from error
        self.loras = wanted

    def _make_room(self, arguments: dict[str, Any]) -> None:
        """Lets programs of other shapes go, where there are many and this one is new."""
        names = ("width", "height", "num_frames", "num_steps")
        shape = tuple(arguments[name] for name in names)
        if shape not in self.shapes and len(self.shapes) >= SHAPES:
            import jax

            self.pipe.programs.clear()
            jax.clear_caches()  # its own hold on them
            gc.collect()
            trim()
            self.shapes.clear()
        self.shapes.add(shape)

    def write(self, order: dict[str, Any], made: tuple[Result, Writer]) -> dict[str, Any]:
        """Waits for the file, and writes the metadata beside it."""
        from tdjax.pipeline.result import sidecar, write_json
        from tdjax.progress import device_bytes

        result, writer = made
        writer.close()
        write_json(sidecar(Path(order["video"])), result.about())
        device = device_bytes()
        peak = device[1] if device else None
        return {"timings": result.timings, "warnings": result.warnings, "device_peak": peak}


def _version(file: str) -> tuple[int, int] | None:
    """What changes when an operator replaces a file; None where it is gone."""
    try:
        facts = os.stat(file)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def trim() -> None:
    """Gives memory that was let go back to the system. Of what programs have taken, glibc keeps a
    third and more, in pieces between others, and the process would grow with every set of sizes."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:  # elsewhere than in glibc there is none
        give_back(0)


class Worker:
    """Orders of one stream, made by one maker, told on another stream."""

    def __init__(self, maker: Maker, orders: TextIO, told: TextIO):
        self.maker, self.orders, self.out = maker, orders, told
        self.todo: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancels: dict[str, threading.Event] = {}
        self.lock = threading.Lock()
        self.room = threading.Semaphore(WRITING)

    def tell(self, event: str, **values: Any) -> None:
        """Writes one line to the server."""
        line = json.dumps({"event": event, **values})
        with self.lock:
            self.out.write(line + "\n")
            self.out.flush()

    def run(self) -> int:
        """Works until the orders end; the process's exit code."""
        try:
            self.tell("model", info=self.maker.open())
            threading.Thread(target=self._read, daemon=True).start()
            self.maker.warm()
        except TdjaxError as error:
            self.tell("refused", message=str(error), code=error.exit_code)
            return error.exit_code
        self.tell("ready")
        with ThreadPoolExecutor(WRITING) as writer:
            while True:
                self.room.acquire()
                if not self._make(self.todo.get(), writer):
                    return 1

    def _read(self) -> None:
        """Takes orders in; ends the process with them, whatever runs."""
        try:
            for line in self.orders:
                order = json.loads(line)
                if order["do"] == "make":
                    self.cancels[order["id"]] = threading.Event()
                    self.todo.put(order)
                elif order["id"] in self.cancels:
                    self.cancels[order["id"]].set()
        finally:
            os._exit(0)

    def _make(self, order: dict[str, Any], writer: ThreadPoolExecutor) -> bool:
        """Whether the process can go on after a job."""
        id, last = order["id"], 0

        def told(progress: int, **values: Any) -> None:
            nonlocal last
            self.tell("progress", id=id, progress=progress, **values)
            if last < SOON <= progress:
                self.tell("made", id=id)
            last = progress

        try:
            made = self.maker.make(order, told, self.cancels[id])
        except Cancelled:
            self.tell("cancelled", id=id)
        except Exception as error:
            traceback.print_exc()
            code = CODES.get(type(error), "internal")
            message = _internal(error) if code == "internal" else str(error)
            self.tell("failed", id=id, code=code, message=message)
            if code == "internal":  # of the device, of weights, or a fault here
                return False
        else:
            if last < SOON:
                self.tell("made", id=id)
            writer.submit(self._write, order, made)
            return True
        self.room.release()
        del self.cancels[id]
        return True

    def _write(self, order: dict[str, Any], made: Any) -> None:
        id = order["id"]
        try:
            result = self.maker.write(order, made)
        except Exception as error:  # such as a full disk
            traceback.print_exc()
            self.tell("failed", id=id, code="not_written", message=_internal(error))
        else:
            self.tell("done", id=id, result=result)
        finally:
            del self.cancels[id]
            self.room.release()


def _internal(error: Exception) -> str:
    """What clients are told of an error that is not theirs: no message, which may name files."""
    what = f"the server failed ({type(error).__name__}); its log says more"
    return str(TdjaxError(what, "the fault is not the request's", "tell who runs the server"))


def serve(maker: Maker) -> int:
    """Works for the server that started this process. What libraries print goes to stderr, as the
    standard output is the server's."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return Worker(maker, sys.stdin, told).run()


if __name__ == "__main__":
    cli.run(lambda: serve(PipelineMaker(json.loads(sys.argv[1]))))
