"""Secrets vanish from texts; numbers, keys and JSON stay whole, whatever the environment holds."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from job.observability import logs
from job.observability.redaction import Redactor, secret_values
from job.runtime.credentials import is_credential
from job.runtime.errors import DataError
from job.state.attempts import Attempts
from job.state.ledger import Ledger
from job.state.record import Record
from job.storage.open import open_store
from tests.jobs import ROOT

SECRET = "s3cr3t-value"


@pytest.fixture
def secrets(monkeypatch):
    """Give the log, and all that asks it, secrets to remove."""

    def plant(*values):
        monkeypatch.setattr(logs._state, "redactor", Redactor(frozenset(values)))

    return plant


@pytest.mark.parametrize(
    ("name", "credential"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True),
        ("HF_TOKEN", True),
        ("HUGGING_FACE_HUB_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("MLFLOW_TRACKING_TOKEN", True),
        ("GITHUB_TOKEN", True),
        ("AZURE_CLIENT_SECRET", True),
        ("AZURE_STORAGE_CONNECTION_STRING", True),
        ("GOOGLE_API_KEY", True),
        ("SSH_PRIVATE_KEY", True),
        ("PASSWORD", True),
        ("http_proxy_password", True),
        ("PGPASSWORD", True),
        ("SSH_KEY", True),
        ("HF_TOKEN_WRITE", True),
        ("DB_PASSWORD_2", True),
        ("AZURE_CREDENTIAL", True),
        ("WEBHOOK_SIGNATURE", True),
        ("DB_PASS", True),
        ("GITHUB_PAT", True),
        ("MY_JWT", True),
        ("PASSWORD2", True),
        ("SSH_KEY_BASE64", True),
        ("GOOGLE_APPLICATION_CREDENTIALS_JSON", True),
        ("AWS_BEARER_TOKEN_BEDROCK", True),
        ("DOCKER_AUTH_CONFIG", True),
        ("COMPASS", False),
        ("PUBLIC_KEY", False),
        ("MY_API_KEY", True),
        ("MAX_TOKENS", False),
        ("TOKEN_LIMIT", False),
        ("NUM_KEYS", False),
        ("KEYBOARD", False),
        ("SSH_AUTH_SOCK", False),
        ("HF_TOKEN_PATH", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("AWS_ACCESS_KEY_ID", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", False),
        ("TOKEN_PATH", False),
        ("SECRETARY", False),
        ("EOS_TOKEN", False),
        ("PARTITION_KEY", False),
        ("TUNE_MODEL", False),
    ],
)
def test_credentials_are_named(name, credential):
    """A variable holds a credential by its whole name or by its last words, not because a word occurs in it."""
    assert is_credential(name) is credential


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        pytest.param({"HF_TOKEN": f" {SECRET}\n"}, {SECRET}, id="without white space"),
        pytest.param({"A_TOKEN": "133333", "B_TOKEN": "-1.5e-07", "C_TOKEN": "1,000,000"}, set(), id="numbers"),
        pytest.param({"A_TOKEN": "", "B_TOKEN": "true", "C_TOKEN": "short"}, set(), id="too short"),
        pytest.param({"DB_PASSWORD": "20261128"}, {"20261128"}, id="a password of digits"),
        pytest.param(
            {"DB": "postgresql://user:pa/ssw0rd@host/db"}, {"user:pa/ssw0rd", "pa/ssw0rd"}, id="not quoted in a URL"
        ),
        pytest.param({"PLACE": "https://host:8443/a?mail=b@example.com"}, set(), id="a port and an @"),
        pytest.param({"MAX_TOKENS": "some-text"}, set(), id="not a credential"),
        pytest.param(
            {"PROXY": "http://user:pass%40word@proxy:3128/a"},
            {"user:pass%40word", "user:pass@word", "pass%40word", "pass@word"},
            id="in a URL",
        ),
        pytest.param({"URLS": "http://a,https://token-1234@b"}, {"token-1234"}, id="in one of several URLs"),
        pytest.param({"HTTPS_PROXY": "u:p%40ssword@proxy:1"}, {"u:p%40ssword", "u:p@ssword", "p%40ssword", "p@ssword"}),
        pytest.param(
            {"TUNE_MODEL": "https://h/a?b=1&X-Amz-Signature=0a1b2c3d&sig=x%2By%2Fz1"},
            {"0a1b2c3d", "x%2By%2Fz1", "x+y/z1"},
            id="signatures",
        ),
        pytest.param({"TUNE_DATASET": "hf://datasets/org/name@revision:train"}, set(), id="revision"),
        pytest.param({"TUNE_DATASET": "https://host/path?mail=a.person@example.com"}, set(), id="@ in a path"),
    ],
)
def test_values_that_are_secret(environment, found):
    """Credentials and passwords inside URLs, as written and decoded; never a plain number or a short word."""
    assert secret_values(environment) == found


def test_only_texts_change():
    """Texts lose their secrets at any depth; numbers, booleans, None and keys stay as they are."""
    redact = Redactor(frozenset({SECRET, "133333", "seconds", 'quo"ted'}))
    value = {
        "seconds": 0.000133333,
        "count": 133333,
        "none": None,
        "yes": True,
        "list": [f"a {SECRET} b", {"deep": (SECRET, 133333.5)}],
        "path": Path("/tmp") / SECRET,
        "error": ValueError(SECRET),
        "quoted": json.dumps({"message": 'quo"ted'}),
    }
    shown = redact(value)
    assert shown == {
        "seconds": 0.000133333,
        "count": 133333,
        "none": None,
        "yes": True,
        "list": ["a *** b", {"deep": ("***", 133333.5)}],
        "path": "/tmp/***",
        "error": "***",
        "quoted": '{"message": "***"}',
    }
    assert type(shown["count"]) is int


def test_a_longer_secret_goes_first():
    """A secret that begins with another one leaves nothing of it."""
    assert Redactor(frozenset({"secret", "secret-and-more"})).text("secret-and-more secret") == "*** ***"


def test_a_history_stays_readable(tmp_path, secrets):
    """Secrets that look like parts of numbers or JSON do not change what a checkpoint's history says."""
    store = open_store(str(tmp_path), patience_seconds=1)
    record = Record(ledger=Ledger(store=store, run_id="run", attempt=1))
    secrets(SECRET, "133333", "000133", '"step"', "evaluated", "attempt", "train_progress", ": 0.")
    record.note({"event": "evaluated", "step": 133333, "loss": 0.000133333, "answer": f"It is {SECRET}."})
    (line,) = map(json.loads, record.history_text().splitlines())
    assert line == {"event": "evaluated", "step": 133333, "loss": 0.000133333, "answer": "It is ***.", "attempt": 1}
    other = Record(ledger=Ledger(store=store, run_id="run", attempt=2))
    other.resume(record.history_text())
    assert other.history_text() == record.history_text()


def test_records_of_failures_hold_no_secret(tmp_path, secrets):
    """The message of an error may quote anything; the records of how an attempt ended stay JSON without secrets."""
    secrets(SECRET, "133333")
    store = open_store(str(tmp_path), patience_seconds=1)
    attempts = Attempts(store=store, closing=lambda _: store, run_id="run", number=1)
    attempts.facts["resumed_step"] = 133333
    attempts.fail(DataError(f"No access with {SECRET}.", remedy="None."), step=133333)
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert (failure["message"], failure["step"]) == ("No access with ***.", 133333)
    assert json.loads((tmp_path / "run/attempts/0001.end.json").read_text())["resumed_step"] == 133333


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a s3cr3t \"quoted\" 'twice' back\\slash", id="quotes"),
        pytest.param("gehéim-日本-\u2028-\x1b", id="unicode"),
        pytest.param('"step": 3, "loss"', id="like JSON"),
        pytest.param("/+=/abc%2F", id="like an address"),
    ],
)
def test_a_secret_is_found_however_it_is_quoted(text):
    """As it is, as JSON writes it, as Python shows it in a message, as an address holds it, and in base64."""
    redact = Redactor(frozenset({text}))
    for form in (
        text,
        json.dumps(text),
        json.dumps(text, ensure_ascii=False),
        f"x={text!r}.",
        f"?a={quote(text, safe='')}",
        f"?a={quote(text)}",
        f"?a={quote_plus(text)}",
        "?a=" + re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
        f"Authorization: Basic {base64.b64encode(text.encode()).decode()}",
    ):
        assert text not in redact.text(form)
        assert "***" in redact.text(form)


def test_the_lines_of_a_long_secret_are_secrets():
    """What libraries print comes line by line: a line of a key is replaced, its first and last line are not."""
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG\nshort\n-----END PRIVATE KEY-----"
    redact = Redactor(frozenset({key}))
    assert redact.text("MIIEvQIBADANBgkqhkiG") == "***"
    assert redact.text("-----BEGIN PRIVATE KEY----- short") == "-----BEGIN PRIVATE KEY----- short"


def test_words_of_the_program_stay():
    """A secret that is the name of an event, an outcome or a time changes no record: whoever reads them needs these."""
    redact = Redactor(frozenset({"train_progress", "interrupted", "storage", "before", "2026-11-28", "complete"}))
    body = {
        "timestamp": "2026-11-28T13:00:00.123456Z",
        "event": "train_progress",
        "kind": "storage",
        "outcome": "interrupted",
        "phase": "before",
        "message": "complete, before 2026-11-28",
    }
    assert redact(body) == redact.known(body) == {**body, "message": "***, *** ***"}
    assert redact({"event": "the secret is train_progress"}) == {"event": "the secret is ***"}


def test_what_the_data_says_is_kept(tmp_path, secrets):
    """An address in a sample's text is the data's: the history keeps it; a log line shows it without its password."""
    secrets(SECRET)
    store = open_store(str(tmp_path), patience_seconds=1)
    record = Record(ledger=Ledger(store=store, run_id="run", attempt=1))
    entry = {"event": "sample", "answer": f"https://user:pass@host/?token=abc {SECRET}"}
    record.note(entry)
    assert json.loads(record.history_text())["answer"] == "https://user:pass@host/?token=abc ***"
    assert logs.redact(entry)["answer"] == "https://***@host/?token=*** ***"


def test_the_settings_of_a_run_hold_no_secret(tmp_path, secrets):
    """`run.json` has the addresses of all settings, without what opens them; its fingerprint is compared and stays."""
    secrets(SECRET)
    store = open_store(str(tmp_path), patience_seconds=1)
    record = Record(ledger=Ledger(store=store, run_id="run", attempt=1))
    settings = {"TUNE_OUTPUT": f"s3://bucket/{SECRET}", "TUNE_CACHE": "s3://u:p@b/?sig=x", "TUNE_SEED": 133333}
    record.pin(settings=settings, inputs={}, fingerprint={"TUNE_SEED": 133333}, reproducibility_facts={})
    body = json.loads((tmp_path / "run/run.json").read_text())
    assert body["config"] == {
        "TUNE_OUTPUT": "s3://bucket/***",
        "TUNE_CACHE": "s3://***@b/?sig=***",
        "TUNE_SEED": 133333,
    }
    assert body["fingerprint"] == {"TUNE_SEED": 133333}


LOGS = """
import logging, os
import structlog
from job.observability import logs
from job.observability.redaction import secret_values
from job.runtime import process
logs.configure(form=os.environ["FORM"], level="info", secrets=secret_values(process.variables()))
log = structlog.get_logger()
log.info("evaluated", step=133333, loss=0.000133333, eval={"loss": [133333, 1e-07]})
log.info("quoted", reason=ValueError("the token is s3cr3t-value"), path=["s3cr3t-value"])
logging.getLogger("library").warning("133333 of %s", "s3cr3t-value")
if os.environ["FORM"] == "json":  # on a terminal nothing that is printed is captured
    print("133333 s3cr3t-value", flush=True)
try:
    raise ValueError("s3cr3t-value")
except ValueError:
    log.exception("failed")
logs.close()
"""


@pytest.mark.process
@pytest.mark.parametrize("form", ["json", "text"])
def test_log_lines_stay_json_with_their_numbers(form):
    """`MAX_TOKENS=133333` and a numeric token leave the numbers of the log alone; a real token vanishes from it."""
    planted = {"FORM": form, "MAX_TOKENS": "133333", "OTHER_TOKEN": "133333", "HF_TOKEN": SECRET}
    environment = {**os.environ, **planted}
    done = subprocess.run(
        [sys.executable, "-c", LOGS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert SECRET not in done.stdout
    assert done.stdout.count("***") >= 4
    if form == "json":
        progress, quoted, *_ = (json.loads(line) for line in done.stdout.splitlines() if "library_output" not in line)
        assert (progress["step"], progress["loss"]) == (133333, 0.000133333)
        assert progress["eval"] == {"loss": [133333, 1e-07]}
        assert quoted["reason"] == "the token is ***"
        assert all(isinstance(json.loads(line), dict) for line in done.stdout.splitlines())


@pytest.mark.process
def test_what_observers_see_holds_no_secret():
    """What is passed on to other services is redacted as the log is."""
    code = f"""
import json
import structlog
from job.observability import logs
logs.configure(form="text", level="info", secrets=[{SECRET!r}])
logs.observe(lambda event: print("seen", json.dumps([event["message"], event["step"]])))
structlog.get_logger().info("event", message={SECRET!r}, step=3)
"""
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert 'seen ["***", 3]' in said


REJECTED = {
    "TUNE_MODEL": "https://u:planted-pw1@host/x?X-Amz-Signature=planted-sig1&X-Amz-Credential=planted-id1",
    "TUNE_DATASET": "s3://planted-id2:planted-key2@bucket/x",
    "TUNE_OUTPUT": "s3://a:planted-key3@bucket",
    "TUNE_CHAT_TEMPLATE": "https://host/a.jinja?se=1&sig=planted-sig4",
    "TUNE_CACHE": "https://planted-token5@host/",
    "TUNE_RUN_ID": "a b?token=planted-token6",
    "TUNE_EPOCHS": "https://x/?AWSAccessKeyId=planted-id7&Signature=planted-sig7",
    "TUNE_MODLE": "https://host/?sig=planted-sig8",
    "TUNE_ALLOW_CHANGE": "https://host/?api_key=planted-key9",
    "TUNE_COLUMNS": "prompt=https://host/?X-Amz-Security-Token=planted-token10",
    "TUNE_SEED_FILE": "/nowhere/?password=planted-pw11",
    "TUNE_EVAL_DATASET": "hf_planted-token12",
    "HF_TOKEN": "hf_planted-token12",
    "RANK": "http://u:planted-pw13@host",
}
"""Values that are rejected, each with a credential in it."""


@pytest.mark.process
@pytest.mark.parametrize("command", [["train"], ["check", "--json"], ["env"], ["https://u:planted-pw14@host"]])
def test_rejected_values_show_no_credentials(tmp_path, command):
    """Whatever is wrong with a value, and wherever it is shown, its passwords and signatures are not."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNE_")}
    done = subprocess.run(
        [sys.executable, "-m", "job", *command],
        cwd=ROOT,
        env={**environment, **REJECTED, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if command == ["env"] else 78), done.stderr
    assert "planted" not in done.stdout + done.stderr
    assert "TUNE_MODEL" in done.stdout or command[0].startswith("https")
