"""The web server around the application: it says where it is, and lets jobs end when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from tdjax.errors import UsageError
from tdjax.server.service import Service, note
from tdjax.server.tables import OperationalError, first_line

# Seconds until a connection is ended whose request does not come, or that takes nothing of what is
# sent to it: 64 KB in this time are enough.
ASKING, TAKING = 15.0, 60.0
CONNECTIONS = 1000  # at once; others are answered 503, and twice as many are all that are held


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One of so many that files of jobs can still be opened beside them, whoever connects; it ends
    where its client neither asks nor takes."""

    asking: asyncio.TimerHandle | None = None
    taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Takes a connection, or ends it at once."""
        super().connection_made(transport)
        self.asking = self.loop.call_later(ASKING, transport.abort)
        if len(self.connections) > 2 * self.config.limit_concurrency:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request."""
        super().data_received(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.asking is None:
            self.asking = self.loop.call_later(ASKING, self.transport.abort)
        elif not idle and self.asking is not None:
            self.asking.cancel()
            self.asking = None

    def pause_writing(self) -> None:
        """The client is slower than the answer."""
        super().pause_writing()
        self.taking = self.loop.call_later(TAKING, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken a part."""
        super().resume_writing()
        if self.taking is not None:
            self.taking.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection has ended."""
        super().connection_lost(error)
        for timer in (self.asking, self.taking):
            if timer is not None:
                timer.cancel()


def connections() -> int:
    """Returns how many connections are answered at once: a quarter of the files that this process
    may have open, whose limit is raised as far as they need and the system allows."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted, endless = 4 * CONNECTIONS, resource.RLIM_INFINITY
    if now == endless or now >= wanted:
        return CONNECTIONS
    files = wanted if most == endless else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return max(1, files // 4)


class Server(uvicorn.Server):
    """Serves until a signal, then lets jobs end."""

    def __init__(self, app: Any, service: Service, drain: float, verbose: bool):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if verbose else "warning",
                access_log=verbose,
                limit_concurrency=connections(),
                http=Connection,
                timeout_graceful_shutdown=5,
                server_header=False,
                ws="none",
            )
        )
        self.service, self.drain = service, drain

    def serve_on(self, sock: socket.socket) -> int:
        """The exit code of the command. Raises what a worker says of its model, and what ended the
        queue."""
        asyncio.run(self._serve_on(sock))
        ended = self.service.refused or self.service.fault
        if isinstance(ended, OperationalError):
            is_file = self.service.store.db.is_file
            remedy = "make room on its disk" if is_file else "see that the database answers"
            raise UsageError(
                f"{self.service.store.db.name}: {first_line(ended)}",
                "how a job ended cannot be written down",
                f"{remedy} and start the server again: no job is lost",
            ) from ended
        if ended is not None:
            raise ended
        return 0

    async def _serve_on(self, sock: socket.socket) -> None:
        watching = asyncio.create_task(self._watch())
        name = sock.getsockname()
        place = f"[{name[0]}]" if ":" in name[0] else name[0]
        note(f"http://{place}:{name[1]} (the page), http://{place}:{name[1]}/v1 (the API)")
        await self.serve(sockets=[sock])
        watching.cancel()

    async def _watch(self) -> None:
        """Ends the server where its model cannot be opened, and where its queue has a fault."""
        await self.service.model_known.wait()
        if self.service.model is not None:
            note(f"the model is {self.service.model.name}, {self.service.model.size}")
        while self.service.refused is None and self.service.fault is None:
            await asyncio.sleep(0.5)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets jobs end, while clients are still answered; another Ctrl-C ends it at once."""
        running = sum(len(worker.jobs) for worker in self.service.workers)
        running += len(self.service.publishing)
        if running and not self.force_exit:
            note(f"stopping: {running} jobs have up to {self.drain:g} s to end")
        stopping = asyncio.create_task(self.service.stop(self.drain))
        while not stopping.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        if not stopping.done():
            stopping.cancel()
            await self.service.stop(0)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, and are not raised again when it has ended."""
        before = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops the server, a second one its jobs as well."""
        self.force_exit = self.should_exit
        self.should_exit = True
