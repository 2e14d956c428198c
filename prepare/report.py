"""What a check found, as a table on the terminal, and as JSON, Markdown or a self-contained HTML page."""

from __future__ import annotations

import functools
import html
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SHOWN = 20  # items of a list on the terminal; the files have all


@dataclass
class Report:
    """Figures, and lists of what was noticed; every rendering shows the same.

    figures: numbers, texts, or dictionaries of them, by name
    """

    figures: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # training would fail
    notices: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # worth a look

    @property
    def trainable(self) -> bool:
        return not any(self.problems.values())


def table(report: Report) -> list[tuple[str, str]]:
    """(name, value) of each figure, as text."""
    return [(name, shown(value)) for name, value in report.figures.items()]


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items()) or "none"
    if isinstance(value, float) and value != round(value):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def sections(report: Report, limit: int | None = None) -> Iterator[tuple[bool, str, list[str]]]:
    """(whether it is a problem, title, items) of each list; with a limit its rest is only counted."""
    for is_problem, lists in ((True, report.problems), (False, report.notices)):
        for title, items in lists.items():
            if items:
                more = [f"... and {len(items) - limit} more"] if limit and len(items) > limit else []
                yield is_problem, f"{title}: {len(items)}", [*items[:limit], *more]


def verdict(report: Report) -> str:
    return "training on this works" if report.trainable else "training on this would fail"


def render_text(report: Report) -> str:
    rows = table(report)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    for is_problem, title, items in sections(report, SHOWN):
        lines += ["", f"{'! ' if is_problem else ''}{title}", *(f"  {item}" for item in items)]
    return "\n".join([*lines, "", verdict(report)])


def render_markdown(report: Report, name: str) -> str:
    def escape(text: str) -> str:
        return "".join(f"\\{c}" if c in r"\`*_[]<>|#&~" else c for c in " ".join(text.splitlines()))

    lines = [f"# {escape(name)}", "", f"**{verdict(report)}**", "", "| | |", "| --- | --- |"]
    lines += [f"| {escape(key)} | {escape(value)} |" for key, value in table(report)]
    for is_problem, title, items in sections(report):
        lines += ["", f"## {'Problem: ' if is_problem else ''}{escape(title)}", "", *(f"- {escape(item)}" for item in items)]
    return "\n".join(lines) + "\n"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td{padding:.2rem 1rem .2rem 0;vertical-align:top}td:first-child{color:#666}
.problem summary{color:#b00020}.verdict{font-weight:600}li{overflow-wrap:anywhere}"""


def render_html(report: Report, name: str) -> str:
    escape: Callable[[Any], str] = functools.partial(html.escape, quote=True)
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in table(report))
    lists = "".join(
        f"<details{' class=problem open' if is_problem else ''}><summary>{escape(title)}</summary>"
        f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul></details>"
        for is_problem, title, items in sections(report)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(name)}</title><style>{STYLE}</style><h1>{escape(name)}</h1><p class="verdict">{verdict(report)}</p>'
        f"<table>{rows}</table>{lists}</html>\n"
    )


def render_json(report: Report, name: str) -> str:
    lists = {
        "problems": {k: v for k, v in report.problems.items() if v},
        "notices": {k: v for k, v in report.notices.items() if v},
    }
    content = {"manifest": name, "trainable": report.trainable, "figures": report.figures, **lists}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


RENDERERS: dict[str, Callable[[Report, str], str]] = {".html": render_html, ".json": render_json, ".md": render_markdown}
