from __future__ import annotations

import base64
import datetime
import json
import random
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.config.schema import Config
from job.data import prepare
from job.data.examples import Example, Turn, content_key
from job.data.findings import is_grave
from job.data.quality.scan import QualityScan, ScanResult, Scope, _percent
from job.data.reading.dataset import ExampleStream, Source
from job.data.split import is_held_out, split_by_content
from job.inputs.files import File
from job.inputs.pull import Inputs
from job.observability import masking
from job.runtime.errors import DataError
from tests.jobs import ROOT, run

WORDS = (ROOT / "README.md").read_text().split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def drawn(length: int, seed: int = 1, letters: str = LETTERS) -> str:
    """An apparent secret, generated so that this file contains none."""
    return "".join(random.Random(seed).choices(letters, k=length))


SECRETS = {
    "aws": "AKIA" + drawn(16, letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "aws session": "ASIA" + drawn(16, 2, letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "aws secret": "aws_secret_access_key = " + drawn(40, 3),
    "github": "ghp_" + drawn(36),
    "github fine-grained": "github_pat_" + drawn(82),
    "gitlab": "glpat-" + drawn(20),
    "slack": "xoxb-" + drawn(12, letters="0123456789") + "-" + drawn(24),
    "hugging face": "hf_" + drawn(34),
    "openai": "sk-proj-" + drawn(48),
    "google": "AIza" + drawn(35),
    "stripe": "sk_live_" + drawn(24),
    "json web token": f"eyJ{drawn(20)}.eyJ{drawn(40)}.{drawn(43)}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n{drawn(64, 2)}\n-----END RSA PRIVATE KEY-----",
    "encrypted key": f"-----BEGIN PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n{drawn(64)}\n-----END PRIVATE KEY-----",
    "password": 'password="' + drawn(14) + '"',
    "api key": "API_KEY: " + drawn(32),
    "token in JSON": json.dumps({"access_token": drawn(40)}),
    "url": f"postgres://admin:{drawn(12)}@db/orders",
}


def sentence(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def talk(*turns: str, line: int = 1, source: str = "a.jsonl", system: str = "") -> Example:
    said = [Turn(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(turns)]
    first = [Turn(role="system", content=system)] if system else []
    return Example(source=source, line=line, format="messages", turns=tuple(first + said))


def normal(rows: int = 60) -> list[Example]:
    """Conversations in which there is nothing to find."""
    return [talk(sentence(2 * n, 12), sentence(2 * n + 1, 30), line=n + 1, source="n.jsonl") for n in range(rows)]


def varied(text: str, seed: int = 0) -> str:
    """The text with one word of forty replaced and other case and punctuation."""
    words = text.upper().split()
    words[random.Random(seed).randrange(len(words))] = f"other{seed},"
    return " ".join(words)


def scanned(
    examples: Iterable[Example], held_out: Iterable[Example] = (), *, scope: Scope = "everything"
) -> ScanResult:
    scan = QualityScan(scope=scope)
    for example in examples:
        scan.add(example)
    for example in held_out:
        scan.add(example, held_out=True)
    return scan.result()


def found(examples: Iterable[Example], held_out: Iterable[Example] = ()) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {one.code: (one.count, one.first) for one in scanned(examples, held_out).findings}


LONG = sentence(99, 80)
PICTURE = f"data:image/png;base64,{base64.b64encode(bytes(range(250))).decode()}"
TABLE = "| a | b |\n|---|---|\n" + "=" * 200 + "\n" + "-" * 120


@pytest.mark.parametrize(
    ("code", "planted", "places"),
    [
        pytest.param("exact_duplicates", [talk("Who?", "Me."), talk("Who?", "Me.", line=2)], [2], id="same"),
        pytest.param(
            "near_duplicates",
            [talk(LONG, "yes, of course it is"), talk(varied(LONG), "yes, of course it is", line=2)],
            [2],
            id="nearly the same",
        ),
        pytest.param("empty_answers", [talk("Who?", " \n")], [1], id="blank answer"),
        pytest.param("empty_answers", [talk("Who?", "", "Well?", "Me.")], [1], id="an earlier answer is empty"),
        pytest.param("answers_repeat_prompts", [talk("Say it again.", "Say it again.\n")], [1], id="echo"),
        pytest.param("one_word_answers", [talk("Who?", "Me.")], [1], id="one word"),
        pytest.param(
            "conflicting_answers",
            [talk("Capital of X?", "It is Y."), talk("Capital of X?", "It is Z.", line=2)],
            [1, 2],
            id="two answers",
        ),
        pytest.param("garbage", [talk("Who?", "It is\x00 me and you")], [1], id="NUL"),
        pytest.param("garbage", [talk("Who?", "\x1b[31mred\x1b[0m is it now")], [1], id="terminal colours"),
        pytest.param("garbage", [talk("Who is Ren\ufffd?", "He is a man")], [1], id="replacement character"),
        pytest.param("garbage", [talk("Un cafÃ© s'il vous plaÃ®t", "Oui, bien sur")], [1], id="e acute"),
        pytest.param("garbage", [talk("It isnâ€™t so", "It is so, I say")], [1], id="apostrophe"),
        pytest.param("garbage", [talk("NaÃ¯ve", "Ã–sterreich ist ein Land")], [1], id="capital umlaut"),  # noqa: RUF001
        pytest.param("garbage", [talk("Who?", "so it goes " + "a" * 160)], [1], id="one letter"),
        pytest.param("embedded_media", [talk(f"What is on {PICTURE}?", "It is a heron")], [1], id="picture"),
        pytest.param("email_addresses", [talk("Who?", "Write to jane.doe@acme-mail.com please")], [1], id="address"),
        *(
            pytest.param("secrets", [talk("How do I log in?", f"You use {secret} for that")], [1], id=name)
            for name, secret in SECRETS.items()
        ),
        pytest.param("secrets", [talk("Hello there", "Hello you too", system=SECRETS["github"])], [1], id="in system"),
    ],
)
def test_each_kind_is_found_where_it_is(code: str, planted: list[Example], places: list[int]) -> None:
    """A defect planted among normal rows is found, with its rows' places and under its own code only."""
    one = found([*planted, *normal()])
    assert one.pop(code) == (len(places), tuple(f"a.jsonl:{line}" for line in places))
    assert one.keys() <= {"one_word_answers"}  # a short planted answer may be one as well


TOOL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
CALL = (Turn(role="user", content="Look."), Turn(role="assistant", content="", tool_calls=(TOOL,)))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="prose"),
        pytest.param([talk(sentence(n), ("good", "bad")[n % 2], line=n) for n in range(50)], id="labels"),
        pytest.param([talk(f"What is {n} + {n}?", f"It is {2 * n}.", line=n) for n in range(60)], id="short rows"),
        pytest.param(
            [talk(f"{n}?", sentence(n), line=n, system=sentence(7, 400)) for n in range(50)], id="shared system"
        ),
        pytest.param([talk("Ação? NÃO! “Ô INFÂNCIA”", "Qu’il fît 20 °C à l’Étang, Größe Ö, ÄÖÜ.")], id="accents"),  # noqa: RUF001
        pytest.param(
            [talk("今天天气怎么样？", "今天天气很好，适合出去散步。"), talk("Ще не вмерла", "Україна і слава")],  # noqa: RUF001
            id="scripts",
        ),
        pytest.param(
            [talk("A table?", TABLE), talk("Emoji?", "👩‍👩‍👧 is a family, می‌خواهم is a word")], id="tables, joiners"
        ),
        pytest.param(
            [talk("My address?", "It is someone@example.com or root@localhost, @name is none")], id="examples"
        ),
        pytest.param(
            [talk("How to log in?", "Use password=<your password>, token = os.getenv('API_TOKEN') and api_key: xxx")],
            id="placeholders",
        ),
        pytest.param(
            [talk("What are tokens?", "A token: a piece of a word. The secret: more data. Password: see below.")],
            id="talk of secrets",
        ),
        pytest.param([Example(source="a", line=1, format="messages", turns=CALL)], id="tool call"),
        pytest.param([Example(source="a", line=n, format="text", text=sentence(n)) for n in range(5)], id="text"),
        pytest.param(
            [Example(source="a", line=n, format="text", text=text) for n, text in enumerate(["", "x", "a b"])],
            id="hardly any text",
        ),
        pytest.param([talk("", f"It was the {n}th night", line=n) for n in range(9)], id="no prompt"),
    ],
)
def test_normal_data_is_quiet(rows: list[Example]) -> None:
    """Nothing is found where nothing is wrong."""
    alone = rows if len(rows) > 20 else [*rows, *normal()]
    assert found(alone) == {}


def test_no_rows_are_no_findings() -> None:
    """An empty evaluation file, or none, changes nothing."""
    assert scanned([]).findings == ()
    assert scanned(normal(), []).shared == 0


def read_file(name: str) -> Iterator[Example]:
    path = ROOT / "examples/orders" / name
    return iter(ExampleStream([Source(name=name, path=path)]))


def test_the_orders_are_clean() -> None:
    """The example dataset, which is generated from phrases, has no findings at all."""
    assert found(read_file("train.jsonl"), read_file("eval.jsonl")) == {}


def test_a_leak_is_a_row_of_the_evaluation_that_is_in_training() -> None:
    """Exact and near copies are reported by their place in the evaluation file; duplicates inside it are not."""
    train = [*normal(), talk(LONG, "yes, it is so, I think")]
    held_out = [
        talk(sentence(1000), sentence(1001), line=1, source="e"),
        talk(sentence(1000), sentence(1001), line=2, source="e"),
        talk(LONG, "yes, it is so, I think", line=3, source="e"),
        talk(varied(LONG), "yes, it is so, I think", line=4, source="e"),
    ]
    scan = scanned(train, held_out)
    assert {one.code: (one.count, one.first) for one in scan.findings} == {"eval_leakage": (2, ("e:3", "e:4"))}
    assert (scan.rows, scan.held_out, scan.shared) == (61, 4, 2)
    assert "2 of 4 rows (50%)" in scan.findings[0].message


def test_a_text_that_all_rows_share_is_no_duplicate() -> None:
    """Instructions repeated in every prompt make rows alike: that is said once, and no side of the split is emptied."""
    shared = sentence(5, 300)
    rows = [talk(f"{shared} {sentence(n, 6)}", f"It is number {n} of all.", line=n) for n in range(200)]
    assert found(rows).keys() == {"shared_text"}
    split = split_by_content(scanned(rows).group_keys(), fraction=0.2)
    assert 20 < sum(split.held_out) < 60


def family(seed: int, size: int) -> list[Example]:
    """Rows that are nearly the same."""
    return [talk(sentence(seed, 60), varied(sentence(seed + 1, 60), n), line=n) for n in range(size)]


def sides(rows: list[Example], scope: Scope = "everything") -> dict[str, bool]:
    """For each content whether it is held out; a content on both sides is an error."""
    keys = list(scanned(rows, scope=scope).group_keys())
    split = split_by_content(keys, fraction=0.3)
    if split.note:
        return {content_key(row): is_held_out(key, 0.3) for row, key in zip(rows, keys, strict=True)}
    train, held_out = ({content_key(row) for row in compress(rows, side)} for side in (split.train, split.held_out))
    assert not train & held_out
    assert sum(split.train) + sum(split.held_out) == len(rows)
    return {**dict.fromkeys(train, False), **dict.fromkeys(held_out, True)}


def test_rows_that_are_nearly_the_same_are_on_one_side() -> None:
    """No family of near duplicates is divided, and the fraction is about that which was asked for."""
    families = [family(2 * n, 3) for n in range(200)]
    side = sides([row for rows in families for row in rows])
    assert {len({side[content_key(row)] for row in rows}) for rows in families} == {1}
    assert 0.2 < sum(side.values()) / len(side) < 0.4


def test_short_rows_of_the_same_words_are_on_one_side() -> None:
    """Rows of a few words that differ in case, punctuation and space alone are near duplicates, and no leak."""
    pairs = [
        [talk(f"Capital of land{n}?", "Paris"), talk(f"capital of land{n} ?", "paris.", line=2)] for n in range(200)
    ]
    rows = [row for pair in pairs for row in pair]
    side = sides(rows)
    assert {len({side[content_key(row)] for row in pair}) for pair in pairs} == {1}
    assert found(rows)["near_duplicates"][0] == 200
    assert found([one for one, _ in pairs], [other for _, other in pairs])["eval_leakage"][0] == 200


@settings(max_examples=25, deadline=None)
@forall(
    seeds=st.lists(st.integers(0, 400), min_size=1, max_size=12, unique=True),
    others=st.lists(st.integers(1000, 1400), max_size=12, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_no_order_and_no_unlike_row_moves_another(seeds: list[int], others: list[int], order: random.Random) -> None:
    """A row's side depends only on the rows that are nearly the same."""
    rows = [row for seed in seeds for row in family(3 * seed, 1 + seed % 3)]
    before = sides(rows)
    more = [*rows, *(row for seed in others for row in family(3 * seed, 1))]
    order.shuffle(more)
    after = sides(more)
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(
    ("share", "percent"),
    [(1, "100%"), (0.5, "50%"), (1 / 3, "33%"), (0.012, "1.2%"), (0.0005, "0.05%"), (1e-9, "0.001%")],
)
def test_shares_as_a_person_writes_them(share: float, percent: str) -> None:
    """No share is written in powers of ten, and none as zero."""
    assert _percent(share) == percent


@pytest.mark.parametrize("size", [30, 60])
def test_a_large_group_is_judged_by_its_own_size(size: int) -> None:
    """Unlike rows, however many, neither dissolve a group nor bring it together."""
    shared = sentence(1, 80)
    rows = [talk(shared, f"It is number {n}", line=n) for n in range(size)]
    unlike = [talk(sentence(n, 20), sentence(n + 1, 20)) for n in range(1000, 3000, 2)]
    small, large = sides([*rows, *unlike[:100]]), sides([*rows, *unlike])
    assert {key: large[key] for key in small} == small
    assert len({small[content_key(row)] for row in rows}) == (1 if size == 30 else 2)


def test_off_does_not_change_the_split() -> None:
    """TUNE_QUALITY=off does not change the training rows: the setting is not part of the fingerprint."""
    rows = [*normal(), *family(0, 5), *family(50, 5)]
    assert sides(rows) == sides(rows, scope="near_duplicates")
    assert scanned(rows, scope="near_duplicates").findings == ()


def test_memory_does_not_hold_texts() -> None:
    """More rows need a few hundred bytes more for each, however long they are."""

    def peak(rows: int) -> int:
        tracemalloc.start()
        scanned(talk(str(n), LONG * 40, line=n) for n in range(rows))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(300) - peak(100) < 200 * 3000  # of about 20,000 each


@settings(max_examples=60, deadline=None)
@forall(before=st.text(max_size=40), secret=st.sampled_from(sorted(SECRETS.values())), after=st.text(max_size=40))
def test_no_secret_is_ever_shown(before: str, secret: str, after: str) -> None:
    """Neither findings, warnings, nor the error quote a secret, and a text that is shown has it masked."""
    text = f"{before} {secret} {after}"
    core = max(secret.replace("\n", " ").replace('"', " ").replace(":", " ").replace("@", " ").split(), key=len)
    assert masking.holds_secret(text)
    assert core not in masking.masked(text)
    scan = scanned([talk("How do I log in?", text)])
    with capture_logs() as logs:
        prepare.judge(scan.findings, rows=scan.rows, quality="warn")
    with pytest.raises(DataError) as caught:
        prepare.judge(scan.findings, rows=scan.rows, quality="fail")
    assert core not in f"{scan.findings} {logs} {caught.value}"
    assert "secrets" in {line["code"] for line in logs}


@forall(text=st.text(max_size=200))
def test_a_text_without_secrets_is_shown_as_it_is(text: str) -> None:
    """Masking leaves all other texts unchanged."""
    assert masking.masked(text) == text or masking.holds_secret(text) or masking.holds_email(text)


def test_secrets_that_lie_in_one_another_are_masked_whole() -> None:
    """However patterns overlap, no end of a secret is left over."""
    text = f"password={SECRETS['github']} and {SECRETS['url']}, jane@acme-mail.com."
    assert masking.masked(text) == "password=[masked] and postgres://admin:[masked]@db/orders, [masked]."


@pytest.mark.parametrize("piece", ["sk-", "sk-a-", "eyJaaaaaaaa-", "eyJaaaaaaaa.", "token:", "a.b@"])
def test_text_that_nearly_looks_like_secrets_takes_no_time(piece: str) -> None:
    """Time grows with the length of a text, not with its square."""
    start = time.process_time()
    assert not masking.holds_secret(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 2


def config(**settings: Any) -> Config:
    return Config(model="/m", dataset=("/d",), output="/o", **settings)


def pulled(train: Path, held_out: Path | None = None) -> Inputs:
    def file(path: Path) -> File:
        return File(name=path.name, path=path, size=path.stat().st_size, etag=None, version=None)

    return Inputs(
        model=Path("/m"),
        model_files=(),
        model_revision=None,
        dataset=(file(train),),
        eval_dataset=(file(held_out),) if held_out else (),
        template_text=None,
        template_files=(),
        date=datetime.date(2026, 1, 1),
    )


def write(path: Path, examples: Iterable[Example]) -> Path:
    rows = ({"messages": [turn.message() for turn in one.turns]} for one in examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scan_of(path: Path, **settings: Any) -> ScanResult:
    return prepare.read(config(**settings), pulled(path)).scan


def test_fail_names_everything_that_was_found(tmp_path: Path) -> None:
    """The error has each finding with its place and remedy, grave or not, and says which are grave."""
    path = write(tmp_path / "a.jsonl", [talk("Who is it?", ""), talk("Who?", "me@acme-mail.com it is"), *normal()])
    facts = prepare.read(config(), pulled(path))
    with pytest.raises(DataError, match=r"grave: empty_answers\.") as caught:
        prepare.judge(facts.scan.findings, rows=facts.scan.rows, quality="fail")
    assert "empty_answers: 1 of 62 rows (1.6%) " in caught.value.message
    assert "email_addresses: 1 of 62 rows" in caught.value.message
    assert "First: a.jsonl:1. " in caught.value.message
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(("quality", "events"), [("warn", ["data_quality"] * 2), ("off", [])])
def test_warn_says_each_finding_once(tmp_path: Path, quality: str, events: list[str]) -> None:
    """One warning for each code with all its fields; `off` says nothing."""
    path = write(tmp_path / "a.jsonl", [talk("Who is it?", ""), talk("Who?", "me@acme-mail.com it is"), *normal()])
    found = scan_of(path, quality=quality)
    with capture_logs() as logs:
        prepare.judge(found.findings, rows=found.rows, quality=quality)
    assert [line["event"] for line in logs] == events
    assert all(line.keys() >= {"code", "count", "first", "message", "remedy"} for line in logs)


def test_some_duplicates_are_not_grave() -> None:
    """`fail` lets a few duplicates pass, which most datasets have, and not a tenth."""
    few = scanned([*normal(), *normal(2)])
    many = scanned([*normal(), *normal(20)])
    assert [is_grave(one, found.rows) for found in (few, many) for one in found.findings] == [False, True]


def test_too_few_rows_for_an_evaluation_are_a_warning(tmp_path: Path) -> None:
    """The log says that a requested evaluation is not possible."""
    path = write(tmp_path / "a.jsonl", normal(3))
    with capture_logs() as logs:
        facts = prepare.read(config(eval_fraction=0.0001), pulled(path))
    assert [(line["event"], line["log_level"]) for line in logs] == [("evaluation_disabled", "warning")]
    assert facts.split.train == bytes([1]) * 3


def test_the_users_own_evaluation_is_compared(tmp_path: Path) -> None:
    """Both files are read, none is changed, and the leak is in the findings."""
    train, held_out = write(tmp_path / "a.jsonl", normal(9)), write(tmp_path / "b.jsonl", normal(2))
    facts = prepare.read(config(), pulled(train, held_out))
    assert [(one.code, one.first) for one in facts.scan.findings] == [("eval_leakage", ("b.jsonl:1", "b.jsonl:2"))]
    assert (sum(facts.split.train), sum(facts.split.held_out)) == (9, 2)
    assert prepare.read(config(quality="off"), pulled(train, held_out)).scan.shared == 2


def test_a_run_on_bad_data_ends(tiny_model: Path, tmp_path: Path) -> None:
    """With TUNE_QUALITY=fail the run ends with 65 before the weights are loaded, and its log holds no secret."""
    secret = SECRETS["github"]
    path = write(tmp_path / "a.jsonl", [*normal(), talk("How?", f"With {secret} of course")])
    ended = run(tmp_path, model=tiny_model, dataset=path, output=tmp_path / "out", quality="fail", max_length=256)
    assert ended.code == 65
    assert "secrets: 1 of 61 rows" in ended.event("run_failed")["message"]
    written = [file.read_text(errors="replace") for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert secret not in json.dumps(ended.lines) + "".join(written)
