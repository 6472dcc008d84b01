from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from job import likeness
from job.likeness import Signature, Signatures, groups

VOCABULARY = [f"w{number}" for number in range(5000)]
WORDS = st.lists(st.sampled_from(["a", "bb", "Über", "x1", "今", "天", "-", "\n", "."]), max_size=30)


def signed(texts: list[str]) -> Signature:
    signatures = Signatures()
    for text in texts:
        signatures.add(text)
    return signatures.all()


def pairs(words: list[str]) -> set[tuple[str, str]]:
    return set(zip(words, words[1:], strict=False))  # noqa: RUF007


@pytest.mark.parametrize("length", [30, 100, 400])
def test_what_is_found_is_what_is_alike(length: int) -> None:
    """Against the likeness counted exactly: from 0.9 on nearly every pair is found, below 0.65 hardly one."""
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
    """It does not depend on the texts beside it, nor on where a batch ends."""
    alone = [signed([text])[0] for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, "BATCH", batch)
        together = signed(texts)
    assert together.tolist() == [signature.tolist() for signature in alone]


def test_signatures_stay_what_they_are() -> None:
    """Sides of the split follow from these numbers: another version of the job or of numpy must give the same."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(["alpha", "Über", "今天", "x1-", "e\u0301", "it's"], k=k)) for k in (3, 8, 20, 500)]
    signature = signed(texts)
    digest = hashlib.sha256(signature.astype("<u2").tobytes()).hexdigest()[:16]
    assert digest == "afea0ace34769931"


def test_case_punctuation_and_space_do_not_matter() -> None:
    """Two texts of the same words are the same to it."""
    one, other = signed(["One, two: three four five six seven eight", "one two\nthree FOUR  five six (seven) eight!"])
    assert one.tolist() == other.tolist()


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


def test_likeness_carries_over() -> None:
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
    long = "word " * likeness.LONGEST
    assert signed([long])[0].tolist() == signed([long + "end"])[0].tolist()
