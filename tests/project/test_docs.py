"""The documents say what the program says: messages, names, links, commands, examples."""

import re
from urllib.parse import unquote

import pytest

from job.config.schema import SETTINGS
from job.runtime.errors import KINDS
from tests import documents, messages
from tests.documents import DOCUMENTS, PAGES, WARNINGS
from tests.jobs import ROOT

README = ROOT / "README.md"
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"
TEXT = TROUBLESHOOTING.read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
WIDTH = 126
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
PAGE_NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

NEED_NO_ENTRY = {
    "job/__main__.py: \0.": "argparse's own words; the entry for the command line quotes the usage",
    "job/runtime/errors.py: \0: \0": "an unexpected error's own words; the entry for exit 1 quotes the remedy",
    "job/data/tokenizer/trial.py: \0: \0.": "the library's own words; the entry for a tokenizer quotes the limits",
    "job/data/tokenizer/trial_worker.py: ": "within the program: what the parent says of it has an entry",
    "job/storage/s3/setup.py: \0": "boto3's own words; the entry for the profile quotes the remedy",
    "job/storage/s3/store.py: s3://\0/\0: \0": "passes a key's problem on, which has an entry",
    "job/storage/s3/store.py: the reply is no listing": "within the program: an entry shows the reply",
    "job/inputs/hub_failures.py: \0": "within the program: an outage, which ends as the entry for an unreachable hub",
    "job/data/reading/dataset.py: ": "passes a row's problem on, each of which has an entry",
    "job/data/reading/files.py: ": "passes an element's problem on, each of which has an entry",
    "job/data/examples.py: ": "the list of invalid rows; its first line has an entry",
    "job/inputs/hub.py: ": "within the program: an outage, which ends as the entry for an unreachable hub",
    "job/inputs/hub.py: the process that downloads ended with status \0": "within the program: the same",
    "job/tuning/fit/attention.py: its attention is not one that a single kernel computes for all lengths": (
        "within the program: a reason of the plan, which continues without CUDA graphs"
    ),
    f"job/tuning/fit/cuda_graphs.py: {messages.HOLE} has no decoder of its own": "within the program: the same",
    "job/data/tokenizer/chat_template.py: ": "within the program: the template's own words, as other entries end",
}
"""Messages without constant words, or that no user sees, and why they need no entry."""
PASSED_ON = {
    "job/data/reading/": {"TooLargeError", "TooLongError", "DamagedError"},
    "job/data/tokenized/": {"OvertimeError"},
}
"""Errors whose words become the reason in a message that has an entry."""
EVENTS_WITHOUT_ENTRY = {"run_failed": "not a warning: the page begins with it"}


def quoted(said: messages.Said, quotes: list[str]) -> bool:
    key = f"{said.where.rpartition(':')[0]}: {said.text}"
    passed_on = any(key.startswith(folder) and said.name in names for folder, names in PASSED_ON.items())
    return passed_on or key in NEED_NO_ENTRY or any(messages.says(quote, said.text) for quote in quotes)


def test_every_message_quoted_is_in_the_source():
    """A message that the troubleshooting page quotes is one that the program can say."""
    texts = messages.texts()
    unknown = [quote for quote in documents.quotes(TEXT) if not any(messages.says(quote, text) for text in texts)]
    assert unknown == []


def test_every_error_has_an_entry():
    """Every error that a run can end with, and every problem that is part of one, is quoted on the page."""
    quotes = documents.quotes(TEXT)
    unquoted = [said for said in messages.errors() if not quoted(said, quotes)]
    assert [(said.where, said.text.replace(messages.HOLE, messages.ELLIPSIS)) for said in unquoted] == []


def test_nothing_is_excused_that_does_not_exist():
    """The list of messages without an entry names only messages that are there."""
    there = {f"{said.where.rpartition(':')[0]}: {said.text}" for said in messages.errors()}
    assert NEED_NO_ENTRY.keys() - there == set()


def test_every_warning_has_an_entry():
    """The section on warnings has a heading for each event that is logged as a warning or worse, and no other."""
    titles = re.findall(r"^### (.+)$", documents.section(TEXT, WARNINGS), re.MULTILINE)
    described = {span for title in titles for span in documents.spans(title)}
    logged = {said.text for said in messages.events()} - EVENTS_WITHOUT_ENTRY.keys()
    assert described == logged


def test_every_kind_of_failure_has_a_section():
    """There is a section for each exit code, with the code and the kind in its title, and for no other."""
    titles = [title for title in re.findall(r"^## (.+)$", TEXT, re.MULTILINE) if title.startswith("Exit")]
    numbers = {int(title.split()[1].rstrip(":")): title for title in titles}
    assert numbers.keys() == {kind.exit_code for kind in KINDS} | {1}
    assert messages.job_errors() >= {kind.__name__ for kind in KINDS}
    for title in titles:
        assert documents.quotes(documents.section(TEXT, title)), title


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_links_lead_somewhere(path):
    """Every relative link or picture names a file that exists, and a heading in it."""
    broken = []
    for target in documents.links(path):
        if re.match(r"\w+:", target):
            continue
        name, _, fragment = unquote(target).partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (fragment and fragment not in documents.anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_variables_exist(path):
    """Every TUNE_ name in a document is a variable of the job, or one's _FILE twin."""
    known = {setting.variable for setting in SETTINGS}
    named = {name.rstrip("_") for name in re.findall(r"\bTUNE_[A-Z0-9_]+\b", path.read_text())}
    assert {name for name in named if name not in known and name.removesuffix("_FILE") not in known} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_make_targets_exist(path):
    """Every `make` target that a document names is in the Makefile."""
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
    code = [block.text for block in documents.blocks(path)] + documents.spans(documents.prose(path))
    named = {name for text in code for name in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", text, re.MULTILINE)}
    assert named - targets == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_files_named_in_code_exist(path):
    """A path of this repository that a document names in code is there."""
    roots = "job|tests|docs|benchmarks|examples|helm|cloud|k8s"
    named = {span for span in documents.spans(documents.prose(path)) if re.fullmatch(rf"(?:{roots})/[\w./-]+", span)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_lines_are_wrapped(path):
    """Prose is wrapped near 120 columns, so that a changed word is a changed line; tables and quotes may be longer."""
    lines = documents.prose(path).splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith(("|", ">"))] == []


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_headings_differ(path):
    """No two headings of a document have the same fragment: a link would lead to the first."""
    titles = re.findall(r"^#{1,6} (.+)$", documents.prose(path), re.MULTILINE)
    assert len(documents.anchors(path)) == len(titles)


def test_every_block_says_its_language():
    """A fenced block says its language; the readers of examples in the tests know it by that."""
    known = {"sh", "yaml", "ini", "env", "text", "json", "jsonl", "python"}
    assert [b.where for path in DOCUMENTS for b in documents.blocks(path) if b.language not in known] == []


def test_every_command_is_tested_or_says_what_it_needs():
    """Each block of shell commands carries a mark: what it needs, or the files that run it. Each of its commands stands
    in one of those, by its first words; for `make x` those of the recipe will do."""
    wrong = []
    for block in documents.every_block("sh"):
        files = [ROOT / name for name in block.value.split(", ")] if block.mark == "tested" else []
        sources = [file.read_text() for file in files if file.is_file()]
        for command in commands(block.text):
            ways = [first_words(command), recipe(command)]
            ran = any(way and names(source, way) for way in ways for source in sources)
            if block.mark != "needs" and not ran:
                wrong.append((block.where, block.mark, block.value, command))
    assert wrong == []


def commands(text: str) -> list[str]:
    """The commands of a block: what continues a quotation or a line is part of the one before."""
    joined = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), text.replace("\\\n", " "))
    return [line for line in joined.splitlines() if line.strip() and not line.startswith(("#", "export "))]


def first_words(command: str) -> list[str]:
    return [word.rpartition("/")[2] for word in command.split()[:2]]


def recipe(command: str) -> list[str]:
    """What a `make` command runs with Python, without the interpreter."""
    target = command.split()[1] if command.startswith("make ") else ""
    found = re.search(rf"^{target}:.*\n(?:\t.*\n)*?\t@?\$\(BIN\)/python (.+)$", MAKEFILE, re.MULTILINE)
    return found[1].split() if target and found else []


def names(source: str, words: list[str]) -> bool:
    """The words stand in a file as a command line or as a list of strings."""
    return re.search(r"""["',\s]+""".join(map(re.escape, words)), source) is not None


def test_what_a_command_needs_is_one_of_a_few_things():
    """The mark names a cluster, a GPU, a container engine, an account, a tool, time or data: nothing vague."""
    allowed = ("cluster", "gpu", "docker", "account", "tool", "minutes", "data")
    vague = [
        (block.where, need)
        for block in documents.every_block("sh")
        if block.mark == "needs"
        for need in block.value.split(", ")
        if need.partition(" ")[0] not in allowed
    ]
    assert vague == []


def test_the_readme_is_the_front_door():
    """The README is short, and its first screen has the demo and Docker."""
    lines = README.read_text().splitlines()
    assert len(lines) < 200
    assert [line for line in documents.prose(README).splitlines() if len(line) > 120 and not line.startswith("|")] == []
    for command in ("make demo", "docker run"):
        assert any(command in line for line in lines[:45]), command


def test_every_document_is_found_from_the_readme():
    """Links lead from the README to every other document, perhaps by way of another."""
    found, ahead = set(), [README]
    while ahead:
        path = ahead.pop()
        found.add(path)
        targets = {(path.parent / unquote(target).partition("#")[0]).resolve() for target in documents.links(path)}
        ahead += [target for target in targets & set(PAGES) if target not in found]
    assert set(PAGES) - found == set()


def test_no_document_names_this_machine():
    """No document holds the path of the checkout that it was written in."""
    for path in DOCUMENTS:
        assert str(ROOT) not in path.read_text(), path.name
