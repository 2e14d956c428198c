"""A check's report: text on the terminal, JSON, or one self-contained HTML page."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import MAX_SHOWN

MAX_ON_PAGE = 200  # items of a list: each has a player


class Finding(str):
    """A line of a report about a clip, which the page plays. path: of the file; start and length of the clip in seconds"""

    path: str
    start_sec: float
    length_sec: float | None

    @classmethod
    def of(cls, text: str, path: str, start_sec: float | None, length_sec: float | None) -> Finding:
        finding = cls(text)
        finding.path, finding.start_sec, finding.length_sec = path, start_sec or 0.0, length_sec
        return finding


@dataclass
class Report:
    """Figures and findings; every rendering shows the same.

    figures: numbers, texts, or dictionaries of them, by name
    """

    figures: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # training would fail
    notices: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # worth a look
    histograms: dict[str, dict[str, float]] = field(default_factory=dict)  # of the page
    speakers: list[dict[str, Any]] = field(default_factory=list)  # of the page, a row each, the largest first

    @property
    def trainable(self) -> bool:
        return not any(self.problems.values())

    @property
    def verdict(self) -> str:
        return "training on this works" if self.trainable else "training on this would fail"

    def table(self) -> list[tuple[str, str]]:
        """(name, value) of each figure, as text."""
        return [(name, shown(value)) for name, value in self.figures.items()]

    def lists(self) -> Iterator[tuple[bool, str, list[str]]]:
        """(whether it is a problem, title with count, items) of each finding."""
        for is_problem, lists in ((True, self.problems), (False, self.notices)):
            yield from ((is_problem, f"{title}: {len(items)}", items) for title, items in lists.items() if items)


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items()) or "none"
    if isinstance(value, float) and value != round(value):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def render_text(report: Report) -> str:
    width = max(len(name) for name in report.figures)
    lines = [f"{name:{width}}  {value}" for name, value in report.table()]
    for is_problem, title, items in report.lists():
        more = [f"  ... and {len(items) - MAX_SHOWN} more"] * (len(items) > MAX_SHOWN)
        lines += ["", f"{'! ' if is_problem else ''}{title}", *(f"  {item}" for item in items[:MAX_SHOWN]), *more]
    return "\n".join([*lines, "", report.verdict])


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;vertical-align:top;text-align:left;font-weight:400}
td:first-child,th{color:#666}.bars td:first-child{white-space:nowrap}h1{font-size:1.5rem;overflow-wrap:anywhere}
.problem summary{color:#b00020}.verdict{font-weight:600}h2{font-size:1rem;margin-top:2rem}
i{display:inline-block;height:.7em;background:#47a}audio{height:1.8rem}li{overflow-wrap:anywhere}"""


def render_html(report: Report, name: str) -> str:
    escape = html.escape
    charts = "".join(bars(title, counts) for title, counts in report.histograms.items())
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in report.table())
    lists = "".join(
        f"<details{' class=problem open' if is_problem else ''}><summary>{escape(title)}</summary>"
        f"<ul>{''.join(f'<li>{escape(item)}{player(item)}</li>' for item in items[:MAX_ON_PAGE])}{more(items)}</ul></details>"
        for is_problem, title, items in report.lists()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(name)}</title><style>{STYLE}</style><h1>{escape(name)}</h1><p class="verdict">{report.verdict}</p>'
        f"<table>{rows}</table>{speaker_table(report.speakers)}{charts}<h2>what was found</h2>{lists or 'nothing'}</html>\n"
    )


def more(items: Sequence[str]) -> str:
    left = len(items) - MAX_ON_PAGE
    return f"<li>... and {left} more, which a report in .json has</li>" if left > 0 else ""


def player(item: str) -> str:
    """A player of the clip that a finding is about; waveforms only."""
    if not isinstance(item, Finding) or not item.path or item.path.endswith((".npy", ".safetensors")):
        return ""
    stop = f",{item.start_sec + item.length_sec:g}" if item.length_sec else ""
    source = Path(item.path).absolute().as_uri() + (f"#t={item.start_sec:g}{stop}" if item.start_sec or stop else "")
    return f'<br><audio controls preload="none" src="{html.escape(source)}"></audio>'


def speaker_table(speakers: Sequence[dict[str, Any]]) -> str:
    if not speakers:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in speakers[0])
    cells = ("".join(f"<td>{html.escape(shown(value))}</td>" for value in row.values()) for row in speakers)
    return f"<h2>speakers</h2><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def bars(title: str, counts: dict[str, float]) -> str:
    """A histogram as bars."""
    if not counts:
        return ""
    most = max(counts.values()) or 1
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td><i style="width:{160 * count / most:.0f}px"></i> {shown(count)}</td></tr>'
        for name, count in counts.items()
    )
    return f"<h2>{html.escape(title)}</h2><table class=bars>{rows}</table>"


def histogram(values: Sequence[float], edges: Sequence[float], unit: str) -> dict[str, float]:
    """How many values are between each two edges, by name; nothing without values."""
    if not len(values):
        return {}
    counts, _ = np.histogram(values, [*edges, math.inf])
    names = [f"{a:g} to {b:g} {unit}" for a, b in itertools.pairwise(edges)] + [f"over {edges[-1]:g} {unit}"]
    return dict(zip(names, counts.tolist()))


def render_json(report: Report, name: str) -> str:
    found = {kind: {k: v for k, v in getattr(report, kind).items() if v} for kind in ("problems", "notices")}
    content = {"manifest": name, "trainable": report.trainable, "figures": report.figures, **found}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


RENDERERS: dict[str, Callable[[Report, str], str]] = {".html": render_html, ".json": render_json}
