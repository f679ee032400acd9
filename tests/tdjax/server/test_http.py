"""Connections: of clients that do not ask, and of those that do not take what they asked for."""

import asyncio
import contextlib
import time

import pytest
import uvicorn

from tdjax.server import http

LARGE = 32 * 2**20  # bytes, more than sockets hold


async def app(scope, receive, send):
    if scope["type"] == "http":
        size = LARGE if scope["path"] == "/large" else 2
        headers = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(0, size, 2**16):
            body = bytes(min(size, 2**16))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def connected(**limits):
    """(reader, writer, connections of the server) of a connection to one."""
    config = uvicorn.Config(
        app, port=0, log_level="critical", http=http.Connection, limit_concurrency=9, lifespan="off"
    )
    server = uvicorn.Server(config)
    with contextlib.ExitStack() as patches:
        for name, seconds in limits.items():
            patches.enter_context(pytest.MonkeyPatch.context()).setattr(http, name, seconds)
        serving = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer, server.server_state.connections
        finally:
            writer.close()
            server.should_exit = True
            await serving


async def ends(reader) -> bool:
    """Whether a connection is ended by the server."""
    with contextlib.suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(), 20) == b""
    return True


ASK = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("before, part", [(b"", b""), (b"", ASK[:20]), (ASK, ASK[:20])], ids=str)
def test_who_does_not_ask_is_sent_away(before, part):
    async def run():
        async with connected(ASKING=0.3) as (reader, writer, _):
            writer.write(before)
            if before:
                await reader.readuntil(b"\r\n\r\n\0\0")
            begun = time.monotonic()
            writer.write(part)
            assert await ends(reader)
            assert time.monotonic() - begun > 0.2

    asyncio.run(run())


def test_who_asks_is_waited_for_no_more_and_who_takes_again_neither():
    async def run():
        async with connected() as (reader, writer, connections):
            writer.write(ASK[:20])
            await asyncio.sleep(0.05)
            (connection,) = connections
            assert connection.asking is not None
            writer.write(ASK[20:])
            await reader.readuntil(b"\r\n\r\n\0\0")
            assert connection.asking is None
            connection.pause_writing()
            assert not connection.taking.cancelled()
            connection.resume_writing()
            assert connection.taking.cancelled()

    asyncio.run(run())


@pytest.mark.slow
def test_who_takes_nothing_is_sent_away():
    async def run():
        async with connected(TAKING=0.3) as (reader, writer, _):
            writer.write(ASK.replace(b"/ ", b"/large "))
            await asyncio.sleep(1)
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk := await reader.read(2**20):
                    got += len(chunk)
            assert got < LARGE

    asyncio.run(run())
