"""What a Markdown document of this project holds: headings, links, code blocks with the mark before them, quotes."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import ROOT

DOCUMENTS = (
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
OTHERS = ("benchmarks/README.md", "helm/finetune-job/README.md", "k8s/README.md")
PAGES = (*DOCUMENTS, *(ROOT / name for name in OTHERS))
"""All that people read: also what is kept beside the code that it is about."""
WARNINGS = "Warnings in the log"
SYMPTOMS = "Symptoms without a message of the job"
"""Sections of the troubleshooting page."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (needs|tested): (.+?) -->\s*\Z")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block, and the comment right before it."""

    where: str
    language: str
    text: str
    mark: str
    """`needs`, `tested`, or empty."""
    value: str
    """What it needs, or the file that runs it."""


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = path.read_text()
    found = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text[: match.start()])
        where = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        kind, value = mark.groups() if mark else ("", "")
        found.append(Block(where=where, language=match[1], text=match[2], mark=kind, value=value))
    return found


def every_block(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for path in PAGES for block in blocks(path) if block.language in languages]


def prose(path: Path) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def links(path: Path) -> list[str]:
    """The targets of all links and pictures, code spans left out."""
    return _LINK.findall(_SPAN.sub("code", prose(path)))


def anchors(path: Path) -> set[str]:
    """The fragments that a link into the document may name."""
    return {anchor(title) for title in re.findall(r"^#{1,6} (.+)$", prose(path), re.MULTILINE)}


def anchor(title: str) -> str:
    """The fragment of a heading, by GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def spans(text: str) -> list[str]:
    """The code spans of a piece of Markdown."""
    return [content.strip() if len(ticks) > 1 else content for ticks, content in _SPAN.findall(text)]


def quotes(text: str) -> list[str]:
    """The code spans of all block quotes: messages as a user pastes them."""
    return [span for line in text.splitlines() if line.startswith(">") for span in spans(line)]


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level; empty if there is none."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""
