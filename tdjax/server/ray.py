"""The server as a deployment of Ray Serve: `tdjax.server.ray:app`, named by Serve's config file.

Each replica is one server of a store that all of them share: whichever is asked answers for all,
and what a replica was making that is gone, another one makes (tdjax.server.store). How many there
are, on which hosts, and which of them gets a request is Serve's.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingContext
from starlette.applications import Starlette

from tdjax.errors import UsageError
from tdjax.generate.arguments import option_words
from tdjax.server import __main__ as command
from tdjax.server import store
from tdjax.server.app import App
from tdjax.server.http import CONNECTIONS

# Options of the command that a replica has no use for: Serve listens, and draws its folder.
SERVES = ("host", "port", "folder", "verbose")
NEEDED = ("store", "videos", "api_keys")
STOPPING = 30.0  # seconds that a replica has to stop, beside those of its jobs


def app(args: dict[str, Any]) -> Application:
    """Returns the application that Serve deploys. args: options of `python -m tdjax.server`, by
    their names. Raises UsageError."""
    options = options_of(args)
    return Videos.options(graceful_shutdown_timeout_s=options.drain + STOPPING).bind(options)


def options_of(args: dict[str, Any]) -> argparse.Namespace:
    """Returns the command's options. Raises UsageError."""
    parser = command.build_parser()
    for name in SERVES:
        if name in args:
            raise UsageError(
                f"args of the replicas have `{name}`",
                "Serve listens for them, and each draws a folder of its own",
                "leave it away: Serve's config file has http_options and logging_config",
            )
    for name in NEEDED:
        if not args.get(name):
            raise UsageError(
                f"args of the replicas have no `{name}`",
                "all replicas share one store of jobs, one place of videos, and the keys",
                "give a URL as store, a folder of all hosts or s3://bucket/prefix as videos, and a"
                " file, or none if everybody may ask, as api_keys",
            )
    options = parser.parse_args(option_words("args", parser, args))
    if options.webhooks and options.webhook_secret is None:
        raise UsageError(
            "args of the replicas have `webhooks` without `webhook_secret`",
            "each replica would draw a secret of its own",
            "give a file that all hosts have",
        )
    return options


def replicas_for_jobs(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Returns (how many replicas there should be, nothing to remember): a policy of Serve's
    `autoscaling_config`. Its `target_ongoing_requests` are jobs of each replica here, that wait or
    run: requests have ended long before their videos."""
    # Every replica tells of the whole store.
    jobs = (context.aggregated_metrics or {}).get("jobs", {}).values()
    if not jobs:
        return context.target_num_replicas, {}
    return max(jobs) / context.config.get_target_ongoing_requests(), {}


@serve.deployment(max_ongoing_requests=CONNECTIONS)
@serve.ingress()
class Videos:
    """A replica. options: those of the command, as they were parsed; what is wrong with them on
    this host is raised here, and Serve tells of it."""

    server: App | None = None

    def __init__(self, options: argparse.Namespace):
        self.folder = tempfile.TemporaryDirectory(prefix="tdjax-")
        options.folder = self.folder.name
        command.check_installed()
        command.check(options)
        self.server = command.app_of(options, options.drain)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self.server.build()

    async def check_health(self) -> None:
        """Waits until the model is known, before which no request comes here, and raises what has
        ended this server: Serve starts another one in its place."""
        service = self.server.service
        await service.model_known.wait()
        ended = service.refused or service.fault
        if ended is not None:
            raise ended

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns what `replicas_for_jobs` goes by."""
        counts = self.server.service.store.counts()
        return {"jobs": counts[store.WAITING] + counts[store.RUNNING]}

    def __del__(self):
        """Ends what the application has left open, after its own end."""
        if self.server is not None:
            self.server.service.store.close()
