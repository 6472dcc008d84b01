"""The edges of a whole run: what it contacts, what a terminal shows, what refused credentials do."""

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
import time

import boto3
import pytest
from huggingface_hub import ModelCard

from tests.hub_server import COMMIT, serve_hub
from tests.jobs import ROOT, run

pytestmark = pytest.mark.process

SHORT = {"max_steps": 2, "max_length": 128, "samples": 1, "batch_size": 4, "lora_r": 4, "eval_fraction": 0.1}


@pytest.fixture
def trap():
    """A proxy that answers nothing and remembers who called."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(1)
                    calls.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls


def test_nothing_reaches_the_network(trap, tiny_model, rows, tmp_path):
    """With model, data and output on disk a run contacts nobody: a proxy for everything sees no call."""
    proxy, calls = trap
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy)
    # The tests' environment keeps only some names; these are given as they are.
    ended = run(
        tmp_path, **SHORT, **proxies, model=tiny_model, dataset=rows, output=tmp_path / "out", precision="16bit"
    )
    assert ended.code == 0
    assert calls == []


def test_a_terminal_gets_lines_and_a_bar(tiny_model, rows, tmp_path):
    """On a terminal the log is readable lines and a progress bar, not JSON."""
    primary, secondary = pty.openpty()
    (tmp_path / "scratch").mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TUNE_")},
        **{f"TUNE_{name.upper()}": str(value) for name, value in SHORT.items()},
        "TUNE_MODEL": str(tiny_model),
        "TUNE_DATASET": str(rows),
        "TUNE_OUTPUT": str(tmp_path / "out"),
        "TMPDIR": str(tmp_path / "scratch"),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "job"], cwd=ROOT, env=environment, stdin=secondary, stdout=secondary, stderr=secondary
    )
    os.close(secondary)
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", _read(primary)).decode()
    assert child.wait(timeout=10) == 0
    assert re.search(r"\d\d:\d\d:\d\d dataset ready +rows=", text)
    assert re.search(r"training .*2/2", text)
    assert "run complete" in text
    assert '{"timestamp"' not in text


def _read(primary: int) -> bytes:
    """Everything until the other side closes."""
    data, end = b"", time.monotonic() + 200
    while time.monotonic() < end:
        ready, _, _ = select.select([primary], [], [], 1)
        if ready:
            try:
                chunk = os.read(primary, 65536)
            except OSError:  # how a pseudo-terminal says that nobody is there any more
                break
            data += chunk
    os.close(primary)
    return data


def test_refused_credentials_exit_77(rclone, tiny_model, rows, tmp_path):
    """Refused credentials end the run with 77 when the patience is over, saying what was tried, without the secret."""
    started = time.monotonic()
    ended = run(
        tmp_path,
        **SHORT,
        model=tiny_model,
        dataset=rows,
        output="s3://some-bucket/runs",
        AWS_ENDPOINT_URL_S3=rclone.endpoint,
        AWS_ACCESS_KEY_ID="wrong-key",
        AWS_SECRET_ACCESS_KEY="wrong-secret-value",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        storage_patience_minutes=0.05,
    )
    assert time.monotonic() - started < 60
    assert ended.code == 77
    failed = ended.event("run_failed")
    assert "some-bucket" in failed["message"]
    assert rclone.endpoint in failed["message"]
    assert failed["remedy"]
    assert "wrong-secret-value" not in str(ended.lines)


def test_latest_moves_on(moto, tiny_model, rows, tmp_path):
    """Runs with other settings get other default ids under one output, and `latest.json` names the last."""
    environment = {
        "AWS_ENDPOINT_URL_S3": moto,
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=moto, aws_access_key_id="any", aws_secret_access_key="any", region_name="us-east-1"
    )
    client.create_bucket(Bucket="latest-tests")
    ids = []
    for number in (1, 2):
        place = tmp_path / str(number)
        place.mkdir()
        settings = {**SHORT, **environment, "model": tiny_model, "dataset": rows, "output": "s3://latest-tests/x"}
        ended = run(place, **settings, seed=number)
        assert ended.code == 0
        ids.append(ended.event("run_complete")["run_id"])
    body = client.get_object(Bucket="latest-tests", Key="x/latest.json")["Body"].read()
    assert ids[0] != ids[1]
    assert json.loads(body)["run_id"] == ids[1]


def test_model_and_data_from_a_hub(tiny_model, rows, tmp_path):
    """A hub's model and dataset train, with the commit on record; a gated model ends with 77 and the page of its
    licence."""
    model = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    data = {"data/train.jsonl": rows.read_bytes(), "README.md": b"# rows"}
    with serve_hub({"org/tiny": model, "org/rows": data}) as hub:
        settings = {**SHORT, "dataset": "hf://datasets/org/rows", "output": tmp_path / "out"}
        settings |= {"HF_ENDPOINT": hub.endpoint, "model": "org/tiny", "run_id": "hub"}
        assert run(tmp_path, **settings).code == 0
        pinned = json.loads((tmp_path / "out/hub/inputs.json").read_text())
        assert pinned["model_revision"] == COMMIT
        card = (tmp_path / "out/hub/adapter/README.md").read_text()
        assert ModelCard(card).data.base_model == "org/tiny"
        assert COMMIT in card
        again = run(tmp_path, **settings)
        assert (again.code, again.lines[-1]["event"]) == (0, "already_complete")

        hub.gated.add("org/tiny")
        refused = run(tmp_path, **{**settings, "run_id": "gated", "model": "org/tiny@main"})
    assert refused.code == 77
    assert f"{hub.endpoint}/org/tiny" in str(refused.event("run_failed"))
