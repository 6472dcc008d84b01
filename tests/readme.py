"""The generated parts of the documents: tables from the code, and the index of the messages. `make readme` writes them.

A test compares. Between `<!-- name: written by make readme -->` and `<!-- end -->` nothing is written by hand.
"""

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from job.commands import variables
from job.observability import prometheus
from job.runtime.errors import KINDS, JobError
from tests import documents
from tests.jobs import ROOT

WIDTH = 120


def exit_codes(_: str) -> str:
    """The table of exit codes, from the error classes."""
    rows = [(0, "complete", "`done.json` exists", "ends at once")]
    rows += [(kind.exit_code, kind.kind, kind.meaning, _again(kind)) for kind in (*KINDS, JobError)]
    lines = [f"| {code} | {kind} | {meaning} | {again} |" for code, kind, meaning, again in rows]
    return "\n".join(["| code | kind | when | started again |", "|---|---|---|---|", *lines]) + "\n"


def _again(kind: type[JobError]) -> str:
    return "resumes" if kind.retry else "ends the same way until something is changed"


def settings(_: str) -> str:
    """The table of all variables."""
    return variables.render("markdown")


def metrics(_: str) -> str:
    """The table of the gauges that Prometheus finds."""
    found = {
        prometheus.name(event, field): text
        for event, fields in prometheus.EVENTS.items()
        for field, text in fields.items()
    }
    found[prometheus.COMMITTED] = "When the newest checkpoint was committed."
    return (
        "\n".join(["| gauge | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in found.items())])
        + "\n"
    )


def index(text: str) -> str:
    """Links to the entries of the troubleshooting page: by exit code, by event, by symptom."""
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    lines = ["| exit code | entries |", "|---|---|"]
    lines += [
        f"| {_link(title)} | {', '.join(_entries(text, title))} |" for title in titles if title.startswith("Exit")
    ]
    events = sorted(_entries(text, documents.WARNINGS))
    symptoms = _entries(text, documents.SYMPTOMS)
    named = {"By event": events, "Without a message": symptoms}
    for name, links in named.items():
        lines += [
            "",
            *textwrap.wrap(f"**{name}**: {', '.join(links)}", WIDTH, break_long_words=False, break_on_hyphens=False),
        ]
    return "\n".join(lines) + "\n"


def _entries(text: str, title: str) -> list[str]:
    return [_link(entry) for entry in re.findall(r"^### (.+)$", documents.section(text, title), re.MULTILINE)]


def _link(title: str) -> str:
    return f"[{title}](#{documents.anchor(title)})"


GENERATED: Mapping[Path, Mapping[str, Callable[[str], str]]] = {
    ROOT / "README.md": {"exit codes": exit_codes},
    ROOT / "docs/configuration.md": {"variables": settings},
    ROOT / "docs/monitoring.md": {"metrics": metrics},
    ROOT / "docs/troubleshooting.md": {"index": index},
}
"""What is generated in each document, by the name in its marker; each function is given the document's text."""


def rendered(path: Path) -> str:
    """A document with its generated parts as the code has them now."""
    text = path.read_text()
    for name, generate in GENERATED[path].items():
        pattern = rf"(<!-- {name}: written by make readme -->\n).*?(<!-- end -->)"
        new = generate(text)
        text, found = re.subn(pattern, lambda m, new=new: m[1] + new + m[2], text, flags=re.DOTALL)
        assert found == 1, (path.name, name)
    return text


if __name__ == "__main__":
    for document in GENERATED:
        document.write_text(rendered(document))
