"""What the program can say: every error, row problem and log event in its source, read without running it.

A message's variable parts become `HOLE`, so that a document may quote it with an ellipsis in their place.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import ROOT

HOLE = "\0"
ELLIPSIS = "…"
_FIELD = re.compile(r"\{it\.[^}]*\}")
"""What a row of the table of causes fills in."""
LEAST_WORDS = 7
"""Constant characters that a quote must have to say which message it is."""
PROGRAM = sorted(path for path in (ROOT / "job").rglob("*.py"))
NOT_A_RUN = ("demo.py", "demo_view.py", "local_s3.py")
"""Modules of `make demo`, which stands in front of its user."""
LEVELS = ("warning", "error", "critical", "exception")


@dataclass(frozen=True, kw_only=True)
class Said:
    """One place in the source that says something."""

    where: str
    name: str
    """The error's class, the list that a problem is added to, or the level of a log event."""
    text: str
    """With holes; empty where it is put together elsewhere."""


def error_classes() -> dict[str, set[str]]:
    """The classes of errors in the program, and the names that each inherits from."""
    found = {}
    for path in PROGRAM:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    return {name: bases for name, bases in found.items() if name.endswith("Error")}


def job_errors() -> set[str]:
    """JobError and all classes below it."""
    below, classes = {"JobError"}, error_classes()
    while more := {name for name, bases in classes.items() if bases & below} - below:
        below |= more
    return below


def errors() -> Iterator[Said]:
    """Every place where a run makes an error, or notes a problem that becomes part of one."""
    classes = error_classes()
    for path, node in _calls():
        name = _called(node)
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        if name in ("Cause", "SystemCause"):
            yield Said(where=where, name=name, text=_FIELD.sub(HOLE, template(words["says"])))
        elif name == "RowError":
            yield Said(where=where, name=name, text=template(words["reason"]))
        elif name == "Row" and "problem" in words:
            yield Said(where=where, name=name, text=template(words["problem"]))
        elif name in classes or (name == "ValueError" and path.name == "env.py"):
            yield Said(where=where, name=name, text=template(node.args[0]) if node.args else "")
        elif (
            name == "append"
            and path.name in ("env.py", "config.py", "roles.py")
            and isinstance(node.args[0], ast.JoinedStr)
        ):
            yield Said(where=where, name=name, text=template(node.args[0]))


def events() -> Iterator[Said]:
    """Every log event at the level of a warning or above."""
    for path, node in _calls():
        if _called(node) in LEVELS and node.args and isinstance(node.func, ast.Attribute):
            yield Said(where=f"{path.relative_to(ROOT)}:{node.lineno}", name=_called(node), text=template(node.args[0]))


def all_events() -> set[str]:
    """The names of all log events, of every level."""
    levels = (*LEVELS, "info", "debug")
    return {template(node.args[0]) for _, node in _calls() if _called(node) in levels and node.args}


def texts() -> set[str]:
    """Every string in the program, with holes, docstrings left out."""
    found = set()
    for path in (ROOT / "job").rglob("*.py"):
        tree = ast.parse(path.read_text())
        plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) not in plain and (isinstance(node, ast.JoinedStr) or _is_text(node)):
                found.add(template(node))
    return found


def template(node: ast.AST) -> str:
    """A string expression with a hole for each variable part; empty for any other expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or HOLE) + (template(node.right) or HOLE)
    return ""


def says(quote: str, text: str) -> bool:
    """Whether a quote, with ellipses for what varies, is how a text of the source begins."""
    parts = [part for part in quote.split(ELLIPSIS) if part]
    if sum(len(part.strip()) for part in parts) < LEAST_WORDS:
        return False
    pattern = ".*".join(re.escape(part) for part in parts)
    return re.match(("" if quote.startswith(parts[0]) else ".*") + pattern, text, re.DOTALL) is not None


def _calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in PROGRAM:
        if path.name not in NOT_A_RUN:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path, node


def _called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
