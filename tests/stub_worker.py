"""A worker without a model, for tests of the server: what it does stands in the prompt.

"sleep 0.5" takes so long, in ten steps; "late" has its last frames for a while; "die"
ends the process; "fail", "damaged" and "break" raise what a model, its weights and a fault would;
"wide" cannot be written. A video is a few bytes that name its job.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path

from PIL import Image

from tdjax import cli
from tdjax.config import SamplerConfig, VideoSize
from tdjax.errors import Cancelled, CheckpointError, OutOfMemory, UsageError
from tdjax.files import written
from tdjax.pipeline.request import ModelInfo
from tdjax.server.worker import serve

MODEL = ModelInfo(
    name="stub",
    task="t2v",
    distilled=True,
    experts=False,
    language=None,
    prompts=("a stub",),
    size=VideoSize(frames=5, width=64, height=48),
    resolution=None,
    sampler=SamplerConfig(),
    text_encoder=True,
    text_len=8,
    text_dim=8,
    channels=16,
)


class Maker:
    """task: "t2v", "i2v", or "none", which is a model that cannot be opened."""

    def __init__(self, task):
        self.task = task

    def open(self):
        if self.task == "none":
            raise UsageError("no such model", "the stub was told so", "leave `offline` away")
        return dataclasses.asdict(dataclasses.replace(MODEL, task=self.task))

    def warm(self):
        pass

    def make(self, order, told, cancel):
        prompt = order["request"]["prompt"]
        with written(Path(order["thumbnail"])) as part:
            Image.new("RGB", (64, 48), "green").save(part)
        seconds = re.search(r"sleep ([0-9.]+)", prompt)
        for step in range(10 if seconds else 1):
            told(progress=5 + 9 * step, stage="denoise", preview=1)
            if cancel.wait(float(seconds[1]) / 10 if seconds else 0):
                raise Cancelled("cancelled")
        if "late" in prompt:
            told(progress=97, stage="decode", preview=1)
            cancel.wait(0.2)
        if "die" in prompt:
            os._exit(9)
        if "fail" in prompt:
            raise OutOfMemory("no room", "the stub is full", "ask for less")
        if "damaged" in prompt:
            raise CheckpointError("a secret of /the/machine", "it is damaged", "fetch it again")
        if "break" in prompt:
            raise RuntimeError("a secret of /the/machine")
        return order

    def write(self, order, made):
        if "wide" in order["request"]["prompt"]:
            raise OSError("disk full at /the/machine")
        with written(Path(order["video"])) as part:
            part.write_bytes(f"video of {order['id']} ".encode() * 100)
        has_image = order["image"] is not None and Path(order["image"]).stat().st_size > 0
        warnings = [f"image: {has_image}"]
        if order["loras"]:
            warnings.append(f"loras: {order['loras']}")
        return {"timings": {"denoise": 0.1}, "warnings": warnings}


if __name__ == "__main__":
    cli.run(lambda: serve(Maker(sys.argv[1])))
