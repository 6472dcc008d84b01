"""Models and datasets come from a hub, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import psutil
import pytest
from structlog.testing import capture_logs

from job.inputs import hub_failures, hub_worker
from job.inputs.data_files import choose
from job.inputs.dataset_card import declared_splits
from job.inputs.hub import Request, Unreachable, fetch_dataset, fetch_model
from job.runtime.child import Failed
from job.runtime.errors import AccessDeniedError, ConfigError, DataError, StorageError
from tests.certificates import make_certificates
from tests.hub_server import COMMIT, Hub, serve_hub
from tests.misbehaving import Answer, serve_answers
from tests.servers import serve_proxy

pytestmark = pytest.mark.process

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.00.pth": b"a pickle",
    "onnx/model.onnx": b"another format",
    "README.md": b"# a model",
}
PICKLED = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
DATA = {"README.md": b"# data", "data/train-00000-of-00001.jsonl": b"{}\n", "data/test-00000-of-00001.jsonl": b"{}\n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve_hub({"org/model": MODEL, "org/pickled": PICKLED, "org/data": DATA}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_model(hub: Hub, tmp_path: Path) -> None:
    """A model comes as safetensors, configuration, tokenizer and template, with its commit; once."""
    found = fetch_model("org/model", tmp_path / "model")
    assert ("org/model", COMMIT) == (found.name, found.commit)
    assert ("chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json") == found.files
    for name in found.files:
        assert MODEL[name] == (found.path / name).read_bytes()
    assert set(found.files) == set(hub.resolved)
    hub.resolved.clear()
    assert found == fetch_model(f"org/model@{COMMIT}", tmp_path / "model")
    assert hub.resolved == []


def test_dataset(hub: Hub, tmp_path: Path) -> None:
    """A dataset's split comes as its data files; training data is `train` where nothing else is said."""
    found = fetch_dataset("hf://datasets/org/data@main:test", tmp_path / "test")
    assert ("data/test-00000-of-00001.jsonl",) == found.files
    assert (found.path / found.files[0]).read_bytes() == b"{}\n"
    found = fetch_dataset("hf://datasets/org/data", tmp_path / "train")
    assert ("data/train-00000-of-00001.jsonl",) == found.files


def test_pickles_are_refused(hub: Hub, tmp_path: Path) -> None:
    """A model whose weights are only pickles is refused by name, and not downloaded."""
    with pytest.raises(DataError, match=r"org/pickled.*pytorch_model\.bin"):
        fetch_model("org/pickled", tmp_path)
    assert hub.resolved == []


def test_gated(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated model without a token is refused with the page of its licence; with a token it is read."""
    hub.gated.add("org/model")
    with pytest.raises(AccessDeniedError) as caught:
        fetch_model("org/model", tmp_path)
    assert f"{hub.endpoint}/org/model" in caught.value.remedy
    assert "No token was found: looked at HF_TOKEN" in caught.value.message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_model("org/model", tmp_path).commit == COMMIT


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("org/nothing", DataError, "org/nothing"),
        ("org/model@v9", DataError, "v9"),
        ("no name at all", ConfigError, "no name"),
        ("org/model:train", ConfigError, "org/model:train"),
    ],
)
def test_missing(hub: Hub, tmp_path: Path, name: str, error: type[Exception], text: str) -> None:
    """A repository or revision that does not exist is the data's fault, a malformed name the configuration's."""
    with pytest.raises(error, match=text):
        fetch_model(name, tmp_path)


def test_outage(hub: Hub, tmp_path: Path) -> None:
    """A hub that fails for a while is waited for, with a line in the log."""
    hub.failing = 1
    with capture_logs() as logs:
        assert fetch_model("org/model", tmp_path, patience_seconds=60).commit == COMMIT
    assert ["storage_retry"] == [entry["event"] for entry in logs if entry["log_level"] == "warning"]


def test_unreachable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the patience an unreachable hub is a storage error that names the repository."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="org/model"):
        fetch_model("org/model", tmp_path, patience_seconds=0)


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is offline gets what the cache holds, or hears at once that it holds nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE"):
        fetch_model("org/model", tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    program = "import huggingface_hub as h; h.snapshot_download('org/model')"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ), capture_output=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = fetch_model("org/model", tmp_path)
    assert COMMIT == found.commit
    assert (found.path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    (found.path / "model.safetensors").resolve().unlink()
    with pytest.raises(StorageError, match="does not hold org/model"):  # the library sees that the link is broken
        fetch_model("org/model", tmp_path)


def test_offline_with_two_names_of_one_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps files of the same content once; each name counts."""
    hub.repositories["org/data"] = {"train/a.jsonl": b"{}\n", "train/b.jsonl": b"{}\n", "test/a.jsonl": b"{}\n"}
    program = "import huggingface_hub as h; h.snapshot_download('org/data', repo_type='dataset')"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ), capture_output=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = fetch_dataset("hf://datasets/org/data", tmp_path, side="training", hold_out=True)
    assert (found.files, found.held_out) == (("train/a.jsonl", "train/b.jsonl"), ("test/a.jsonl",))


def test_child_ends_with_its_parent(hub: Hub, tmp_path: Path) -> None:
    """When the parent is killed in the middle of a download, nothing of it continues."""
    hub.hang = True
    program = (
        "import sys, pathlib; from job.inputs.hub import fetch_model; "
        "fetch_model('org/model', pathlib.Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        child = _wait_for(lambda: next(iter(psutil.Process(parent.pid).children()), None))
        _wait_for(child.net_connections)  # it has begun to ask
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: not _alive(child))


def test_the_worker_gets_the_hubs_credentials_only(hub: Hub, tmp_path: Path) -> None:
    """The process that downloads has what the hub needs, and no other credential."""
    hub.hang = True
    needed = {"HF_TOKEN": "hf_needed", "ALL_PROXY": "http://u:needed@127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN_WRITE", "KAGGLE_KEY")
    environment = {**os.environ, **needed, **dict.fromkeys(names, "planted"), "DB": "pg://u:planted@h"}
    program = "import pathlib, sys; from job.inputs.hub import fetch_model; "
    program += "fetch_model('org/model', pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)
    try:
        child = _wait_for(lambda: next(iter(psutil.Process(parent.pid).children()), None))
        found = _wait_for(lambda: "job.inputs.hub_worker" in child.cmdline() and child.environ())
    finally:
        parent.kill()
        parent.wait()
    assert needed.items() <= found.items()
    assert "planted" not in str(found)


def _wait_for(condition: object) -> psutil.Process:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(psutil.Error):
            if found := condition():  # type: ignore[operator]
                return found  # type: ignore[no-any-return]
        time.sleep(0.05)
    raise TimeoutError


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


BAD = [
    # (what the hub answers, exit code, words of the message, words of the remedy, what is done about it)
    (Answer.page(), 78, "not a hub", "HF_ENDPOINT", "briefly"),
    (Answer(body=b"[]"), 78, "not a hub", "login page", "briefly"),
    (Answer(status=404), 78, "rejected", "HF_ENDPOINT", "briefly"),
    (Answer.page(403), 77, "not the hub", "firewall", "once"),
    (Answer(status=403), 77, "does not exist or is private", "HF_TOKEN", "once"),
    (Answer(status=407), 77, "proxy asks", "HTTPS_PROXY", "once"),
    (Answer(status=429), 74, "429", "again", "long"),
    (Answer.page(502), 74, "502", "again", "long"),
    (Answer(status=501), 78, "rejected", "HF_ENDPOINT", "briefly"),
]
REQUEST = Request(kind="model", repo="org/model", revision=None, split=None, directory="/nowhere")


def _answered(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> Failed | Unreachable:
    """What the worker would send, in this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    huggingface_hub.close_session()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        hub_worker._download(REQUEST)
    huggingface_hub.close_session()
    answer = hub_failures.answer(REQUEST, caught.value)
    assert isinstance(answer, Failed | Unreachable)
    return answer


@pytest.mark.parametrize(
    ("answer", "code", "says", "remedy", "tried"), BAD, ids=[f"{row[0].status}-{row[1]}" for row in BAD]
)
def test_a_hub_that_misbehaves(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: Answer, code: int, says: str, remedy: str, tried: str
) -> None:
    """Each reply ends with its code; what cannot get better is not waited for."""
    with serve_answers(lambda *_: answer) as server:
        found = _answered(monkeypatch, server.endpoint)
    ended = Failed(kind=found.kind, message=found.message, remedy=found.remedy).error()
    assert (ended.exit_code, says in ended.message, remedy in ended.remedy) == (code, True, True), ended
    assert tried == ("once" if isinstance(found, Failed) else "briefly" if found.brief else "long")


@pytest.mark.parametrize(
    ("variables", "endpoint", "says", "remedy"),
    [
        ({}, "127.0.0.1:9", "not a URL", "HF_ENDPOINT"),
        ({"HF_TOKEN": "hf_“quoted”"}, "http://127.0.0.1:9", "HTTP does not allow", "HF_TOKEN"),
        ({"HTTP_PROXY": "socks5://127.0.0.1:9"}, "http://hub.invalid", "SOCKS", "http://host:port"),
    ],
    ids=["no scheme", "a token with quotes", "a SOCKS proxy"],
)
def test_settings_of_the_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], endpoint: str, says: str, remedy: str
) -> None:
    """A mistake in them ends with 78 at once; the token is not shown."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = _answered(monkeypatch, endpoint)
    assert isinstance(found, Failed), found
    assert (found.kind, says in found.message, remedy in found.remedy) == ("config", True, True), found
    assert "quoted" not in found.message


def test_a_ca_file_of_the_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is named with its variable, by a real process, without a second try."""
    monkeypatch.setenv("SSL_CERT_FILE", "/no/ca.pem")
    with pytest.raises(ConfigError, match=r"SSL_CERT_FILE=/no/ca\.pem"):
        fetch_model("org/model", tmp_path / "model", patience_seconds=600)


def test_what_is_no_hub_is_waited_for_briefly(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may be a machine that is just starting; then the mistake is what is reported."""
    monkeypatch.setattr("job.inputs.hub.BRIEF_SECONDS", 0.1)
    with serve_answers(lambda *_: Answer.page()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        with pytest.raises(ConfigError, match="not a hub"):
            fetch_model("org/model", tmp_path / "model", patience_seconds=600)
    assert server.seen


def test_a_hub_with_a_certificate_of_a_private_ca(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable that the hub's library reads is named."""
    made = make_certificates(tmp_path / "made")
    with serve_proxy("http://127.0.0.1:9", lambda _: None, tls=made) as endpoint:
        found = _answered(monkeypatch, endpoint)
    assert (found.kind, "not trusted" in found.message, "SSL_CERT_FILE" in found.remedy) == ("config", True, True)


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/validation-0.parquet"]
HEADER = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "raw/*.jsonl"
  - split: held_out
    path: [raw/extra/**, other.jsonl]
- config_name: small
  data_files: small.jsonl
---
# text
"""


def _files_of(split: str | None, names: list[str], readme: str) -> list[str]:
    place = "hf://datasets/org/data"
    return list(choose(place, names, split=split, declared=declared_splits(place, readme.encode(), names)).files)


@pytest.mark.parametrize(
    ("split", "names", "readme", "expected"),
    [
        pytest.param("train", SHARDS, "", SHARDS[:2], id="shards"),
        pytest.param("validation", SHARDS, "", SHARDS[2:], id="another split"),
        pytest.param(None, SHARDS, "", SHARDS[:2], id="train by default"),
        pytest.param("validation", ["dev.csv", "train.csv"], "", ["dev.csv"], id="the hub's other words"),
        pytest.param(
            "train", ["data/train/a.json.gz", "data/test/a.json.gz"], "", ["data/train/a.json.gz"], id="folders"
        ),
        pytest.param(None, ["all.jsonl.zst", "README.md"], "", ["all.jsonl.zst"], id="no splits"),
        pytest.param(None, ["test.jsonl"], "", ["test.jsonl"], id="the only split"),
        pytest.param(None, ["a.jsonl", "dataset_infos.json", ".x/b.jsonl"], "", ["a.jsonl"], id="not data"),
        pytest.param("train", ["raw/a.jsonl", "raw/b/c.jsonl", "x.jsonl"], HEADER, ["raw/a.jsonl"], id="declared"),
        pytest.param(
            "held_out",
            ["raw/extra/b/c.jsonl", "other.jsonl", "raw/a.jsonl"],
            HEADER,
            ["raw/extra/b/c.jsonl", "other.jsonl"],
            id="declared list",
        ),
    ],
)
def test_splits(split: str | None, names: list[str], readme: str, expected: list[str]) -> None:
    """A split is what the README declares, else what the file names say."""
    assert sorted(expected) == _files_of(split, names, readme)


@pytest.mark.parametrize(
    ("split", "names", "readme", "text"),
    [
        pytest.param("nope", SHARDS, "", "no split 'nope'.*validation", id="no such split"),
        pytest.param(None, ["test.csv", "dev.csv"], "", "no split 'train'.*dev.csv", id="which one"),
        pytest.param(None, ["a.txt"], "", "no data files", id="no data"),
        pytest.param(None, ["train.csv", "train.jsonl"], "", "train.csv and train.jsonl, perhaps the same", id="twice"),
        pytest.param(None, ["train/a.csv", "train/b.jsonl"], "", "several formats.*a.csv", id="two formats"),
        pytest.param(None, ["a.jsonl"], HEADER.replace("default", "large"), "several configurations", id="configs"),
        pytest.param(None, ["a.jsonl"], "---\na: [\n---\n", "README.md", id="not YAML"),
        pytest.param(None, ["a.jsonl"], "---\nconfigs: text\n---\n", "README.md", id="configs are a text"),
        pytest.param(None, ["a.jsonl"], "---\nconfigs: [text]\n---\n", "README.md", id="a config is a text"),
        pytest.param(None, ["a.jsonl"], "---\nconfigs: {a: 1}\n---\n", "README.md", id="configs are an object"),
        pytest.param(None, ["a.jsonl"], "---\nconfigs: [{data_files: 5}]\n---\n", "README.md", id="files are a number"),
        pytest.param(None, ["a.jsonl"], "---\nconfigs: [{data_files: [{path: a}]}]\n---\n", "README.md", id="no split"),
        pytest.param(
            None, ["a.jsonl"], "---\nconfigs: [{data_files: [[1]]}]\n---\n", "README.md", id="a list in a list"
        ),
        pytest.param(None, ["a.jsonl"], "---\n- a\n---\n", "README.md", id="a list"),
    ],
)
def test_unclear_splits(split: str | None, names: list[str], readme: str, text: str) -> None:
    """Where it is not clear which files are meant, the error lists them."""
    with pytest.raises(DataError, match=text):
        _files_of(split, names, readme)


def test_a_model_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    """Asked for without weights, a model comes with stubs: the size and the header of each file, and nothing
    behind it. They have a place of their own, so that no run takes them for weights."""
    header = b'{"a": {"dtype": "BF16", "shape": [300000], "data_offsets": [0, 600000]}}'
    weights = len(header).to_bytes(8, "little") + header + b"w" * 600_000
    hub.repositories["org/model"] = {**MODEL, "model.safetensors": weights}
    found = fetch_model("org/model", tmp_path / "model", weights=False)
    write_stub = (found.path / "model.safetensors").read_bytes()
    assert len(write_stub) == len(weights)
    assert write_stub.startswith(weights[: 8 + len(header)])
    assert not write_stub.rstrip(b"\0").endswith(b"w" * 200_000)
    assert (found.path / "config.json").read_bytes() == b"{}"
