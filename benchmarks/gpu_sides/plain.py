"""TRL + PEFT + bitsandbytes as their documents show them: QLoRA, padded batches, 2 x 4, gradient checkpointing.

Takes ready input_ids and labels; steps, losses and memory go to <output>/side.json.

    python benchmarks/gpu_sides/plain.py --model DIR --tokens DIR --output DIR --steps 25
"""

import argparse
from pathlib import Path

import torch
from datasets import load_from_disk
from peft import LoraConfig
from probe import watch, write
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="a dataset on disk with input_ids and labels")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--max-length", type=int, default=2048)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, quantization_config=quantisation, dtype=torch.bfloat16, device_map={"": 0}
    )
    model.config.use_cache = False
    set_seed(3407)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_from_disk(str(asked.tokens)),
        peft_config=LoraConfig(
            r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=str(asked.output / "outputs"),
            max_length=asked.max_length,
            packing=False,
            per_device_train_batch_size=asked.micro,
            gradient_accumulation_steps=max(1, asked.batch // asked.micro),
            gradient_checkpointing=True,
            warmup_steps=min(5, max(asked.steps - 1, 0)),
            max_steps=asked.steps,
            learning_rate=2e-4,
            bf16=True,
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            data_seed=3407,
            report_to="none",
        ),
    )
    steps, counting = watch(trainer)
    trainer.train()
    write(asked.output, trainer, steps, counting)
    trainer.model.save_pretrained(asked.output / "lora_model")


if __name__ == "__main__":
    main()
