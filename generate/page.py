"""evaluation.html: the table, and every line with what each model made of it, worst first.

Sounds are referred to, not embedded: move the page together with its folder. Lines without sounds show their codes.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from generate.lines import Line
from generate.pictures import as_url, codes_figure

PIXELS_PER_FRAME = 12  # of codes, where they fit: the same for both takes

LEGEND = ". Codes are pictures: above the target, where there is one, then the take, below where they differ (red)"

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}h1{font-size:1.4rem}h2{font-size:1rem;margin:0}
th,td{padding:.2rem .8rem .2rem 0;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
th{white-space:normal;vertical-align:bottom;overflow-wrap:break-word}@media(max-width:32rem){table{font-size:.8rem}th,td{padding-right:.5rem}}
article{border-top:1px solid #ddd;padding:1rem 0}.takes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
h3{font-size:.85rem;font-weight:600;color:#666;margin:.3rem 0}.takes div{min-width:0}audio{width:100%}img{image-rendering:pixelated}
p{margin:.3rem 0}.facts,.note{color:#666;font-size:.85rem}.better{color:#1a7f37}.worse,.stuck{color:#b00020}"""


def render(about: dict, rows: Sequence[Sequence[str]], takes: Sequence[Sequence[dict]], lines: Sequence[Line], out: Path) -> str:
    """rows: the table's, the first of them a header; takes: of each model; lines: in the same order; out: the page's folder"""
    cells = [
        "".join(f"<{tag}{f' class={cell}' * (cell in ('better', 'worse'))}>{html.escape(cell)}</{tag}>" for cell in row)
        for row, tag in zip(rows, ["th", *["td"] * len(rows)])
    ]
    judged = "".join(f"; {name} {value}" for name, value in about["judged_by"].items())
    order = sorted(range(len(lines)), key=lambda i: badness(takes[0][i]), reverse=True)
    titles = rows[0][1 : 1 + len(takes)]
    cards = "".join(card(lines[i], [each[i] for each in takes], titles, out) for i in order)
    note = f"{' against '.join(about['models'])}: {about['num_lines']} lines of {about['lines']}{judged}; worst first"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Evaluation</title><style>{STYLE}</style><h1>Evaluation: {html.escape(' against '.join(titles))}</h1>"
        f'<p class="note">{html.escape(note)}{LEGEND * ("<img" in cards)}</p>'
        f"<div class=wide><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table></div>{cards}</html>\n"
    )


def short_names(names: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    try:
        short = [os.path.relpath(name, os.path.commonpath(names)) for name in names]
    except ValueError:  # some are absolute
        return list(names)
    return list(names) if "." in short else short


def badness(take: dict) -> tuple:
    """How bad a take is: wrong words first, then wrong codes, then what else there is."""
    wrong = 1 - take.get("code_match", 1)
    return take.get("wer", 0), wrong, take["is_runaway"], not take["stopped"], -take.get("sim_o", take.get("sim_r", 0))


def card(line: Line, takes: Sequence[dict], titles: Sequence[str], out: Path) -> str:
    target = target_codes(line)
    parts = [show_take(take, title, target, out) for take, title in zip(takes, titles)]
    references = [clip.path for clip in line.record([], line.chunks[0]).audio if clip.path and not clip.holds_codes]
    given = "".join(f"<div><h3>reference</h3>{player(path, out)}</div>" for path in references)
    text = html.escape(takes[0]["text"])
    return f"<article><h2>{html.escape(line.name)}</h2><p>{text}</p><div class=takes>{given}{''.join(parts)}</div></article>"


def show_take(take: dict, title: str, target: np.ndarray | None, out: Path) -> str:
    facts = [f"{take['frames']} frames" + (f" (target: {take['target_frames']})" if "target_frames" in take else "")]
    facts += [] if take["stopped"] or not take["frames"] else ["did not end by itself"]
    facts += [f"{take['word_errors']} of {take['words']} words wrong"] if "wer" in take else []
    facts += [f"{take['code_match']:.1%} of the codes right".replace("%", " %")] if "code_match" in take else []
    facts += [f"{name} {take[name]:.2f}" for name in ("sim_o", "sim_r") if name in take]
    unbroken = [fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts]
    stuck = f" <span class=stuck>stuck: {take['runaway']}</span>" * take["is_runaway"]
    heard = f"<p>“{html.escape(take['transcript'])}”</p>" if take.get("transcript") else ""
    sound = player(Path(take["wav"]), out) if "wav" in take else picture(take, target)
    return f"<div><h3>{html.escape(title)}</h3>{sound}{heard}<p class=facts>{html.escape(' · '.join(unbroken))}{stuck}</p></div>"


def player(path: Path, out: Path) -> str:
    source = quote(Path(os.path.relpath(path, out)).as_posix())
    return f'<audio controls preload=none src="{source}"></audio>'


def picture(take: dict, target: np.ndarray | None) -> str:
    """The codes of a take, with its target above and where they differ (red) below."""
    if not take["frames"]:
        return "<p>nothing was generated</p>"
    image = codes_figure(np.load(take["codes"], allow_pickle=False), target)
    alt = "codes" if target is None else "codes: target, take, differences"
    size = f"height:{image.shape[0] * 5}px;width:min(100%,{image.shape[1] * PIXELS_PER_FRAME}px)"
    return f'<img alt="{alt}" style="{size}" src="{as_url(image)}">'


def target_codes(line: Line) -> np.ndarray | None:
    """The record's own answer, if it is whole files of codes."""
    if not line.target or any(part.path is None or part.path.suffix != ".npy" or part.offset_sec for part in line.target):
        return None
    return np.concatenate([np.load(part.path, allow_pickle=False) for part in line.target], axis=1)
