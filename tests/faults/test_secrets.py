"""An environment full of credentials, some of them like parts of records: none is shown, and no record suffers."""

import json

import pytest

from tests.faults.harness import KILLED

HARMLESS = {
    "MAX_TOKENS": "133333",
    "TOKEN_LIMIT": "0.0001",
    "NUM_KEYS": "train_progress",
    "KEYBOARD": "loss",
    "SECRETARY": "checkpoint",
    "SSH_AUTH_SOCK": "/tmp/agent",
    "HF_TOKEN_PATH": "/tmp/token",
}
WORDS = {
    "MY_API_KEY": "train_progress",  # an event
    "DB_PASSWORD_2": "attempt",  # a field, and a word of messages
    "C_PASSWORD": '"step": ',
    "D_PASSWORD": ', "loss": ',
    "E_TOKEN": "checkpoint",
    "F_TOKEN": "complete",  # an outcome
    "G_SECRET": "unknown",
    "H_KEY": "00000000",
    "I_TOKEN": "0.0001",
    "J_TOKEN": "before",  # a phase
}
SECRETS = {
    "HF_TOKEN": "hf_plantedtoken",
    "K_SECRET": "hf_plantedtoken-and-more",
    "WANDB_API_KEY": "plän\u2028ted-\\u00e9-日本",
    "PIN_PASSWORD": "20261128",
    "L_PASSWORD": "pl\"an'ted\nsecond-line-of-it \\ {}",
    "DATABASE_URL": "postgres://u:planted-db@host/x",
    "PRESIGNED": "https://host/a?X-Amz-Signature=0a1b2c3d4e5f",
}
FORBIDDEN = ("plantedtoken", "plän", "second-line", "planted-db", "0a1b2c3d4e5f")


def check_records(bench, run_id):
    """All JSON of the run is valid, and no secret is in any of its texts."""
    for key in bench.place.names(bench.key(run_id, "")):
        data = bench.place.get(key)
        text = data.decode(errors="replace")
        assert not [secret for secret in FORBIDDEN if secret in text or secret.encode("unicode_escape") in data], key
        if key.endswith((".json", ".jsonl")) and "/adapter/" not in key:
            for part in [data] if key.endswith(".json") else data.splitlines():
                assert isinstance(json.loads(part), dict), key


def test_no_record_suffers(bench):
    """With secrets that are words, fields and parts of numbers a killed run resumes, and ends as an undisturbed one;
    its history has all events, and the process that uploads has the store's credentials only."""
    run_id = bench.name("secrets")
    planted = {**HARMLESS, **WORDS, **SECRETS}
    job = bench.start(run_id, hooks=[["commit_every_save"], ["kill_at_step", 9], ["slow_steps", 0.05]], **planted)
    job.until("train_progress", step=1)
    environment = job.uploader().environ()
    assert job.wait() == KILLED
    assert not [name for name in {**WORDS, **SECRETS} if name in environment]
    assert environment["AWS_SECRET_ACCESS_KEY"]
    assert environment["MAX_TOKENS"] == "133333"
    second = bench.start(run_id, **planted).ends(0)
    assert second.event("resumed")["resumed_step"] == 8
    bench.check_whole(run_id)
    check_records(bench, run_id)
    history = [json.loads(line) for line in bench.place.get(bench.key(run_id, "metrics.jsonl")).splitlines()]
    assert [line["step"] for line in history if line["event"] == "train_progress"] == list(range(1, 13))
    assert {line["phase"] for line in history if line["event"] == "sample"} == {"before", "after"}
    assert bench.place.json(bench.key(run_id, "attempts/0002.end.json"))["outcome"] == "complete"
    for line in (*job.lines(), *second.lines()):
        assert not [secret for secret in FORBIDDEN if secret in json.dumps(line, ensure_ascii=False)]


@pytest.mark.parametrize("secret", ['boom "quoted"\n\\ 133333 plän', "unknown"])
def test_a_failure_is_told_without_secrets(bench, tmp_path, secret):
    """What an error quotes is removed from its log line, its record and its message, which stay JSON with codes."""
    run_id, message = bench.name("failing"), tmp_path / "termination-log"
    message.touch()
    text = f"{secret} of https://user:pass@host/?sig=0a1b2c3d4e5f"
    hooks = [["termination_log", str(message)], ["fail_with", 2, text]]
    job = bench.start(run_id, hooks=hooks, MY_PASSWORD=secret).ends(1)
    records = [
        job.event("run_failed"),
        bench.place.json(bench.key(run_id, "failure.json")),
        json.loads(message.read_text()),
    ]
    for body in records:
        assert (body["kind"], body["exit_code"]) == ("unknown", 1)
        assert "RuntimeError: *** of https://***@host/?sig=***" in body["message"]
        assert secret not in body["message"]
    assert bench.place.json(bench.key(run_id, "attempts/0001.end.json"))["outcome"] == "unknown"
