"""Ask a base model with a trained adapter one question, with plain transformers and peft: nothing of this project.

    python examples/try_adapter.py MODEL ADAPTER ["e-mail text"]

MODEL is the base model's directory or hub name, ADAPTER the directory that the job wrote. Without a text, one of the
demo's held-out e-mails is asked. Answers are greedy.

The base is loaded in 4 bit (NF4, double quantization), as the job trained on it. That matters: an adapter learns on top
of the quantized weights, errors included, and a model as small as the demo's answers far worse on its 16-bit weights.
"""

import argparse
import json
import logging
from pathlib import Path

logging.disable(logging.WARNING)  # the libraries below warn about their own internals when they are imported

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

HELD_OUT = Path(__file__).parent / "orders" / "eval.jsonl"
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="base model: a directory or a hub name")
    parser.add_argument("adapter", type=Path, help="directory with adapter_model.safetensors")
    parser.add_argument("--16bit", dest="full", action="store_true", help="for an adapter of TUNE_PRECISION=16bit")
    parser.add_argument("text", nargs="?", help="the e-mail; default: a held-out one")
    arguments = parser.parse_args()
    system, user, _ = json.loads(HELD_OUT.read_text(encoding="utf-8").splitlines()[0])["messages"]
    if arguments.text:
        user = {"role": "user", "content": arguments.text}
    else:
        print(user["content"], end="\n\n")
    print(answer(arguments.model, arguments.adapter, [system, user], in_4bit=not arguments.full))


def answer(model_name: str, adapter: Path, messages: list[dict[str, str]], *, in_4bit: bool) -> str:
    """The model's most likely next turn."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(
        model_name,
        dtype=torch.bfloat16,
        device_map="auto",
        quantization_config=NF4 if in_4bit else None,
    )
    model = PeftModel.from_pretrained(model, adapter).eval()
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
