"""finetune-job: a dataset and a base model in, a trained LoRA adapter out, safe to kill at any moment."""
