"""For tests of the server: one in a thread, whose workers are processes without a model, and what
clients should not send."""

import contextlib
import dataclasses
import io
import sys
import threading
import time
import zlib
from pathlib import Path
from unittest import mock

import httpx2 as httpx
import stub_worker
import uvicorn
from PIL import Image

import tdjax.server.service
from tdjax.server.app import App
from tdjax.server.keys import Keys
from tdjax.server.limits import Limits
from tdjax.server.service import Service
from tdjax.server.store import Store
from tdjax.server.webhooks import Webhooks

LOCAL = {"127.0.0.1", "localhost"}
SECRET = bytes(range(32))  # of webhooks


def until(condition, seconds=30.0):
    """What a condition gives, once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return value


@dataclasses.dataclass
class Served:
    """A running server, and a client of it."""

    service: Service
    client: httpx.Client
    url: str

    def post(self, prompt="a fox", headers=None, **fields) -> httpx.Response:
        return self.client.post("/v1/videos", json={"prompt": prompt, **fields}, headers=headers)

    def add(self, prompt="a fox", **fields) -> str:
        answer = self.post(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def get(self, id: str) -> dict:
        return self.client.get(f"/v1/videos/{id}").json()

    def ended(self, id: str) -> dict:
        states = ("completed", "failed", "cancelled")
        job = until(lambda: (job := self.get(id))["status"] in states and job)
        assert job["error"] is None or job["error"]["message"].count("\n") == 2, job["error"]
        return job


@contextlib.contextmanager
def serving(
    folder,
    *,
    task="t2v",
    workers=1,
    keys=None,
    hosts=LOCAL,
    store=None,
    videos=None,
    loras=None,
    **limits,
):
    limits = Limits(**limits)
    store = Store(Path(folder), limits, url=store, videos=videos)
    command = [sys.executable, "-P", stub_worker.__file__, task]
    hooks = Webhooks(store, limits.webhooks, SECRET) if limits.webhooks else None
    service = Service(store, command, [None] * workers, loras=loras, webhooks=hooks)
    app = App(service, keys or Keys(), limits, hosts).build()
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", loop="asyncio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    soon = mock.patch.multiple(tdjax.server.service, SHORTEST=0.02, LOOK=0.05)
    soon.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30) as client:
            if task != "none":
                until(lambda: client.get("/ready").status_code == 200)
            yield Served(service, client, url)
    finally:
        server.should_exit = True
        thread.join()
        soon.stop()
        store.close()


# What is refused
# --------------------------------------------------------------------------------------------------

REFUSED = [
    {"prompt": ""},
    {"prompt": " \n"},
    {"prompt": None},
    {"prompt": 3},
    {"prompt": ["a"]},
    {"prompt": "a" * 20_000},
    {"prompt": "half \ud83d"},
    {"prompt": "a \0"},
    {"size": "64"},
    {"size": "65x48"},
    {"size": "0x0"},
    {"size": "64x48x3"},
    {"size": "../../etc/passwd"},
    {"size": 64},
    {"size": "128x128"},
    {"size": "64x48", "aspect_ratio": "1:1"},
    {"seconds": "a"},
    {"seconds": 0},
    {"seconds": -1},
    {"seconds": float("nan")},
    {"seconds": 1e300},
    {"seconds": 500},
    {"seconds": 4, "num_frames": 5},
    {"seconds": [4]},
    {"num_frames": 6},
    {"num_frames": 85},
    {"num_frames": True},
    {"num_frames": 10**30},
    {"num_steps": 0},
    {"num_steps": 5},
    {"num_steps": "4"},
    {"seed": -1},
    {"seed": 2**32},
    {"seed": [1, 2]},
    {"seed": 1.5},
    {"fps": 0},
    {"fps": 10**9},
    {"guidance_scale": float("inf")},
    {"negative_prompt": 3},
    {"negative_prompt": "a" * 20_000},
    {"negative_prompt": "half \ud83d"},
    {"fit": "squeeze"},
    {"fit": "adaptive"},
    {"format": "exe"},
    {"format": "../mp4"},
    {"format": 4},
    {"format": ["mp4"]},
    {"latents": [1]},
    {"save_path": "x.mp4"},
    {"image": "/etc/passwd"},
    {"prompt_embeds": []},
    {"cancel": True},
    {"on_step": "print"},
    {"lora": "x.safetensors"},
    {"lora": {"name": "sketch"}},
    {"lora": ["sketch"]},
    {"lora": [{"name": "../sketch"}]},
    {"lora": [{"name": "/etc/passwd"}]},
    {"lora": [{"name": 3}]},
    {"lora": [{"weight": 1}]},
    {"lora": [{"name": "sketch", "path": "x"}]},
    {"lora": [{}] * 9},
    {"webhook": "http://169.254.169.254/"},
    {"webhook": 3},
    {"previews": 1},
    {"previews": "true"},
    {"webhook": ["http://127.0.0.1/"]},
    {"last_image": "data:image/png;base64,AAAA"},
    {"last_image": None},
]


def encoded(form="PNG", size=(8, 6), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, form, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in a few bytes."""
    header = bytearray(encoded())
    header[16:24] = (40_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    return bytes(header)


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


STRANGE = {
    "empty": b"",
    "text": b"hello",
    "cut": encoded()[:40],
    "cut in the pixels": encoded(size=(100, 100))[:-40],
    "bomb": bomb(),
    "too many pixels": encoded(size=(200, 200)),
    "animated": animated(),
    "gif": encoded("GIF"),
    "tiff": encoded("TIFF"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zip": b"PK\x03\x04" + bytes(100),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}
