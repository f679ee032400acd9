"""Parts of a stored file, against Starlette's own answers for a file of this machine."""

import asyncio
import contextlib

import fsspec
import pytest
from starlette.datastructures import Headers
from starlette.responses import FileResponse

from tdjax.server.parts import part_of
from tdjax.server.storage import Storage

SIZE = 1000
RANGES = [
    None,
    *("bytes=0-0", "bytes=0-4", "bytes=0-", "bytes=10-19", "bytes=990-", "bytes=990-5000"),
    *("bytes=-1", "bytes=-300", "bytes=999-999", "bytes=0-999", "bytes=1000-", "bytes=5000-6000"),
]


def answered(response, headers) -> tuple:
    """(status, range and length that are told, content) of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return await asyncio.Event().wait()

    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "headers": listed}
    asyncio.run(response(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], told.get("content-range"), told.get("content-length"), content


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "video_a.1.mp4"
    path.write_bytes(bytes(number % 251 for number in range(SIZE)))
    fsspec.filesystem("memory").store.clear()
    with contextlib.closing(Storage("memory://parts")) as storage:
        storage.put(path)
        yield path, storage


def ours(storage, headers):
    response = part_of(storage, "video_a.1.mp4", SIZE, Headers(headers), "video/mp4")
    return answered(response, headers), response.headers


@pytest.mark.parametrize("asked", RANGES)
def test_parts_are_those_of_a_file_server(file, asked):
    path, storage = file
    headers = {} if asked is None else {"range": asked}
    theirs = answered(FileResponse(path, media_type="video/mp4"), headers)
    mine, _ = ours(storage, headers)
    assert mine[0] == theirs[0] and mine[3] == (theirs[3] if mine[0] != 416 else b"")
    if mine[0] == 416:
        assert mine[1].endswith(f"*/{SIZE}")
    else:
        assert mine[1:3] == theirs[1:3]


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=", "bytes=-", "lines=1-2", "bytes=0-1,5-6", "bytes=a-b", "0-5"]
)
def test_what_is_no_single_part_is_the_whole(file, asked):
    (status, _, length, content), _ = ours(file[1], {"range": asked})
    assert (status, length, len(content)) == (200, str(SIZE), SIZE)


def test_a_part_of_another_content_is_the_whole(file):
    _, headers = ours(file[1], {})
    assert headers["accept-ranges"] == "bytes" and headers["content-type"] == "video/mp4"
    same = {"range": "bytes=0-4", "if-range": headers["etag"]}
    assert ours(file[1], same)[0][0] == 206
    assert ours(file[1], same | {"if-range": '"other"'})[0][0] == 200
