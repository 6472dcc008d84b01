"""The README's generated tables. `make readme` writes them; a test compares."""

import re
from pathlib import Path

from job.commands import variables
from job.runtime.errors import KINDS, JobError

README = Path(__file__).resolve().parent.parent / "README.md"


def exit_codes() -> str:
    """The table of exit codes, from the error classes."""
    rows = [(0, "complete", "`done.json` exists", "ends at once")]
    rows += [(kind.exit_code, kind.kind, kind.meaning, _again(kind)) for kind in (*KINDS, JobError)]
    lines = [f"| {code} | {kind} | {meaning} | {again} |" for code, kind, meaning, again in rows]
    return "\n".join(["| code | kind | when | started again |", "|---|---|---|---|", *lines]) + "\n"


def _again(kind: type[JobError]) -> str:
    return "resumes" if kind.retry else "ends the same way until something is changed"


def rendered(text: str) -> str:
    """The README with its tables as the code has them now."""
    for name, table in {"variables": variables.render("markdown"), "exit codes": exit_codes()}.items():
        pattern = rf"(<!-- {name}: written by make readme -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, table=table: m[1] + table + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
