"""The queue at work: worker processes that are started, fed, watched and replaced, and what they
tell, handed on to whoever waits. All of it runs in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from tdjax.errors import TdjaxError
from tdjax.pipeline.request import ModelInfo
from tdjax.progress import say
from tdjax.server import store
from tdjax.server.asking import model_of
from tdjax.server.loras import arguments_of, lora_files
from tdjax.server.store import Job, Store
from tdjax.server.tables import OperationalError, first_line
from tdjax.server.webhooks import Webhooks

LINE = 2**20  # bytes of a line that a worker tells, at most
# Seconds until a worker that died is started again; doubled each time that it did not get ready.
SHORTEST, LONGEST = 0.5, 60.0
AGAIN = 60.0  # seconds until old videos, and jobs that could not be begun, are looked for again
LOOK = 1.0  # seconds until a server looks again for what others of its store have done


@dataclasses.dataclass
class Progress:
    """How far a job is. percent: 0 to 100. preview: the number of the picture that clients can
    read; 0: none. told: of the last one that the worker told of."""

    percent: int = 0
    stage: str = ""
    preview: int = 0
    told: int = 0


class Service:
    """Jobs of a store, made by worker processes.

    command: starts a worker; the server's own ends follow as a JSON word.
    devices: for each worker, the value of CUDA_VISIBLE_DEVICES, or None to leave it as it is.
    loras: the folder of those that requests may name. webhooks: tell clients of jobs that ended.
    """

    def __init__(
        self,
        jobs: Store,
        command: list[str],
        devices: list[str | None],
        *,
        loras: Path | None = None,
        webhooks: Webhooks | None = None,
    ):
        self.store, self.folder_of_loras, self.webhooks = jobs, loras, webhooks
        self.workers = [Worker(self, command, each) for each in devices]
        self.model: ModelInfo | None = None
        self.refused: TdjaxError | None = None  # of the model, with the worker's exit code
        self.fault: BaseException | None = None  # of this process: what it was doing is not known
        self.draining = False
        self.progress: dict[str, Progress] = {}
        self.listeners: dict[str, set[asyncio.Event]] = {}
        self.device_peak = 0  # bytes, of any worker
        self.seconds = 10.0  # that a job has lately taken
        self.on_end: Callable[[Job], None] = lambda job: None
        self.model_known = asyncio.Event()
        self.publishing: dict[str, Job] = {}  # made and on their way to a store of files
        self._tasks: list[asyncio.Task] = []
        self._errands: set[asyncio.Task] = set()  # that end by themselves
        self._lease_due = 0.0
        self._told: dict[str, tuple] = {}  # what other servers know of jobs that run here
        self._seen: dict[str, Job | None] = {}  # jobs that somebody listens to

    def start(self) -> None:
        """Takes up what an earlier server has left, and starts the workers."""
        if self.store.shared:
            self.store.keep_lease()
        self._recover()
        self.store.sweep()
        self._tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        self._tasks.append(asyncio.create_task(self._look_again()))
        if self.store.shared:
            self._tasks.append(asyncio.create_task(self._look_around()))
        if self.webhooks is not None:
            self._tasks.append(asyncio.create_task(self.webhooks.run()))
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    def _recover(self) -> None:
        done, again = self.store.recover()
        if done or again:
            note(f"{again} jobs that ran are queued again, {done} videos were complete already")

    def errand(self, work: Coroutine[Any, Any, None]) -> None:
        """Has something done beside everything else."""
        task = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
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
        working = lambda: self.publishing or any(worker.jobs for worker in self.workers)
        while working() and time.monotonic() < end:
            await asyncio.sleep(0.05)
        tasks = [*self._tasks, *self._errands]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in self.publishing.values():
            self.store.give_back(job, counted=False)
        if self.store.shared:
            self.store.leave()
        for waiting in list(self.listeners.values()):
            for event in waiting:
                event.set()

    async def _look_again(self) -> None:
        while True:
            try:
                self.store.expire()
            except (OSError, OperationalError) as error:
                note(f"an old video cannot be removed: {first_line(error)}")
            self.feed()
            await asyncio.sleep(AGAIN)

    async def _look_around(self) -> None:
        while True:
            try:
                self._share()
            except OperationalError as error:
                note(f"the store of jobs does not answer: {first_line(error)}")
            await asyncio.sleep(LOOK)

    def _share(self) -> None:
        """Tells other servers of the store how far jobs are here, and finds what those have done:
        jobs that were added, ended or taken over, and servers that have died."""
        if time.monotonic() >= self._lease_due:
            self.store.keep_lease()
            self._lease_due = time.monotonic() + self.store.limits.lease / 4
            self._recover()
        running = [(worker, job) for worker in self.workers for job in worker.jobs.values()]
        told = {}
        for _, job in running:
            now = self.progress.get(job.id, Progress())
            told[job.id] = job.attempts, now.percent, now.stage, bool(now.preview)
            if self._told.get(job.id) != told[job.id]:
                self.store.report(job, *told[job.id][1:])
        self._told = told
        known = self.store.many({job.id for _, job in running} | set(self.listeners))
        for worker, job in running:
            now = known.get(job.id)
            if now is None or (now.status, now.attempts) != (store.RUNNING, job.attempts):
                worker.send({"do": "cancel", "id": job.id})
        before, self._seen = self._seen, {id: known.get(id) for id in self.listeners}
        for id, now in self._seen.items():
            if before.get(id, now) != now:
                self.tell(id)
        self.feed()

    @property
    def ready(self) -> bool:
        """Whether a job that came now would begin without waiting for a process to start."""
        return not self.draining and any(worker.ready for worker in self.workers)

    def loras(self) -> dict[str, dict[str, str]]:
        """Returns the LoRA files that requests may name now, see `lora_files`."""
        return lora_files(self.folder_of_loras)

    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        return int(min(600, max(1, self.seconds / len(self.workers))))

    def feed(self) -> None:
        """Gives jobs that wait to workers that are free, first to those with nothing to end."""
        for worker in sorted(self.workers, key=lambda worker: len(worker.jobs)):
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
            if self.webhooks is not None and "webhook" in job.request:
                self.webhooks.wake.set()
        self.tell(id)

    def heard(self, job: Job, percent: int, stage: str, preview: int) -> None:
        """Tells how far a job is. preview: the number of its thumbnail, which is renewed."""
        progress = self.progress.setdefault(job.id, Progress())
        progress.percent, progress.stage = percent, stage
        if preview > progress.told:
            progress.told = preview
            if self.store.storage is None:
                progress.preview = preview
            else:
                self.errand(self._publish_preview(job, progress, preview))
        self.tell(job.id)

    async def _publish_preview(self, job: Job, progress: Progress, number: int) -> None:
        try:
            await asyncio.to_thread(self.store.publish, [self.store.thumbnail(job)])
        except Exception as error:  # whatever a library of a store raises; the video goes on
            note(f"the preview of {job.id} cannot be stored: {error}")
        else:
            progress.preview = max(progress.preview, number)
            self.tell(job.id)

    def made(self, job: Job, result: dict[str, Any]) -> None:
        """Ends a job whose video has been written."""
        if self.store.shared or self.store.storage is not None:
            self.publishing[job.id] = job
            self.progress[job.id] = Progress(98, "store", 1)
            self.errand(self._publish(job, result))
        elif self.store.complete(job, result):
            self.ended(job.id)

    async def _publish(self, job: Job, result: dict[str, Any]) -> None:
        try:
            paths = [self.store.thumbnail(job), self.store.video(job)]
            await asyncio.to_thread(self.store.publish, paths)
        except Exception as error:  # the same
            note(f"{job.id} cannot be stored: {error}")
            why, fix = "where videos are kept did not take it", "ask for the video anew"
            error = TdjaxError("the video could not be stored", why, fix)
            message = str(error)
            counts = await self._settled(lambda: self.store.fail(job, "not_written", message))
        else:
            counts = await self._settled(lambda: self.store.complete(job, result))
        del self.publishing[job.id]
        self.progress.pop(job.id, None)
        if counts:
            self.ended(job.id)

    async def _settled(self, end: Callable[[], bool]) -> bool:
        """Ends a job, as soon as a database on another host answers: it comes back by itself, as a
        full disk does not."""
        while True:
            try:
                return end()
            except OperationalError as error:
                if self.store.db.is_file:
                    raise
                note(f"the end of a job cannot be written down yet: {first_line(error)}")
            await asyncio.sleep(LOOK)

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
        self.making = ""  # the job that keeps it busy
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
                self.making = ""
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
        except OperationalError as error:  # a full disk: the job waits
            note(f"no job can be begun: {first_line(error)}")
            return
        if job is None:
            return
        if job.id in self.jobs or job.id in service.publishing:
            # An earlier beginning, which was taken from here and is still being written.
            service.store.give_back(job, counted=False)
            return
        self.in_a_row = self.in_a_row + 1 if job.shape == self.shape else 1
        self.shape, self.busy, self.making = job.shape, True, job.id
        self.jobs[job.id], self.begun[job.id] = job, time.monotonic()
        service.progress[job.id] = Progress()
        if service.store.storage is None or "fit" not in job.request:
            self._begin(job)
        else:
            service.errand(self._fetch_and_begin(job))
        service.tell(job.id)

    def _begin(self, job: Job) -> None:
        jobs = self.service.store
        image = jobs.image(job.id)
        self.send(
            {
                "do": "make",
                "id": job.id,
                "request": job.request,
                "image": str(image) if image.is_file() else None,
                "loras": arguments_of(job.request.get("lora", ()), self.service.folder_of_loras),
                "video": str(jobs.video(job)),
                "thumbnail": str(jobs.thumbnail(job)),
            }
        )

    async def _fetch_and_begin(self, job: Job) -> None:
        """Begins a job whose image lies elsewhere, unless the process has ended meanwhile."""
        process, jobs = self.process, self.service.store
        try:
            await asyncio.to_thread(jobs.fetch, jobs.image(job.id))
        except Exception as error:  # whatever a library of a store raises
            note(f"the image of {job.id} cannot be read: {error}")
            why, fix = "where images are kept does not have it", "ask for the video anew"
            self._end(
                "failed",
                job,
                {"code": "no_image", "message": str(TdjaxError("no image", why, fix))},
            )
        else:
            if self.process is process and self.jobs.get(job.id) is job:
                self._begin(job)

    def send(self, order: dict[str, Any]) -> None:
        """Writes an order to the process; one that has just died is noticed elsewhere."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def _free_of(self, id: str) -> None:
        """The process can be given another job, if it was this one that it made."""
        if id == self.making:
            self.busy, self.making = False, ""

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
                service.refused = TdjaxError(*told["message"].split("\n", 2))
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
            service.heard(job, told["progress"], told["stage"], told["preview"])
        elif event == "made":
            self._free_of(id)
            self.feed()
        else:
            self._end(event, job, told)

    def _end(self, event: str, job: Job, told: dict[str, Any]) -> None:
        """A job has ended: "done", "failed" or "cancelled"."""
        service = self.service
        self._drop(job.id)
        if event == "done":
            service.device_peak = max(service.device_peak, told["result"].get("device_peak") or 0)
            service.made(job, told["result"])
            counts = False  # it is told there
        elif event == "failed":
            counts = service.store.fail(job, told["code"], told["message"])
        else:
            counts = False  # it was ended in the store by who had it cancelled
        if counts:
            service.ended(job.id)
        self._free_of(job.id)
        if told.get("code") == "internal":
            self.busy = True  # the process takes no other one, and ends by itself
        self.feed()


def note(text: str) -> None:
    """One line for who runs the server."""
    say(f"tdjax: {text}")
