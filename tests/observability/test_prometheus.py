"""A run's numbers, asked for by a real scraper's HTTP request."""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from job.observability.prometheus import EVENTS, Metrics, name
from tests.jobs import finish, run, start

pytestmark = pytest.mark.process

SHORT = {"max_length": 128, "samples": 0, "batch_size": 4, "lora_r": 4, "eval_fraction": 0.1, "precision": "16bit"}


def _free_port():
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def _scraped(port: int, host: str = "127.0.0.1") -> dict[str, float]:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    assert all(family.documentation for family in families)
    return {sample.name: sample.value for family in families for sample in family.samples}


def _until(child: subprocess.Popen, port: int, metric: str) -> dict[str, float]:
    """The first scrape in which a metric is not 0 any more."""
    while child.poll() is None:
        try:
            found = _scraped(port)
        except urllib.error.URLError:
            found = {}
        if found.get(metric):
            return found
        time.sleep(0.05)
    raise AssertionError(f"the run ended before {metric} was seen")


def test_a_run_is_watched(tiny_model, rows, tmp_path):
    """While a run is in progress, step, loss and checkpoints are at /metrics under the names that alerts rely on."""
    port = _free_port()
    child = start(
        tmp_path,
        **SHORT,
        max_steps=60,
        checkpoint_steps=1,
        model=tiny_model,
        dataset=rows,
        output=tmp_path / "out",
        metrics_port=port,
    )
    try:
        found = _until(child, port, "finetune_job_checkpoint_step")
        assert found["finetune_job_step"] >= found["finetune_job_checkpoint_step"] >= 1
        assert found["finetune_job_max_steps"] == 60
        assert found["finetune_job_loss"] > 0
        assert abs(found["finetune_job_checkpoint_timestamp_seconds"] - time.time()) < 60
        assert found["finetune_job_run_info"] == 1
        if Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text():
            assert _scraped(port, "[::1]")["finetune_job_max_steps"] == 60
    finally:
        ended = finish(child)
    assert ended.code == 0


def test_a_port_that_is_taken(tiny_model, rows, tmp_path):
    """A port that somebody else has ends the run with 78 before anything is read."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ended = run(
            tmp_path, **SHORT, model=tiny_model, dataset=rows, output=tmp_path / "out", metrics_port=port, max_steps=1
        )
    assert ended.code == 78
    assert f"TUNE_METRICS_PORT={port}" in ended.event("run_failed")["message"]
    assert not [*(tmp_path / "out").glob("*")]


def test_every_metric_follows_its_event():
    """Each number of an event is shown under its metric's name as it was logged last, and not before its first time;
    other events change nothing."""
    metrics = Metrics()
    assert [family.name for family in metrics.registry.collect()] == ["finetune_job_run"]
    for number in (1.0, 2.0):
        for event, fields in EVENTS.items():
            metrics.observe({"event": event, "run_id": "a", "attempt": 3, **dict.fromkeys(fields, number)})
    metrics.observe({"event": "sample", "step": 7.0})
    for event, fields in EVENTS.items():
        for field in fields:
            assert metrics.registry.get_sample_value(name(event, field)) == 2.0
    assert metrics.registry.get_sample_value("finetune_job_run_info", {"run_id": "a", "attempt": "3"}) == 1.0
