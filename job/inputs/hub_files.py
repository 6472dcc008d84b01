"""Which files of a hub repository are meant: a model's safetensors and configuration, or its data files.

Knows names and the README's header; downloads nothing.
"""

from __future__ import annotations

from huggingface_hub.utils import filter_repo_objects

from job.inputs.data_files import COPY_FILES, HUB, Choice, Side, choose, file_type, listed
from job.inputs.dataset_card import declared_splits
from job.runtime.errors import DataError

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*"]
_NOT_MODEL_FILES = ["consolidated*.safetensors", "*/*.safetensors", "*.bin.index.json"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def model_files(repo: str, names: list[str]) -> list[str]:
    """The files that loading a model needs: safetensors, configuration, tokenizer, templates.

    Raises:
        DataError: there are no safetensors; pickles are listed.
    """
    chosen = filter_repo_objects(names, allow_patterns=MODEL_FILES, ignore_patterns=_NOT_MODEL_FILES)
    files = [name for name in chosen if "/" not in name or name.startswith("additional_chat_templates/")]
    if any(name.endswith(".safetensors") for name in files):
        return files
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise DataError(
            f"{repo} has its weights only as pickles, which can run code when loaded: {listed(pickles)}.",
            remedy="Choose a repository with safetensors, or convert it.",
        )
    raise DataError(f"{repo} has no weights as safetensors. It has: {listed(names)}.", remedy="Correct the name.")


def data_files(
    repo: str,
    split: str | None,
    names: list[str],
    readme: str,
    *,
    side: Side = "training",
    hold_out: bool = False,
) -> Choice:
    """The data files of a repository.

    Args:
        repo: the repository's name, for messages.
        split: its name; None for those that `choose` takes.
        names: all files of the repository.
        readme: the README's text, whose header may declare which files belong to which split.
        side: see `choose`.
        hold_out: see `choose`.

    Raises:
        DataError: see `choose`; or the files are of several formats.
    """
    place = f"{HUB}{repo}"
    declared = declared_splits(place, readme, names)
    found = choose(place, names, side=side, hold_out=hold_out, split=split, declared=declared)
    kinds = {file_type(name).type.replace("jsonl", "json") for name in found.files}
    if len(kinds) > 1:
        raise DataError(
            f"{place} has files of several formats, perhaps the same data twice: {listed(list(found.files))}.",
            remedy=COPY_FILES,
        )
    return found
