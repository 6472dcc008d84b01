"""What `python -m job check` found, in words for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from job.inputs.data_files import LeftOut, by_reason
from job.report.page import shown_bytes, unread_names

Facts = Mapping[str, Any]
VERDICTS = {"fits": "green", "tight": "yellow", "does not fit": "red"}
LEFT_OUT = 5
"""Files left out for one reason that are named."""
UNREAD = 12
"""Columns and keys without effect that are named."""
WIDTH = 110
"""Where the output is not a terminal."""


def show(facts: Facts, stdout: TextIO) -> None:
    """Print the summary; `facts` as `job.commands.check` gives them to programs."""
    console = Console(file=stdout, highlight=False, soft_wrap=True, width=None if stdout.isatty() else WIDTH)
    for part in (_data, _unread, _estimate, _findings, _problems):
        part(facts, console)
    if facts["report"]:
        console.print(f"Report: {escape(facts['report'])}")
    begins = "The run is finished, and nothing would be done." if facts["finished"] else "A run would begin."
    verdict = f"[green]{begins}[/]" if facts["ok"] else f"[red]A run would end with {facts['exit_code']}.[/]"
    console.print(f"{verdict} Checked in {facts['seconds']:.1f} s.")


def _data(facts: Facts, console: Console) -> None:
    if facts["run_id"]:
        console.print(f"[bold]Run {escape(facts['run_id'])}[/]")
    if model := facts["model"]:
        console.print(
            f"model       {escape(model['name'])}: {model['architecture']}, {model['parameters']:,} parameters"
        )
    for file in facts["files"]:
        side = ", for evaluation" if file["held_out"] else ""
        console.print(f"data        {escape(file['name'])}: {file['rows']:,} rows, {file['format'] or 'empty'}{side}")
    for reason, names in by_reason(LeftOut(**one) for one in facts["left_out_files"]).items():
        more = f" and {len(names) - LEFT_OUT:,} more" if len(names) > LEFT_OUT else ""
        console.print(f"[yellow]left out[/]    {escape(', '.join(names[:LEFT_OUT]) + more)}: {escape(reason)}")
    if (train := facts["train"]) is None:
        return
    lengths = facts["lengths"]
    learned = train["labelled_tokens"] / max(train["tokens"], 1)
    console.print(
        f"training    {train['rows']:,} rows, {train['sequences']:,} sequences, {train['tokens']:,} tokens, "
        f"{learned:.1%} of them learned; template {escape(facts['chat_template'])}"
    )
    console.print(f"evaluation  {escape(_held_out(facts))}")
    console.print(
        f"lengths     half up to {lengths['p50']:,} tokens, 99 % up to {lengths['p99']:,}, longest "
        f"{lengths['longest']:,}; TUNE_MAX_LENGTH={lengths['limit']}"
    )
    for note in facts["tokenizer_notes"]:
        console.print(f"[yellow]tokenizer[/]   {escape(note)}")


def _unread(facts: Facts, console: Console) -> None:
    """Columns and keys that have no effect: what a person may have meant to be read."""
    names = [f"{name} ({count:,})" for name, count in unread_names(facts["files"]).items()]
    if names:
        more = f" and {len(names) - UNREAD:,} more" if len(names) > UNREAD else ""
        console.print(f"not read    {escape(', '.join(names[:UNREAD]) + more)}: in so many rows, without effect")


def _held_out(facts: Facts) -> str:
    if (found := facts["evaluation"]) is None:
        return facts["eval_note"] or "none"
    return f"{found['rows']:,} rows" if found["sequences"] else f"none: nothing is left of {found['rows']:,} rows"


def _estimate(facts: Facts, console: Console) -> None:
    if (found := facts["estimate"]) is None:
        return
    console.print(
        f"estimate    {found['steps']:,} steps of {found['micro_batch']} x {found['gradient_accumulation']} sequences, "
        f"{found['epochs']:.3g} epochs, {found['tokens']:,} tokens"
    )
    if not found["memory"]:
        return
    total = found["alternatives"][found["checkpointing"]]
    console.print(
        f"            {shown_bytes(total)} on a GPU with {found['micro_batch_tokens']:,} tokens in a micro-batch "
        f"(TUNE_GRADIENT_CHECKPOINTING={found['checkpointing']}); an estimate, not a measurement"
    )
    table = Table.grid(padding=(0, 3))
    for fit in found["fits"]:
        table.add_row("           ", fit["card"], f"[{VERDICTS[fit['verdict']]}]{fit['verdict']}[/]")
    console.print(table)


def _findings(facts: Facts, console: Console) -> None:
    for finding in facts["findings"]:
        places = f" First: {', '.join(finding['first'])}." if finding["first"] else ""
        console.print(
            f"[yellow]finding[/]     {escape(finding['message'] + places)}\n            {escape(finding['remedy'])}"
        )


def _problems(facts: Facts, console: Console) -> None:
    for problem in facts["problems"]:
        console.print(f"[bold red]{escape(problem['check'])}[/] ({problem['kind']}, {problem['exit_code']})")
        console.print(escape("\n".join([problem["message"], *problem.get("problems", []), problem["remedy"]]).strip()))
