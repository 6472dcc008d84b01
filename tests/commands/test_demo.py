"""What the demo stands on: its dataset and its model. The demo itself is run by `make demo`."""

import json
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parents[2] / "examples"
ORDERS = EXAMPLES / "orders"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ORDERS / name).read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_committed_bytes() -> None:
    """The dataset is a function of the script: whoever doubts a row can read how it was made."""
    generate = runpy.run_path(str(ORDERS / "generate.py"))["generate"]

    assert {name: (ORDERS / name).read_text(encoding="utf-8") for name in ("train.jsonl", "eval.jsonl")} == {
        name: "".join(lines) for name, lines in generate().items()
    }


def test_nothing_held_out_is_trained_on() -> None:
    """No e-mail and no customer of the held-out rows occurs in training."""
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")

    assert (len(train), len(held_out)) == (480, 40)
    for part in (email, customer):
        assert len({part(row) for row in train + held_out}) == 520, part.__name__


def email(row: dict) -> str:
    return row["messages"][1]["content"]


def customer(row: dict) -> str:
    return json.loads(row["messages"][-1]["content"])["customer"]


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_every_answer_is_an_order_found_in_its_email(name: str) -> None:
    """Each assistant turn is a JSON object of one shape, and its customer and city stand in the e-mail."""
    for row in rows(name):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        order = json.loads(row["messages"][-1]["content"])
        assert list(order) == ["customer", "city", "items", "express"]
        assert order["customer"] in email(row)
        assert order["city"] in email(row)
        assert order["express"] is ("express" in email(row).lower())
        assert order["items"]
        assert all(item["quantity"] > 0 and item["product"] for item in order["items"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, EXAMPLES / "smollm2.py", directory], check=True)
    return directory


def test_the_converted_model_ends_its_turns(model: Path) -> None:
    """The GGUF's end-of-sequence token, read naively, opens a turn; all three files name the one that closes it."""
    configs = {
        name: json.loads((model / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config", "tokenizer")
    }
    ids = {token["content"]: token["id"] for token in configs["tokenizer"]["added_tokens"]}

    assert configs["tokenizer_config"]["eos_token"] == "<|im_end|>"
    assert ids["<|im_end|>"] == configs["config"]["eos_token_id"] == configs["generation_config"]["eos_token_id"]
    assert "<|im_end|>" in (model / "chat_template.jinja").read_text()


def test_the_converted_model_is_a_plain_checkpoint(model: Path) -> None:
    """Other users may read every file, nothing says that the weights are still quantized, no scratch is left."""
    assert {0o644} == {stat.S_IMODE(path.stat().st_mode) for path in model.iterdir()}
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert [model] == list(model.parent.iterdir())


def test_converting_again_does_nothing(model: Path) -> None:
    """A whole directory is left as it is."""
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}

    subprocess.run([sys.executable, EXAMPLES / "smollm2.py", model], check=True)

    assert before == {path.name: path.stat().st_mtime_ns for path in model.iterdir()}


@pytest.mark.slow
def test_plain_transformers_talks_to_the_converted_model(model: Path) -> None:
    """It answers a question and stops by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    output = network.generate(**inputs, max_new_tokens=60, do_sample=False)[0]

    assert "Paris" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == output[-1]
