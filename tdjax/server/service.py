"""The queue at work: worker processes that are started, fed, watched and replaced, and what they
tell, handed on to whoever waits. All of it runs in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from tdjax.errors import TdjaxError
from tdjax.pipeline.request import ModelInfo
from tdjax.progress import say
from tdjax.server import store
from tdjax.server.asking import model_of
from tdjax.server.store import Job, Store

LINE = 2**20  # bytes of a line that a worker tells, at most
# Seconds until a worker that died is started again; doubled each time that it did not get ready.
SHORTEST, LONGEST = 0.5, 60.0
AGAIN = 60.0  # seconds until old videos, and jobs that could not be begun, are looked for again


@dataclasses.dataclass
class Progress:
    """How far a job is. percent: 0 to 100."""

    percent: int = 0
    stage: str = ""


class ModelRefused(TdjaxError):
    """The model cannot be opened: the worker's message, and its exit code."""


class Service:
    """Jobs of a store, made by worker processes.

    command: starts a worker; the server's own ends follow as a JSON word.
    devices: for each worker, the value of CUDA_VISIBLE_DEVICES, or None to leave it as it is.
    """

    def __init__(self, jobs: Store, command: list[str], devices: list[str | None]):
        self.store = jobs
        self.workers = [Worker(self, command, each) for each in devices]
        self.model: ModelInfo | None = None
        self.refused: ModelRefused | None = None
        self.fault: BaseException | None = None  # of this process: what it was doing is not known
        self.draining = False
        self.progress: dict[str, Progress] = {}
        self.listeners: dict[str, set[asyncio.Event]] = {}
        self.device_peak = 0  # bytes, of any worker
        self.seconds = 10.0  # that a job has lately taken
        self.on_end: Callable[[Job], None] = lambda job: None
        self.model_known = asyncio.Event()
        self._tasks: list[asyncio.Task] = []

    def start(self) -> None:
        """Takes up what an earlier server has left, and starts the workers."""
        done, again = self.store.recover()
        if done or again:
            note(f"{again} jobs that ran are queued again, {done} videos were complete already")
        self._tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        self._tasks.append(asyncio.create_task(self._look_again()))
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task) -> None:
        """The end of a job that cannot be written down (a full disk) ends the server: the next one
        finds in the store what was going on."""
        if not task.cancelled() and task.exception() is not None:
            self.fault = task.exception()
            self.model_known.set()

    async def stop(self, seconds: float) -> None:
        """Takes no more jobs, waits for those that run, and queues the rest again. seconds: to
        wait."""
        self.draining = True
        end = time.monotonic() + seconds
        while any(worker.jobs for worker in self.workers) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiting in list(self.listeners.values()):
            for event in waiting:
                event.set()

    async def _look_again(self) -> None:
        while True:
            try:
                self.store.expire()
            except (OSError, sqlite3.OperationalError) as error:
                note(f"an old video cannot be removed: {error}")
            self.feed()
            await asyncio.sleep(AGAIN)

    @property
    def ready(self) -> bool:
        """Whether a job that came now would begin without waiting for a process to start."""
        return not self.draining and any(worker.ready for worker in self.workers)

    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        return int(min(600, max(1, self.seconds / len(self.workers))))

    def feed(self) -> None:
        """Gives jobs that wait to workers that are free."""
        for worker in self.workers:
            worker.feed()

    def cancel(self, job: Job) -> bool:
        """Ends a job; False where it has ended already."""
        changed = self.store.cancel(job.id)
        for worker in self.workers:
            if job.id in worker.jobs:
                worker.send({"do": "cancel", "id": job.id})
        if changed:
            self.ended(job.id)
        return changed

    def delete(self, job: Job) -> None:
        """Ends a job if it has not ended, and removes it."""
        self.cancel(job)
        self.store.delete(job.id)
        self.tell(job.id)

    def ended(self, id: str) -> None:
        """Tells that a job has ended."""
        self.progress.pop(id, None)
        job = self.store.get(id)
        if job is not None:
            if job.status == store.COMPLETED:
                took = (job.completed_at or 0) - (job.started_at or 0)
                self.seconds += 0.2 * (took - self.seconds)
            self.on_end(job)
        self.tell(id)

    def tell(self, id: str) -> None:
        """Wakes whoever waits for news of a job."""
        for event in self.listeners.get(id, ()):
            event.set()

    async def news(self, id: str, heartbeat: float = 15.0) -> AsyncIterator[Job | None]:
        """The job now, whenever something has changed, and None where nothing has for a while. It
        ends after a job that has ended, one that was removed, and when the server stops."""
        event = asyncio.Event()
        self.listeners.setdefault(id, set()).add(event)
        try:
            while True:
                job = self.store.get(id)
                if job is None:
                    return
                yield job
                if job.status in store.ENDED:
                    return
                while not event.is_set():
                    if self.draining and not any(id in worker.jobs for worker in self.workers):
                        return
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(event.wait(), heartbeat)
                    if not event.is_set():
                        yield None
                event.clear()
        finally:
            self.listeners[id].discard(event)
            if not self.listeners[id]:
                del self.listeners[id]


class Worker:
    """One worker process after another."""

    def __init__(self, service: Service, command: list[str], devices: str | None):
        self.service, self.command, self.devices = service, command, devices
        self.process: asyncio.subprocess.Process | None = None
        self.ready = self.busy = False
        self.jobs: dict[str, Job] = {}  # that it has been given: one is made, others written
        self.begun: dict[str, float] = {}
        self.shape: str | None = None
        self.in_a_row = 0
        self.starts = 0

    async def run(self) -> None:
        """Starts a process whenever there is none, until this is cancelled."""
        pause = SHORTEST
        while True:
            try:
                await self._run_once()
            except ValueError as error:  # a line that is no JSON, or has no end
                note(f"a worker told what cannot be read: {error}")
            finally:
                was_ready, self.ready, self.busy = self.ready, False, False
                for job in list(self.jobs.values()):
                    self._give_back(job)
            if self.service.refused is not None:
                return
            self.service.feed()
            pause = SHORTEST if was_ready else min(pause * 2, LONGEST)
            note(f"a worker process ended; another one is started in {pause:.1f} s")
            await asyncio.sleep(pause)

    def _give_back(self, job: Job) -> None:
        """A job whose process is gone waits again, or has ended."""
        service = self.service
        self._drop(job.id)
        if service.store.give_back(job, counted=not service.draining):
            service.ended(job.id)
        else:
            service.tell(job.id)

    async def _run_once(self) -> None:
        environment = dict(os.environ)
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        self.starts += 1
        self.process = process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            limit=LINE,
            start_new_session=True,  # Ctrl-C is the server's, which lets jobs end
        )
        watch = asyncio.create_task(self._watch())
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                self._hear(json.loads(line))
            await process.wait()
        finally:
            watch.cancel()
            self.process, self.busy = None, True  # it takes no more jobs
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _watch(self) -> None:
        """Ends the process when a job takes longer than it may."""
        limit = self.service.store.limits.job_seconds
        while True:
            await asyncio.sleep(min(limit / 10, 10.0))
            late = [i for i, begun in self.begun.items() if time.monotonic() - begun > limit]
            if late and self.process is not None:
                self.process.kill()  # first: what follows can fail, as on a full disk
            fix = "ask for a smaller size, or fewer frames or steps"
            error = TdjaxError("the video took too long", f"{limit:g} seconds are allowed", fix)
            for id in late:
                if self.service.store.fail(self.jobs[id], "timeout", str(error)):
                    self.service.ended(id)
                self._drop(id)

    def feed(self) -> None:
        """Gives the next job to the process, if it has nothing to make."""
        service = self.service
        if not self.ready or self.busy or service.draining:
            return
        try:
            job = service.store.claim(self.shape if self.in_a_row < store.IN_A_ROW else None)
        except sqlite3.OperationalError as error:  # a full disk: the job waits
            note(f"no job can be begun: {error}")
            return
        if job is None:
            return
        self.in_a_row = self.in_a_row + 1 if job.shape == self.shape else 1
        self.shape, self.busy = job.shape, True
        self.jobs[job.id], self.begun[job.id] = job, time.monotonic()
        service.progress[job.id] = Progress()
        image = service.store.image(job.id)
        self.send(
            {
                "do": "make",
                "id": job.id,
                "request": job.request,
                "image": str(image) if image.is_file() else None,
                "video": str(service.store.video(job)),
                "thumbnail": str(service.store.thumbnail(job)),
            }
        )
        service.tell(job.id)

    def send(self, order: dict[str, Any]) -> None:
        """Writes an order to the process; one that has just died is noticed elsewhere."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def _drop(self, id: str) -> None:
        self.jobs.pop(id, None)
        self.begun.pop(id, None)
        self.service.progress.pop(id, None)

    def _hear(self, told: dict[str, Any]) -> None:
        """Acts on one line of the process."""
        service, event, id = self.service, told["event"], told.get("id", "")
        job = self.jobs.get(id)
        if event == "model":
            service.model = model_of(told["info"])
            service.model_known.set()
        elif event == "refused":
            # What could be opened once is tried again: files may be on a disk that comes back.
            if service.model is None:
                service.refused = ModelRefused(*told["message"].split("\n", 2))
                service.refused.exit_code = told["code"]
                service.model_known.set()
            else:
                note(told["message"])
        elif event == "ready":
            self.ready = True
            self.feed()
        elif job is None:  # one that was given up
            return
        elif event == "progress":
            service.progress[id] = Progress(told["progress"], told["stage"])
            service.tell(id)
        elif event == "made":
            self.busy = False
            self.feed()
        else:
            self._end(event, job, told)

    def _end(self, event: str, job: Job, told: dict[str, Any]) -> None:
        """A job has ended: "done", "failed" or "cancelled"."""
        service = self.service
        self._drop(job.id)
        if event == "done":
            service.device_peak = max(service.device_peak, told["result"].get("device_peak") or 0)
            counts = service.store.complete(job, told["result"])
        elif event == "failed":
            counts = service.store.fail(job, told["code"], told["message"])
        else:
            counts = False  # it was ended in the store when the client asked
        if counts:
            service.ended(job.id)
        if event != "done" and told.get("code") != "not_written":  # it was still being made
            self.busy = False
        if told.get("code") == "internal":
            self.busy = True  # the process takes no other one, and ends by itself
        self.feed()


def note(text: str) -> None:
    """One line for who runs the server."""
    say(f"tdjax: {text}")
