# ruff: noqa: RUF001 - characters that look alike are what is tested

from __future__ import annotations

import hashlib
import random
from unicodedata import category

import numpy as np
import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from job.data.quality import near_duplicates
from job.data.quality.near_duplicates import Signature, Signatures, groups

VOCABULARY = [f"w{number}" for number in range(5000)]
WORDS = st.lists(st.sampled_from(["a", "bb", "Über", "x1", "今", "天", "-", "\n", ".", "“", "é…", "。"]), max_size=30)
COMMON = "¡¿«»·„“”‘’‚‹›–—…•‐‑‰、。〈〉《》「」『』【】〜・！，．：；？（）［］،؛؟।॥։־״׳።"
"""Punctuation that texts of many languages hold."""


def signed(texts: list[str]) -> Signature:
    signatures = Signatures()
    for text in texts:
        signatures.add(text)
    return signatures.all()


def digest(signature: Signature) -> str:
    return hashlib.sha256(signature.astype("<u2").tobytes()).hexdigest()[:16]


def pairs(words: list[str]) -> set[tuple[str, str]]:
    return set(zip(words, words[1:], strict=False))  # noqa: RUF007


@pytest.mark.parametrize("length", [30, 100, 400])
def test_what_is_found_is_what_is_alike(length: int) -> None:
    """Against the exact similarity: from 0.9 on nearly every pair is found, below 0.65 hardly any."""
    rng = random.Random(length)
    truths, texts = [], []
    for _ in range(300):
        one = rng.choices(VOCABULARY, k=length)
        other = list(one)
        for place in rng.sample(range(length), rng.randrange(length // 3)):
            other[place] = rng.choice(VOCABULARY)
        truths.append(len(pairs(one) & pairs(other)) / len(pairs(one) | pairs(other)))
        texts += [" ".join(one), " ".join(other)]
    group, truth = groups(signed(texts)), np.array(truths)
    found = group[1::2] == group[::2]
    assert found[truth >= 0.9].mean() > 0.97
    assert found[truth < 0.65].mean() < 0.03


@settings(deadline=None, max_examples=40)
@forall(texts=st.lists(WORDS.map(" ".join), max_size=20), batch=st.sampled_from([1, 40]))
def test_a_signature_is_the_texts_own(texts: list[str], batch: int) -> None:
    """It depends neither on the other texts nor on where a batch ends."""
    alone = [signed([text])[0] for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "BATCH", batch)
        together = signed(texts)
    assert together.tolist() == [signature.tolist() for signature in alone]


def test_signatures_stay_what_they_are() -> None:
    """Sides of the split follow from these numbers: another version of the job or of numpy must give the same."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(["alpha", "Über", "今天", "x1-", "e\u0301", "it's"], k=k)) for k in (3, 8, 20, 500)]
    assert digest(signed(texts)) == "afea0ace34769931"
    texts = ["“Hello…” 。今天、x — ¿qué? 😊\u00a0§", "l’un « et » l’autre — " * 20]
    assert digest(signed(texts)) == "a620ade5be267f3b"


def test_case_punctuation_and_space_do_not_matter() -> None:
    """Two texts of the same words are the same to it."""
    one, other = signed(["One, two: three four five six seven eight", "one two\nthree FOUR  five six (seven) eight!"])
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("Hello", "“Hello…”", id="typographic"),
        pytest.param("Je l'ai dit: oui", "Je l’ai dit\u202f: «\u00a0oui\u00a0»", id="French"),
        pytest.param("Que hora es? Ya", "¿Que hora es? ¡Ya!", id="Spanish"),
        pytest.param("one - two", "one—two", id="dashes"),
        pytest.param("你好，今天很好。", "「你好」今天、很好", id="Chinese"),
        pytest.param("今日はいい天気", "今日は、いい天気。", id="Japanese"),
        pytest.param("안녕 세상", "안녕\u3000세상！", id="Korean"),
        pytest.param("كيف حالك", "كيف حالك؟", id="Arabic"),
        pytest.param("नमस्ते दुनिया", "नमस्ते दुनिया।", id="Hindi"),
        pytest.param("`x` < 5 $", "´x´ ≤ 5 €", id="symbols"),
    ],
)
def test_punctuation_of_all_scripts_does_not_matter(one: str, other: str) -> None:
    """It is between words, as that of ASCII is, in short texts and in long ones."""
    more = " and then seven more words stand behind it"
    first, second, longer, longest = signed([one, other, one + more, other + more]).tolist()
    assert first == second
    assert longer == longest
    assert first != longer


def test_letters_marks_digits_and_emoji_are_of_words() -> None:
    """Texts that differ in one of them differ; an answer of nothing but an emoji is a word."""
    texts = ["naïve", "naive", "e\u0301", "e", "का", "क", "٣", "٤", "５", "Yes 👍", "Yes 👎", "Yes", "👍", "©"]
    assert groups(signed(texts)).tolist() == list(range(len(texts)))


def test_every_character_is_of_a_word_or_between_words() -> None:
    """No letter, mark or digit of today's Unicode divides a word, and its common punctuation and white space does."""
    between = [
        chr(code).encode()[0] for code in np.flatnonzero(near_duplicates._between()) if code > near_duplicates.ASCII
    ]
    assert set(between) == set(near_duplicates.BETWEEN)
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    inside = iter(near_duplicates._in_word(np.frombuffer("\n".join([*characters, ""]).encode(), dtype=np.uint8)))
    for character in characters:
        of_word = {bool(next(inside)) for _ in character.encode()}
        assert len(of_word) == 1
        assert not next(inside), "the line end behind it"
        kind = category(character)
        if kind[0] in "MN" or kind in {"Lu", "Ll", "Lt", "Lo"}:
            assert of_word == {True}, hex(ord(character))
        if kind[0] == "Z" or (kind[0] == "P" and character in COMMON):
            assert of_word == {False}, hex(ord(character))


@pytest.mark.parametrize("longest", [8, 9])
def test_a_text_cut_within_a_character_leaves_the_next_alone(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """The rest of the character consumes nothing of the next text."""
    monkeypatch.setattr(near_duplicates, "LONGEST", longest)
    assert signed(["word é…", "xyz"])[1].tolist() == signed(["xyz"])[0].tolist()


def test_scripts_without_spaces_are_compared_by_character() -> None:
    """A Chinese sentence with one more character is nearly the same, another sentence is not."""
    text = "今天天气很好我们一起去公园散步吧然后在湖边的小店里喝一杯热茶再慢慢走回家"
    other = "明天要下雨所以大家都留在家里看书和听音乐哪里也不去"
    assert groups(signed([text, text.replace("热茶", "热的茶"), other])).tolist() == [0, 0, 2]


def test_short_texts_are_alike_if_their_words_are() -> None:
    """Under eight words, case, punctuation and space do not matter; another word, order or number does, and texts
    without words are alone."""
    texts = ["Capital of X?\nParis", "capital of X ?\nparis.", "Capital of Y?\nParis", "X of capital\nParis", "Paris"]
    texts += [
        "?!",
        "...",
        "Paris paris",
        "今天",
        "今 天",
        "one two three four five six seven",
        "One two three four five six",
    ]
    assert groups(signed(texts)).tolist() == [0, 0, 2, 3, 4, 5, 6, 7, 8, 8, 10, 11]


def test_similarity_is_transitive() -> None:
    """A chain of texts, each like the next, is one group named by its first."""
    rng = random.Random(3)
    chain = [rng.choices(VOCABULARY, k=100)]
    for step in range(12):
        chain.append([*chain[-1]])
        chain[-1][step * 8] = "other"
    found = groups(signed([*map(" ".join, chain), " ".join(rng.choices(VOCABULARY, k=100))]))
    assert found.tolist() == [0] * 13 + [13]


def test_long_texts_do_not_grow_the_tables() -> None:
    """A text beyond the bound is compared by its first part."""
    long = "word " * near_duplicates.LONGEST
    assert signed([long])[0].tolist() == signed([long + "end"])[0].tolist()
