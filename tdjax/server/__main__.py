"""`python -m tdjax.server`: videos over HTTP. With no argument, the embedded demo model on this
machine alone."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tdjax import cli
from tdjax.config import VideoSize
from tdjax.errors import UsageError
from tdjax.files import refuse_unwritable
from tdjax.generate.arguments import add_model_options, add_speed_options
from tdjax.server.keys import Keys, environment_keys, read_keys
from tdjax.server.limits import GIB, Limits
from tdjax.server.webhooks import Webhooks, allowed_addresses, read_secret

if TYPE_CHECKING:
    from tdjax.server.app import App

LOCAL = {"localhost", "127.0.0.1", "[::1]", "::1"}
VARIABLE = "env:"  # before the name of a variable that holds keys
# Limits that the command calls otherwise.
NAMES = {name: f"max_{name}" for name in ("frames", "pixels", "steps", "body", "image_pixels")}
EXAMPLES = """examples:
  python -m tdjax.server
  python -m tdjax.server --model turbowan2.1-t2v-1.3b-480p --workers 2
  python -m tdjax.server --host 0.0.0.0 --api_keys keys.toml --allow_host videos.example.org

A page for people is at /, the API that OpenAI's clients speak at /v1."""


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "tdjax server",
        usage="%(prog)s [options]",
        description="Videos over HTTP: POST /v1/videos, and a page at /.",
        epilog=EXAMPLES,
    )
    add_model_options(p.add_argument_group("what to run"))
    add_speed_options(p)
    service = p.add_argument_group("service")
    service.add_argument("--host", default="127.0.0.1", help="address to listen at")
    service.add_argument("--port", type=int, default=8000, help="0 draws one")
    service.add_argument(
        "--api_keys",
        metavar="FILE",
        help=(
            "TOML of keys (python -m tdjax.server.keys), env:NAME for a variable that holds it, or"
            " none: everybody who reaches --host may ask (default: none on this machine alone,"
            " needed elsewhere)"
        ),
    )
    service.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients know this server by, beside --host; * for any",
    )
    service.add_argument(
        "--folder",
        type=os.path.expanduser,
        default="output/server",
        help="of jobs and videos, one server's own",
    )
    service.add_argument(
        "--store",
        metavar="URL",
        help=(
            "jobs that servers of many hosts share: postgresql+psycopg://user@host/name, whose"
            " password comes from PGPASSWORD or ~/.pgpass (default: a file in --folder)"
        ),
    )
    service.add_argument(
        "--videos",
        metavar="PLACE",
        help=(
            "videos that they share: a folder, or s3://bucket/prefix and what else fsspec knows"
            " (default: --folder)"
        ),
    )
    service.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that make videos, one a GPU or mesh",
    )
    service.add_argument(
        "--drain", type=float, default=30, help="seconds that running jobs have when it is stopped"
    )
    service.add_argument(
        "--loras",
        metavar="FOLDER",
        type=os.path.expanduser,
        help="of LoRA files that requests may name: NAME.safetensors, NAME.high.safetensors, .low.",
    )
    service.add_argument(
        "--webhooks",
        nargs="+",
        default=[],
        metavar="URL",
        help="that requests may have called when a video has ended; below it too, if it ends in /",
    )
    service.add_argument(
        "--webhook_secret",
        metavar="FILE",
        type=os.path.expanduser,
        help="that signs them, drawn where there is none (default: webhook_secret in --folder)",
    )
    service.add_argument("--verbose", "-v", action="store_true", help="a line for each request")
    limits = p.add_argument_group("limits")
    own = Limits()
    for name, kind, text in (
        ("queue", int, "jobs that wait"),
        ("jobs", int, "jobs of one key that wait or run"),
        ("max_frames", int, "of a clip"),
        ("max_pixels", int, "of a frame"),
        ("max_steps", int, "of the sampler"),
        ("max_body", int, "bytes of a request"),
        ("max_image_pixels", int, "of an image that is sent"),
        ("job_seconds", float, "until a job that runs is given up"),
        ("attempts", int, "how often a job is begun whose process dies"),
        ("lease", float, "seconds until a server of --store that is silent is taken for dead"),
    ):
        default = getattr(own, name.removeprefix("max_"))
        limits.add_argument(f"--{name}", type=kind, default=default, help=text)
    limits.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="SIZE",
        help="832x480 or 832x480x81, and no others: each new one has to be compiled",
    )
    limits.add_argument(
        "--keep_hours", type=float, default=own.keep_seconds / 3600, help="that videos are kept"
    )
    limits.add_argument(
        "--keep_gb", type=float, default=own.keep_bytes / GIB, help="that videos take, at most"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 stopped, 2 usage, and those of a model that cannot be opened."""
    return cli.main(_command, argv, parser=build_parser, names=NAMES)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check(args)
    check_installed()
    from tdjax.server.http import Server

    with listening(args.host, args.port) as sock:
        app = app_of(args)
        try:
            return Server(app.build(), app.service, args.drain, args.verbose).serve_on(sock)
        finally:
            app.service.store.close()


def check(args) -> None:
    """Raises UsageError for what is wrong with the command line."""
    limits_of(args)
    keys_of(args)
    if not 1 <= args.workers <= 64:
        raise UsageError(f"--workers is {args.workers}", "1 to 64 processes can run", "use 1")
    if not 0 <= args.drain < math.inf:
        raise UsageError(f"--drain is {args.drain}", "it is seconds, 0 or more", "use 30")
    if args.store is not None and args.videos is None:
        raise UsageError(
            "--store without --videos",
            "other servers of the store could not read videos in this one's folder",
            "give --videos: a folder that all of them have, or s3://bucket/prefix",
        )
    if args.loras is not None and not Path(args.loras).is_dir():
        fix = "make it, and put .safetensors files there"
        raise UsageError(f"--loras {args.loras}", "there is no such folder", fix)
    refuse_unwritable(Path(args.folder) / "jobs")
    devices_of(args.workers, args.mesh, os.environ.get("CUDA_VISIBLE_DEVICES"))


def app_of(args, drain: float = 0.0) -> App:
    """Returns the application of a command line that was checked, with its store open. drain: see
    `App`."""
    from tdjax.server.app import App
    from tdjax.server.service import Service
    from tdjax.server.store import Store

    limits, hooks = limits_of(args), None
    if limits.webhooks:
        secret = read_secret(Path(args.webhook_secret or f"{args.folder}/webhook_secret"))
    store = Store(Path(args.folder), limits, url=args.store, videos=args.videos)
    if limits.webhooks:
        hooks = Webhooks(store, limits.webhooks, secret)
    devices = devices_of(args.workers, args.mesh, os.environ.get("CUDA_VISIBLE_DEVICES"))
    loras = Path(args.loras) if args.loras else None
    service = Service(store, worker_command(args), devices, loras=loras, webhooks=hooks)
    names = LOCAL | {name.lower() for name in (args.host, *args.allow_host)}
    hosts = None if "*" in args.allow_host else names
    return App(service, keys_of(args), limits, hosts, drain)


def check_installed() -> None:
    """Raises UsageError where the libraries of the extra `server` are missing."""
    if importlib.util.find_spec("fcntl") is None:
        raise UsageError(
            "the server does not run on Windows itself",
            "it needs locks and processes of a Unix",
            "use Linux, macOS or WSL 2",
        )
    needed = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
    needed += ("sqlalchemy", "fsspec")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} is not installed",
            "the server needs libraries that tdjax alone does not",
            'pip install "tdjax[server]", or pip install -e ".[server]" in a checkout',
        )


def limits_of(args) -> Limits:
    """Returns the limits of the command line. Raises UsageError."""
    for name in ("keep_hours", "keep_gb", "job_seconds", "lease"):
        if not 0 < getattr(args, name) < math.inf:
            given = getattr(args, name)
            raise UsageError(f"--{name} is {given}", "a number above zero is needed", "leave it")
    for size in args.sizes:
        _check_size(size)
    return Limits(
        sizes=tuple(args.sizes),
        webhooks=allowed_addresses(args.webhooks),
        queue=args.queue,
        jobs=args.jobs,
        frames=args.max_frames,
        pixels=args.max_pixels,
        steps=args.max_steps,
        body=args.max_body,
        image_pixels=args.max_image_pixels,
        job_seconds=args.job_seconds,
        attempts=args.attempts,
        lease=args.lease,
        keep_seconds=args.keep_hours * 3600,
        keep_bytes=int(args.keep_gb * GIB),
    )


def _check_size(text: str) -> None:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if match is None:
        raise UsageError(
            f"--sizes {text}", "WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES is needed", "use 832x480x81"
        )
    VideoSize(width=int(match[1]), height=int(match[2]), frames=int(match[3] or 81))


def keys_of(args) -> Keys:
    """Returns the keys of the command line. Raises UsageError where a server that others reach
    would have none."""
    if args.api_keys is None and args.host not in LOCAL:
        raise UsageError(
            f"--host {args.host} without --api_keys",
            "whoever reaches this address could have videos made",
            "python -m tdjax.server.keys alice > keys.toml and --api_keys keys.toml, or"
            " --api_keys none if it is meant",
        )
    if args.api_keys in (None, "none"):
        return Keys()
    if args.api_keys.startswith(VARIABLE):
        return environment_keys(args.api_keys.removeprefix(VARIABLE))
    return read_keys(cli.path(args.api_keys))


def devices_of(workers: int, mesh: str | None, visible: str | None) -> list[str | None]:
    """Returns CUDA_VISIBLE_DEVICES of each worker: as many devices as its mesh has places.

    visible: the variable as it is; where it is empty there are none, and None leaves it so. One
    worker over `auto` sees what the server sees. No worker sees more than it uses: JAX takes memory
    of every device that it sees.
    """
    if visible == "" or (workers == 1 and mesh == "auto"):
        return [None] * workers
    each = math.prod(int(n) for n in re.findall(r"[0-9]{1,4}", mesh or "")) if mesh else 1
    names = visible.split(",") if visible else [str(n) for n in range(workers * each)]
    if len(names) < workers * each:
        raise UsageError(
            f"--workers {workers} need {workers * each} devices",
            f"CUDA_VISIBLE_DEVICES names {len(names)}",
            f"use --workers {max(1, len(names) // each)}",
        )
    return [",".join(names[i * each : (i + 1) * each]) for i in range(workers)]


def worker_command(args) -> list[str]:
    """Returns what starts a worker that opens the model of the command line."""
    service = build_parser()
    names = {
        action.dest
        for group in service._action_groups
        if group.title in ("what to run", "speed and memory")
        for action in group._group_actions
    }
    options = {name: value for name, value in vars(args).items() if name in names}
    return [sys.executable, "-m", "tdjax.server.worker", json.dumps(options)]


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address. Raises UsageError."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port is {port}", "0 to 65535 are allowed", "use 8000")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of TCP by name: asyncio sends small answers at once (TCP_NODELAY) only then.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(512)
    except OSError as error:
        sock.close()
        raise UsageError(
            f"{host}:{port} cannot be listened at",
            error.strerror or str(error),
            "give another --port, or stop what has it",
        ) from error
    with sock:
        yield sock


if __name__ == "__main__":
    cli.run(main)
