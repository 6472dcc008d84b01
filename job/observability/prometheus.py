"""The run's numbers for Prometheus, at `/metrics` for as long as the run lasts.

It knows the log's events, and shows the newest of each as gauges; it measures nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Info, start_http_server

from job.observability import logs
from job.runtime.errors import ConfigError

PREFIX = "finetune_job_"
COMMITTED = PREFIX + "checkpoint_timestamp_seconds"
EVENTS: Mapping[str, Mapping[str, str]] = {
    "train_progress": {
        "step": "Optimizer steps done.",
        "max_steps": "Optimizer steps of the whole run.",
        "loss": "Training loss of the newest step.",
        "learning_rate": "Learning rate of the newest step.",
        "grad_norm": "Norm of the gradients before clipping.",
        "tokens_per_second": "Tokens trained on per second, padding excluded.",
        "eta_seconds": "Estimated seconds of training that are left.",
        "gpu_memory_allocated_bytes": "GPU memory in tensors now.",
        "gpu_memory_reserved_bytes": "GPU memory held by the allocator now.",
        "gpu_memory_peak_bytes": "Most GPU memory held so far.",
        "gpu_memory_total_bytes": "Total memory of the GPU.",
        "host_memory_rss_bytes": "Memory of the process on the host.",
    },
    "evaluated": {"eval_loss": "Loss on the held-out rows."},
    "checkpoint_committed": {
        "step": "Step of the newest committed checkpoint.",
        "stall_seconds": "How long training waited for it.",
        "upload_seconds": "How long its upload took.",
    },
}
"""Fields of log events that are shown: by event, by field, with what they mean."""


class Metrics:
    """The gauges of one run, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._info = Info(PREFIX + "run", "Which run this is.", registry=self.registry)
        self._gauges: dict[str, Gauge] = {}

    def observe(self, event: Mapping[str, Any]) -> None:
        """Set the gauges of a log event."""
        kind = event["event"]
        if kind not in EVENTS:
            return
        for field, meaning in EVENTS[kind].items():
            self._gauge(name(kind, field), meaning).set(event[field])
        if kind == "checkpoint_committed":
            self._gauge(COMMITTED, "When the newest checkpoint was committed.").set(time.time())
        self._info.info({field: str(event.get(field, "")) for field in ("run_id", "attempt")})

    def _gauge(self, metric: str, meaning: str) -> Gauge:
        """A gauge exists from its first value on: a 0 that was never measured would trigger alerts."""
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(metric, meaning, registry=self.registry)
        return self._gauges[metric]


def name(event: str, field: str) -> str:
    """The metric's name; those of checkpoints say so."""
    return PREFIX + ("checkpoint_" if event == "checkpoint_committed" else "") + field


def serve(port: int | None) -> Metrics | None:
    """Listen on all addresses, IPv6 and IPv4, in a thread that ends with the process; None for no port.

    Raises:
        ConfigError: the port is not available.
    """
    if port is None:
        return None
    metrics = Metrics()
    try:
        try:
            start_http_server(port, addr="::", registry=metrics.registry)  # IPv4, too
        except OSError:  # a machine without IPv6
            start_http_server(port, addr="0.0.0.0", registry=metrics.registry)  # noqa: S104 - scrapers come from outside
    except OSError as error:
        raise ConfigError(
            f"TUNE_METRICS_PORT={port} is not available: {error}.", remedy="Choose a free port."
        ) from None
    logs.observe(metrics.observe)
    return metrics
