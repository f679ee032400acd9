"""The routes: videos as OpenAI's clients know them, what operators ask, and the page."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tdjax.config.values import shown
from tdjax.errors import TdjaxError, UsageError
from tdjax.server import store
from tdjax.server.asking import FORMATS, Asked, asked, asked_apart, spelled
from tdjax.server.body import Refusal, fields_of, read_body
from tdjax.server.keys import Key, Keys
from tdjax.server.limits import SEARCH, Limits
from tdjax.server.metrics import Metrics
from tdjax.server.openapi import description
from tdjax.server.parts import part_of
from tdjax.server.service import Progress, Service, note
from tdjax.server.store import Conflict, Full, Job
from tdjax.server.tables import OperationalError, first_line

PAGE = Path(__file__).parent / "page.html"
LARGE = 2**20  # bytes: of bodies from here on only some are read at a time
LARGE_AT_ONCE = 4
IMAGES_AT_ONCE = 2
PROBES = ("/health", "/ready")  # what runs containers asks them by addresses that change
WATCHING = 50  # streams of events of one key at once
IDEMPOTENCY = 200  # characters of a key
STARTING = 10.0  # seconds that a request waits for a model that is being opened


class NoKey(Refusal):
    """A request without a key that the server knows."""

    status = 401
    headers = {"WWW-Authenticate": "Bearer"}


class Unknown(Refusal):
    """A request for a video or a model that is not there."""

    status = 404


class Opening(Refusal):
    """A request that came before the model."""

    status = 503
    headers = {"Retry-After": "10"}


class TooMany(Refusal):
    """A request beside too many others of its key."""

    status = 429
    headers = {"Retry-After": "10"}


class Stopping(Refusal):
    """A request that came while the server stops."""

    status = 503
    headers = {"Retry-After": "30"}


class App:
    """One server's routes over its service.

    hosts: names under which it is asked; None: any. Others are refused, so that no page of another
           site reaches a server of this machine by a name of its own.
    drain: seconds that running jobs have when the application ends.
    """

    def __init__(
        self,
        service: Service,
        keys: Keys,
        limits: Limits,
        hosts: set[str] | None,
        drain: float = 0.0,
    ):
        self.service, self.keys, self.limits, self.hosts = service, keys, limits, hosts
        self.drain = drain
        self.metrics = Metrics(service)
        service.on_end = self.metrics.ended
        self.large = asyncio.Semaphore(LARGE_AT_ONCE)
        self.images = asyncio.Semaphore(IMAGES_AT_ONCE)
        self.watching: collections.Counter[str] = collections.Counter()
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = content_policy(self.page)

    def build(self) -> Starlette:
        """Returns the application."""
        one = "/v1/videos/{id}"
        routes = [
            Route("/", self.show_page),
            Route("/health", self.health),
            Route("/ready", self.readiness),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.describe),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.one_model),
            Route("/v1/videos", self.create, methods=["POST"]),
            Route("/v1/videos", self.page_of_jobs),
            Route("/v1/videos/sync", self.create_and_wait, methods=["POST"]),
            Route(one, self.retrieve),
            Route(one, self.delete, methods=["DELETE"]),
            Route(one + "/cancel", self.cancel, methods=["POST"]),
            Route(one + "/content", self.content),
            Route(one + "/events", self.events),
        ]
        app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={
                HTTPException: _no_route,  # type: ignore[dict-item]
                Refusal: _refused,  # type: ignore[dict-item]
                UsageError: _usage,  # type: ignore[dict-item]
                Full: self._full,  # type: ignore[dict-item]
                Conflict: _conflict,  # type: ignore[dict-item]
                OSError: _unwritable,  # type: ignore[dict-item]
                OperationalError: self._no_store,  # type: ignore[dict-item]
                Exception: _fault,
            },
        )
        app.add_middleware(_Guard, hosts=self.hosts)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.service.start()
        yield
        await self.service.stop(self.drain)

    # -- who asks, and for what --------------------------------------------------------------------

    def _key(self, request: Request) -> Key:
        key = self.keys.of(request.headers.get("authorization"))
        if key is None:
            why = "this server has keys, and the request names none of them"
            raise NoKey("no valid API key", why, "send Authorization: Bearer KEY")
        return key

    def _job(self, request: Request) -> Job:
        id = request.path_params["id"]
        job = self.service.store.get(id, self._key(request).name)
        if job is None:
            why = "it was deleted, is no longer kept, or is another key's"
            raise Unknown("no video has this id", why, "GET /v1/videos lists those that are there")
        return job

    async def _asked(self, request: Request, key: Key, image: Path) -> tuple[Asked, str]:
        """(what is asked for, digest of the request). image: the file that one becomes."""
        await self._model_known()
        declared = request.headers.get("content-length", "")
        small = declared.isascii() and declared.isdigit() and len(declared) < 8
        crowded = not small or int(declared) > LARGE
        async with self.large if crowded else contextlib.nullcontext():
            loras = tuple(self.service.loras())
            limits = dataclasses.replace(key.limits(self.limits), loras=loras)
            body = await read_body(request, limits)
            fields, data = await fields_of(request, body)
            del body
            digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + (data or b""))
            model = self.service.model
            assert model is not None
            name = fields.get("model")
            if name is not None and name != model.name:
                raise _unknown_model(name, model.name)
            if data is None:
                return asked(fields, None, model, limits), digest.hexdigest()
            async with self.images:
                what = await asked_apart(fields, data, model, limits, image)
            return what, digest.hexdigest()

    async def _model_known(self) -> None:
        """Waits for a model that is being opened. Raises Opening and Stopping."""
        fix = "ask again after Retry-After seconds"
        if self.service.draining:
            raise Stopping("the server is being stopped", "it takes no more requests", fix)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.service.model_known.wait(), STARTING)
        if self.service.model is None:
            raise Opening("the model is being opened", "it is not known yet what it takes", fix)

    async def _add(self, request: Request) -> Job:
        """The job that a request becomes. Raises what the handlers answer."""
        key = self._key(request)
        idempotency = request.headers.get("idempotency-key")
        if idempotency is not None and not re.fullmatch(rf"[!-~]{{1,{IDEMPOTENCY}}}", idempotency):
            why = f"1 to {IDEMPOTENCY} printable characters without blanks are allowed"
            raise UsageError("the Idempotency-Key cannot be taken", why, "use a UUID")
        id, jobs = store.new_id(), self.service.store
        job: Job | None = None
        try:
            what, digest = await self._asked(request, key, jobs.image(id))
            await asyncio.to_thread(jobs.publish, [jobs.image(id)])
            job = jobs.add(
                key.name,
                what.arguments,
                digest=digest,
                shape=what.shape,
                priority=key.priority,
                jobs=key.limits(self.limits).jobs,
                idempotency=idempotency,
                id=id,
            )
        finally:
            if job is None or job.id != id:
                jobs.image(id).unlink(missing_ok=True)
        self.service.feed()
        return job

    # -- videos ------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        """Queues a video."""
        job = await self._add(request)
        return JSONResponse(self.shown(self.service.store.get(job.id) or job))

    async def create_and_wait(self, request: Request) -> Response:
        """Makes a video and returns it. A client that goes away ends it, unless it can ask for it
        again by its Idempotency-Key."""
        job = await self._add(request)
        gone = asyncio.create_task(_gone(request))
        waiting = asyncio.create_task(self._wait(job.id))
        await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            if "idempotency-key" not in request.headers:
                self.service.cancel(job)
            return Response(status_code=499)
        gone.cancel()
        ended = waiting.result()
        if ended is None or ended.status == store.CANCELLED:
            why = "a client ended it while this one waited"
            error = TdjaxError(
                "the video was cancelled", why, "ask anew, with a new Idempotency-Key"
            )
            return _error(409, error, "cancelled")
        if ended.status == store.FAILED:
            assert ended.error is not None
            status = 400 if ended.error["code"] == "invalid_request" else 500
            return _answer(status, ended.error["message"], ended.error["code"])
        if ended.status != store.COMPLETED:
            why = f"{job.id} is kept, and is made when it runs again"
            error = Stopping("the server is being stopped", why, f"GET /v1/videos/{job.id} then")
            return _error(503, error, "stopped", error.headers)
        return await self._file(request, ended)

    async def _wait(self, id: str) -> Job | None:
        async for _ in self.service.news(id):
            pass
        return self.service.store.get(id)

    async def page_of_jobs(self, request: Request) -> Response:
        """A page of the key's videos."""
        key, query = self._key(request), request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= 100:
            raise UsageError(f"limit is {limit[:20]!r}", "1 to 100 are allowed", "use 20")
        if order not in ("asc", "desc"):
            raise UsageError(f"order is {order[:20]!r}", "asc and desc are allowed", "use desc")
        search = query.get("search", "")
        if len(search) > SEARCH:
            why = f"{SEARCH} characters are allowed"
            raise UsageError("the text that is searched is long", why, "use fewer words")
        jobs = self.service.store.page(
            key.name, query.get("after"), int(limit) + 1, order == "desc", search
        )
        data = [self.shown(job) for job in jobs[: int(limit)]]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(jobs) > int(limit),
            }
        )

    async def retrieve(self, request: Request) -> Response:
        """One video's state."""
        return JSONResponse(self.shown(self._job(request)))

    async def delete(self, request: Request) -> Response:
        """Removes a video; one that is being made is ended."""
        job = self._job(request)
        self.service.delete(job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Ends a video that waits or is made."""
        job = self._job(request)
        if not self.service.cancel(job) and job.status != store.CANCELLED:
            why, fix = "one that waits or is made can be cancelled", "DELETE removes it"
            error = TdjaxError(f"the video is {job.status} already", why, fix)
            return _error(409, error, "ended")
        return JSONResponse(self.shown(self._job(request)))

    async def content(self, request: Request) -> Response:
        """The file of a complete video."""
        job, variant = self._job(request), request.query_params.get("variant", "video")
        if variant not in ("video", "thumbnail"):
            raise UsageError(
                f"variant is {variant[:20]!r}", "allowed: video, thumbnail", "nearest: thumbnail"
            )
        early = variant == "thumbnail" and self._preview(job)
        if job.status != store.COMPLETED and not early:
            why, fix = "the file is there once it is completed", "GET /v1/videos/ID tells its state"
            return _error(409, TdjaxError(f"the video is {job.status}", why, fix), "not_completed")
        request.scope["headers"] = [
            (name, value)
            for name, value in request.scope["headers"]
            if name != b"range" or _is_range(value.decode("latin-1"))
        ]
        return await self._file(request, job, thumbnail=variant == "thumbnail")

    def _preview(self, job: Job) -> int:
        """The number of the picture that shows how far a job is that runs; 0: none yet."""
        progress = self.service.progress.get(job.id)
        preview = progress.preview if progress else job.preview
        return int(preview) if job.status == store.RUNNING else 0

    async def _file(self, request: Request, job: Job, thumbnail: bool = False) -> Response:
        jobs = self.service.store
        path = jobs.thumbnail(job) if thumbnail else jobs.video(job)
        kind = "image/jpeg" if thumbnail else FORMATS[job.request["format"]]
        name = f"{job.id}{path.suffix}"
        headers = {"X-Video-Id": job.id, "Cache-Control": "private"}
        try:
            if jobs.storage is not None:
                size = await asyncio.to_thread(jobs.size, path)
                if not size:
                    raise FileNotFoundError
                response = part_of(jobs.storage, path.name, size, request.headers, kind)
                headers["Content-Disposition"] = f'attachment; filename="{name}"'
                response.headers.update(headers)
                return response
            if thumbnail:  # renewed and removed while its job runs, so it is read at once
                return Response(path.read_bytes(), headers=headers, media_type=kind)
            found = path.stat()
        except FileNotFoundError:
            why = "somebody has removed it where videos are kept"
            error = TdjaxError("the file is no longer kept", why, "ask for the video anew")
            return _error(404, error, "expired")
        return FileResponse(
            path, headers=headers, media_type=kind, filename=name, stat_result=found
        )

    async def events(self, request: Request) -> Response:
        """A video's states as they change, as server-sent events."""
        job, key = self._job(request), self._key(request).name
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(headers=headers, media_type="text/event-stream")
        if self.watching[key] >= WATCHING:
            why = f"{WATCHING} at once are allowed"
            raise TooMany("too many streams of events of this key", why, "end some of them")

        async def lines() -> AsyncIterator[str]:
            self.watching[key] += 1
            try:
                async for news in self.service.news(job.id):
                    if news is None:
                        yield ": still there\n\n"
                    else:
                        yield f"event: {news.status}\ndata: {json.dumps(self.shown(news))}\n\n"
            finally:
                self.watching[key] -= 1

        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    def shown(self, job: Job) -> dict[str, Any]:
        """Returns a job as OpenAI's clients read a video; the names after `error` are tdjax's."""
        request = job.request
        progress = self.service.progress.get(job.id) or Progress(job.percent, job.stage)
        expires = None
        if job.completed_at is not None:
            expires = int(job.completed_at + self.limits.keep_seconds)
        completed = job.status == store.COMPLETED
        return {
            "id": job.id,
            "object": "video",
            "model": request["model"],
            "status": job.status,
            "progress": 100 if completed else progress.percent,
            "created_at": int(job.created_at),
            "completed_at": int(job.completed_at) if job.completed_at and completed else None,
            "expires_at": expires,
            "prompt": request["prompt"],
            "seconds": f"{(request['num_frames'] - 1) / request['fps']:g}",
            "size": f"{request['width']}x{request['height']}",
            "remixed_from_video_id": None,
            "error": job.error,
            "stage": progress.stage if job.status == store.RUNNING else "",
            "preview": self._preview(job),
            "seed": request["seed"],
            "num_frames": request["num_frames"],
            "num_steps": request["num_steps"],
            "fps": request["fps"],
            "format": request["format"],
            "lora": [{"name": name, "weight": weight} for name, weight in request.get("lora", ())],
            "webhook": request.get("webhook"),
            "warnings": (job.result or {}).get("warnings", []),
            "timings": (job.result or {}).get("timings", {}),
        }

    # -- models and the server ---------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The model that is served."""
        self._key(request)
        await self._model_known()
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        """The same, by its name."""
        self._key(request)
        await self._model_known()
        if request.path_params["id"] != self._model()["id"]:
            raise _unknown_model(request.path_params["id"], self._model()["id"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        model = self.service.model
        assert model is not None
        size = model.size
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "tdjax",
            "task": model.task,
            "size": f"{size.width}x{size.height}",
            "num_frames": size.frames,
            "num_steps": model.sampler.num_steps,
            "prompts": list(model.prompts[:8]),
            "loras": list(self.service.loras()),
        }

    async def health(self, request: Request) -> Response:
        """Whether the web process lives."""
        return JSONResponse({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """Whether a job would begin now."""
        ready = self.service.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def show_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self._key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def describe(self, request: Request) -> Response:
        """The routes, for programs."""
        return JSONResponse(description())

    async def show_page(self, request: Request) -> Response:
        """For people."""
        headers = {"Content-Security-Policy": self.policy, "Cache-Control": "no-cache"}
        return Response(self.page, media_type="text/html", headers=headers)

    async def _full(self, request: Request, error: Full) -> Response:
        headers = {"Retry-After": str(self.service.retry_after())}
        return _error(429, error, "queue_full", headers)

    async def _no_store(self, request: Request, error: OperationalError) -> Response:
        note(f"a request could not be kept: {first_line(error)}")
        if self.service.store.db.is_file:
            return _unkept(first_line(error))
        why, fix = "it is away, or being restarted", "ask again after Retry-After seconds"
        said = TdjaxError("the store of jobs does not answer", why, fix)
        return _error(503, said, "store", {"Retry-After": "10"})


class _Guard:
    """Refuses what another site's page makes a browser send, and names that are not this
    server's."""

    def __init__(self, app, hosts: set[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            response: Response | None = None
            known = self.hosts is None or _name_of(host).lower() in self.hosts
            if not known and scope["path"] not in PROBES:
                why = "it answers to the names that it was started with"
                fix = "ask it by one of them, or start it with --allow_host NAME"
                error = TdjaxError("the server is not known under this name", why, fix)
                response = _error(421, error, "host")
            elif origin is not None and origin.partition("://")[2] != host:
                why, fix = "the Origin is not this server", "ask from your own backend"
                error = TdjaxError("requests of other sites' pages are refused", why, fix)
                response = _error(403, error, "origin")
            if response is not None:
                await response(scope, receive, send)
                return

        async def sending(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, sending)


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    return host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host


def content_policy(page: str) -> str:
    """What the page may do: run its own script and style, and ask this server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digests = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
        " connect-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _is_range(text: str) -> bool:
    """Whether a Range header can be read; others are as if they were not there (RFC 9110, 14.2)."""
    unit, _, ranges = text.partition("=")
    for each in ranges.split(","):
        match = re.fullmatch(r"\s*(?:([0-9]{1,15})-([0-9]{0,15})|-[0-9]{1,15})\s*", each)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            return False
    return unit.strip().lower() == "bytes"


async def _gone(request: Request) -> None:
    """Waits until the client has gone away."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)


# Errors as OpenAI's clients read them
# --------------------------------------------------------------------------------------------------


def _answer(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": body}, status, headers)


def _error(
    status: int,
    error: TdjaxError,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return _answer(status, spelled(error), code, headers)


def _unknown_model(given: Any, known: str) -> Unknown:
    return Unknown(
        f"model is {shown(given)}", f"the model here is {known}", "leave it away, or give this name"
    )


async def _no_route(request: Request, error: HTTPException) -> Response:
    """What the router itself refuses."""
    allowed, fix = (error.headers or {}).get("Allow"), "GET /openapi.json describes the routes"
    if allowed is not None:
        why = f"allowed: {allowed}"
        return _error(
            405, TdjaxError(f"{request.method} is not allowed here", why, fix), None, error.headers
        )
    why = "the API is under /v1, and the page is at /"
    return _error(error.status_code, TdjaxError("there is nothing here", why, fix))


async def _refused(request: Request, error: Refusal) -> Response:
    return _error(error.status, error, headers=error.headers)


async def _usage(request: Request, error: UsageError) -> Response:
    return _error(400, error, "invalid_value")


async def _conflict(request: Request, error: Conflict) -> Response:
    return _error(409, error, "idempotency")


async def _unwritable(request: Request, error: Exception) -> Response:
    why = getattr(error, "strerror", None)
    note(f"a request could not be kept: {why or error}")
    return _unkept(why or "its log says more")


def _unkept(why: str) -> Response:
    fix = "ask again after Retry-After seconds"
    error = TdjaxError("the server could not keep this on its disk", why, fix)
    return _error(503, error, "disk", {"Retry-After": "60"})


async def _fault(request: Request, error: Exception) -> Response:
    what, why = "the server failed; its log says more", "the fault is not the request's"
    return _error(500, TdjaxError(what, why, "tell who runs the server"), "internal")
