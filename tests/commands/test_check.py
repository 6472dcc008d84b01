"""`python -m job check`: a real process, real S3 over HTTP, a real small model; each fault has its code."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass

import boto3
import pytest

from job.commands.check_text import show
from job.config.schema import Config
from job.inputs.pull import Sources, listing
from tests.hub_server import serve_hub
from tests.jobs import ROOT

pytestmark = pytest.mark.process

HEAVY = ("torch", "unsloth", "trl", "peft", "bitsandbytes", "triton", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Checked:
    code: int
    found: dict
    stderr: str
    cpu_seconds: float
    """Where others use the processor too, the clock says nothing of a check's cost."""

    def problem(self, check: str) -> dict:
        return next(problem for problem in self.found["problems"] if problem["check"] == check)


STOPPED = """
import os, runpy, signal, sys, time
from job.commands import checks
swallows = sys.argv[1] == "swallows"
def stopped(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        time.sleep(20)
    except BaseException as error:
        if swallows:
            raise RuntimeError("a library's own error") from error
        raise
checks.read = stopped
sys.argv = ["job", "check", "--json"]
runpy.run_module("job", run_name="__main__", alter_sys=True)
"""


def execute(tmp_path, *arguments, python=(), **variables):
    """`python -m job check` in the present environment."""
    named = {(name if name.isupper() else f"TUNE_{name.upper()}"): str(value) for name, value in variables.items()}
    (tmp_path / "scratch").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch"), **named}
    command = [sys.executable, *python, "-m", "job", "check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def check(tmp_path, *arguments, **variables) -> Checked:
    """The same with `--json`: stdout must be one JSON object in one line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = execute(tmp_path, "--json", *arguments, **variables)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = done.stdout.splitlines()
    assert len(lines) == 1, (done.stdout[:2000], done.stderr[-2000:])
    found = json.loads(lines[0])
    assert found["exit_code"] == done.returncode
    assert found["ok"] is (done.returncode == 0)
    return Checked(code=done.returncode, found=found, stderr=done.stderr, cpu_seconds=seconds)


def chat(number: int) -> str:
    turns = [
        {"role": "user", "content": f"Say the number {number}."},
        {"role": "assistant", "content": f"It is {number * 7}."},
    ]
    return json.dumps({"messages": turns}) + "\n"


def keys(bucket: str) -> list[str]:
    return [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture
def place(s3_env, tiny_model) -> dict:
    """A bucket with the model and a thousand rows, and the settings that name them."""
    client = boto3.client("s3")
    for path in tiny_model.iterdir():
        client.put_object(Bucket=s3_env, Key=f"model/{path.name}", Body=path.read_bytes())
    client.put_object(Bucket=s3_env, Key="data/a.jsonl", Body="".join(map(chat, range(1000))).encode())
    uri = f"s3://{s3_env}"
    # A GPU is asked for on purpose: a check needs none.
    return {
        "model": f"{uri}/model",
        "dataset": f"{uri}/data/",
        "output": f"{uri}/runs",
        "device": "cuda",
        "max_length": 256,
        "bucket": s3_env,
    }


def settings(place: dict, **changed) -> dict:
    return {name: value for name, value in {**place, **changed}.items() if name != "bucket"}


def test_good_data(place, tmp_path):
    """Good settings and data give 0; counts, lengths and estimate are reported, nothing is written to the output,
    and the weights are not downloaded."""
    before = keys(place["bucket"])
    page = tmp_path / "page.html"
    checked = check(tmp_path, "--report", str(page), **settings(place))
    assert checked.code == 0, checked.found["problems"]
    found = checked.found
    assert (found["problems"], found["output"]["conditional_writes"]) == ([], True)
    assert found["files"][0]["rows"] == 1000 == found["train"]["rows"] + found["evaluation"]["rows"]
    assert found["lengths"]["longest"] == found["train"]["length_max"]
    assert found["estimate"]["steps"] == -(-found["train"]["sequences"] // 8) * 3
    assert found["estimate"]["memory"]["weights"] > 0
    assert {fit["verdict"] for fit in found["estimate"]["fits"]} == {"fits"}
    assert keys(place["bucket"]) == before
    assert page.read_text().count('class="t l') > 10
    weights = list((tmp_path / "scratch").rglob("*.safetensors"))
    assert weights
    original = boto3.client("s3").get_object(Bucket=place["bucket"], Key=f"model/{weights[0].name}")["Body"].read()
    assert weights[0].stat().st_size == len(original)


@pytest.mark.full  # how long it takes depends on the machine, which others may share
def test_a_thousand_rows_are_checked_in_ten_seconds(place, tmp_path):
    """Most of it is spent on imports; the clock would count the waiting for other processes, too."""
    assert check(tmp_path, **settings(place)).cpu_seconds < 10


def test_large_weights_are_not_downloaded(place, tiny_model, tmp_path):
    """Of a file of weights only the beginning is read, however large it is."""
    header = json.dumps({"m.weight": {"dtype": "BF16", "shape": [4 << 20], "data_offsets": [0, 8 << 20]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + b"w" * (8 << 20)
    client = boto3.client("s3")
    for name in (path.name for path in tiny_model.glob("*safetensors*")):
        client.delete_object(Bucket=place["bucket"], Key=f"model/{name}")
    client.put_object(Bucket=place["bucket"], Key="model/model.safetensors", Body=weights)
    checked = check(tmp_path, **settings(place, dataset=f"s3://{place['bucket']}/nothing"))
    assert checked.found["model"]["parameters"] == 4 << 20
    (stand_in,) = (path for path in (tmp_path / "scratch").rglob("*.safetensors") if not path.is_symlink())
    assert stand_in.read_bytes().rstrip(b"\0").count(b"w") < 1 << 20


def test_in_words(place, tmp_path):
    """Without --json it says the same in words on stdout, and nothing else. Neither torch nor Unsloth is imported:
    that alone would take longer than the whole check."""
    done = execute(tmp_path, python=("-X", "importtime"), **settings(place))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1,000 rows, messages" in done.stdout
    assert "an estimate, not a measurement" in done.stdout
    assert "A run would begin." in done.stdout.splitlines()[-1]
    assert "{" not in done.stdout
    imported = {line.rpartition("|")[2].strip(' "}') for line in done.stderr.splitlines() if "import time:" in line}
    assert "transformers" in imported
    assert imported & set(HEAVY) == set()


def test_everything_at_once(place, tmp_path):
    """Problems of the output, the model and the data are reported together; the code is that of the first."""
    client = boto3.client("s3")
    client.put_object(Bucket=place["bucket"], Key="bad/b.jsonl", Body=(chat(1) + '{"messages": []}\n').encode())
    changed = {"dataset": f"s3://{place['bucket']}/bad/", "model": f"s3://{place['bucket']}/nothing"}
    checked = check(tmp_path, **settings(place, **changed, output=f"s3://{place['bucket']}-not-there/runs"))
    assert [problem["check"] for problem in checked.found["problems"]] == ["output", "model", "dataset"]
    assert checked.code == 65
    assert "bad/b.jsonl:2" in checked.problem("dataset")["message"]
    assert "not-there" in checked.problem("output")["message"]


def test_training_and_evaluation_files(tiny_model, tmp_path):
    """What is wrong with training files hides neither the evaluation files' problems nor those of the settings; what is
    wrong with the evaluation files alone is reported once."""
    good, bad, worse = (tmp_path / name for name in ("good.jsonl", "bad.jsonl", "worse.jsonl"))
    good.write_text(chat(1) + chat(2))
    bad.write_text(chat(1) + '{"messages": []}\n')
    worse.write_text(chat(1) + chat(2) + '{"messages": "no"}\n')
    named = {"model": tiny_model, "output": tmp_path / "runs", "max_length": 256, "lora_targets": "q_proj,wq"}
    checked = check(tmp_path, dataset=bad, eval_dataset=worse, **named)
    kinds = [problem["check"] for problem in checked.found["problems"]]
    assert (kinds, checked.code) == (["model", "dataset", "evaluation dataset"], 78)
    assert "bad.jsonl:2" in checked.problem("dataset")["message"]
    assert "worse.jsonl:3" in checked.problem("evaluation dataset")["message"]
    assert "wq, which match no linear layer" in checked.problem("model")["message"]
    assert "q_proj" in checked.problem("model")["remedy"]
    checked = check(tmp_path, dataset=good, eval_dataset=worse, **named | {"lora_targets": "q_proj"})
    assert [problem["check"] for problem in checked.found["problems"]] == ["dataset"]
    assert "worse.jsonl:3" in checked.problem("dataset")["message"]


@pytest.mark.parametrize(
    ("changed", "code", "kind", "part"),
    [
        pytest.param({"epochs": "many", "typo": "1"}, 78, "configuration", "TUNE_EPOCHS", id="configuration"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, 77, "output", "", id="credentials"),
        pytest.param({"max_length": 100_000}, 78, "model", "positions for 512 tokens", id="too long for the model"),
        pytest.param({"chat_template": "no-such"}, 78, "rendering", "no-such", id="template"),
        pytest.param({"overlong": "fail", "max_length": 8}, 65, "rendering", "TUNE_MAX_LENGTH=8", id="overlong"),
        pytest.param({"warmup": 400}, 78, "rendering", "TUNE_WARMUP=400", id="warm-up"),
        pytest.param({"format": "alpaca"}, 65, "dataset", "instruction", id="format"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_code(place, rclone, tmp_path, changed, code, kind, part):
    """A mistake ends the check with the code that a run would end with, and the message names it."""
    if "AWS_SECRET_ACCESS_KEY" in changed:
        changed = {**changed, "AWS_ENDPOINT_URL_S3": rclone.endpoint}
    checked = check(tmp_path, **settings(place, **changed))
    assert checked.code == code, checked.found["problems"]
    first = checked.found["problems"][0]
    assert (first["check"], first["exit_code"]) == (kind, code)
    assert part in json.dumps(first)
    if "warmup" in changed:  # found after rendering: what would be learned is known anyway
        assert checked.found["train"]
        assert checked.found["lengths"]


def test_a_run_begun_with_other_settings(place, tmp_path):
    """A run that exists already with other settings would be refused, and so the check says."""
    uri = settings(place)
    body = {"fingerprint": {**Config(model="m", dataset=("/d",), output="/o").fingerprint_fields(), "TUNE_SEED": 1}}
    boto3.client("s3").put_object(Bucket=place["bucket"], Key="runs/old/run.json", Body=json.dumps(body).encode())
    checked = check(tmp_path, **uri, run_id="old")
    assert checked.code == 78
    assert "other settings" in checked.problem("output")["message"]


def test_what_a_run_would_refuse_of_what_is_there(tiny_model, rows, tmp_path):
    """A run that must resume and cannot, and a finished run whose dataset grew, end with 78; finished on the same
    inputs, nothing is left to do."""
    data, output = tmp_path / "data", tmp_path / "runs" / "r"
    data.mkdir()
    (data / "a.jsonl").write_bytes(rows.read_bytes())
    named = {"model": tiny_model, "dataset": f"{data}/", "output": tmp_path / "runs", "run_id": "r", "max_length": 256}
    checked = check(tmp_path, **named, resume="require")
    assert checked.code == 78
    assert "TUNE_RESUME=require" in checked.problem("output")["message"]

    asked = Config(model=str(tiny_model), dataset=(f"{data}/",), output=str(tmp_path / "runs"), max_length=256)
    body = {"fingerprint": asked.fingerprint_fields(), "artifacts": []}
    records = output / "checkpoints/commits"
    records.mkdir(parents=True)
    base = {"layout": 2, "attempt": 1, "owner": "x", "life": 0, "nonce": "y", "promoted": True}
    published = {**base, "kind": "published", "final": 1, "prefix": "results/000001", **body}
    (records / "000002.json").write_text(json.dumps(published))
    (output / "inputs.json").write_text(json.dumps(listing(Sources.of(asked), pinned={"date": "2026-01-01"})))
    (output / "run.json").write_text(json.dumps(body))
    checked = check(tmp_path, **named)
    assert (checked.code, checked.found["finished"]) == (0, True), checked.found["problems"]
    (data / "b.jsonl").write_bytes(rows.read_bytes())
    checked = check(tmp_path, **named)
    assert checked.code == 78
    assert "b.jsonl" in checked.problem("output")["message"]


def test_required_fencing_is_judged(s3_env, rclone, tiny_model, rows, tmp_path):
    """Where the store does not honour conditional writes, required fencing ends the check as it ends the run."""
    boto3.client("s3", endpoint_url=rclone.endpoint).create_bucket(Bucket="unfenced")
    named = {"model": tiny_model, "dataset": rows, "output": "s3://unfenced/runs", "max_length": 256}
    checked = check(tmp_path, **named, fencing="require", AWS_ENDPOINT_URL_S3=rclone.endpoint)
    assert checked.found["output"]["conditional_writes"] is False
    assert checked.code == 78
    assert "TUNE_FENCING=require" in checked.problem("output")["message"]


def test_a_local_model_and_directory(tiny_model, rows, tmp_path):
    """A model and data on this disk are read in place, and the output may be a directory that is not there yet."""
    checked = check(tmp_path, model=tiny_model, dataset=rows, output=tmp_path / "runs", max_length=256)
    assert checked.code == 0, checked.found["problems"]
    assert list((tmp_path / "runs").glob("**/*")) == []


def test_files_left_out_are_named(tiny_model, rows, tmp_path):
    """Files under a prefix that are no data are named in words and on the page."""
    data, page = tmp_path / "data", tmp_path / "page.html"
    data.mkdir()
    (data / "a.jsonl").write_bytes(rows.read_bytes())
    (data / "notes.docx").write_bytes(b"1")
    named = {"model": tiny_model, "dataset": f"{data}/", "output": tmp_path / "runs", "max_length": 256}
    done = execute(tmp_path, "--report", str(page), **named)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("left out")]
    assert "notes.docx" in line
    assert "notes.docx" in page.read_text()


def test_what_is_not_learned_and_not_read_is_said(tiny_model, tmp_path):
    """A template that drops reasoning from answers, and keys that nothing reads, are in JSON, in words and on the page;
    under TUNE_QUALITY=fail the run would end with 65."""
    said = {"role": "assistant", "content": "<think>\n17 + 3 is 20, 2 more is 22.\n</think>\n\n22", "score": 1}
    data, template, page = tmp_path / "a.jsonl", tmp_path / "t.jinja", tmp_path / "page.html"
    row = {"messages": [{"role": "user", "content": "What is 17 + 5?"}, said], "source": "exam"}
    data.write_text(f"{json.dumps(row)}\n" * 3)
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    named = {"model": tiny_model, "dataset": data, "output": tmp_path / "runs", "chat_template": template}
    named |= {"max_length": 256, "eval_fraction": 0, "quality": "fail"}
    checked = check(tmp_path, "--report", str(page), **named)
    assert (checked.code, {problem["check"] for problem in checked.found["problems"]}) == (65, {"quality"})
    (finding,) = [one for one in checked.found["findings"] if one["code"] == "answers_not_learned"]
    assert (finding["count"], finding["first"]) == (3, [f"{data}:{line}" for line in (1, 2, 3)])
    assert checked.found["files"][0]["unread"] == {"source": 3, "messages[].score": 3}
    assert "messages[].score (3)" in page.read_text()
    words = io.StringIO()
    show(checked.found, words)
    assert "not read    source (3), messages[].score (3)" in words.getvalue()


def test_a_model_on_the_hub(tiny_model, rows, tmp_path, monkeypatch):
    """Of a model on the hub, configuration and tokenizer are downloaded, and of its weights the headers."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    with serve_hub({"org/tiny": files}) as hub:
        found = check(
            tmp_path, model="org/tiny", dataset=rows, output=tmp_path / "runs", max_length=256, HF_ENDPOINT=hub.endpoint
        )
    assert found.code == 0, found.found["problems"]
    assert found.found["model"]["architecture"] == "LlamaForCausalLM"


def test_secrets_are_masked(tiny_model, tmp_path):
    """A secret of the environment that stands in the data is shown neither in the result nor on the page."""
    data, page = tmp_path / "d.jsonl", tmp_path / "page.html"
    data.write_text(chat(1).replace("number", "planted-secret-value") * 30)
    shutil.copy(data, tmp_path / "planted-secret-value.jsonl")
    both = f"{data},{tmp_path / 'planted-secret-value.jsonl'}"
    checked = check(
        tmp_path, "--report", str(page), model=tiny_model, dataset=both, output=tmp_path / "runs",
        max_length=256, HF_TOKEN="planted-secret-value",
    )  # fmt: skip
    assert checked.code == 0, checked.found["problems"]
    assert "a secret of this environment" in page.read_text()
    assert "planted-secret" not in page.read_text() + json.dumps(checked.found) + checked.stderr


def test_bad_arguments(tmp_path):
    """An unknown option ends with 78."""
    assert execute(tmp_path, "--no-such").returncode == 78


def test_a_page_that_cannot_be_written(rows, tmp_path):
    """A page that cannot be written is reported, and the object on stdout is whole anyway."""
    nowhere = tmp_path / "nowhere"
    checked = check(tmp_path, "--report", str(nowhere / "r"), model=nowhere, dataset=rows, output=tmp_path / "o")
    assert checked.code == 65
    problem = checked.problem("report")
    assert (problem["exit_code"], checked.found["report"]) == (78, None)
    assert f"cannot be written to {nowhere / 'r'}: No such file or directory" in problem["message"]


@pytest.mark.parametrize("library", ["passes it on", "swallows"])
def test_a_signal_is_said_once(tiny_model, rows, tmp_path, library):
    """SIGTERM ends a check with 75 and is one problem: in nested checks, and where a library makes an error of it."""
    settings = {"TUNE_MODEL": str(tiny_model), "TUNE_DATASET": str(rows), "TUNE_OUTPUT": str(tmp_path / "out")}
    settings["TUNE_MAX_LENGTH"] = "128"
    (scratch := tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, library],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch), **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stdout.splitlines()
    problems = json.loads(line)["problems"]
    assert [(problem["kind"], problem["check"]) for problem in problems] == [("interrupted", "dataset")], done.stderr
    assert done.returncode == 75
