"""An application of Ray Serve whose replicas have workers without a model, and its driver.

`python ray_app.py PORT JSON` starts a Ray of this machine alone with two replicas, and ends it with
its standard input. Each replica leaves a file named by its process in the folder of videos.
"""

import json
import os
import sys
from pathlib import Path

import ray
import stub_worker
from ray import serve

import tdjax.server.ray
from tdjax.server import __main__ as command


class Stubbed(tdjax.server.ray.Videos.func_or_class):
    """A replica with such workers."""

    async def __init__(self, options):
        word = [sys.executable, "-P", stub_worker.__file__, options.model]
        command.worker_command = lambda args: word
        await super().__init__(options)
        (Path(options.videos) / f"{os.getpid()}.pid").touch()


def main(port: str, args: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
    serve.start(http_options={"port": int(port)})
    options = tdjax.server.ray.options_of(json.loads(args))
    replicas = serve.deployment(Stubbed).options(
        num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5}
    )
    serve.run(replicas.bind(options))
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
