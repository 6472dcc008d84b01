"""The whole job on a tiny model: real processes, real S3 over HTTP, and what they leave behind."""

import hashlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from job.runtime.errors import KINDS
from tests.jobs import ROOT, Ended, run, start, stop_at

pytestmark = pytest.mark.process

SECRET = "planted-secret-value"
SHORT = {"max_steps": 4, "max_length": 128, "samples": 2, "batch_size": 4, "lora_r": 4, "learning_rate": 1e-2}
PROGRESS = {
    "step",
    "max_steps",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "eta_seconds",
    "gpu_memory_allocated_bytes",
    "gpu_memory_reserved_bytes",
    "gpu_memory_peak_bytes",
    "gpu_memory_total_bytes",
    "host_memory_rss_bytes",
}
LOAD = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, run = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(run + "/adapter")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run + "/adapter")
merged = AutoModelForCausalLM.from_pretrained(run + "/merged_16bit", dtype=torch.float32)
rows = [tokenizer(f"Say the number {n}. It is {n * 7}.", return_tensors="pt").input_ids for n in range(50, 60)]
with torch.no_grad():
    pairs = [(model(row).logits.argmax(-1), merged(row).logits.argmax(-1)) for row in rows]
same = torch.cat([(a == b).float().flatten() for a, b in pairs])
changed = any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
limits = [tokenizer.model_max_length, merged.config.use_cache]
print(json.dumps({"same": float(same.mean()), "changed": bool(changed), "limits": limits, "eos": tokenizer.eos_token}))
"""


class Bucket:
    """A bucket, as an observer sees it."""

    def __init__(self, name: str) -> None:
        self.name, self._client = name, boto3.client("s3")

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=data)

    def put_tree(self, directory: Path, prefix: str) -> None:
        for path in directory.iterdir():
            self.put(f"{prefix}/{path.name}", path.read_bytes())

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def json(self, key: str) -> dict:
        return json.loads(self.get(key))


@pytest.fixture(scope="module")
def place(moto, tiny_model, rows) -> Iterator[Bucket]:
    """A bucket with model and data in it, and this process's environment set to reach it."""
    environment = {
        "AWS_ENDPOINT_URL_S3": moto,
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.setup_default_session()
        boto3.client("s3").create_bucket(Bucket="run-tests")
        bucket = Bucket("run-tests")
        bucket.put_tree(tiny_model, "model")
        bucket.put("data/a.jsonl", rows.read_bytes())
        yield bucket
    boto3.setup_default_session()


@pytest.fixture(scope="module")
def settings(place) -> dict:
    """What every run here has in common."""
    uri = f"s3://{place.name}"
    return {**SHORT, "model": f"{uri}/model", "dataset": f"{uri}/data/", "output": f"{uri}/runs", "HF_TOKEN": SECRET}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Ended:
    """One run with everything on, in an interpreter of its own."""
    return run(
        tmp_path_factory.mktemp("first"),
        fresh=True,
        **settings,
        run_id="first",
        checkpoint_steps=1000,
        warmup=2,
        eval_fraction=0.2,
        export="adapter,merged_16bit",
    )


def test_the_report_of_a_run(finished, place):
    """A finished run leaves a page with what was learned, its losses, answers from before and after, and no secret."""
    assert finished.code == 0
    page = place.get("runs/first/report.html").decode()
    assert ">complete<" in page
    assert 'class="t l' in page
    assert page.count("<polyline") == 2
    assert "before training" in page
    assert "after training" in page
    assert "host memory peak" in page
    assert SECRET not in page


def test_a_run_completes_with_its_events(finished):
    """The documented events come in order, with their documented fields."""
    assert finished.code == 0
    by_speed = {"library_output", "checkpoint_superseded", "transfer_progress"}
    names = [line["event"] for line in finished.lines if line["event"] not in by_speed]
    order = ["run_started", "dataset_ready", "model_loaded", "evaluated", "sample", "plan_made", "train_progress"]
    order += ["checkpoint_committed", "artifact_uploaded", "run_complete"]
    assert order == sorted(set(names), key=names.index)
    assert all({"timestamp", "level", "run_id", "rank"} <= line.keys() for line in finished.lines)
    assert all(line["attempt"] == 1 for line in finished.lines)
    progress = finished.events("train_progress")
    assert [1, 2, 3, 4] == [line["step"] for line in progress]
    assert all(line.keys() >= PROGRESS for line in progress)
    assert progress[-1]["host_memory_rss_bytes"] > 100_000_000
    assert progress[-1]["loss"] < progress[0]["loss"]
    committed = [line["step"] for line in finished.events("checkpoint_committed")]
    assert committed[-1] == 4
    assert committed == sorted(set(committed))
    assert {"bytes", "stall_seconds", "upload_seconds"} <= finished.event("checkpoint_committed").keys()
    complete = finished.event("run_complete")
    assert complete["eval_loss"] < complete["eval_loss_before"]
    assert {"gpu_memory_before_bytes", "gpu_memory_peak_bytes", "gpu_memory_peak_share"} <= complete.keys()


def test_every_step_trains(finished, place):
    """The learning rate rises from the first step on and falls after the warm-up, by the documented formula; the loss
    of the training is the mean of its steps."""
    steps = finished.events("train_progress")
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2 / 2])
    assert steps[0]["grad_norm"] > 0
    assert steps[1]["loss"] != steps[0]["loss"]
    results = place.json("runs/first/done.json")["results"]
    assert results["train_loss"] == pytest.approx(statistics.fmean(line["loss"] for line in steps))
    assert results["final_step_loss"] == steps[-1]["loss"]
    assert finished.event("run_complete")["train_loss"] == results["train_loss"]


def test_counts_of_the_data(finished):
    """`dataset_ready` counts rows, both sides, truncated, dropped and masked."""
    ready = finished.event("dataset_ready")
    assert ready["rows"] + ready["eval_rows"] == 40
    assert ready["eval_rows"] > 0
    assert [0, 0, 0] == [ready[name]["count"] for name in ("truncated", "dropped_overlong", "fully_masked")]
    assert 0 < ready["labelled_tokens"] < ready["tokens"]


def test_the_plan_is_logged(finished):
    """The effective hyperparameters are logged, also where the CPU cannot do what was asked."""
    plan = finished.event("plan_made")["plan"]
    assert (plan["micro_batch"], plan["batch_size"], plan["batching"]) == (4, 4, "padded")
    assert plan["optimizer"] == "adamw_torch_fused"
    assert plan["learning_rate"] == 1e-2


def test_the_tokens_of_a_step(settings, place, tmp_path):
    """`tokens_per_second` counts the tokens of the steps that are done, and none of a batch that is only ready."""
    same = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}
    place.put("same/rows.jsonl", (json.dumps(same) + "\n").encode() * 10)
    values = {"samples": 0, "eval_fraction": 0, "batch_size": 4, "max_steps": 5, "run_id": "tokens", "quality": "off"}
    ended = run(tmp_path, **{**settings, **values, "dataset": f"s3://{place.name}/same/", "output": tmp_path})
    row, seconds, seen = ended.event("dataset_ready")["tokens"] / 10, 0.0, []
    for line in ended.events("train_progress"):
        seconds += line["step_seconds"]
        seen.append(line["tokens_per_second"] * seconds / row)
    assert seen == pytest.approx([4, 8, 10, 14, 18], rel=1e-2)  # two epochs, of which each ends with two rows


def test_what_counts_as_compiling(finished):
    """`compile` is the making of the plan, and what the first step took more than the later ones."""
    first, *later = [entry["step_seconds"] for entry in finished.events("train_progress")]
    expected = finished.event("plan_made")["seconds"] + max(0.0, first - statistics.median(later))
    assert finished.event("run_complete")["timeline_seconds"]["compile"] == pytest.approx(expected, abs=2e-3)


def test_what_a_run_leaves(finished, place):
    """The layout is the documented one, and `done.json` has every artefact's true size and hash."""
    assert finished.code == 0
    keys = {key.removeprefix("runs/first/") for key in place.names() if key.startswith("runs/first/")}
    assert {"run.json", "inputs.json", "metrics.jsonl", "done.json"} <= keys
    assert {"attempts/0001.json", "attempts/0001.end.json"} <= keys
    assert {"checkpoints/commits/000001.json", "checkpoints/commits/000002.json"} <= keys
    done = place.json("runs/first/done.json")
    names = [artifact["name"] for artifact in done["artifacts"]]
    assert {name for name in keys if name.startswith("results/")} == {f"{done['prefix']}/{name}" for name in names}
    assert {name.partition("/")[0] for name in names} == {"adapter", "merged_16bit", "metrics.jsonl", "report.html"}
    assert [name for name in names if name.startswith("adapter/")][-1] == "adapter/README.md"
    assert {name for name in keys if name.startswith("adapter/")} == {
        name for name in names if name.startswith("adapter/")
    }
    for artifact in done["artifacts"]:
        data = place.get(f"runs/first/{done['prefix']}/{artifact['name']}")
        assert (artifact["size"], artifact["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        if not artifact["name"].startswith("merged_16bit/"):
            assert place.get(f"runs/first/{artifact['name']}") == data
    latest = place.json("runs/latest.json")
    assert (latest["run_id"], latest["uri"]) == ("first", done["uri"])
    assert latest["uri"].endswith(f"/runs/first/{done['prefix']}/")
    assert place.json(f"runs/first/{done['prefix']}/merged_16bit/generation_config.json")["eos_token_id"] == [257]
    assert place.json("runs/first/attempts/0001.end.json")["outcome"] == "complete"


def test_checkpoints_are_whole(finished, place):
    """A commit lists every file with its true size and hash, and no pickled settings."""
    names = sorted(name for name in place.names() if name.startswith("runs/first/checkpoints/commits/"))
    (first, *commits, final, published) = [place.json(name) for name in names]
    assert [first["kind"], final["kind"], published["kind"]] == ["fence", "final", "published"]
    assert {commit["kind"] for commit in commits} == {"checkpoint"}
    commit = commits[-1]
    assert (commit["step"], commit["attempt"]) == (4, 1)
    names = {file["name"] for file in commit["files"]}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert "training_args.bin" not in names
    for file in commit["files"]:
        data = place.get(f"runs/{'first'}/{commit['data'].partition('/')[2]}/{file['name']}")
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_record_tells_what_was_read(finished, place):
    """`inputs.json` lists every file that was read; `metrics.jsonl` has the curve and the samples."""
    names = {file["name"] for file in place.json("runs/first/inputs.json")["files"]}
    assert f"s3://{place.name}/data/a.jsonl" in names
    assert f"s3://{place.name}/model/config.json" in names
    history = [json.loads(line) for line in place.get("runs/first/metrics.jsonl").splitlines()]
    assert [4, 4] == [
        sum(entry["event"] == "train_progress" for entry in history),
        sum(entry["event"] == "sample" for entry in history),
    ]
    logged = [line["answer"] for line in finished.events("sample")]
    assert logged == [entry["answer"] for entry in history if entry["event"] == "sample"]


def test_the_model_card_is_true(finished, place, rows):
    """The card names base, data with hash, hyperparameters, versions and metrics."""
    card = place.get("runs/first/adapter/README.md").decode()
    assert hashlib.sha256(rows.read_bytes()).hexdigest() in card
    assert f"s3://{place.name}/model" in card
    assert "| learning_rate | 0.01 |" in card
    assert "| TUNE_LORA_R | 4 |" in card
    assert f"{finished.event('run_complete')['eval_loss']:.6g}" in card
    assert "| unsloth |" in card


def test_no_secret_anywhere(finished, place):
    """A secret from the environment is in no log line and in no object that the run wrote."""
    assert SECRET not in json.dumps(finished.lines)
    for key in place.names():
        assert SECRET.encode() not in place.get(key), key


def test_adapter_and_merged_weights_load_as_another_user(finished, place, tiny_model, tmp_path):
    """Plain peft and transformers load both as another uid; adapter on base and merged weights agree; the tokenizer
    and configuration are the base's own."""
    assert finished.code == 0
    tmp_path.chmod(0o755)
    results = f"runs/first/{place.json('runs/first/done.json')['prefix']}/"
    for key in place.names():
        if key.startswith(results):
            path = tmp_path / key.removeprefix(results)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(place.get(key))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", f"s3://{place.name}/model")
    shown = subprocess.check_output([sys.executable, "-c", LOAD, str(tiny_model), str(tmp_path)], cwd="/")
    facts = json.loads(shown.splitlines()[-1])
    assert facts["same"] >= 0.97
    assert facts["changed"]
    assert facts["limits"] == [512, True]
    assert facts["eos"] == "<|im_end|>"


def test_files_are_readable_by_others(settings, tmp_path):
    """In a directory used as output, every published file may be read by any uid."""
    out = tmp_path / "out"
    ended = run(tmp_path, **{**settings, "output": out, "run_id": "local", "eval_fraction": 0, "max_steps": 2})
    assert ended.code == 0
    assert not ended.events("evaluated")
    adapter = out / "local" / "adapter"
    assert (adapter / "adapter_model.safetensors").exists()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in adapter.iterdir())


def test_the_same_run_gives_the_same_adapter(finished, settings, place, tmp_path):
    """Two runs of one configuration publish the same adapter, bit for bit, whatever else they log or export."""
    again = run(tmp_path, **settings, run_id="again", eval_fraction=0.2, warmup=2, log_level="warning", eval_steps=1)
    assert again.code == 0
    assert not again.events("train_progress")
    assert place.get("runs/first/adapter/adapter_model.safetensors") == place.get(
        "runs/again/adapter/adapter_model.safetensors"
    )


def test_accumulation_does_not_change_the_steps(finished, settings, tmp_path):
    """The same batch in other passes has the same losses, to rounding: they are means over the batch's labels."""
    split = run(tmp_path, **settings, run_id="split", eval_fraction=0.2, warmup=2, micro_batch=1)
    losses = [line["loss"] for line in split.events("train_progress")]
    assert losses == pytest.approx([line["loss"] for line in finished.events("train_progress")], rel=2e-3)


def test_a_finished_run_is_not_run_again(finished, settings, place, tmp_path):
    """A finished run ends at once with 0; with other data under the same address it ends with 78 and names the file."""
    assert finished.code == 0
    again = run(tmp_path, **settings, run_id="first", eval_fraction=0.2, warmup=2)
    assert (again.code, again.lines[-1]["event"]) == (0, "already_complete")
    assert again.seconds < 15
    place.put("data/b.jsonl", b'{"messages": []}\n')
    try:
        changed = run(tmp_path, **settings, run_id="first", eval_fraction=0.2, warmup=2)
    finally:
        boto3.client("s3").delete_object(Bucket=place.name, Key="data/b.jsonl")
    assert changed.code == 78
    assert "data/b.jsonl" in changed.event("run_failed")["message"]


@pytest.mark.parametrize(
    ("values", "code", "part"),
    [
        pytest.param({"lora_targets": "q_proj,k_porj"}, 78, "k_porj", id="a target that matches nothing"),
        pytest.param({"precision": "8bit"}, 78, "TUNE_PRECISION=8bit", id="8 bit without a GPU"),
        pytest.param({"device": "cuda"}, 78, "no GPU device", id="cuda without a GPU"),
        pytest.param({"max_length": 4096}, 78, "512 tokens", id="longer than the model's positions"),
        pytest.param({"dataset": "s3://run-tests/nothing/"}, 65, "s3://run-tests/nothing/", id="missing key"),
        pytest.param({"dataset": "s3://no-such-bucket/x"}, 65, "no-such-bucket", id="missing bucket"),
        pytest.param({"model": "s3://run-tests/data"}, 65, "it contains: a.jsonl", id="no model there"),
    ],
)
def test_what_cannot_work_ends_with_its_code(settings, tmp_path, values, code, part):
    """A run that cannot work says why and exits with the code of its kind."""
    ended = run(tmp_path, **{**settings, "run_id": "bad", **values})
    assert ended.code == code
    failed = ended.event("run_failed")
    assert part in failed["message"]
    assert failed["remedy"]
    assert failed["exit_code"] == code
    assert failed["kind"] == next(kind.kind for kind in KINDS if kind.exit_code == code)


def test_all_labels_masked_never_starts(settings, tmp_path, rows):
    """Rows whose labels are all cut away are an error, not a run that learns nothing."""
    (tmp_path / "long.jsonl").write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "never reached"}]}
        )
        + "\n"
    )
    ended = run(tmp_path, **{**settings, "run_id": "masked", "dataset": tmp_path / "long.jsonl"})
    assert ended.code == 65
    assert not ended.events("train_progress")


def test_invalid_rows_are_named(settings, place, tmp_path):
    """Invalid rows end the run with 65, file and line, and the failure is recorded in the output."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "hi"}]}\nnot json\n')
    ended = run(tmp_path, **{**settings, "run_id": "invalid", "dataset": bad})
    assert ended.code == 65
    assert f"{bad}:2" in ended.event("run_failed")["message"]
    assert place.json("runs/invalid/failure.json")["exit_code"] == 65
    assert place.json("runs/invalid/attempts/0001.end.json")["outcome"] == "data"


def test_a_second_signal_ends_at_once(settings, tmp_path):
    """A signal repeated later ends the process at once, with 75 as well."""
    child = start(tmp_path, **{**settings, "run_id": "twice", "max_steps": 500})
    first = stop_at(child, "train_progress", signal.SIGINT)
    assert first.code == 75
    child = start(tmp_path, **{**settings, "run_id": "thrice", "max_steps": 500})
    assert b"run_started" in child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    child.stdout.close()
    assert child.wait(timeout=30) == 75


def test_several_processes_are_refused(settings, tmp_path):
    """A launcher that starts several ranks hears that this job is one process."""
    ended = run(tmp_path, **settings, WORLD_SIZE=2, RANK=1)
    assert ended.code == 78
    assert ended.lines[-1]["rank"] == 1
    assert "WORLD_SIZE=2" in ended.lines[-1]["message"]


def test_sigterm_exits_75(settings, place, tmp_path):
    """SIGTERM ends a training run with 75 and an `interrupted` event, and the attempt's end is recorded."""
    ended = stop_at(start(tmp_path, **{**settings, "run_id": "stopped", "max_steps": 500}), "train_progress")
    assert ended.code == 75
    assert ended.event("interrupted")["signal"] == "SIGTERM"
    assert place.json("runs/stopped/attempts/0001.end.json")["outcome"] == "interrupted"


def test_no_evaluation_is_broken_off_where_there_is_none(settings, tmp_path):
    """A signal before a step at which an evaluation would be due says nothing of one."""
    none = {"eval_fraction": 0, "eval_steps": 1, "run_id": "nothing-held-out", "max_steps": 500}
    ended = stop_at(start(tmp_path, **{**settings, **none}), "train_progress")
    assert ended.code == 75
    assert ended.events("evaluation_cancelled") == []


def test_prequantised_bases_work(settings, place, tiny_model, tmp_path):
    """A checkpoint stored in 4-bit trains, merges to 16 bit, and the path's name changes nothing."""
    base = tmp_path / "tiny-unsloth-bnb-4bit"
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                       bnb_4bit_compute_dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=q, device_map="cpu").save_pretrained(sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", code, str(tiny_model), str(base)], check=True, cwd=ROOT, capture_output=True)
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, base)
    shutil.copy(tiny_model / "chat_template.jinja", base)
    values = {**settings, "model": base, "run_id": "prequantised", "export": "adapter,merged_16bit"}
    ended = run(tmp_path, **values)
    assert ended.code == 0
    assert ended.event("model_loaded")["prequantised"] == "4bit"
    results = f"runs/prequantised/{place.json('runs/prequantised/done.json')['prefix']}"
    assert "quantization_config" not in place.json(f"{results}/merged_16bit/config.json")
    assert not [key for key in place.names() if key.startswith(results) and "absmax" in key]


def test_divergence_is_permanent():
    """A loss that is no number ends the run with 70, whatever the trainer would make of it."""
    code = """
from types import SimpleNamespace as N
from job.runtime.errors import PermanentError
from job.tuning.callbacks.progress import Progress
from job.tuning.trainer.collator import CountingCollator
progress = Progress(device=N(kind="cpu", dtype=None), collator=CountingCollator(None), log_steps=1, hooks=None)
try:
    progress.on_log(None, N(global_step=3, max_steps=9, epoch=0.1), None, {"loss": float("nan"), "grad_norm": 1.0})
except PermanentError as error:
    assert "loss is nan at step 3" in str(error), error
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
