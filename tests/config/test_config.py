"""Environment to configuration: every problem at once, in under two seconds, without a secret."""

import json
import os
import subprocess
import sys
import time

import pytest

from job.commands import variables
from job.config import environment as env
from job.config.field import PREFIX
from job.config.schema import SETTINGS, Config
from job.runtime.errors import ConfigError

REQUIRED = {"TUNE_MODEL": "org/name", "TUNE_DATASET": "s3://bucket/rows.jsonl", "TUNE_OUTPUT": "s3://bucket/runs"}


@pytest.fixture
def load(monkeypatch):
    """Load a configuration from exactly these variables."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)

    def _load(**values: str) -> Config:
        for name, value in {**REQUIRED, **values}.items():
            monkeypatch.setenv(name, value)
        return env.load()

    return _load


def test_defaults_are_the_tables(load):
    """With only what is required set, every setting has the table's default."""
    config = load()
    assert {s.name: s.default for s in SETTINGS if not s.required} == {
        s.name: getattr(config, s.name) for s in SETTINGS if not s.required
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        pytest.param("TUNE_BATCH_SIZE", " 16 ", 16, id="white space around a number"),
        pytest.param("TUNE_LEARNING_RATE", "2e-4", 2e-4, id="scientific notation is a number"),
        pytest.param("TUNE_LEARNING_RATE", "auto", "auto", id="auto"),
        pytest.param("TUNE_LORA_RSLORA", "true", True, id="flag"),
        pytest.param("TUNE_COLUMNS", "prompt=a b.c, text=x=y", ("prompt=a b.c", "text=x=y"), id="columns"),
        pytest.param("TUNE_EXPORT", "adapter, merged_16bit", ("adapter", "merged_16bit"), id="list"),
        pytest.param("TUNE_MAX_STEPS", "", None, id="empty is unset"),
        pytest.param("TUNE_WARMUP", "5", 5.0, id="warm-up in steps"),
        pytest.param("TUNE_MODEL", "s3://models/llama/8b", "s3://models/llama/8b", id="model in S3"),
        pytest.param("TUNE_MODEL", "org/name@main", "org/name@main", id="hub model with a revision"),
        pytest.param("TUNE_OUTPUT", "s3://bucket", "s3://bucket", id="a whole bucket"),
        pytest.param("TUNE_OUTPUT", "s3://bucket/a/.b/..c/d./", "s3://bucket/a/.b/..c/d./", id="dots in names"),
        pytest.param("TUNE_DATASET", "hf://datasets/o/n:train,/data/x.csv", ("hf://datasets/o/n:train", "/data/x.csv")),
    ],
)
def test_values_are_read(load, name, text, value):
    """A value is parsed to its type."""
    assert value == getattr(load(**{name: text}), name.removeprefix(PREFIX).lower())


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("TUNE_BATCH_SIZE", "0", "a whole number, at least 1"),
        ("TUNE_BATCH_SIZE", "8.5", "a whole number"),
        ("TUNE_LEARNING_RATE", "fast", "auto, or a number, above 0 and at most 1"),
        ("TUNE_LEARNING_RATE", "nan", "auto, or a number"),
        ("TUNE_EVAL_FRACTION", "0.9", "at most 0.5"),
        ("TUNE_PRECISION", "4 bit", "one of 4bit, 8bit, 16bit"),
        ("TUNE_OUTPUT", "gs://bucket/x", "s3://bucket/prefix, or an absolute path"),
        ("TUNE_OUTPUT", "runs", "s3://bucket/prefix, or an absolute path"),
        ("TUNE_MODEL", "s3://UPPER/x", "org/name[@revision]"),
        ("TUNE_COLUMNS", "query=q", "our name is one of messages, conversations"),
        ("TUNE_COLUMNS", "prompt", "our name=your column"),
        ("TUNE_EXPORT", "adapter,onnx", "any of adapter, merged_16bit"),
        ("TUNE_RUN_ID", "../x", "letters, digits"),
        (
            "TUNE_OUTPUT",
            "s3://My_Bucket/x",
            "'My_Bucket' is not the name of a bucket: it has 3 to 63 lower-case letters",
        ),
        ("TUNE_MODEL", "s3://my_models/x", "'my_models' is not the name of a bucket"),
        ("TUNE_OUTPUT", "s3://ab/x", "3 to 63"),
        ("TUNE_OUTPUT", "s3:///x", "'' is not the name of a bucket"),
        ("TUNE_OUTPUT", "s3://bucket/a//c", "'a//c' is not a key: it has no empty, '.' or '..' part"),
        ("TUNE_OUTPUT", "s3://bucket/../c", "'../c' is not a key"),
        ("TUNE_OUTPUT", "s3://bucket/a//", "'a//' is not a key"),
        ("TUNE_DATASET", "s3://bucket/good,s3://bucket/a\\b", "no backslash"),
        ("TUNE_CACHE", "s3://Cache", "'Cache' is not the name of a bucket"),
    ],
)
def test_bad_values_name_value_and_rule(load, name, text, part):
    """A bad value is reported with the variable, the value and the rule."""
    with pytest.raises(ConfigError) as caught:
        load(**{name: text})
    (problem,) = caught.value.problems
    assert f"{name}={text!r}" in problem
    assert part in problem


def test_all_problems_at_once(load):
    """Every problem is in one message, unknown names with the nearest known one."""
    with pytest.raises(ConfigError) as caught:
        load(TUNE_MODEL="", TUNE_BATCH_SIZE="x", TUNE_EPOCH="3", TUNE_ZZZ="1")
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "TUNE_MODEL is not set" in problems
    assert "Did you mean TUNE_EPOCHS?" in problems
    assert "TUNE_ZZZ is not a variable of this job" in problems


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"TUNE_MICRO_BATCH": "9"}, "TUNE_MICRO_BATCH=9 is more than TUNE_BATCH_SIZE=8"),
        ({"TUNE_DEVICE": "cpu", "TUNE_BATCHING": "packed"}, "TUNE_BATCHING=packed needs a GPU"),
        ({"TUNE_METRICS_PORT": "80"}, "at least 1024 and at most 65535"),
        ({"TUNE_METRICS_PORT": "9400", "TUNE_LOG_LEVEL": "error"}, "TUNE_LOG_LEVEL=error"),
        ({"TUNE_COLUMNS": "prompt=a,prompt=b"}, "'prompt' twice"),
        ({"TUNE_COLUMNS": "prompt=a,completion=a"}, "'a' twice"),
        ({"TUNE_WARMUP": "2.5"}, "TUNE_WARMUP=2.5 is neither"),
        ({"TUNE_WARMUP": "9", "TUNE_MAX_STEPS": "5"}, "TUNE_WARMUP=9 steps are not fewer"),
        ({"TUNE_DEVICE": "cpu", "TUNE_PRECISION": "8bit"}, "TUNE_PRECISION=8bit needs a GPU"),
        ({"TUNE_RUN_ID": "latest.json"}, "TUNE_RUN_ID='latest.json' is the name of an object"),
        ({"TUNE_RUN_ID": "LATEST.json"}, "TUNE_RUN_ID='LATEST.json' is the name"),
        ({"TUNE_RUN_ID": "preflight-1"}, "TUNE_RUN_ID='preflight-1' is the name"),
    ],
)
def test_rules_between_variables(load, values, part):
    """Rules between variables are checked and say what to do."""
    with pytest.raises(ConfigError) as caught:
        load(**values)
    assert part in "\n".join(caught.value.problems)


def test_values_from_files(load, tmp_path):
    """`<NAME>_FILE` reads the value from a file; both at once, or an unreadable file, is an error."""
    (tmp_path / "rate").write_text("0.001\n")
    assert load(TUNE_LEARNING_RATE_FILE=str(tmp_path / "rate")).learning_rate == 0.001
    with pytest.raises(ConfigError, match="both set"):
        load(TUNE_LEARNING_RATE="1e-4")
    with pytest.raises(ConfigError, match="TUNE_SEED_FILE='/nowhere' cannot be read"):
        load(TUNE_LEARNING_RATE="", TUNE_SEED_FILE="/nowhere")


def test_identity_depends_on_the_result_only(load):
    """The default run id changes with what decides the result, and with nothing else."""
    first = load().identity()
    assert first == load(TUNE_LOG_LEVEL="debug", TUNE_OUTPUT="s3://other/place").identity()
    assert first != load(TUNE_LEARNING_RATE="1e-4").identity()
    assert load(TUNE_RUN_ID="mine").identity() == "mine"


@pytest.mark.process
def test_variables_command_shows_the_table():
    """`python -m job variables --json` is the table that the parser uses."""
    shown = json.loads(subprocess.check_output([sys.executable, "-m", "job", "variables", "--json"]))
    assert [s.variable for s in SETTINGS] == [row["name"] for row in shown]
    assert [s.fingerprint for s in SETTINGS] == [row["fingerprint"] for row in shown]
    for form in ("text", "markdown"):
        assert all(s.variable in variables.render(form) for s in SETTINGS)


@pytest.mark.process
def test_bad_environment_exits_78_quickly_and_without_secrets():
    """A bad environment ends with 78 within two seconds, as JSON, and shows no secret, not even inside a value."""
    secret = "hunter2-hunter2"
    environment = {"PATH": os.environ["PATH"], "HF_TOKEN": secret, "TUNE_MODEL": f"https://u:{secret}@host/x"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "job"], env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 2
    assert done.returncode == 78
    (line,) = (done.stdout + done.stderr).splitlines()
    assert json.loads(line)["event"] == "run_failed"
    assert "TUNE_DATASET is not set" in line
    assert secret not in line


@pytest.mark.process
@pytest.mark.parametrize("command", [(), ("check", "--json")], ids=["run", "check"])
def test_rejected_addresses_are_shown_without_secrets(command):
    """Whatever says that an address is not valid shows neither its password nor its signature, however short."""
    addresses = {
        "TUNE_MODEL": "https://user:pw@host/model",
        "TUNE_DATASET": "https://b.s3.amazonaws.com/a?X-Amz-Credential=AKIA1&X-Amz-Signature=0a1b",
        "TUNE_OUTPUT": "s3://user:pw@bucket/runs?sig=0a1b",
        "TUNE_CACHE": "ftp://host/a?token=0a1b",
        "AWS_ENDPOINT_URL_S3": "https://user:pw@host",
    }
    done = subprocess.run(
        [sys.executable, "-m", "job", *command],
        env={"PATH": os.environ["PATH"], **addresses},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 78
    assert "https://***@host/model" in said
    assert "ftp://host/a?token=***" in said
    assert not [secret for secret in ("pw@", "0a1b", "AKIA1") if secret in said]


@pytest.mark.process
def test_bad_command_line_exits_78():
    """A mistake on the command line is a configuration error too."""
    done = subprocess.run([sys.executable, "-m", "job", "bogus"], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "bogus" in done.stdout


@pytest.mark.parametrize(
    ("temporary", "output", "lost"),
    [
        ("{0}/scratch", "{0}/scratch/runs", True),
        ("{0}/scratch", "{0}/scratch", True),
        ("{0}/scratch", "{0}/link/runs", True),
        ("{0}/scratch", "{0}/scratch2/runs", False),
        ("{0}/scratch", "{0}/runs", False),
        (None, "/tmp/finetune-job-{1}/runs", True),
        (None, "/tmp/runs", False),
        ("/tmp", "/tmp/runs", False),
        ("{0}/scratch", "s3://bucket/scratch", False),
    ],
)
def test_an_output_that_would_be_lost(load, monkeypatch, tmp_path, temporary, output, lost):
    """What lies in the scratch directory is gone with its machine; /tmp is shared, so only the job's part of it is."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    if temporary:
        monkeypatch.setenv("TMPDIR", temporary.format(tmp_path))
    place = output.format(tmp_path, os.getuid())
    if not lost:
        assert load(TUNE_OUTPUT=place).output == place
        return
    with pytest.raises(ConfigError) as caught:
        load(TUNE_OUTPUT=place)
    assert f"TUNE_OUTPUT={place!r} lies in the scratch directory" in caught.value.problems[0]
