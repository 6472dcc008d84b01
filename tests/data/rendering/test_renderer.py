from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, settings
from hypothesis import given as forall
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from job.data.examples import Example, RowError, Turn
from job.data.rendering.labels import IGNORED, Rendered
from job.data.rendering.renderer import MAX_CHARACTERS, Renderer
from job.data.tokenizer.chat_template import bundled_template
from job.data.tokenizer.load import Tokenizer, wrap_tokenizer
from job.runtime.errors import DataError
from tests.data.datasets import tokenized
from tests.tiny_tokenizer import DATE, MARKERS, real_smollm2, tiny

# For each template: the tokenizer's BOS, whether the tokenizer adds it, and what an answer looks like when learned.
TEMPLATES = {
    "chatml": (None, False, "{}<|im_end|>"),
    "gemma": ("<s>", True, "{}<end_of_turn>"),
    "llama-2": ("<s>", True, " {} </s>"),
    "llama-3": ("<|begin_of_text|>", True, "{}<|eot_id|>"),
    "llama-3.1": ("<|begin_of_text|>", True, "{}<|eot_id|>"),
    "mistral": ("<s>", True, " {}</s>"),
    "phi-3": ("<s>", True, "{}<|end|>"),
    "zephyr": ("<s>", True, "{}</s>"),
    "qwen-2.5": (None, False, "{}<|im_end|>"),
    "alpaca": ("<s>", True, "{}</s>"),
    "question_answer": ("<s>", False, "{}</s>"),
    "prompt_completion": (None, False, "{}</s>"),
}

TRIMMING = {"gemma", "llama-2", "llama-3", "llama-3.1", "mistral"}
"""These templates strip white space around an answer."""


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    bos, adds_bos, _ = TEMPLATES.get(name, (None, False, ""))
    return wrap_tokenizer(tiny(bos=bos, adds_bos=adds_bos), chat_template=name, date=DATE)


def of_text(text: str, **special: Any) -> Tokenizer:
    return wrap_tokenizer(tiny(**special), template_text=text, date=DATE)


def conversation(*turns: tuple[str, str], line: int = 1) -> Example:
    said = tuple(Turn(role=role, content=content) for role, content in turns)
    return Example(source="a.jsonl", line=line, format="messages", turns=said)


def ready(text: str, line: int = 1) -> Example:
    return Example(source="a.jsonl", line=line, format="text", text=text)


def learned(found: Tokenizer, sequence: Rendered) -> list[str]:
    """The stretches of labelled tokens, decoded."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        assert label in {token, IGNORED}
        stretches = [*stretches, []] if label == IGNORED else [*stretches[:-1], [*stretches[-1], label]]
    return [found.hf.decode(stretch) for stretch in stretches if stretch]


def marked() -> Example:
    """A conversation whose last answer is only context."""
    turns = conversation(*TALK).turns
    return replace(conversation(*TALK), turns=(*turns[:3], replace(turns[3], trained=False)))


def test_an_answer_that_is_only_context_is_no_sample() -> None:
    """A sample is compared with the answer that its prompt asks for: the last one that is learned."""
    found = Renderer(tokenizer=tokenizer("chatml")).prompt(marked())
    assert (found.reference, "It is one" in found.text) == ("It is one.", False)


def test_a_mark_is_never_overruled_in_silence() -> None:
    """TUNE_TRAIN_ON=all and a message that is marked as context contradict each other; the row is named."""
    with pytest.raises(RowError, match=r"a\.jsonl:1: .*TUNE_TRAIN_ON=all"):
        Renderer(tokenizer=tokenizer("chatml"), train_on="all").render(marked())


def whole(found: Tokenizer, sequence: Rendered) -> str:
    return str(found.hf.decode(sequence.input_ids))


TALK = (("user", "What is 1?"), ("assistant", "It is one."), ("user", "And 2?"), ("assistant", "It is two."))

words = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_categories=("Cs", "Co")), st.sampled_from(" \n#[]<|>")), max_size=30
)
markers = st.sampled_from([*MARKERS, "[INST]", "[/INST]", "### Response:\n", "<|im_start|>assistant\n", "<think>"])
user_texts = st.lists(st.one_of(words, markers), max_size=4).map("".join)
answers = user_texts.filter(lambda text: not text.rstrip().endswith(MARKERS))
conversations = st.lists(st.tuples(user_texts, answers), min_size=1, max_size=4)


@pytest.mark.parametrize("name", list(TEMPLATES))
@settings(deadline=None, max_examples=60)
@forall(pairs=conversations, system=st.one_of(st.none(), user_texts.filter(str.strip)))
def test_exactly_the_answers_are_learned(name: str, pairs: list[tuple[str, str]], system: str | None) -> None:
    """What is labelled decodes to each answer as the template renders it with its end marker, and to nothing else;
    BOS stands once where the tokenizer has one; markers inside what is said are text, the user's and the assistant's.
    """
    assume(name != "prompt_completion" or system or pairs[0][0])  # a first token is never learned
    found = tokenizer(name)
    turns = [("system", system)] if system else []
    turns += [turn for asked, answered in pairs for turn in (("user", asked), ("assistant", answered))]
    (sequence,) = Renderer(tokenizer=found, max_length=10**6).render(conversation(*turns))
    bos, _, pattern = TEMPLATES[name]
    said = [answered.strip() if name in TRIMMING else answered for _, answered in pairs]
    assert "".join(learned(found, sequence)) == "".join(map(pattern.format, said))
    if bos and name != "question_answer":
        expected = len(pairs) if name == "llama-2" else 1  # Llama 2 writes BOS before each question
        assert sequence.input_ids[0] == found.hf.bos_token_id
        assert sequence.input_ids.count(found.hf.bos_token_id) == expected
    (end,) = found.end_of_turn_ids
    assert [token for token in sequence.labels if token == end] == [end] * len(pairs)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_prompt_is_the_text_before_the_answer(name: str) -> None:
    """Generation starts from the very tokens that stand before the last answer in training."""
    found = tokenizer(name)
    renderer = Renderer(tokenizer=found, train_on="last_response")
    prompt = renderer.prompt(conversation(*TALK))
    (sequence,) = renderer.render(conversation(*TALK))
    start = next(n for n, label in enumerate(sequence.labels) if label != IGNORED)
    assert prompt.input_ids == sequence.input_ids[:start]
    assert prompt.reference == "It is two."
    assert found.hf.decode(prompt.input_ids).endswith(prompt.text)


def test_a_prompt_shows_markers_as_the_user_wrote_them() -> None:
    """The stand-ins for markers never reach what a human reads."""
    prompt = Renderer(tokenizer=tokenizer("chatml")).prompt(conversation(("user", "<|im_end|>!"), ("assistant", "b")))
    assert prompt.text == "<|im_start|>user\n<|im_end|>!<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("chatml").hf.decode(prompt.input_ids) == prompt.text


def test_an_end_marker_that_the_answer_brings_stays() -> None:
    """Data whose answers already end with the marker does not teach the model to spell it."""
    found = tokenizer("chatml")
    (sequence,) = Renderer(tokenizer=found).render(conversation(("user", "a"), ("assistant", "b<|im_end|>")))
    assert sequence.labels.count(found.end_of_turn_ids[0]) == 2


def test_an_opening_marker_that_an_answer_ends_with_is_plain_text() -> None:
    """Only what ends turns may stand there as a token; a model that learned to open a turn would never stop."""
    found = tokenizer("chatml")
    (sequence,) = Renderer(tokenizer=found).render(conversation(("user", "a"), ("assistant", "b<|im_start|>")))
    assert sequence.input_ids.count(found.hf.convert_tokens_to_ids("<|im_start|>")) == 2
    assert learned(found, sequence) == ["b<|im_start|><|im_end|>"]


def test_an_end_marker_of_many_tokens_is_learned_to_its_end() -> None:
    """A tokenizer without the template's markers spells them, and joins the end of one with the next one's start."""
    backend = Tokenizers(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["<|a|><|b|>"] * 9, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    found = wrap_tokenizer(hf, chat_template="llama-3", date=DATE)
    assert any("><" in token for token in hf.get_vocab())
    (sequence,) = Renderer(tokenizer=found).render(conversation(*TALK))
    assert learned(found, sequence) == ["It is one.<|eot_id|>", "It is two.<|eot_id|>"]


def test_each_prefix_is_rendered_a_few_times_at_most() -> None:
    """How often the template runs grows with the turns, also where every answer is a call."""
    counted = []
    for count in (4, 8):
        found = tokenizer("qwen-2.5")
        assert found.chat is not None
        calls: list[int] = []
        apply = found.chat.apply

        def counting(*, apply: Any = apply, calls: list[int] = calls, **values: Any) -> str:
            calls.append(1)
            return str(apply(**values))

        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        asked, told = Turn(role="user", content="a"), Turn(role="assistant", content="", tool_calls=(call,) * 3)
        row = Example(source="a", line=1, format="messages", turns=(asked, told) * count)
        Renderer(tokenizer=replace(found, chat=replace(found.chat, apply=counting))).text(row)
        counted.append(len(calls))
    assert counted[1] <= 2 * counted[0]


def test_special_tokens_that_are_no_turn_markers_stay_in_answers() -> None:
    """An answer may be meant to hold a control token; a question never is."""
    found = tokenizer("chatml")
    row = conversation(("user", "<|eot_id|>"), ("assistant", "<|eot_id|> x"))
    (sequence,) = Renderer(tokenizer=found).render(row)
    (token,) = (n for n, one in enumerate(sequence.input_ids) if one == found.hf.convert_tokens_to_ids("<|eot_id|>"))
    assert sequence.labels[token] != IGNORED


def test_training_can_be_limited_to_the_last_answer() -> None:
    """`last_response` learns one answer of a conversation, `all` every token but the first."""
    found = tokenizer("chatml")
    (last,) = Renderer(tokenizer=found, train_on="last_response").render(conversation(*TALK))
    assert learned(found, last) == ["It is two.<|im_end|>"]
    (everything,) = Renderer(tokenizer=found, train_on="all").render(conversation(*TALK))
    assert everything.labels == [IGNORED, *everything.input_ids[1:]]


def test_answers_that_are_context_are_not_learned() -> None:
    """An assistant turn inside a conversational prompt stays unlabelled."""
    turns = (
        Turn(role="user", content="a"),
        Turn(role="assistant", content="context", trained=False),
        Turn(role="user", content="b"),
        Turn(role="assistant", content="learned"),
    )
    example = Example(source="a", line=1, format="prompt_completion", turns=turns)
    (sequence,) = Renderer(tokenizer=tokenizer("chatml")).render(example)
    assert learned(tokenizer("chatml"), sequence) == ["learned<|im_end|>"]


def test_a_question_without_an_answer_is_left_out() -> None:
    """Turns after the last answer teach nothing and are not rendered."""
    found = tokenizer("chatml")
    (sequence,) = Renderer(tokenizer=found).render(conversation(*TALK, ("user", "And 3?")))
    assert whole(found, sequence).endswith("It is two.<|im_end|>\n")


def test_a_template_that_rewrites_earlier_turns_is_split() -> None:
    """Qwen 3 shows an empty thought in the last turn only: each answer becomes a sequence, as at inference."""
    found = tokenizer("qwen-3")
    first, second = Renderer(tokenizer=found).render(conversation(*TALK))
    assert learned(found, first) == ["<think>\n\n</think>\n\nIt is one.<|im_end|>"]
    assert learned(found, second) == ["<think>\n\n</think>\n\nIt is two.<|im_end|>"]
    assert "one.<|im_end|>" in whole(found, second)
    assert whole(found, second).count("<think>") == 1
    assert (first.part, second.part, first.parts, second.parts) == (0, 1, 2, 2)


def test_one_answer_is_never_split() -> None:
    """A single answer needs one sequence, whatever the template does to earlier turns."""
    (sequence,) = Renderer(tokenizer=tokenizer("qwen-3")).render(conversation(*TALK[:2]))
    assert sequence.parts == 1


def test_an_answer_that_does_not_open_with_the_generation_prompt_is_found() -> None:
    """A template may prompt for a thought that answers do not have: they are learned from where both part."""
    text = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    found = of_text(text)
    (sequence,) = Renderer(tokenizer=found).render(conversation(*TALK))
    assert learned(found, sequence) == ["It is one.</s>", "It is two.</s>"]
    assert sequence.header_differs


def test_an_answer_may_come_first() -> None:
    """Where the template cannot render an empty prefix, the header of the first answer is known from other prompts."""
    text = "{% if messages[0]['role'] == 'system' %}{% endif %}" + bundled_template("chatml")
    for found in (of_text(text), tokenizer("chatml"), tokenizer("qwen-2.5")):
        (sequence,) = Renderer(tokenizer=found).render(conversation(("assistant", "Hello."), *TALK))
        assert learned(found, sequence)[0] == "Hello.<|im_end|>"


def test_a_first_answer_whose_start_is_unknown_is_an_invalid_row() -> None:
    """Without a generation prompt, nothing shows where a first answer begins."""
    text = "{% if messages[0]['role'] == 'system' %}{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(RowError, match=r"refuses the conversation: .*undefined|no element|list object has no element"):
        Renderer(tokenizer=of_text(text)).render(conversation(("assistant", "Hello."), *TALK))


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([*TALK, ("assistant", "Too much.")], id="two answers"),
        pytest.param([("assistant", "Hello."), *TALK], id="answer first"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_an_invalid_row(turns: list[tuple[str, str]]) -> None:
    """The row is named with the template's own rule and a remedy."""
    with pytest.raises(RowError, match=r"a\.jsonl:7: the template `gemma` refuses .* to alternate") as caught:
        Renderer(tokenizer=tokenizer("gemma")).render(conversation(*turns, line=7))
    assert "TUNE_CHAT_TEMPLATE" in caught.value.remedy


def test_no_token_lies_across_the_start_of_an_answer() -> None:
    """An answer is tokenised as it is generated: after the tokens of its prompt, however the two would merge."""
    found = tokenizer("prompt_completion")
    row = conversation(("user", "The capital of Fra"), ("assistant", "nce is"))
    (sequence,) = Renderer(tokenizer=found).render(row)
    assert learned(found, sequence) == ["nce is</s>"]
    assert Renderer(tokenizer=found).prompt(row).input_ids == found.encode("The capital of Fra").ids
    assert len(found.encode("The capital of France is</s>").ids) < len(sequence.input_ids)


def test_a_token_across_the_end_of_an_answer_is_not_learned() -> None:
    """A token with characters of the next turn does not belong to the answer."""
    found = of_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = conversation(("user", "What? "), ("assistant", "The capital of Fra"), ("user", "nce."), ("assistant", "Yes."))
    first, *_ = learned(found, Renderer(tokenizer=found).render(row)[0])
    assert first == "The capital of"


def test_white_space_after_the_end_is_learned_only_if_it_alone_ends_a_turn() -> None:
    """Without an end marker the separator is the only sign of an end."""
    found = of_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    (sequence,) = Renderer(tokenizer=found).render(conversation(*TALK[:2]))
    assert "".join(learned(found, sequence)).endswith("one.\n\n")


@pytest.mark.parametrize("text", ["<s>[INST] hi [/INST] hello </s>", "[INST] hi [/INST] hello"])
def test_ready_text_has_bos_and_eos_once(text: str) -> None:
    """Text that brings its special tokens gets no second ones; all of it but the first token is learned."""
    found = wrap_tokenizer(tiny(bos="<s>", adds_bos=True), date=DATE)
    (sequence,) = Renderer(tokenizer=found).render(ready(text))
    assert [sequence.input_ids.count(token) for token in (found.hf.bos_token_id, found.eos_token_id)] == [1, 1]
    assert (sequence.input_ids[0], sequence.input_ids[-1]) == (found.hf.bos_token_id, found.eos_token_id)
    assert sequence.labels == [IGNORED, *sequence.input_ids[1:]]


def test_formats_without_roles_use_the_chat_template_or_their_block() -> None:
    """With a chat template a question is a user turn; without one it is written as its classic block."""
    turns = (Turn(role="user", content="Add.", input="1 2"), Turn(role="assistant", content="3"))
    example = Example(source="a", line=1, format="alpaca", turns=turns)
    for found, start in [
        (tokenizer("chatml"), "<|im_start|>user\nAdd.\n\n1 2<"),
        (wrap_tokenizer(tiny(), date=DATE), "Below is an"),
    ]:
        (sequence,) = Renderer(tokenizer=found).render(example)
        assert whole(found, sequence).startswith(start)
        assert len(learned(found, sequence)) == 1


@pytest.mark.parametrize(
    ("overlong", "outcomes"),
    [("truncate", ["kept", "cut", "masked"]), ("drop", ["kept", "overlong", "overlong"])],
)
def test_every_overlong_row_is_counted_and_named(tmp_path: Path, overlong: Any, outcomes: list[str]) -> None:
    """Truncated, dropped and fully masked rows are in the counts with file and line; the rest is untouched."""
    found = tokenizer("chatml")
    short = conversation(("user", "a"), ("assistant", "b"), line=1)
    long_answer = conversation(("user", "a"), ("assistant", "b " * 200), line=2)
    long_question = conversation(("user", "a " * 200), ("assistant", "b"), line=3)
    rows = [short, long_answer, long_question]
    renderer = Renderer(tokenizer=found, max_length=40, overlong=overlong)
    assert [sequence.outcome for row in rows for sequence in renderer.render(row)] == outcomes
    counts = tokenized(rows, renderer=renderer, directory=tmp_path).counts
    places = {
        "cut": counts.cut_inside.first,
        "masked": counts.fully_masked.first,
        "overlong": counts.dropped_overlong.first,
    }
    for outcome, first in places.items():
        assert first == tuple(f"a.jsonl:{line}" for line, one in enumerate(outcomes, 1) if one == outcome)
    assert (counts.rows, counts.sequences) == (3, 2 if overlong == "truncate" else 1)


def test_overlong_rows_fail_the_run_when_asked_to(tmp_path: Path) -> None:
    """Under `fail` all rows that are too long are named before anything is trained."""
    rows = [conversation(("user", "a " * 100), ("assistant", "b"), line=line) for line in (1, 2)]
    renderer = Renderer(tokenizer=tokenizer("chatml"), max_length=40, overlong="fail")
    with pytest.raises(DataError, match=r"2 of 2 rows are invalid:\na\.jsonl:1: .* more than TUNE_MAX_LENGTH=40"):
        tokenized(rows, renderer=renderer, directory=tmp_path)


@pytest.mark.parametrize("ready", [False, True], ids=["conversation", "ready text"])
def test_a_text_too_large_to_tokenise_is_rejected(ready: bool) -> None:
    """It would take gigabytes of memory, and all but its beginning would be cut off."""
    large = "word " * (MAX_CHARACTERS // 5) + "!"
    row = conversation(("user", "a"), ("assistant", large), line=7)
    read = replace(row, format="text", text=large, turns=()) if ready else row
    with pytest.raises(RowError, match=r"a\.jsonl:7: .* more than 8,000,000"):
        Renderer(tokenizer=tokenizer("chatml")).text(read)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    """A run whose labels are all masked never starts; an evaluation set may end up empty."""
    rows = [conversation(("user", "a " * 100), ("assistant", "b"))]
    renderer = Renderer(tokenizer=tokenizer("chatml"), max_length=40)
    with pytest.raises(DataError, match="Nothing to train on") as caught:
        tokenized(rows, renderer=renderer, directory=tmp_path)
    assert "TUNE_MAX_LENGTH" in caught.value.remedy
    empty = tokenized(rows, renderer=renderer, directory=tmp_path, may_be_empty=True)
    assert (len(empty.dataset), empty.counts.sequences) == (0, 0)


def test_rows_that_the_template_refuses_are_all_counted(tmp_path: Path) -> None:
    """Refused rows are reported together, like those that cannot be read."""
    bad = [conversation(("assistant", "a"), line=line) for line in range(1, 13)]
    with pytest.raises(DataError, match="12 of 13 rows are invalid, the first ten:"):
        tokenized([*bad, conversation(*TALK)], renderer=Renderer(tokenizer=tokenizer("gemma")), directory=tmp_path)


def test_the_arrow_file_holds_what_single_rendering_gives(tmp_path: Path) -> None:
    """Many examples give, in the order of the file, the very tokens and labels that each gives alone."""
    rows = [
        conversation(
            ("user", f"{n} <|im_end|>" if n % 7 == 0 else f"{n}"), ("assistant", "ok " * (n % 5)), *TALK, line=n
        )
        for n in range(1, 700)
    ]
    renderer = Renderer(tokenizer=tokenizer("chatml"))
    prepared = tokenized(iter(rows), renderer=renderer, directory=tmp_path)
    alone = [sequence for row in rows for sequence in renderer.render(row)]
    assert prepared.dataset["input_ids"][:] == [sequence.input_ids for sequence in alone]
    assert prepared.dataset["labels"][:] == [sequence.labels for sequence in alone]
    assert prepared.dataset["length"][:] == [len(sequence.input_ids) for sequence in alone]
    counts, lengths = prepared.counts, sorted(len(sequence.input_ids) for sequence in alone)
    assert (counts.rows, counts.sequences, counts.tokens) == (699, 699, sum(lengths))
    assert counts.labelled_tokens == sum(len(s.labels) - s.labels.count(IGNORED) for s in alone)
    assert (counts.length_p50, counts.length_max) == (lengths[349], lengths[-1])


def test_split_rows_are_counted_as_rows(tmp_path: Path) -> None:
    """A row that became two sequences is one row in the report, and is named."""
    rows = [conversation(*TALK, line=1), conversation(*TALK[:2], line=2)]
    counts = tokenized(rows, renderer=Renderer(tokenizer=tokenizer("qwen-3")), directory=tmp_path).counts
    assert (counts.rows, counts.sequences, counts.split.count, counts.split.first) == (2, 3, 1, ("a.jsonl:1",))


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return wrap_tokenizer(real_smollm2(), date=DATE)


@settings(deadline=None, max_examples=60)
@forall(pairs=conversations)
def test_the_real_smollm2_learns_exactly_its_answers(smollm2: Tokenizer, pairs: list[tuple[str, str]]) -> None:
    """The law of the small tokenizers holds for a real one and its own template, which adds a system turn."""
    turns = [turn for asked, answered in pairs for turn in (("user", asked), ("assistant", answered))]
    (sequence,) = Renderer(tokenizer=smollm2, max_length=10**6).render(conversation(*turns))
    safe = [smollm2.encode_parts(smollm2.escape_answer(answered), escaped=True).ids for _, answered in pairs]
    said = [smollm2.hf.decode(ids) for ids in safe]  # some bytes are none of its tokens
    assert learned(smollm2, sequence) == [f"{answered}<|im_end|>" for answered in said]
