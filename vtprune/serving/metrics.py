"""What a server counts, for Prometheus."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from vtprune.serving.queue import Job, JobQueue

if TYPE_CHECKING:
    from vtprune.inference.report import Report

PARTS = ("media", "preprocess", "vision", "select", "prefill", "decode")
"""Of the seconds of a report; beside them "queue", from decoded media to the batch, and "total"."""
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """What a server counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        self.requests = counter(
            "vtprune_requests_total", "Requests by route and status", ["route", "status"]
        )
        self.tokens = counter(
            "vtprune_visual_tokens_total",
            "Visual tokens of prompts, before pruning and kept to the end",
            ["which"],
        )
        self.answer = counter("vtprune_answer_tokens_total", "Tokens of answers")
        self.seconds = Histogram(
            "vtprune_part_seconds",
            "Seconds of an answer by part; what a batch shares counts for each of its requests",
            ["part"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.waiting = gauge("vtprune_requests_waiting", "Requests in the queue")
        self.running = gauge("vtprune_requests_running", "Requests in the batch that runs")
        self.uploads = gauge("vtprune_upload_bytes", "Bytes of uploads that are kept")

    def count_answer(self, job: Job, report: Report) -> None:
        """Count an answer."""
        self.tokens.labels("before").inc(report.tokens.visual)
        self.tokens.labels("kept").inc(report.tokens.kept_after)
        self.answer.inc(report.tokens.answer)
        for part in PARTS:
            self.seconds.labels(part).observe(getattr(report.seconds, part))
        self.seconds.labels("queue").observe(job.began - job.ready)
        self.seconds.labels("total").observe(report.seconds.total)

    def text(self, queue: JobQueue, upload_bytes: int) -> bytes:
        """Return all counts in Prometheus' format."""
        self.waiting.set(queue.waiting)
        self.running.set(queue.running)
        self.uploads.set(upload_bytes)
        return generate_latest(self.registry)
