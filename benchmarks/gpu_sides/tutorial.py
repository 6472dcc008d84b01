"""Unsloth's tutorial as a script: SFTTrainer with DataCollatorForSeq2Seq, so padded, 2 x 4, checkpointing "unsloth".

With --no-collator the same without that one argument: Unsloth then turns padding-free batches on by itself.

--tokens takes ready input_ids and labels, so that all sides learn the same; --rows takes conversations and does what
the tutorial does with them: apply_chat_template to text, tokenise, train_on_responses_only. Steps, losses and memory
go to <output>/side.json, the adapter to <output>/lora_model.

    python benchmarks/gpu_sides/tutorial.py --model DIR --tokens DIR --output DIR --steps 25
"""

import argparse
import gc
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip - before all others
import torch
from datasets import load_dataset, load_from_disk
from probe import watch, write
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer
from unsloth.chat_templates import train_on_responses_only

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, help="a dataset on disk with input_ids and labels")
    parser.add_argument("--rows", type=Path, help="JSON lines with messages")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--micro", type=int, nargs="+", default=[2], help="several: one after the other until one fails"
    )
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--no-collator", action="store_true")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=asked.model, max_seq_length=asked.max_length, dtype=None, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=TARGETS,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    survived = []
    for micro in asked.micro:
        trainer = steps = counting = None
        try:
            trainer = build(asked, model, tokenizer, micro)
            steps, counting = watch(trainer)
            trainer.train()
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            print(f"micro-batch {micro}: {str(error).splitlines()[0]}")
            break
        survived.append(micro)
        write(asked.output, trainer, steps, counting, survived=survived)
        del trainer, steps, counting
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    model.save_pretrained(asked.output / "lora_model")
    tokenizer.save_pretrained(asked.output / "lora_model")


def build(asked: argparse.Namespace, model: Any, tokenizer: Any, micro: int) -> Any:
    dataset = load_from_disk(str(asked.tokens)) if asked.tokens else texts(asked.rows, tokenizer)
    collator = {} if asked.no_collator else {"data_collator": DataCollatorForSeq2Seq(tokenizer=tokenizer)}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        **collator,
        args=SFTConfig(
            output_dir=str(asked.output / "outputs"),
            dataset_text_field="text",
            max_length=asked.max_length,
            dataset_num_proc=2,
            packing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=max(1, asked.batch // micro),
            warmup_steps=min(5, max(asked.steps - 1, 0)) if asked.steps > 0 else 5,
            max_steps=asked.steps,
            num_train_epochs=asked.epochs,
            learning_rate=2e-4,
            bf16=is_bfloat16_supported(),
            fp16=torch.cuda.is_available() and not is_bfloat16_supported(),
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            data_seed=3407,
            report_to="none",
        ),
    )
    if asked.rows:
        parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
        trainer = train_on_responses_only(trainer, **parts)
    return trainer


def texts(rows: Path, tokenizer: Any) -> Any:
    def render(batch: dict[str, Any]) -> dict[str, list[str]]:
        found = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
        return {"text": found}

    return load_dataset("json", data_files=str(rows), split="train").map(render, batched=True)


if __name__ == "__main__":
    main()
