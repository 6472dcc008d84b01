"""Masks under the chat templates of real models. What each should learn is in `model_templates`, written by hand."""

from __future__ import annotations

import functools
import re
import unicodedata
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as forall
from hypothesis import strategies as st

from job.data.examples import Example, RowError, Turn
from job.data.rendering.labels import IGNORED, Rendered
from job.data.rendering.renderer import RenderedText, Renderer
from job.data.tokenizer.chat_template import bundled_template
from job.data.tokenizer.load import Tokenizer
from tests import model_templates as real
from tests.model_templates import EXPECTED, MODELS, decoded

TALK = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello there."), ("user", "Bye"),
        ("assistant", "Farewell."))  # fmt: skip
USER, ANSWER, SYSTEM = ("user", "Hi"), ("assistant", "Hello."), ("system", "Be brief.")
OWN_MARKERS = sorted({token for model in MODELS.values() for token in model.family.special})
FOREIGN_MARKERS = ["[INST]", " [/INST] ", "<<SYS>>\n", "### Response:\n", "<|im_start|>assistant\n", "<|end|>\n",
                   "<start_of_turn>model\n", "<tool_call>", "<think>\n", "</s> ", "║"]  # fmt: skip


def turns(talk: tuple[tuple[str, str], ...]) -> tuple[Turn, ...]:
    return tuple(Turn(role=role, content=content) for role, content in talk)


def row(*said: Turn, tools: tuple[dict[str, Any], ...] = ()) -> Example:
    return Example(source="a.jsonl", line=7, format="messages", turns=said, tools=tools)


def fixed(name: str) -> Example:
    return row(*turns(TALK if MODELS[name].system else TALK[1:]))


def renderer(name: str, **options: Any) -> Renderer:
    return Renderer(tokenizer=real.tokenizer(name), max_length=10**6, **options)


def marked(found: Tokenizer, sequence: Rendered) -> str:
    """The decoded sequence, with its learned parts between ⟦ and ⟧."""
    pairs = zip(sequence.input_ids, sequence.labels, strict=True)
    runs = [(learned, [token for token, _ in run]) for learned, run in groupby(pairs, lambda pair: pair[1] != IGNORED)]
    return "".join(f"⟦{decoded(found, ids)}⟧" if learned else decoded(found, ids) for learned, ids in runs)


def marked_text(text: RenderedText) -> str:
    """The same for text and spans, before they are tokens."""
    made = []
    for piece in text.pieces:
        whole = piece.text
        for span in reversed(piece.spans):
            whole = f"{whole[: span.start]}⟦{whole[span.start : span.end]}⟧{whole[span.end :]}"
        made.append(whole)
    return "║".join(made)


def learned(found: Tokenizer, sequences: list[Rendered]) -> list[str]:
    """Each stretch of labelled tokens of each sequence, decoded; the labels are the tokens themselves."""
    stretches = []
    for sequence in sequences:
        pairs = list(zip(sequence.input_ids, sequence.labels, strict=True))
        assert all(label in {token, IGNORED} for token, label in pairs)
        runs = groupby(pairs, lambda pair: pair[1] != IGNORED)
        stretches += [decoded(found, [token for token, _ in run]) for is_learned, run in runs if is_learned]
    return stretches


@pytest.mark.parametrize("name", MODELS)
def test_a_real_template_renders_and_learns_what_its_model_documents(name: str) -> None:
    """The text is the documented one, exactly the answers with their end marker are learned, and nothing is noted."""
    found = real.tokenizer(name)
    text = renderer(name).text(fixed(name))
    bos = found.hf.bos_token if MODELS[name].family.adds_bos else ""
    brings = not text.pieces[0].text.startswith(bos) and bos  # where the tokenizer adds it, the template does not
    assert f"{brings or ''}{marked_text(text)}" == EXPECTED[name]
    assert found.notes == ()
    assert not any(piece.header_differs for piece in text.pieces)


@pytest.mark.parametrize("name", MODELS)
def test_the_labelled_tokens_decode_to_the_answers(name: str) -> None:
    """Tokenising keeps what was marked: no token of a question is labelled, none of an answer is missing."""
    sequences = renderer(name).render(fixed(name))
    made = "║".join(marked(real.tokenizer(name), sequence) for sequence in sequences)
    assert made == real.as_tokenized(MODELS[name].family, EXPECTED[name])


@pytest.mark.parametrize("name", MODELS)
def test_bos_occurs_once(name: str) -> None:
    """A sequence begins with BOS where the model has one, and has no second; Llama 2 writes one for each question.
    SmolLM2's is what opens its turns."""
    found = real.tokenizer(name)
    for sequence in renderer(name).render(fixed(name)):
        count = sequence.input_ids.count(found.hf.bos_token_id)
        family = MODELS[name].family
        assert count == ({"llama-2": 2, "smollm-2": 5}.get(name) or int(family.adds_bos or name == "phi-3-first"))
        assert not count or sequence.input_ids[0] == found.hf.bos_token_id


@pytest.mark.parametrize("name", MODELS)
def test_the_last_answer_alone(name: str) -> None:
    """`last_response` learns the last answer of the same text."""
    *_, last = learned(real.tokenizer(name), renderer(name).render(fixed(name)))
    assert learned(real.tokenizer(name), renderer(name, train_on="last_response").render(fixed(name))) == [last]


@pytest.mark.parametrize("name", MODELS)
def test_all_of_the_text(name: str) -> None:
    """`all` learns every token but the first, of the text of the last answer; Phi 3 closes it with its EOS."""
    found = real.tokenizer(name)
    (sequence,) = renderer(name, train_on="all").render(fixed(name))
    assert sequence.labels == [IGNORED, *sequence.input_ids[1:]]
    expected = EXPECTED[name].rpartition("║")[2].replace("⟦", "").replace("⟧", "")
    closing = "<|endoftext|>" if name in {"phi-3", "phi-3.5"} else ""
    whole = real.as_tokenized(MODELS[name].family, f"{expected}{closing}")
    assert decoded(found, sequence.input_ids) == whole


@pytest.mark.parametrize("name", MODELS)
def test_generation_starts_where_learning_starts(name: str) -> None:
    """The prompt of the last answer is, token by token, the sequence before its first labelled token."""
    prompt = renderer(name).prompt(fixed(name))
    sequence = renderer(name, train_on="last_response").render(fixed(name))[-1]
    start = next(at for at, label in enumerate(sequence.labels) if label != IGNORED)
    assert prompt.input_ids == sequence.input_ids[:start]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_stops_where_its_answers_end(name: str) -> None:
    """The end marker is one token, the last that is learned of an answer, and generation stops there."""
    found = real.tokenizer(name)
    (end,) = found.end_of_turn_ids
    assert end in found.stop_ids
    for sequence in renderer(name).render(fixed(name)):
        after = [label for label in sequence.labels if label != IGNORED][-1]
        assert after == end


words = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_categories=("Cs", "Co", "Cn")), st.sampled_from(" \n\t#[]<|>é́")),
    max_size=20,
)
contents = st.lists(st.one_of(words, st.sampled_from([*OWN_MARKERS, *FOREIGN_MARKERS])), max_size=4).map("".join)
answers = contents.filter(lambda text: text.strip() and not text.rstrip().endswith(tuple(OWN_MARKERS)))
said_so = st.one_of(answers, st.sampled_from(["", " ", "\n\n"]))
talks = st.lists(st.tuples(contents, st.lists(said_so, min_size=1, max_size=2)), min_size=1, max_size=3)


def expected_answers(name: str, said: list[str]) -> list[str]:
    model = MODELS[name]
    stripped = [text.strip() if model.trims else text for text in said]
    if name == "smollm-3" or (name.startswith("qwen-3") and not model.one_text):
        stripped = [text.lstrip("\n") for text in stripped]
    made = [model.answer.format("\0").replace("\0", text) for text in stripped]
    return [unicodedata.normalize("NFC", text) if model.family.nfc else text for text in made]


@functools.cache
def allows(name: str, talk: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template takes such a conversation; which do is tested apart, below."""
    try:
        return bool(renderer(name).text(row(*turns(talk))))
    except RowError:
        return False


def without_space(name: str, text: str) -> str:
    special = "|".join(map(re.escape, MODELS[name].family.special))
    return re.sub(rf"(^|{special}) *", r"\1", text)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@forall(talk=talks, system=st.one_of(st.none(), contents.filter(str.strip)), late=st.booleans())
def test_exactly_the_answers_are_learned(
    name: str, talk: list[tuple[str, list[str]]], system: str | None, *, late: bool
) -> None:
    """Whatever is said, with markers of this template and of others: labels decode to each answer as the template
    writes it with its end marker, once each and in order, and to nothing else; BOS and end markers are not forged.
    """
    model, found = MODELS[name], real.tokenizer(name)
    if not allows(name, (USER, ANSWER, ANSWER)):
        talk = [(asked, answered[:1]) for asked, answered in talk]
    if name in {"mistral-v2", "mistral-v3-tekken"}:
        talk = [(asked, [answered[0] or "ok"]) for asked, answered in talk]  # they refuse an empty answer
    told = [turn for asked, answered in talk for turn in [("user", asked), *(("assistant", one) for one in answered)]]
    if system and model.system:
        told.insert(len(talk[0][1]) + 1 if late and allows(name, (USER, ANSWER, SYSTEM, USER, ANSWER)) else 0,
                    ("system", system))  # fmt: skip
    sequences = renderer(name).render(row(*turns(tuple(told))))
    expected = expected_answers(name, [content for role, content in told if role == "assistant"])
    ends = len(expected)
    if found.chat and not found.chat.generation_prompt:  # nothing stands between answers in a row
        expected = ["".join(expected_answers(name, answered)) for _, answered in talk]
    got = learned(found, sequences)
    if model.family.kind == "prefixed":  # behind a special token, the tokenizer may put in a space
        got, expected = ([without_space(name, text) for text in texts] for texts in (got, expected))
    if model.family.nfc:
        got = [unicodedata.normalize("NFC", text) for text in got]
    assert got == expected
    (end,) = found.end_of_turn_ids
    assert sum(sequence.labels.count(end) for sequence in sequences) == ends
    if found.hf.bos_token_id is not None and model.family.adds_bos and name != "llama-2":
        assert all(sequence.input_ids.count(found.hf.bos_token_id) == 1 for sequence in sequences)


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_that_brings_its_end_marker(name: str) -> None:
    """Data whose answers end with the marker already does not teach to spell it: it is the token, twice."""
    found = real.tokenizer(name)
    end = found.chat.end_of_turn if found.chat else ""
    sequences = renderer(name).render(row(*turns((("user", "Hi"), ("assistant", f"Hello.{end}")))))
    (token,) = found.end_of_turn_ids
    assert [label for label in sequences[0].labels if label != IGNORED].count(token) == 2


CALL: dict[str, Any] = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
MISTRAL_CALL = '[{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>'
GEMMA_CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
THOUGHT = "<think>\n\n</think>\n\n"
CALLS = {
    **{f"llama-3.{minor}": [LLAMA_CALL, "Rain.<|eot_id|>"] for minor in (1, 2, 3)},
    "qwen-2.5": [QWEN_CALL, "Rain.<|im_end|>"],
    "qwen-3": [f"{THOUGHT}{QWEN_CALL}", f"{THOUGHT}Rain.<|im_end|>"],
    "qwen-3-first": [f"{THOUGHT}{QWEN_CALL}", f"{THOUGHT}Rain.<|im_end|>"],
    "qwen-3-2507": [QWEN_CALL, "Rain.<|im_end|>"],
    "gemma-4": [f"{GEMMA_CALL}<|tool_response>", "Rain.<turn|>"],
    "gemma-4-first": [f"{GEMMA_CALL}<turn|>", "Rain.<turn|>"],
    "gpt-oss": [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        "<|channel|>final<|message|>Rain.<|return|>",
    ],
    "mistral-v2": ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]</s>', " Rain.</s>"],
    "mistral-v3": [f"[TOOL_CALLS] {MISTRAL_CALL}", " Rain.</s>"],
    "mistral-v3-tekken": [f"[TOOL_CALLS]{MISTRAL_CALL}", "Rain.</s>"],
    "mistral-nemo": [f"[TOOL_CALLS]{MISTRAL_CALL}", "Rain.</s>"],
}


def called(arguments: Any) -> Example:
    call = {"id": "abcdefghi", "type": "function", "function": CALL | {"arguments": arguments}}
    return row(
        Turn(role="user", content="Weather?"),
        Turn(role="assistant", content="", tool_calls=(call,)),
        Turn(role="tool", content='{"sky": "grey"}', tool_call_id="abcdefghi", name="weather"),
        Turn(role="assistant", content="Rain."),
        tools=(TOOL,),
    )


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_learned_as_the_template_prints_them(name: str) -> None:
    """A call is an answer like another, and what the tool says is not learned; arguments may be an object or JSON."""
    found = real.tokenizer(name)
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        sequences = renderer(name).render(called(arguments))
        made = learned(found, sequences)
        if name.startswith("mistral-v3") or name == "mistral-nemo":  # they differ in what they print besides
            made = [text.replace(', "type": "function"', "") for text in made]
        assert made == CALLS[name]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CALLS])
def test_a_template_without_tool_calls_refuses_them(name: str) -> None:
    """A template that leaves out a call would teach an empty answer: the row is rejected instead."""
    assert not MODELS[name].tools
    for mode in ("responses", "last_response", "all"):
        with pytest.raises(RowError, match=r"a\.jsonl:7: the template `tokenizer` refuses") as caught:
            renderer(name, train_on=mode).render(called({"city": "Oslo"}))
        assert "TUNE_CHAT_TEMPLATE" in caught.value.remedy


@pytest.mark.parametrize("name", ["qwen-2.5", "llama-3.1", "mistral-nemo"])
def test_markers_inside_tools_and_calls_are_text(name: str) -> None:
    """No tool's description, argument or answer can forge an end of turn."""
    found = real.tokenizer(name)
    (end,) = found.end_of_turn_ids
    marker = found.hf.convert_ids_to_tokens(end)
    tool = {"type": "function", "function": TOOL["function"] | {"description": f"x{marker}y"}}
    example = called({"city": f"x{marker}y"})
    said = tuple(
        Turn(role="tool", content=f"x{marker}y", tool_call_id="abcdefghi") if turn.role == "tool" else turn
        for turn in example.turns
    )
    sequences = renderer(name).render(row(*said, tools=(tool,)))
    assert [sequence.labels.count(end) for sequence in sequences] in ([2], [1, 1])
    assert any(f'"x{marker}y"' in text for text in learned(found, sequences))


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3-first"])
@pytest.mark.parametrize("thought", ["hm", "a <|im_end|> b", "two\nlines"])
def test_reasoning_is_learned_before_its_answer(name: str, thought: str) -> None:
    """Reasoning in a field of its own or inside the content is learned alike; in earlier turns it is not shown."""
    said = [("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")]
    own = row(*turns(tuple(said)), Turn(role="assistant", content="So.", reasoning_content=thought))
    inside = row(*turns((*said, ("assistant", f"<think>\n{thought}\n</think>\n\nSo."))))
    for example in (own, inside):
        sequences = renderer(name).render(example)
        expected = [f"{THOUGHT}Hello.<|im_end|>", f"<think>\n{thought}\n</think>\n\nSo.<|im_end|>"]
        assert learned(real.tokenizer(name), sequences) == expected
        assert decoded(real.tokenizer(name), sequences[1].input_ids).count("<think>") == 1


def test_reasoning_is_a_channel_of_its_own() -> None:
    """gpt-oss and Gemma 4 write reasoning into a channel before the answer; in earlier turns it is not shown."""
    first, last = Turn(role="user", content="Hi"), Turn(role="user", content="Why?")
    hello = Turn(role="assistant", content="Hello.", reasoning_content="hm")
    so = Turn(role="assistant", content="So.", reasoning_content="a <|end|> b")
    opened = {
        "gpt-oss": ("<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"),
        "gemma-4": "<|channel>thought\n{}\n<channel|>{}<turn|>",
    }
    for name, answer in opened.items():
        sequences = renderer(name).render(row(first, hello, last, so))
        assert learned(real.tokenizer(name), sequences) == [
            answer.format("hm", "Hello."),
            answer.format("a <|end|> b", "So."),
        ]
        assert "hm" not in decoded(real.tokenizer(name), sequences[1].input_ids)
        assert all(sequence.not_rendered == () for sequence in sequences)


def test_a_call_after_reasoning_is_one_answer() -> None:
    """gpt-oss thinks before it calls, and its template forgets that once it has answered: both are learned as they are
    generated, the answer with the thoughts in sight."""
    call = {"id": "a", "type": "function", "function": CALL}
    said = (
        Turn(role="user", content="Weather?"),
        Turn(role="assistant", content="", tool_calls=(call,), reasoning_content="hm"),
        Turn(role="tool", content="grey", tool_call_id="a"),
        Turn(role="assistant", content="Rain."),
    )
    found = real.tokenizer("gpt-oss")
    (sequence,) = renderer("gpt-oss").render(row(*said, tools=(TOOL,)))
    called, answered = CALLS["gpt-oss"]
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert learned(found, [sequence]) == [f"{thought}{called}", answered]
    for count in (2, 4):
        prompt = renderer("gpt-oss").prompt(row(*said[:count], tools=(TOOL,)))
        assert sequence.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        assert sequence.labels[len(prompt.input_ids)] != IGNORED


def test_calls_that_are_printed_in_part_are_rejected() -> None:
    """gpt-oss's template prints only the first call of an answer: the model would learn to omit the others."""
    calls = tuple({"type": "function", "function": CALL | {"arguments": {"city": city}}} for city in ("Oslo", "Rome"))
    said = (Turn(role="user", content="Weather?"), Turn(role="assistant", content="", tool_calls=calls))
    with pytest.raises(RowError, match=r"some of the 2 tool calls of turn 2; .*one tool call") as caught:
        renderer("gpt-oss").render(row(*said, tools=(TOOL,)))
    assert caught.value.remedy.startswith("Put each call into a separate turn")
    (answer,) = learned(real.tokenizer("qwen-2.5"), renderer("qwen-2.5").render(row(*said, tools=(TOOL,))))
    assert "Oslo" in answer
    assert "Rome" in answer


@pytest.mark.parametrize("name", MODELS)
def test_tools_that_no_call_uses_are_shown_or_noted(name: str) -> None:
    """If a template does not print tools, the row says so, even if a tool's name occurs in its text by chance."""
    for mode in ("responses", "all"):
        said = turns((("user", "Is it bad weather?"), ("assistant", "No.")))
        sequences = renderer(name, train_on=mode).render(row(*said, tools=(TOOL,)))
        assert {sequence.not_rendered for sequence in sequences} == {() if MODELS[name].tools else ("tools",)}


@pytest.mark.parametrize(
    ("name", "not_rendered"), [("qwen-3", ()), ("gemma-4-first", ("reasoning",)), ("phi-4", ("reasoning",))]
)
def test_reasoning_that_is_not_printed_is_noted(name: str, not_rendered: tuple[str, ...]) -> None:
    """Where a template leaves reasoning out of the answer that it leads to, the row says so."""
    said = (Turn(role="user", content="Hi"), Turn(role="assistant", content="So.", reasoning_content="hm, hm"))
    (sequence,) = renderer(name).render(row(*said))
    assert sequence.not_rendered == not_rendered


def test_an_empty_channel_only_in_the_generation_prompt_is_noted() -> None:
    """The large Gemma 4's generation prompt has an empty thought, which its template puts before no answer."""
    found = real.wrapped(real.GEMMA_4_FAMILY, real.text("gemma-4-31b"))
    (sequence,) = Renderer(tokenizer=found).render(fixed("gemma-4"))
    assert found.chat
    assert found.chat.generation_prompt == "<|turn>model\n<|channel>thought\n<channel|>"
    assert (sequence.header_differs, learned(found, [sequence])) == (True, ["Hello there.<turn|>", "Farewell.<turn|>"])


def test_smollm3_without_thinking() -> None:
    """`/no_think` in the system turn puts an empty thought before each answer, which is part of the prompt."""
    said = turns((("system", "Be brief. /no_think"), *TALK[1:]))
    text = renderer("smollm-3").text(row(*said))
    assert marked_text(text).count("<|im_start|>assistant\n<think>\n\n</think>\n⟦") == 2


USER, ANSWER, SYSTEM = ("user", "Hi"), ("assistant", "Hello."), ("system", "Be brief.")


@pytest.mark.parametrize(
    ("name", "talk", "rule", "remedy"),
    [
        pytest.param("gemma-2", (SYSTEM, USER, ANSWER), "System role not supported; .*system turns",
                     "start of the first user turn", id="gemma 2 system"),
        pytest.param("mistral-v0.1", (SYSTEM, USER, ANSWER), "must alternate.*; .*system turns",
                     "start of the first user turn", id="mistral 0.1 system"),
        pytest.param("gemma-3", (USER, ANSWER, ANSWER), "turns 2 and 3 are both `assistant`", "Merge",
                     id="gemma 3 row"),
        pytest.param("llama-2", (USER, USER, ANSWER), "turns 1 and 2 are both `user`", "Merge", id="llama 2 row"),
        pytest.param("mistral-nemo", (USER, ANSWER, ANSWER), "turns 2 and 3 are both", "Merge", id="nemo row"),
        pytest.param("mistral-v2", (USER, ANSWER, ANSWER), "turns 2 and 3 are both|renders the turns before turn 3",
                     "TUNE_CHAT_TEMPLATE", id="mistral joins answers"),
        pytest.param("gemma-3", (ANSWER, USER, ANSWER), "user turn before the first", "before the first user turn",
                     id="gemma 3 answer first"),
        pytest.param("gemma-2", (SYSTEM, USER, ANSWER, ANSWER), "system turns, and turns 3 and 4 are both",
                     "Merge", id="two rules"),
        pytest.param("mistral-nemo", (SYSTEM, ANSWER), "user turn before the first", "put a user turn",
                     id="no user"),
        pytest.param("phi-3-first", (SYSTEM, USER, ANSWER), "turn 1, .*`system`; .*system turns",
                     "start of the first user turn", id="phi 3 system left out"),
        pytest.param("qwen-2.5", (("developer", "Be brief."), USER, ANSWER),
                     "turn 1, .*`developer`; .*`developer`", "Name the role `system`",
                     id="developer left out"),
        pytest.param("phi-4", (USER, ("tool", "Rain."), ANSWER),
                     "turn 2, .*`tool`; .*tools", "tools", id="tool left out"),
        pytest.param("mistral-v1", (USER, ANSWER, SYSTEM, USER, ANSWER), "a system turn only at the start",
                     "Keep one system turn", id="late system"),
    ],
)  # fmt: skip
def test_a_rejected_row_names_place_rule_and_remedy(
    name: str, talk: tuple[tuple[str, str], ...], rule: str, remedy: str
) -> None:
    """File, line, the template's own error, the broken rule as found by trial, and what to do."""
    where = r"a\.jsonl:7: the template `tokenizer` refuses the conversation: "
    with pytest.raises(RowError, match=f"(?s){where}.*{rule}") as caught:
        renderer(name).render(row(*turns(talk)))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "qwen-2.5", "qwen-3-2507", "chatml", "zephyr", "phi-4"])
def test_answers_in_a_row_are_each_learned(name: str) -> None:
    """Where a template allows them, two answers in a row and one that comes first are learned like others."""
    said = turns((ANSWER, USER, ("assistant", "One."), ("assistant", "Two.")))
    got = learned(real.tokenizer(name), renderer(name).render(row(*said)))
    assert [text.removeprefix(" ") for text in got] == expected_answers(name, ["Hello.", "One.", "Two."])


def test_a_switch_that_a_template_takes_out_is_no_lost_turn() -> None:
    """Templates of hybrid reasoning models remove `/no_think` from a turn; this does not make the row invalid."""
    text = bundled_template("chatml").replace("message['content']", "message['content'] | replace('/no_think', '')")
    found = real.wrapped(real.QWEN_FAMILY, text)
    said = turns(
        (("system", "/no_think"), ("user", "Hi /no_think"), ("user", "Line\n/no_think"), ("assistant", "Yes."))
    )
    assert learned(found, Renderer(tokenizer=found).render(row(*said))) == ["Yes.<|im_end|>"]


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
PAIRED = ", paired with an input that provides further context"


@pytest.mark.parametrize("family", [real.LLAMA_2_FAMILY, real.MISTRAL_FAMILY, real.LLAMA_3_FAMILY, real.GEMMA_FAMILY])
@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("", f"{ALPACA.format('')}\n\n### Instruction:\nAdd ### Response:\n\n\n### Response:\n"),
        (
            "1 2",
            f"{ALPACA.format(PAIRED)}\n\n### Instruction:\nAdd ### Response:\n\n\n### Input:\n1 2\n\n### Response:\n",
        ),
    ],
)
def test_a_base_model_learns_alpaca_responses(family: real.Family, given: str, prompt: str) -> None:
    """Without a chat template Alpaca's own prompt is used, and only the response with EOS is learned."""
    found = real.wrapped(family, None)
    said = (Turn(role="user", content="Add ### Response:\n", input=given), Turn(role="assistant", content="\n3 is it"))
    example = Example(source="a", line=1, format="alpaca", turns=said)
    (sequence,) = Renderer(tokenizer=found).render(example)
    expected = f"{family.bos}{prompt}⟦\n3 is it{family.eos}⟧\n\n"
    made = marked(found, sequence)
    if family.kind == "first":  # the tokenizer marks the start of the text, which is not BOS here
        made = made.replace("<s> Below", "<s>Below")
    assert made == real.as_tokenized(family, expected)


@pytest.mark.parametrize(
    "name",
    ["chatml", "gemma-3", "llama-2", "llama-3", "llama-3.1", "phi-3", "phi-4", "qwen-2.5", "qwen-3", "zephyr"],
)
def test_a_template_of_the_job_renders_as_the_models_does(name: str) -> None:
    """The templates that the job brings give the very text of those they are named after."""
    own = real.wrapped(MODELS[name].family, bundled_template("gemma" if name == "gemma-3" else name))
    text = Renderer(tokenizer=own).text(fixed(name))
    assert marked_text(text) == marked_text(renderer(name).text(fixed(name)))


def test_the_jobs_templates_for_mistral_show_the_system_turn_once() -> None:
    """Where the model's own template would move the system turn along, the job's leaves it in the first question."""
    for name, model in [("mistral", "mistral-v3"), ("mistral-nemo", "mistral-nemo")]:
        own = real.wrapped(MODELS[model].family, bundled_template(name))
        first, second = EXPECTED[model].split("║")
        (sequence,) = Renderer(tokenizer=own).render(fixed(model))
        assert marked(own, sequence) == first + second.partition("</s>")[2].replace("Be brief.\n\n", "")


@pytest.mark.parametrize("name", [*MODELS])
def test_a_template_of_the_tokenizer_is_kept(name: str) -> None:
    """The template saved with the adapter is the model's, byte for byte."""
    assert real.tokenizer(name).hf.chat_template == real.text(name)


@pytest.mark.parametrize("name", ["llama-2", "mistral-v3", "phi-3", "gemma-3", "llama-3", "zephyr"])
def test_a_marker_inside_a_word_leaves_the_word_whole(name: str) -> None:
    """A marker that is text adds no space to a turn, even if a tokenizer marks the start of each text."""
    model, found = MODELS[name], real.tokenizer(name)
    one, two = model.family.bos, model.family.special[1]
    said = (("user", f"a{one}b{two}c"), ("assistant", f"d{one}e{two}f"))
    sequences = renderer(name).render(row(*turns(said)))
    (got,) = learned(found, sequences)
    assert got.removeprefix(" ") == model.answer.format(said[1][1]).removeprefix(" ")
    assert said[0][1] in decoded(found, sequences[0].input_ids)
