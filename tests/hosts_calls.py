"""Calls of a pipeline in one of two processes: python hosts_calls.py MODEL OUT PORT NUMBER, with
the flags of a test in the environment. Leaves OUT/<number>.npz and OUT/<number>.json."""

import json
import os
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from random_model import PROMPT, SMALL

import tdjax
from tdjax.errors import Cancelled, UsageError
from tdjax.parallel import hosts

CALL = {"num_steps": 2, "seed": 4, **SMALL}


def refused(call, **arguments) -> str:
    """The first line of the error of a call."""
    try:
        call(PROMPT, **(CALL | arguments))
    except (Cancelled, UsageError) as error:
        return str(error).splitlines()[0]
    return "none"


def main(model: str, out: Path, port: str, number: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    pipe = tdjax.load(model, mesh="auto", compile_cache=False)
    steps, previews = [], []
    own = {"on_preview": lambda step, frames: previews.append(frames.shape)}
    if number == 1:
        own = {"on_step": lambda step, steps_: steps.append(step)}
    made = pipe(PROMPT, **CALL, **own)
    # With the embedding that the first process has on disk.
    again = pipe(PROMPT, **CALL, on_step=lambda *_: None)
    told = {"steps": steps, "previews": previews}
    told["same"] = bool((made.latents == again.latents).all())
    told["folder"] = [path.name for path in Path(os.environ["TDJAX_CACHE"]).glob("prompts/*")]
    told["by step"] = refused(pipe, **({"on_step": lambda *_: False} if number else {}))
    jax.config.update("jax_compilation_cache_dir", str(out))
    told["one cache"] = hosts.share_compile_cache()
    own_folder = out / f"compiled{number}"
    own_folder.mkdir()
    jax.config.update("jax_compilation_cache_dir", str(own_folder))
    told["two caches"] = hosts.share_compile_cache()
    event = threading.Event()
    event.set()
    told["by event"] = refused(pipe, **({} if number else {"cancel": event}))
    told["other seed"] = refused(pipe, seed=number)
    decoded = pipe.decode(made.latents).frames
    np.savez(out / f"{number}.npz", latents=made.latents, frames=made.frames, decoded=decoded)
    (out / f"{number}.json").write_text(json.dumps(told))
    hosts.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
