"""A model whose weights are stored under other names, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

INDEX = "model.safetensors.index.json"


def rename_weights(model: Path, name: Callable[[str], str | None]) -> None:
    """Store every tensor of a model in shards under `name(its name)`; without a name it is left out."""
    files: dict[str, str] = {}
    for shard in model.glob("*.safetensors"):
        data = shard.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8:start]), b""
        kept = {"__metadata__": header.pop("__metadata__", {})}
        for old, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if new := name(old):
                first, last = tensor["data_offsets"]
                kept[new] = {**tensor, "data_offsets": [len(body), len(body) + last - first]}
                body += data[start + first : start + last]
                files[new] = shard.name
        text = json.dumps(kept).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + body)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
