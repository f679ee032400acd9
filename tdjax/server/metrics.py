"""What Prometheus reads of a server."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

from tdjax.server.service import Service
from tdjax.server.store import COMPLETED, Job

BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counters of one server, and gauges that are read from its store when somebody asks."""

    def __init__(self, service: Service):
        self.service, self.registry = service, CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.jobs = Counter(
            "tdjax_jobs", "Jobs that have ended", ["status"], registry=self.registry
        )
        self.stages = Histogram(
            "tdjax_stage_seconds",
            "Seconds of the stages of a video",
            ["stage"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.took = Histogram(
            "tdjax_job_seconds",
            "Seconds from a job's coming to its video",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self):
        """The gauges."""
        jobs = GaugeMetricFamily("tdjax_jobs_stored", "Jobs in the store", labels=["status"])
        for status, count in self.service.store.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        workers = self.service.workers
        ready = sum(worker.ready for worker in workers)
        yield GaugeMetricFamily("tdjax_workers_ready", "Worker processes that are ready", ready)
        starts = sum(worker.starts for worker in workers)
        peak = self.service.device_peak
        yield GaugeMetricFamily("tdjax_device_peak_bytes", "Most memory of a device in use", peak)
        yield GaugeMetricFamily("tdjax_workers_started", "Worker processes started so far", starts)

    def ended(self, job: Job) -> None:
        """Counts a job that has ended."""
        self.jobs.labels(job.status).inc()
        if job.status == COMPLETED and job.completed_at is not None:
            self.took.observe(job.completed_at - job.created_at)
        for stage, seconds in ((job.result or {}).get("timings") or {}).items():
            self.stages.labels(stage.partition(":")[0]).observe(seconds)

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)
