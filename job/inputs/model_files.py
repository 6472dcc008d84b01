"""The files of a base model: of all that lies in a folder, prefix or repository, those that are one model.

There is one list, made here, and it is what is downloaded, inspected, hashed, loaded and published, wherever the model
lies. Libraries look around in the folder they are given, and take more than what they were meant to: an older file of
weights, an adapter. So what another loader would take for the model is rejected by name, and the loaders are given a
folder that holds nothing else (`folder_of`).

What transformers takes, and in which order: `_get_resolved_checkpoint_files` in its `modeling_utils.py`,
`PreTrainedTokenizerBase.from_pretrained` in its `tokenization_utils_base.py`, `maybe_load_adapters` in its
`integrations/peft.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.runtime.errors import DataError
from job.storage.folder import Rule

CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG = "config.json", "generation_config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS = "special_tokens_map.json"
VOCABULARIES = (
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "tiktoken.model"),
)
"""What other tokenizers than that of `tokenizer.json` are made from. Other programs need some of them, so they are
published, too."""
CONVERTED = ("tekken.json",)
"""Taken only where there is no `tokenizer.json`: with mistral-common, transformers would prefer it."""
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, *VOCABULARIES, *CONVERTED)
MORE_TEMPLATES = "additional_chat_templates/"
RULE = Rule(
    enters=lambda name: f"{name}/" == MORE_TEMPLATES,
    reads=lambda name: (
        name in {CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES} or name.endswith((SUFFIX, ".jinja"))
    ),
)
"""What of a folder on this disk matters."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST = 256 << 20
"""Bytes of a file that is not weights; the largest tokenizers have 33 million."""
LARGEST_JSON = 16 << 20
"""Bytes of a configuration or an index; an index of 70 billion weights has 60 thousand."""
COPY_AGAIN = "Copy the model to TUNE_MODEL again."
LFS, LFS_BYTES = b"version https://git-lfs.github.com/", 64
"""How a Git LFS pointer begins: what a clone without git-lfs has in the place of large files."""
LISTED = 10


def choose(model: str, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> list[str]:
    """The files that are the model, sorted.

    Args:
        model: its name, for messages.
        sizes: bytes of all files that lie there, by path.
        read: returns a small file of them.

    Raises:
        DataError: it is not a model, it is not whole, or it is not clear which of the files it is.
    """
    _check_kind(model, sizes)
    others = [name for name in sizes if _belongs(name, sizes)]
    for name in others:
        if sizes[name] > (LARGEST if name in TOKENIZER_FILES else LARGEST_JSON):
            raise DataError(
                f"{name} of {model} has {sizes[name]:,} bytes, more than any model needs.", remedy=COPY_AGAIN
            )
    return sorted({*_weights(model, sizes, read), *others})


def folder_of(files: Mapping[str, Path], directory: Path) -> Path:
    """A folder that shows these files under these names, and no others.

    Args:
        files: places by name.
        directory: where the folder is made. Its own name says nothing: Unsloth decides by parts of a model's path.
    """
    listed = json.dumps({name: str(path) for name, path in sorted(files.items())})
    folder = directory / hashlib.sha256(listed.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    made = directory / uuid.uuid4().hex
    for name, path in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).symlink_to(path)
    try:
        made.rename(folder)  # at once: another run may be reading through it
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(made)
    return folder


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object that a file of a model holds.

    Raises:
        DataError: it is something else; `what` names it.
    """
    check_no_pointer(data, what)
    try:
        found = json.loads(data)
    except RecursionError:
        raise DataError(f"{what} is not valid JSON: it is nested too deep.", remedy=COPY_AGAIN) from None
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f"{what} is not valid JSON: {error}.", remedy=COPY_AGAIN) from None
    if not isinstance(found, dict):
        raise DataError(f"{what} is not a JSON object but {type(found).__name__}.", remedy=COPY_AGAIN)
    return found


def check_no_pointer(start: bytes, what: str) -> None:
    """Raise DataError for a file that is only a pointer to what it should hold; `what` names it."""
    if start.startswith(LFS):
        raise DataError(
            f"{what} is a Git LFS pointer, not the file itself.",
            remedy="Run `git lfs install` and `git lfs pull` where the model was cloned, and copy it again.",
        )


def read_object(path: Path, model: str) -> dict[str, Any]:
    """The same, read from a file of a model. Raises DataError also if it is too large."""
    what = f"{path.name} of {model}"
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{what} has {path.stat().st_size:,} bytes, more than any model needs.", remedy=COPY_AGAIN)
    return json_object(path.read_bytes(), what)


def _belongs(name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a file that is not weights is part of a model: configuration, tokenizer, templates."""
    if name in CONVERTED and TOKENIZER in sizes:
        return False
    folder, _, last = name.rpartition("/")
    return name in {CONFIG, GENERATION_CONFIG, INDEX, TEMPLATE, *TOKENIZER_FILES} or (
        f"{folder}/" == MORE_TEMPLATES and last.endswith(".jinja")
    )


def _check_kind(model: str, sizes: Mapping[str, int]) -> None:
    """Reject what is not a base model, or more than one."""
    if CONFIG not in sizes and ADAPTER_CONFIG in sizes:
        raise DataError(
            f"{model} is an adapter, not a base model.", remedy="Set TUNE_MODEL to the base it was made for."
        )
    if CONFIG not in sizes:
        raise DataError(
            f"{model} has no {CONFIG}; it contains: {_listed(sizes)}.",
            remedy="TUNE_MODEL must be the directory or prefix with config.json and model.safetensors or its shards.",
        )
    if ADAPTER_CONFIG in sizes:
        raise DataError(
            f"{model} has {CONFIG} and {ADAPTER_CONFIG}: a base model and an adapter. Transformers would put the "
            "adapter on the base, even if the weights contain it already.",
            remedy=f"Set TUNE_MODEL to a copy without {ADAPTER_CONFIG} and adapter_model.*; without them, the base's "
            "own weights are what is trained.",
        )


def _weights(model: str, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> list[str]:
    """The files of weights: the shards that the index names, or the one file there is without an index."""
    if INDEX not in sizes:
        if WEIGHTS in sizes:
            return [WEIGHTS]
        raise _no_weights(model, sizes)
    shards = _shards(model, read(INDEX))
    missing = [file for file in shards if file not in sizes]
    if missing:
        raise DataError(
            f"{model} is incomplete: {missing[0]} is missing ({len(missing)} of {len(shards)} files).",
            remedy=COPY_AGAIN,
        )
    if WEIGHTS in sizes and shards != [WEIGHTS]:
        raise DataError(
            f"{model} has {WEIGHTS}, and {INDEX} names other files ({shards[0]}): transformers would load the first "
            "and ignore the index, other programs the opposite.",
            remedy="Set TUNE_MODEL to a copy that has one of the two: delete the older one.",
        )
    return shards


def _shards(model: str, index: bytes) -> list[str]:
    """The files that an index names."""
    names = weight_map(index, f"{INDEX} of {model}").values()
    for name in names:
        if not name.endswith(SUFFIX) or set("/\\") & set(name) or name.startswith(".") or not name.isprintable():
            raise DataError(
                f"{INDEX} of {model} is damaged: it names {name!r}, which is not a {SUFFIX} file next to it.",
                remedy=COPY_AGAIN,
            )
    return sorted(set(names))


def weight_map(index: bytes, what: str) -> dict[str, str]:
    """The file of each tensor by an index. Raises DataError if it does not say that."""
    content = json_object(index, what)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise DataError(f"{what} is damaged: its weight_map does not name a file for each tensor.", remedy=COPY_AGAIN)
    if not isinstance(content.get("metadata"), dict):
        raise DataError(
            f"{what} has no object metadata, without which transformers does not read it.",
            remedy='Write `"metadata": {}` into it, or save the model again with save_pretrained.',
        )
    return found


def _no_weights(model: str, sizes: Mapping[str, int]) -> DataError:
    found = sorted(name for name in sizes if name.endswith(SUFFIX) and "/" not in name)
    pickles = sorted(name for name in sizes if name.endswith(PICKLES))
    if found:
        return DataError(
            f"{model} has no {WEIGHTS} and no {INDEX}, so that no library finds its weights ({_listed(found)}).",
            remedy=f"Save it with save_pretrained, or rename its one file of weights to {WEIGHTS}.",
        )
    if pickles:
        return DataError(
            f"{model} has only pickled weights ({pickles[0]}), which can run code when read.",
            remedy="Use a checkpoint with *.safetensors.",
        )
    return DataError(f"{model} has no weights; it contains: {_listed(sizes)}.", remedy="Use a whole checkpoint.")


def _listed(names: Mapping[str, int] | Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(sorted(names)[:LISTED]) + more or "nothing"
