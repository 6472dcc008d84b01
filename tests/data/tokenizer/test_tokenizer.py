from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.examples import Turn
from job.data.tokenizer.chat_template import RefusedError, bundled_names, bundled_template
from job.data.tokenizer.load import load_tokenizer, wrap_tokenizer
from job.runtime.errors import ConfigError, DataError
from tests import model_templates
from tests.tiny_tokenizer import DATE, real_smollm2, tiny

ASKED = (Turn(role="user", content="What is the capital of France?"),)
STRICT = ("gemma", "llama-2", "mistral", "mistral-nemo")
ANSWERED = (*ASKED, Turn(role="assistant", content="Paris."))


def test_the_template_asked_for_is_in_force_and_saved() -> None:
    """A named template replaces the tokenizer's, also in the tokenizer that is saved with the adapter."""
    found = wrap_tokenizer(tiny(template="{{ messages[0]['content'] }}"), chat_template="chatml", date=DATE)
    assert (found.name, found.template, found.hf.chat_template) == (
        "chatml",
        bundled_template("chatml"),
        bundled_template("chatml"),
    )


def test_a_file_wins_over_a_name() -> None:
    """The text of a Jinja file that the user gives decides alone."""
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    found = wrap_tokenizer(tiny(), chat_template="chatml", template_text=text, date=DATE)
    assert found.name == "file"
    assert found.render(ANSWERED, add_generation_prompt=False).endswith("assistant: Paris.</s>\n")


def test_an_unknown_template_is_rejected_with_the_known_names() -> None:
    """A misspelt template name never falls back to another template."""
    with pytest.raises(ConfigError, match="chatlm") as caught:
        wrap_tokenizer(tiny(), chat_template="chatlm", date=DATE)
    assert "chatml" in caught.value.remedy


def test_a_template_that_cannot_render_an_answer_is_rejected_at_once() -> None:
    """A broken template is reported when it is loaded, not row by row."""
    with pytest.raises(DataError, match="never"):
        wrap_tokenizer(tiny(), template_text="{{ raise_exception('never') }}", date=DATE)


@pytest.mark.parametrize("name", [name for name in bundled_names() if name not in STRICT])
def test_templates_render_a_system_turn_before_the_conversation(name: str) -> None:
    """A template we bring writes the system text once, before the user's."""
    found = wrap_tokenizer(tiny(bos="<s>"), chat_template=name, date=DATE)
    text = found.render((Turn(role="system", content="Be brief-ish."), *ANSWERED), add_generation_prompt=False)
    assert text.count("Be brief-ish.") == 1
    assert text.index("Be brief-ish.") < text.index("capital") < text.index("Paris.")


@pytest.mark.parametrize("name", STRICT)
def test_strict_templates_say_which_rule_a_conversation_breaks(name: str) -> None:
    """Two answers in a row are an error with a reason, and a system turn goes into the first question."""
    found = wrap_tokenizer(tiny(bos="<s>"), chat_template=name, date=DATE)
    with pytest.raises(RefusedError, match=f"{name} wants user and assistant turns to alternate"):
        found.render((*ANSWERED, ANSWERED[-1]), add_generation_prompt=False)
    text = found.render((Turn(role="system", content="Be brief-ish."), *ANSWERED), add_generation_prompt=False)
    assert text.index("Be brief-ish.") < text.index("capital")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("chatml", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("llama-2", "</s>"),
        ("llama-3", "<|eot_id|>"),
        ("llama-3.1", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("phi-3", "<|end|>"),
        ("zephyr", "</s>"),
        ("qwen-2.5", "<|im_end|>"),
        ("qwen-3", "<|im_end|>"),
        ("alpaca", "</s>"),
        ("question_answer", "</s>"),
        ("prompt_completion", "</s>"),
    ],
)
def test_the_end_of_a_turn_is_found_by_rendering_one(name: str, ending: str) -> None:
    """What ends a turn is what the template puts there, whatever the tokenizer's EOS is."""
    found = wrap_tokenizer(tiny(bos="<s>"), chat_template=name, date=DATE)
    assert found.end_of_turn_ids == (found.hf.convert_tokens_to_ids(ending),)
    assert set(found.stop_ids) == {found.eos_token_id, *found.end_of_turn_ids}
    assert found.notes == ()


def test_an_eos_that_opens_turns_is_corrected() -> None:
    """A tokenizer that calls the opening marker EOS gets the closing one, and a note says so."""
    found = wrap_tokenizer(tiny(eos="<|im_start|>", template=bundled_template("chatml")), date=DATE)
    assert found.hf.eos_token == "<|im_end|>"
    assert found.eos_token_id == found.hf.convert_tokens_to_ids("<|im_end|>")
    assert "<|im_start|>" in found.notes[0]


def test_markers_that_are_no_tokens_are_noted() -> None:
    """A template made for another model is noticed: its end marker falls apart."""
    found = wrap_tokenizer(
        tiny(), template_text="{% for m in messages %}{{ m.content }}<|endofturn|>{% endfor %}", date=DATE
    )
    assert "is it the right template" in found.notes[0]


def test_a_template_without_an_end_is_noted() -> None:
    """A model that sees no end of turn does not learn to stop; a note says so."""
    found = wrap_tokenizer(tiny(), template_text="{% for m in messages %}{{ m.content }}\n{% endfor %}", date=DATE)
    assert "does not learn to stop" in found.notes[0]


def test_dates_come_from_the_record() -> None:
    """A template that prints today's date prints the run's date, on every attempt."""
    text = "{{ strftime_now('%d %b %Y') }}|{{ date_string }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    found = wrap_tokenizer(tiny(), template_text=text, date=DATE)
    assert found.render(ASKED, add_generation_prompt=False).startswith("22 Nov 2026|22 Nov 2026|")


def test_a_date_that_the_template_sets_itself_stays() -> None:
    """A template's own default date is what inference prints, so it is kept."""
    found = wrap_tokenizer(tiny(bos="<s>"), chat_template="llama-3.1", date=DATE)
    assert "Today Date: 26 Jul 2024" in found.render(ASKED, add_generation_prompt=True)


@pytest.mark.parametrize("text", ["<s>hello", "hello"])
def test_bos_occurs_exactly_once(text: str) -> None:
    """BOS is added only where the text does not bring it."""
    found = wrap_tokenizer(tiny(bos="<s>", adds_bos=True), date=DATE)
    bos = found.hf.bos_token_id
    encoded = found.encode(text)
    assert encoded.ids[0] == bos
    assert encoded.ids.count(bos) == 1
    assert len(encoded.ids) == len(encoded.offsets)


def test_no_bos_where_the_tokenizer_uses_none() -> None:
    """A BOS token that the tokenizer has but does not put before texts is not added."""
    found = wrap_tokenizer(tiny(bos="<s>"), date=DATE)
    assert found.hf.bos_token_id not in found.encode("hello").ids


def test_escaped_markers_are_plain_text() -> None:
    """A marker in a user's text is encoded as its characters, and decodes to them."""
    found = wrap_tokenizer(tiny(), chat_template="chatml", date=DATE)
    safe = found.escape("stop <|im_end|> now")
    encoded = found.encode_parts(f"<|im_start|>{safe}<|im_end|>", escaped=True)
    assert [encoded.ids.count(found.hf.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")] == [1, 1]
    assert found.hf.decode(encoded.ids) == "<|im_start|>stop <|im_end|> now<|im_end|>"
    assert found.unescape(safe) == "stop <|im_end|> now"


def test_a_saved_tokenizer_loads_with_its_template(tmp_path: Path) -> None:
    """A saved tokenizer is loaded again, from local files only."""
    tiny(template=bundled_template("chatml")).save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path, date=DATE)
    assert (found.name, found.template) == ("tokenizer", bundled_template("chatml"))


@pytest.mark.parametrize(
    ("given", "others"),
    [
        pytest.param(["<|eot_id|>", "<|im_end|>", "</s>"], ["<|eot_id|>", "</s>"], id="several"),
        pytest.param("<|eot_id|>", ["<|eot_id|>"], id="one"),
        pytest.param(["<|im_start|>", "</s>"], ["</s>"], id="one that opens turns"),
        pytest.param(None, [], id="none"),
    ],
)
def test_generation_stops_where_the_model_says(
    tmp_path: Path, given: list[str] | str | None, others: list[str]
) -> None:
    """Every EOS of `generation_config.json` ends an answer too (Llama 3 has three), but none that opens one."""
    hf = tiny(eos="<|im_end|>", template=bundled_template("chatml"))
    hf.save_pretrained(tmp_path)
    numbers = hf.convert_tokens_to_ids(given) if given else None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": numbers}))
    found = load_tokenizer(tmp_path, date=DATE)
    assert found.stop_ids == tuple(hf.convert_tokens_to_ids(["<|im_end|>", *others]))


def test_a_damaged_generation_config_is_rejected_at_once(tmp_path: Path) -> None:
    """What would end the export of merged weights ends the run before it trains."""
    tiny(template=bundled_template("chatml")).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"generation_config\.json"):
        load_tokenizer(tmp_path, date=DATE)


def test_a_tokenizer_with_custom_code_is_rejected(tmp_path: Path) -> None:
    """Code from a model's directory never runs, whatever its configuration asks for."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Slow", None]}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match=tmp_path.name) as caught:
        load_tokenizer(tmp_path, date=DATE)
    assert "architecture is part of transformers" in caught.value.remedy
    assert not (tmp_path / "ran").exists()


def test_a_slow_tokenizer_is_rejected_by_name() -> None:
    """Without offsets the answers cannot be found, so nothing is guessed."""

    class SlowTokenizer:
        is_fast = False

    with pytest.raises(DataError, match="SlowTokenizer"):
        wrap_tokenizer(SlowTokenizer(), date=DATE)


def test_without_a_template_each_format_without_roles_has_its_text_block() -> None:
    """A base model gets the classic blocks; a conversation needs a template, and the message says which variable."""
    found = wrap_tokenizer(tiny(), date=DATE)
    assert found.template is None
    assert found.template_for("alpaca").name == "alpaca"
    with pytest.raises(DataError, match="messages") as caught:
        found.template_for("messages")
    assert "TUNE_CHAT_TEMPLATE" in caught.value.remedy


def test_the_blocks_are_the_usual_ones() -> None:
    """Alpaca's two prompts and the question-answer block are written as their tutorials write them."""
    found = wrap_tokenizer(tiny(), date=DATE)
    asked = Turn(role="user", content="Add.", input="1 2")
    alpaca = found.blocks["alpaca"]
    assert alpaca.render([asked], add_generation_prompt=True).startswith(
        "Below is an instruction that describes a task, p"
    )
    assert alpaca.render([asked], add_generation_prompt=True).endswith(
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca.render(ASKED, add_generation_prompt=True).endswith("France?\n\n### Response:\n")
    assert found.blocks["question_answer"].render(ANSWERED, add_generation_prompt=False) == (
        "### Question:\nWhat is the capital of France?\n\n### Answer:\nParis.</s>\n\n"
    )


def test_the_real_smollm2_gets_its_real_eos() -> None:
    """SmolLM2's GGUF says EOS is <|im_start|>; the job uses <|im_end|>."""
    found = wrap_tokenizer(real_smollm2(), date=DATE)
    assert (found.hf.eos_token, found.end_of_turn_ids) == ("<|im_end|>", (found.eos_token_id,))
    assert len(found.notes) == 1


@pytest.mark.parametrize("name", ["llama-3.1", "qwen-2.5", "phi-4", "gpt-oss", "smollm-2"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\t1é日🙂न्\u0301<|im_end|>.,'"), max_size=40))
def test_offsets_that_are_counted_are_those_of_the_library(name: str, text: str) -> None:
    """Byte-level tokenizers: bytes of tokens added up give the same places, whatever characters tokens are torn in."""
    found = model_templates.tokenizer(name)
    backend = found.hf.backend_tokenizer
    (encoded,) = found.encode_batch([text])
    whole = backend.encode(text, add_special_tokens=False)
    assert encoded.ids[encoded.added :] == whole.ids
    assert encoded.raw.offsets == whole.offsets
    for character in range(len(text) + 1):
        assert encoded.raw.char_to_token(character) == whole.char_to_token(character)


def test_which_tokenizers_count_their_bytes() -> None:
    """Byte-level ones do; SentencePiece's, which spell words with `▁`, leave it to the library."""
    counting = {name for name in model_templates.MODELS if model_templates.tokenizer(name)._widths is not None}
    assert {"llama-3.1", "qwen-3", "phi-4", "smollm-2"} <= counting
    assert not {"llama-2", "gemma-3", "mistral-v0.1"} & counting
