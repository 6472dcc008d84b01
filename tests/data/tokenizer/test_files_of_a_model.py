"""What is tokenised is what `tokenizer.json` says, and what the model has embeddings for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from job.data.reading.dataset import ExampleStream, Source
from job.data.rendering.renderer import Renderer
from job.data.tokenized.draft import Draft
from job.data.tokenizer.chat_template import bundled_template
from job.data.tokenizer.file_check import sample_texts
from job.data.tokenizer.load import Tokenizer, load_tokenizer
from job.runtime.errors import DataError
from tests import model_templates
from tests.tiny_tokenizer import DATE, tiny

pytestmark = pytest.mark.process

CHATML = bundled_template("chatml")


def saved(directory: Path, **settings: Any) -> Path:
    """A byte-level tokenizer on disk, with further settings in its tokenizer_config.json."""
    tiny(eos="<|im_end|>").backend_tokenizer.save(str(directory / "tokenizer.json"))
    configured(directory, eos_token="<|im_end|>", chat_template=CHATML, **settings)
    return directory


def configured(directory: Path, file: str = "tokenizer_config.json", **settings: Any) -> None:
    path = directory / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **settings}))


def ids(found: Tokenizer) -> list[list[int]]:
    return [
        one.ids for one in found.hf.backend_tokenizer.encode_batch(sample_texts(found.hf), add_special_tokens=False)
    ]


def of_the_file(directory: Path, found: Tokenizer) -> list[list[int]]:
    alone = Library.from_file(str(directory / "tokenizer.json"))
    return [one.ids for one in alone.encode_batch(sample_texts(found.hf), add_special_tokens=False)]


@pytest.mark.parametrize(
    "name",
    [
        "LlamaTokenizerFast",
        "GemmaTokenizer",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("LlamaTokenizer", "T5TokenizerFast", "BertTokenizer")
        ),
    ],
)
def test_a_class_that_does_not_fit_the_file(tmp_path: Path, name: str) -> None:
    """A class for another kind of tokenizer loses white space or more: it is named, with a text and its ids."""
    with pytest.raises(DataError) as caught:
        load_tokenizer(saved(tmp_path, tokenizer_class=name), name="org/m", date=DATE)
    assert "org/m" in caught.value.message
    assert name in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("family", "model_type", "name"),
    [
        pytest.param("llama-2", "llama", "LlamaTokenizer", id="Llama 2: a space less around special tokens"),
        pytest.param("qwen-2.5", "qwen2", "Qwen2Tokenizer", id="Qwen: other words"),
        pytest.param("qwen-3", "qwen3", None, id="the class comes with the model"),
    ],
)
def test_a_class_that_cuts_differently(tmp_path: Path, family: str, model_type: str, name: str | None) -> None:
    """Where class and file only cut a text differently, the file counts, and a note says so."""
    hf = model_templates.tokenizer(family).hf
    hf.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    configured(tmp_path, eos_token=hf.eos_token, chat_template=CHATML, **({"tokenizer_class": name} if name else {}))
    configured(tmp_path, "config.json", model_type=model_type)
    found = load_tokenizer(tmp_path, name="org/m", date=DATE)
    assert found.of_file
    assert ids(found) == of_the_file(tmp_path, found)
    assert [note for note in found.notes if (name or "model_type") in note and "PreTrainedTokenizerFast" in note]


def test_a_class_that_splits_words_by_another_pattern(tmp_path: Path) -> None:
    """GPT2Tokenizer puts its own pattern in the place of the file's, so that two line ends become two tokens (Phi 4,
    Olmo 3)."""
    saved(tmp_path, tokenizer_class="GPT2Tokenizer")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False}
    level = {**content["pre_tokenizer"], "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    numbers = content["model"]["vocab"]
    last = max(numbers, key=numbers.__getitem__)
    content["model"]["vocab"] = {("ĊĊ" if word == last else word): number for word, number in numbers.items()}
    content["model"]["merges"][-1] = ["Ċ", "Ċ"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = load_tokenizer(tmp_path, date=DATE)
    assert found.of_file
    assert ids(found) == of_the_file(tmp_path, found)


@pytest.mark.parametrize(
    ("family", "model_type", "name"),
    [
        pytest.param("llama-3.1", "llama", "PreTrainedTokenizerFast", marks=pytest.mark.full),
        pytest.param("mistral-v0.1", "mistral", "LlamaTokenizer", marks=pytest.mark.full),
        pytest.param("mistral-v3", "mistral", "LlamaTokenizerFast", marks=pytest.mark.full),
        ("gemma-3", "gemma3_text", "GemmaTokenizerFast"),
        pytest.param("phi-3", "phi3", "LlamaTokenizer", marks=pytest.mark.full),
        pytest.param("phi-4", "phi3", "GPT2Tokenizer", marks=pytest.mark.full),
        ("smollm-2", "llama", "GPT2Tokenizer"),
    ],
)
def test_classes_of_real_models_fit(tmp_path: Path, family: str, model_type: str, name: str) -> None:
    """Tokenizers of the usual kinds, with the classes of the usual models, are used as before."""
    hf = model_templates.tokenizer(family).hf
    hf.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    configured(tmp_path, eos_token=hf.eos_token, tokenizer_class=name)
    configured(tmp_path, "config.json", model_type=model_type)
    found = load_tokenizer(tmp_path, chat_template="chatml", date=DATE)
    assert not found.of_file


def test_settings_that_change_no_ids(tmp_path: Path) -> None:
    """Settings that are meant for other tokenizers, or for texts around a conversation, leave the ids as they are."""
    settings = {"add_prefix_space": True, "legacy": False, "clean_up_tokenization_spaces": True, "do_lower_case": True}
    settings |= {"add_bos_token": True, "add_eos_token": True, "split_special_tokens": True, "fix_mistral_regex": True}
    found = load_tokenizer(saved(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **settings), date=DATE)
    assert ids(found) == of_the_file(tmp_path, found)
    assert not found.of_file


def test_a_pattern_that_transformers_replaces(tmp_path: Path) -> None:
    """With `fix_mistral_regex`, transformers cuts words by another pattern than the file's: no class does otherwise."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"unused{number}": 256 + number for number in range(100_001)} | {"12": 110_000, "</s>": 110_001}
    backend = Library(models.BPE(vocab=vocabulary, merges=[("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    configured(tmp_path, eos_token="</s>", fix_mistral_regex=True, tokenizer_class="PreTrainedTokenizerFast")
    configured(tmp_path, "config.json", model_type="mistral", transformers_version="4.50.0")
    with pytest.raises(DataError, match="'1234567890") as caught:
        load_tokenizer(tmp_path, name="org/m", date=DATE)
    assert "fix_mistral_regex" in caught.value.remedy


def test_flags_of_added_tokens_come_from_the_settings(tmp_path: Path) -> None:
    """As in every version of transformers: a token that takes in spaces by tokenizer_config.json does so here."""
    token = {"content": "<|im_end|>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    number = tiny(eos="<|im_end|>").convert_tokens_to_ids("<|im_end|>")
    found = load_tokenizer(saved(tmp_path, added_tokens_decoder={number: token | {"single_word": False}}), date=DATE)
    assert not found.of_file
    assert found.encode("a <|im_end|> b").ids == [*found.encode("a").ids, number, *found.encode("b").ids]


def test_a_file_for_each_version(tmp_path: Path) -> None:
    """Which of several files is taken would depend on the version of transformers."""
    saved(tmp_path, fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    with pytest.raises(DataError, match="fast_tokenizer_files"):
        load_tokenizer(tmp_path, name="org/m", date=DATE)


def test_two_chat_templates(tmp_path: Path) -> None:
    """A note says which one is used; none is needed where both are the same."""
    saved(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_tokenizer(tmp_path, date=DATE).notes == ()
    (tmp_path / "chat_template.jinja").write_text(bundled_template("zephyr"))
    found = load_tokenizer(tmp_path, date=DATE)
    assert found.template == bundled_template("zephyr")
    assert [note for note in found.notes if "two chat templates" in note]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param("generation_config.json", '{"a":' * 100_000, id="generation nested"),
        pytest.param("generation_config.json", "5", marks=pytest.mark.full, id="generation a number"),
        pytest.param("tokenizer_config.json", "[" * 100_000, id="tokenizer nested"),
        pytest.param("tokenizer_config.json", "[]", marks=pytest.mark.full, id="tokenizer a list"),
        pytest.param(
            "tokenizer_config.json", '{"added_tokens_decoder": 5}', marks=pytest.mark.full, id="tokens a number"
        ),
        pytest.param("tokenizer_config.json", '{"eos_token": ["x"]}', marks=pytest.mark.full, id="EOS a list"),
        pytest.param(
            "tokenizer_config.json", '{"tokenizer_class": {"a": 1}}', marks=pytest.mark.full, id="class an object"
        ),
        pytest.param("special_tokens_map.json", "[" * 100_000, marks=pytest.mark.full, id="special tokens nested"),
        pytest.param("added_tokens.json", '{"<x>": "five"}', marks=pytest.mark.full, id="a number as text"),
        pytest.param("config.json", '{"model_type": "llama", "rms_norm_eps": "small"}', id="not a number"),
        pytest.param(
            "config.json", '{"model_type": "llama", "num_attention_heads": 0}', marks=pytest.mark.full, id="zero heads"
        ),
        pytest.param("config.json", '{"model_type": "no-such-model"}', id="unknown model"),
    ],
)
def test_damaged_settings(tmp_path: Path, file: str, content: str) -> None:
    """Whatever is wrong in a file beside the tokenizer is a data error that names the model."""
    saved(tmp_path)
    (tmp_path / file).write_text(content)
    if file in ("special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(DataError, match="org/m"):
        load_tokenizer(tmp_path, name="org/m", date=DATE)


def test_stop_tokens_are_numbers(tmp_path: Path) -> None:
    """What is not a token's number among the EOS of the generation settings is not taken for one."""
    saved(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [[1], "2", null, true, 3, -1]}')
    assert load_tokenizer(tmp_path, date=DATE).other_stop_ids == (3,)


def test_a_token_for_every_sequence_without_an_embedding(tmp_path: Path) -> None:
    """EOS, padding and the template's markers need embeddings; the message names the first that has none."""
    number = tiny(eos="<|im_end|>").convert_tokens_to_ids("<|im_end|>")
    saved(tmp_path)
    configured(tmp_path, "config.json", model_type="llama", vocab_size=number)
    with pytest.raises(DataError, match=rf"embeddings for {number} tokens.*'<\|im_end\|>'"):
        load_tokenizer(tmp_path, name="org/m", date=DATE)
    configured(tmp_path, pad_token="[PAD]")
    size = len(tiny())
    configured(tmp_path, "config.json", vocab_size=size)
    with pytest.raises(DataError, match=rf"gives the number {size} to '\[PAD\]'"):
        load_tokenizer(tmp_path, name="org/m", date=DATE)


def test_rows_with_a_token_without_an_embedding(tmp_path: Path) -> None:
    """Other tokens may be missing: a note lists them, and the rows that contain one are named."""
    size = len(tiny())
    saved(tmp_path, extra_special_tokens=["<a>", "<b>"])
    configured(tmp_path, "config.json", model_type="llama", vocab_size=size)
    found = load_tokenizer(tmp_path, name="org/m", date=DATE)
    assert [note for note in found.notes if f"embeddings for {size} tokens and none for <a>, <b>" in note]
    answers = ["fine", "it is <b>", "fine again", "<a><b>"]
    rows = [{"prompt": "What?", "completion": answer} for answer in answers]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = ExampleStream([Source(name="rows.jsonl", path=file)], format="auto", columns={})
    renderer = Renderer(tokenizer=found, train_on="responses", max_length=512, overlong="truncate")
    with Draft(tmp_path / "draft") as draft:
        draft.add(stream, renderer)
        with pytest.raises(DataError) as caught:
            draft.check()
    assert "2 of 4 rows" in caught.value.message
    assert f"rows.jsonl:2: its token '<b>' has the number {size + 1}, and the model has" in caught.value.message
    assert f"rows.jsonl:4: its token '<b>' has the number {size + 1}" in caught.value.message


def test_a_row_on_which_the_tokenizer_fails(tmp_path: Path) -> None:
    """What no sample showed ends the run as the data's fault, and says between which rows it happened."""
    saved(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(Q+Q+)+z"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = load_tokenizer(tmp_path, date=DATE)
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "What?", "completion": answer} for answer in ("fine", "Q" * 60, "fine")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = ExampleStream([Source(name="rows.jsonl", path=file)], format="auto", columns={})
    renderer = Renderer(tokenizer=found, train_on="responses", max_length=512, overlong="truncate")
    with Draft(tmp_path / "draft") as draft, pytest.raises(DataError, match=r"from rows\.jsonl:1 to rows\.jsonl:3"):
        draft.add(stream, renderer)
