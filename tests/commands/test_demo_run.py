"""The demo: a real model learns a real task through S3, and the adapter keeps what the log promises."""

import json
import os
import subprocess
import sys

import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.process

PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
model, adapter = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
base = AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4, dtype=torch.bfloat16, device_map="cpu")
tokenizer = AutoTokenizer.from_pretrained(adapter)
loaded = PeftModel.from_pretrained(base, adapter).eval()
for prompt in json.load(sys.stdin):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = loaded.generate(**ids, max_new_tokens=120, do_sample=False)
    answer = tokenizer.decode(output[0, ids.input_ids.shape[1]:], skip_special_tokens=True).strip()
    print(json.dumps(answer))
"""


SHORT = """
import sys
from pathlib import Path
from job.commands.demo import demo
place = Path(sys.argv[1])
for name, rows in (("train.jsonl", 24), ("eval.jsonl", 4)):
    (place / name).write_text("".join((demo.ORDERS / name).read_text().splitlines(keepends=True)[:rows]))
demo.ORDERS = place
demo.SETTINGS_OF_THE_RUN |= {"TUNE_MAX_STEPS": "2", "TUNE_EVAL_STEPS": "2", "TUNE_SAMPLES": "1", "TUNE_BATCH_SIZE": "2"}
sys.exit(demo.demo(directory=place))
"""
"""The demo with few rows and steps."""


def demo(*arguments: object) -> subprocess.CompletedProcess:
    """The demo as a process, with what it printed."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_demo_of_two_steps(tmp_path):
    """In two steps the model learns little, and the demo says so. All the rest is as in the whole demo: every line of
    the job's log is JSON, and the adapter is there."""
    done = demo("-c", SHORT, tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "That is not what the demo should show" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines[-1]["event"] == "run_complete"
    after = [line for line in lines if line["event"] == "sample" and line["phase"] == "after"]
    assert len(after) == 1
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_demo_and_its_adapter():
    """The whole demo succeeds: at most 10 % right before, at least 90 % after. The adapter from the bucket, loaded with
    plain peft on the base in NF4 (what it was trained on), gives the answers that the log claims. No checkpoint makes
    training wait for a second, and all of them for a hundredth of its time."""
    done = demo("-m", "job", "demo")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "Exactly right: before" in done.stdout
    lines = [json.loads(line) for line in (ROOT / ".demo/run.log").read_text().splitlines()]
    after = [line for line in lines if line["event"] == "sample" and line["phase"] == "after"]
    assert len(after) == 20
    trained = sum(line["step_seconds"] for line in lines if line["event"] == "train_progress")
    stalls = [line["stall_seconds"] for line in lines if line["event"] == "checkpoint_committed"]
    assert stalls
    assert max(stalls) < 1
    assert sum(stalls) < trained / 100
    model, adapter = ROOT / ".demo/model", ROOT / ".demo/adapter"
    compared = after[::4]  # one by one in plain peft: a quarter of them takes a minute
    shown = subprocess.check_output(
        [sys.executable, "-c", PLAIN, model, adapter],
        input=json.dumps([line["prompt"] for line in compared]),
        text=True,
        cwd="/",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "10000"},
    )
    answers = [json.loads(line) for line in shown.splitlines() if line.startswith('"')]
    # One by one here, padded to a batch there: an answer may part where two tokens are equally likely.
    assert sum(mine == line["answer"] for mine, line in zip(answers, compared, strict=True)) >= len(compared) - 1
