"""The page: whole in itself, harmless whatever the data, and true about what is learned."""

import dataclasses
import html
import re
from html.parser import HTMLParser

import pytest
from structlog.testing import capture_logs

from job.data.findings import Finding
from job.data.prepare import Data
from job.data.reading.formats import parse_row
from job.data.rendering.labels import IGNORED
from job.data.rendering.renderer import Renderer
from job.data.tokenized.provenance import Provenance
from job.data.tokenizer.chat_template import bundled_template
from job.data.tokenizer.load import wrap_tokenizer
from job.model.base_model import inspect
from job.observability import logs
from job.observability.redaction import Redactor
from job.report import charts
from job.report.build import check_page, expect, length_chart, publish_early
from job.report.page import Answer, Curve, Page, visible
from job.report.token_view import sequence_view, sequence_views
from job.state.ledger import Ledger
from job.state.record import Record
from job.storage.open import open_store
from tests.data.datasets import tokenized
from tests.model.test_memory import BASE_1B, settings
from tests.tiny_tokenizer import DATE, real_smollm2, tiny

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "</pre></div></main></body></html><h1>mine</h1>",
    "{{ 7 * 7 }}{% for x in y %}",
    "<!-- -->]]>&lt;&amp;",
    "\u202eesrever\u202c \u200b\0\x1b[31m",
)
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Parsed(HTMLParser):
    """What a browser would see: elements, their attributes and texts. Elements must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.spans: list[tuple[set[str], str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self.spans.append((set((found.get("class") or "").split()), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "span":
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)

    def tokens(self) -> list[tuple[str, bool]]:
        return [(text, "l" in classes) for classes, text in self.spans if "t" in classes]


def tokenizer():
    hf = tiny(bos="<s>", eos="<|im_end|>", template=bundled_template("chatml"))
    return wrap_tokenizer(hf, date=DATE)


def chat(question, answer, line=1):
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return parse_row(row, format="messages", source="a.jsonl", line=line)


def rendered(tmp_path, rows, with_tokenizer=None, **options) -> Data:
    made = with_tokenizer or tokenizer()
    train = tokenized(rows, renderer=Renderer(tokenizer=made, **options), directory=tmp_path)
    return Data(tokenizer=made, train=train, evaluation=None, files=(), findings=(), prompts=())


def full(tmp_path, texts) -> Page:
    """A page with something in each section, all of it made of the given texts."""
    rows = [chat(text, text, line) for line, text in enumerate(texts, 1)]
    data = rendered(tmp_path, rows)
    config, words = settings(run_id="r"), " ".join(texts)
    expected = expect(config, BASE_1B, data)
    made = check_page(config, data, expected, [])
    finding = Finding(code="odd", count=1, first=(f"{words}:1",), message=words, remedy=words)
    facts = {"name": words, "format": words, "rows": 1, "bytes": 1, "sha256": "0" * 64}
    facts |= {"held_out": True, "unread": {words: 1}}
    return Page(
        title=words,
        state="complete",
        summary=((words, words),),
        problems=(words,),
        findings=(finding,),
        sequences=made.sequences,
        lengths=made.lengths,
        files=(facts,),
        left_out={words: [words]},
        estimate=expected,
        measured=((words, words),),
        curves=(Curve(name=words, points=((1.0, 2.0), (2.0, 1.0))), Curve(name=words, points=((1.0, 2.5),))),
        answers=(Answer(prompt=words, reference=words, before=words, after=None),),
        settings=((words, words),),
        versions=((words, words),),
    )


def test_hostile_data_stays_text(tmp_path):
    """Whatever the data contains is shown as text: a page of hostile rows has the same elements as one of harmless
    rows, and no more."""
    harmless = Parsed(full(tmp_path / "a", ["plain"] * len(HOSTILE)).html())
    page = Parsed(full(tmp_path / "b", list(HOSTILE)).html())

    def kinds(one):
        return {(tag, tuple(sorted(found))) for tag, found in one.elements}

    assert kinds(page) <= kinds(harmless) | {("h3", ()), ("div", ("aria-label", "class", "role", "tabindex"))}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.text
    assert "⟨U+202E⟩" in page.text
    assert "\0" not in page.text
    assert "\x1b" not in page.text


@pytest.mark.parametrize("number", [0xAD, 0x34F, 0x115F, 0x2800, 0x3164, 0xFE0F, 0xFFA0, 0xE0001, 0xE0041, 0xE01EF])
def test_characters_that_show_nothing_are_marked(number):
    """Fillers, selectors and tags, in which text can hide, stand on the page as their numbers."""
    assert visible(f"a{chr(number)}b") == f"a⟨U+{number:04X}⟩b"
    page = Page(title=f"a{chr(number)}b", state="check", summary=()).html()
    assert chr(number) not in page


def test_the_page_needs_nothing_else(tmp_path):
    """No element refers to anything outside the page, there is no script, and a policy forbids both."""
    text = full(tmp_path, list(HOSTILE)).html()
    page = Parsed(text)
    tags = {tag for tag, _ in page.elements}
    assert tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"} == set()
    attributes = {name for _, found in page.elements for name in found}
    assert not {name for name in attributes if name.startswith("on")}
    assert attributes & {"src", "href", "srcset", "action", "data", "style"} == set()
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(found["content"] for _, found in page.elements if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_highlighted_is_what_is_learned(tmp_path):
    """Token by token, the page marks exactly those that have a label, and shows the text whole."""
    made = tokenizer()
    rows = [chat("What is the capital of France? é 日本", "Paris, déjà vu 🎉 ok."), chat("Hi", "<b>Ho</b>", 2)]
    data = rendered(tmp_path, rows, made)
    page = Parsed(check_page(settings(), data, None, []).html())
    wanted = [row for row in data.train.dataset]  # noqa: C416 - a dataset, not a list
    marked = page.tokens()
    assert [learned for _, learned in marked] == [label != IGNORED for row in wanted for label in row["labels"]]
    texts = [made.hf.backend_tokenizer.decode(row["input_ids"], skip_special_tokens=False) for row in wanted]
    assert "".join(text for text, _ in marked).replace("↵", "") == "".join(texts)
    learned = "".join(text for text, learned in marked if learned)
    assert learned == "Paris, déjà vu 🎉 ok.<|im_end|><b>Ho</b><|im_end|>"


def test_what_each_token_counts(tmp_path):
    """Where roles weigh differently, each learned token says its weight, in words and as a shade; elsewhere none does.
    Each sample names the row it comes from."""
    rows = [chat("Ask me.", "No.", 3), chat("And me?", "Yes.", 41)]
    data = rendered(tmp_path / "a", rows, weights={"assistant": 1.0, "user": 0.2})
    text = check_page(settings(), data, None, []).html()
    page = Parsed(text)
    titles = [found.get("title") for tag, found in page.elements if tag == "span" and "t" in found["class"].split()]
    weights = [weight for row in data.train.dataset for weight in row["weights"]]
    assert titles == [f"weight {weight:.3g}" if weight else None for weight in weights]
    shaded = {
        shade: "".join(text for classes, text in page.spans if {"t", shade} <= classes).replace("<|im_end|>", "|")
        for shade in ("w1", "w2", "w3", "w4", "w5")
    }
    assert shaded == {"w1": "Ask me.|And me?|", "w2": "", "w3": "", "w4": "", "w5": "No.|Yes.|"}
    assert [text for classes, text in page.spans if "mark" in classes and classes & {"w1", "w5"}] == ["0.2", "1"]
    assert [text for classes, text in page.spans if "places" in classes] == ["a.jsonl:3", "a.jsonl:41"]
    plain = check_page(settings(), rendered(tmp_path / "b", rows), None, []).html()
    assert "TUNE_ROLE_WEIGHTS gives" not in plain
    assert "title=" not in plain.partition("What is learned")[2].partition("</section>")[0]


def test_tools_and_reasoning_that_no_model_sees_are_found(tmp_path):
    """Rows whose tools or reasoning the template leaves out are counted, with their places, and stand on the page."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    thinking = [said[0], said[1] | {"reasoning_content": "hm"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"messages": said, "tools": [tool]}, {"messages": said}, {"messages": thinking}]
    read = [parse_row(row, format="messages", source="a.jsonl", line=line) for line, row in enumerate(rows, 1)]
    data = rendered(tmp_path, read)
    found = {finding.code: (finding.count, finding.first) for finding in data.all_findings()}
    assert found == {"tools_not_rendered": (1, ("a.jsonl:1",)), "reasoning_not_rendered": (1, ("a.jsonl:3",))}
    assert "1 training rows have tools that" in Parsed(check_page(settings(), data, None, []).html()).text


def test_places():
    """The place of every sequence is that of its row, over the borders of files, also where a row made several."""
    places = Provenance()
    wanted = [("a", 1), ("a", 1), ("a", 9), ("b", 2), ("a", 3)]
    for source, line in wanted:
        places.add(source, line)
    assert [places.at(number) for number in range(len(places))] == [f"{source}:{line}" for source, line in wanted]


def test_real_tokenizer(tmp_path):
    """The same with a real model's tokenizer: the marked text is the answer and its end."""
    made = wrap_tokenizer(real_smollm2(), date=DATE)
    data = rendered(tmp_path, [chat("Übersetze: tea", " Tee -  mit  Milch\n\nund Zucker 🫖.")], made)
    (shown,) = sequence_views(data)
    assert "".join(token.text for token in shown.tokens if token.learned).strip() == (
        "Tee -  mit  Milch\n\nund Zucker 🫖.<|im_end|>"
    )
    assert {token.text for token in shown.tokens if token.special} == {"<|im_start|>", "<|im_end|>"}


def test_a_long_sequence_shows_its_beginning_and_its_end():
    """The tokens left out of a long sequence are counted, and the count is shown in their place."""
    made = tokenizer()
    ids = made.encode("word " * 3000).ids
    row = {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + [ids[-1]]}
    shown = sequence_view(made, row, name="long", place="a.jsonl:1")
    assert len(shown.tokens) + shown.left_out == shown.count == len(ids)
    assert (shown.learned, shown.tokens[-1].learned) == (1, True)
    page = Parsed(Page(title="t", state="check", summary=(), sequences=(shown,)).html())
    assert f"{shown.left_out:,} tokens are not shown" in page.text
    assert len(page.tokens()) == len(shown.tokens)


def test_a_sample_with_a_secret_is_not_shown(monkeypatch):
    """A secret of the environment is not shown, not even in pieces."""
    monkeypatch.setattr(logs._state, "redactor", Redactor(frozenset({"planted-secret-value"})))
    made = tokenizer()
    ids = made.encode("the password is planted-secret-value, is it").ids
    shown = sequence_view(made, {"input_ids": ids, "labels": ids}, name="s", place="planted-secret-value.jsonl:1")
    assert shown.tokens == ()
    page = Page(title="planted-secret-value", state="check", summary=(), sequences=(shown,)).html()
    assert "planted" not in page
    assert "contains a secret" in page


@pytest.mark.parametrize("words", [1, 2000], ids=["whole", "with a part left out"])
def test_suspicious_tokens_of_a_sample_are_masked(tmp_path, words):
    """Keys, passwords and addresses that stand in the data are masked wherever the page shows them, and only they."""
    key, password, address = "ghp_" + "a1B2c3D4e5" * 4, "Xk9fQ2" + "mZ7pL3", "bob.smith@" + "corp-mail.com"
    said = f"my key is {key} and mail {address}, please"
    data = rendered(tmp_path, [chat(said + " word" * words, f"ok, password={password} noted")], max_length=8192)
    (shown,) = sequence_views(data)
    assert "".join(token.text for token in shown.tokens if token.learned) == "ok, password=[masked] noted<|im_end|>"
    answer = Answer(prompt=said, reference=password, before=f"password={password}", after=address)
    made = check_page(settings(), data, None, [])
    page = Parsed(dataclasses.replace(made, answers=(answer,), summary=((address, key),)).html()).text
    assert "my key is [masked] and mail [masked], please" in page
    assert [hidden for hidden in (key, key[:10], address, "bob.smith", f"={password}") if hidden in page] == []


def test_what_a_limit_cuts(tmp_path):
    """For each round length below the longest sequence: how many sequences are longer, and which share of the tokens
    they would lose."""
    data = rendered(tmp_path, [chat("a", "word " * n, n) for n in (1, 30, 100)], max_length=4096)
    found = length_chart(data.train.lengths, max_length=2048)
    sizes = sorted(data.train.dataset["length"])
    for cut in found.cuts:
        assert cut.sequences == sum(size > cut.max_length for size in sizes)
        assert cut.tokens_lost == pytest.approx(sum(max(size - cut.max_length, 0) for size in sizes) / sum(sizes))
    assert found.longest == sizes[-1]
    assert sum(one.count for one in found.bins) == 3


@pytest.mark.parametrize("values", [[2.0], [0.0], [-3.5, 7.25], [1e-7, 1e-6], [12.1, 12.10001], [1e6, 3e6]])
def test_axes_hold_their_values(values):
    """An axis begins and ends at a tick, and every value lies between."""
    axis = charts.axis(values)
    assert axis.ticks[0] == pytest.approx(axis.low)
    assert axis.ticks[-1] == pytest.approx(axis.high)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 12


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, tiny_model):
    """A store that rejects the page, or a page that cannot be made, is logged, and the run continues."""
    data, base = rendered(tmp_path, [chat("a", "b")]), inspect(tiny_model, name="m")
    for uri, given in (("/proc/nowhere", data), (str(tmp_path / "out"), None)):
        record = Record(ledger=Ledger(store=open_store(uri), run_id="r"))
        with capture_logs() as said:
            publish_early(settings(), record, base, given)
        assert [line["event"] for line in said] == ["report_not_written"], said


def test_an_empty_page_is_a_page():
    """Unknown values are not shown."""
    text = Page(title="t", state="check", summary=()).html()
    assert Parsed(text).text.strip().startswith("t")
    assert html.unescape(text).count("<section") == 0
