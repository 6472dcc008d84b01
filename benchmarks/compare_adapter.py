"""Load what a run published with plain peft and transformers, and compare adapter on base with merged weights.

    python benchmarks/compare_adapter.py <base model> <run directory>

The last line it prints is JSON: the share of positions of held-out rows where both have the same most likely token,
and the largest difference of logits, computed in fp32.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 8


def main() -> int:
    base, run = sys.argv[1], Path(sys.argv[2])
    published = run / json.loads((run / "done.json").read_text())["prefix"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(published / "adapter")
    examples = Path(__file__).resolve().parent.parent / "examples/orders/eval.jsonl"
    rows = [json.loads(line)["messages"] for line in examples.read_text().splitlines()[:ROWS]]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]

    def logits(model: torch.nn.Module) -> list[torch.Tensor]:
        model.eval()
        with torch.no_grad():
            encoded = [tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device) for text in texts]
            return [model(input_ids=one.input_ids).logits[0].float().cpu() for one in encoded]

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    adapted = logits(PeftModel.from_pretrained(plain, published / "adapter"))
    del plain
    merged = logits(AutoModelForCausalLM.from_pretrained(published / "merged_16bit", dtype=torch.float32).to(device))
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(adapted, merged, strict=True)])
    gap = max(float((a - b).abs().max()) for a, b in zip(adapted, merged, strict=True))
    print(json.dumps({"top1_agreement": round(float(same.mean()), 5), "positions": len(same), "largest_gap": gap}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
