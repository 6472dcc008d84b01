"""Results of benchmarks/gpu.py as a table for people, as one for benchmarks/README.md, and as charts in SVG.

A chart needs nothing but itself and follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from job.report.charts import axis, thinned  # noqa: E402

NAMES = {
    "plain": "TRL + PEFT + bitsandbytes",
    "tutorial": "Unsloth's tutorial",
    "collator-free": "the same without its collator",
    "job": "finetune-job",
}
"""In the order in which they are shown."""
COLUMNS = ("", "tokens/s", "job is faster by", "GPU busy", "MFU", "peak GiB", "first step cold / warm, s")
WIDE, LEFT, RIGHT, ABOVE, BELOW = 720, 210, 90, 30, 28
BAR, GAP = 22, 10
CURVES_HIGH, CURVES_LEFT = 260, 56
LETTER = 6.5
"""About the width of one in a legend."""
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; } .soft { fill: #57606a; font-size: 12px; }
.grid { stroke: #d0d7de; } .job { --c: #0969da; } .tutorial { --c: #bc4c00; } .collator-free { --c: #8250df; }
.plain { --c: #57606a; } rect { fill: var(--c); } polyline { fill: none; stroke: var(--c); stroke-width: 1.8; }
polyline.job { stroke-width: 4; opacity: 0.45; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .soft { fill: #9198a1; } .grid { stroke: #3d444d; }
  .job { --c: #4493f8; } .tutorial { --c: #f0883e; } .collator-free { --c: #ab7df8; } .plain { --c: #9198a1; }
}
"""


def cells(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each side that was measured, under COLUMNS."""
    found = []
    for side, name in NAMES.items():
        one = result.get("speed", {}).get(side, {})
        if "tokens_per_second" not in one:
            continue
        starts = one["first_step_seconds"]
        times = result["ratios"].get(side)
        found.append(
            (
                name,
                f"{one['tokens_per_second']:,.0f}",
                f"{times:.2f} x" if times else "",
                share(one["gpu_busy_share"]),
                share(one["model_flops_utilisation"], 1),
                f"{one['memory_peak_bytes'] / 2**30:.1f}",
                " / ".join(f"{starts[key]:.0f}" if key in starts else "-" for key in ("cold", "warm")),
            )
        )
    return found


def share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The parts besides speed, and how well the losses agree."""
    found = []
    adapter = {side: one for side, one in result.get("adapter", {}).items() if one.get("seconds")}
    if len(adapter) == 2:
        ours, theirs = adapter["job"], adapter["tutorial"]
        found.append(
            f"{ours['rows']:,} rows x {ours['epochs']} epochs from process start to adapter ({ours['caches']} caches): "
            f"{ours['seconds']:.0f} s, the tutorial {theirs['seconds']:.0f} s."
        )
    large = {side: one for side, one in result.get("batch32", {}).items() if "tokens_per_second" in one}
    if large:
        each = ", ".join(f"{NAMES[side]} {one['tokens_per_second']:,.0f}" for side, one in large.items())
        found.append(f"Tokens/s with batches of 32: {each}.")
    tight = result.get("tight", {})
    if tight:
        each = ", ".join(f"{NAMES[side]} {one['largest_micro_batch']}" for side, one in tight.items())
        by_itself = tight.get("job", {}).get("by_itself")
        own = f"; finetune-job takes {by_itself['largest_micro_batch']} by itself" if by_itself else ""
        limit, tokens = next((one["limit_gib"], one["row_tokens"]) for one in tight.values())
        found.append(f"Largest micro-batch of {tokens:,}-token rows in {limit} GiB: {each}{own}.")
    if squeezed := result.get("squeezed"):
        found.append(
            f"With all but {squeezed['limit_gib']} GiB taken away before step {squeezed['from_step']} the job cuts its "
            f"passes smaller {len(squeezed['cuts'])} times; its losses differ by {squeezed['largest']:.2%} "
            "at most."
        )
    agree = result.get("agreement", {})
    if agree:
        each = ", ".join(f"{NAMES[side]} {off['first']:.3%} / {off['largest']:.2%}" for side, off in agree.items())
        found.append(f"Losses differ from the job's at the first step / at most by: {each}.")
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The table of benchmarks/README.md, with what it was measured on."""
    measured = cells(result)
    rows = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *measured] if measured else []
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    head = f"Llama shape of {result['size'].upper()} on {result['card']} (torch {result['versions']['torch']}, "
    head += f"Unsloth {result['versions'].get('unsloth')}; {result['date']}):"
    return "\n".join([head, "", *lines, "", *sentences(result), ""])


def show(result: Mapping[str, Any]) -> None:
    """The same for a terminal."""
    if importlib.util.find_spec("rich") is None:
        print(markdown(result))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"{result['size']} on {result['card']}, torch {result['versions']['torch']}")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in cells(result):
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    console.print("\n".join([*sentences(result), *result.get("skipped", ())]))


def draw(results: Sequence[Mapping[str, Any]], docs: Path) -> str:
    """Write the charts, and return the text for benchmarks/README.md."""
    measured = [result for result in results if len(cells(result)) > 1]
    docs.mkdir(exist_ok=True, parents=True)
    text = []
    (docs / "gpu-speed.svg").write_text(bars(measured))
    text.append("![Steady tokens a second of the four sides](../docs/gpu-speed.svg)\n")
    for result in measured:
        name = f"gpu-losses-{result['size']}.svg"
        (docs / name).write_text(curves(result))
        text += [markdown(result), f"![Losses of the four sides by optimizer step](../docs/{name})\n"]
    text += [markdown(result) for result in results if result not in measured]
    return "\n".join(text)


def bars(results: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second of every side, one group for each result; each group has a scale of its own."""
    parts, y = [], 0.0
    for result in results:
        speed = {
            side: result["speed"][side]["tokens_per_second"]
            for side in NAMES
            if "tokens_per_second" in result["speed"].get(side, {})
        }
        scale = axis(list(speed.values()), from_zero=True)
        parts.append(f'<text x="0" y="{y + 18:.0f}">{result["size"].upper()}, tokens/s</text>')
        y += ABOVE
        for side, value in speed.items():
            width = (WIDE - LEFT - RIGHT) * scale.share(value)
            middle = y + BAR / 2 + 5
            parts += [
                f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">{html.escape(NAMES[side])}</text>',
                f'<rect class="{side}" x="{LEFT}" y="{y:.0f}" width="{width:.1f}" height="{BAR}" rx="2"/>',
                f'<text x="{LEFT + width + 6:.1f}" y="{middle:.0f}">{value:,.0f}</text>',
            ]
            y += BAR + GAP
        y += GAP
    return svg(parts, y, "Steady tokens a second of the four sides")


def curves(result: Mapping[str, Any]) -> str:
    """The loss of each side by optimizer step."""
    sides = {side: result["speed"][side]["losses"] for side in NAMES if result["speed"].get(side, {}).get("losses")}
    y_axis = axis([loss for losses in sides.values() for loss in losses])
    x_axis = axis([1, *(len(losses) for losses in sides.values())], from_zero=True)
    bottom = CURVES_HIGH - BELOW

    def place(step: float, loss: float) -> tuple[float, float]:
        x = CURVES_LEFT + (WIDE - CURVES_LEFT - 20) * x_axis.share(step)
        return x, ABOVE + (bottom - ABOVE) * (1 - y_axis.share(loss))

    parts = []
    for tick in y_axis.ticks:
        _, y = place(0, tick)
        parts += [
            f'<line class="grid" x1="{CURVES_LEFT}" x2="{WIDE - 20}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="soft" x="{CURVES_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    for tick in x_axis.ticks:
        x, _ = place(tick, y_axis.low)
        parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    x = 8.0
    for side, losses in sides.items():
        points = thinned([(step, loss) for step, loss in enumerate(losses, 1)])
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        parts += [
            f'<polyline class="{side}" points="{path}"/>',
            f'<rect class="{side}" x="{x:.0f}" y="6" width="12" height="12" rx="2"/>',
            f'<text class="soft" x="{x + 16:.0f}" y="16">{html.escape(NAMES[side])}</text>',
        ]
        x += 30 + LETTER * len(NAMES[side])
    return svg(parts, CURVES_HIGH, f"Loss by optimizer step, {result['size'].upper()}")


def svg(parts: Sequence[str], high: float, label: str) -> str:
    """A whole file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high:.0f}" role="img"'
    return "\n".join([f'{head} aria-label="{html.escape(label)}">', f"<style>{STYLE}</style>", *parts, "</svg>", ""])
