"""One self-contained HTML page about a run, for listening: samples side by side, figures in words, curves, data, settings.

    bash launch.sh report runs/voice [--out report.html]

Reads what train.py leaves in the folder: config.json, metrics.jsonl and samples/ (each folder there with a results.jsonl,
from --sample_steps or `bash launch.sh generate --lines ... --out runs/voice/samples/NAME`).

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import DataError, read_json, write_text
from config import Config
from generate.files import read_results
from generate.pictures import as_url, figure
from prepare.manifest import Record, read_manifest, split_weights
from process.command import parser_of, says_errors
from process.monitor import read_lines
from tools import verdicts
from tools.verdicts import points, show

MAX_POINTS = 400  # of a curve; more are averaged
MAX_RECORDS_READ = 20_000  # of a manifest, for the data's summary
SMOOTHING = 0.05  # share of a training curve's points averaged around each; the raw curve stays visible behind

# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder."""

    folder: Path
    settings: dict
    lines: dict[str, list[dict]]  # of metrics.jsonl, by split
    samples: list[Path]  # folders with a results.jsonl: by step, then by name

    def series(self, split: str, name: str, index: int | None = None) -> tuple[list[float], list[float]]:
        """(steps, values) of a figure, where it is a number; or of item `index` of a list."""
        return points(self.lines.get(split, []), name, index)


def read_run(folder: Path) -> Run:
    """raises: DataError if this is not the folder of a run"""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: not the output folder of a run: it has no config.json")
    try:
        settings, lines = read_json(folder / "config.json"), read_lines(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not the output folder of a run: {error}") from None
    samples = [path.parent for path in (folder / "samples").glob("*/results.jsonl")]
    return Run(folder, settings, lines, sorted(samples, key=_step_then_name))


def _step_then_name(folder: Path) -> tuple:
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return (0, int(match[1])) if match else (1, folder.name)


# ---------------------------------------------------------------------------------------------------------------------
# Curves

SPLITS = {"train": "training", "val": "validation", "sample": "samples"}
# (title, figure, splits it is measured on, kind of axis)
CHARTS = (
    ("Loss (nats)", "loss", ("train", "val"), "loss"),
    ("Text loss", "text_loss", ("train", "val"), "loss"),
    ("Audio loss", "audio_loss", ("train", "val"), "loss"),
    ("End-of-speech loss", "eos_loss", ("train", "val"), "loss"),
    ("Audio loss by codebook", "codebook_losses", (), "loss"),
    ("Voice-consistency loss", "consistency_loss", ("train", "val"), "loss"),
    ("Text accuracy", "text_accuracy", ("train", "val"), "share"),
    ("Audio accuracy", "audio_accuracy", ("train", "val"), "share"),
    ("Accuracy by codebook", "codebook_accuracies", (), "share"),
    ("Samples that end by themselves", "stop_rate", ("sample",), "share"),
    ("Samples stuck in a loop or in silence", "runaway_rate", ("sample",), "share"),
    ("Length of samples against their targets", "duration_ratio", ("sample",), ""),
    ("Codes of samples that match", "code_match", ("sample",), "share"),
    ("Word error rate of samples", "word_error_rate", ("sample",), ""),
    ("Speaker similarity of samples", "speaker_similarity", ("sample",), ""),
    ("Drift from the base, other voices (nats)", "drift", ("val",), ""),
    ("Gradient norm", "grad_norm", ("train",), ""),
    ("Learning rate", "lr", ("train",), ""),
    ("Tokens per second", "tokens_per_sec", ("train",), ""),
    ("Copy share", "copy_share", ("val",), "share"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 46, 18, 8, 22  # of a chart, in SVG units of about a pixel


@dataclass(frozen=True)
class Curve:
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: bool = False


@dataclass(frozen=True)
class Scale:
    """Values to SVG units."""

    low: float  # of a logarithmic scale, its log10
    high: float
    start: float  # where `low` is drawn
    stop: float
    least: float = 0.0  # above 0: a logarithmic scale, on which smaller values are drawn here

    def __call__(self, value: float) -> float:
        value = math.log10(max(value, self.least)) if self.least else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return _round_numbers(10**self.low, 10**self.high, True) if self.least else _round_numbers(self.low, self.high)


def charts(run: Run) -> str:
    """Every figure that has at least one point."""
    found = []
    for title, name, splits, kind in CHARTS:
        if splits:
            labels = [SPLITS[split] if len(splits) > 1 else "" for split in splits]
            curves = [Curve(label, *run.series(s, name), smooth=s == "train") for label, s in zip(labels, splits)]
        else:  # a list, a value for each codebook
            split = "val" if any(line.get(name) for line in run.lines.get("val", [])) else "train"
            count = max((len(line.get(name) or ()) for line in run.lines.get(split, [])), default=0)
            curves = [Curve(str(k), *run.series(split, name, k), smooth=split == "train") for k in range(count)]
            title += f", {SPLITS[split]}"
        found.append(chart(title, curves, kind))
    return "".join(found)


def chart(title: str, curves: Sequence[Curve], kind: str = "") -> str:
    """Curves over steps as inline SVG; "" if none has a point.

    kind: "share" has an axis from 0 to 1; "loss" a log scale if its values span decades
    """
    curves = [curve for curve in curves if len(curve.values)]
    if not curves:
        return ""
    x, y = _scales(curves, kind)
    lines = "".join(_draw(curve, f"c{number % 8}", x, y) for number, curve in enumerate(curves))
    legend = "".join(f'<span class="c{n % 8}">{escape(c.label)}</span>' for n, c in enumerate(curves) if c.label)
    now = ", ".join(f"{curve.label} {show(curve.values[-1])}".strip() for curve in curves if len(curves) < 4)
    scale = " <small>log scale</small>" if y.least else ""
    axes = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{_axes(x, y)}'
    head = f"<figcaption><b>{escape(title)}</b>{scale}<span class=now>{escape(now)}</span></figcaption>"
    return f"<figure class=chart>{head}{axes}{lines}</svg><div class=legend>{legend}</div></figure>"


def _scales(curves: Sequence[Curve], kind: str) -> tuple[Scale, Scale]:
    """Of steps and of values."""
    steps, values = ([v for curve in curves for v in getattr(curve, name)] for name in ("steps", "values"))
    least = min((value for value in values if value > 0), default=math.inf)
    is_log = kind == "loss" and max(values) > 50 * least
    low, high = (math.log10(least), math.log10(max(values))) if is_log else (min(values), max(values))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = (0.0, 1.0) if kind == "share" else (low - margin, high + margin)
    x = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    return x, Scale(low, high, HEIGHT - BOTTOM, TOP, least if is_log else 0.0)


def _axes(x: Scale, y: Scale) -> str:
    """Horizontal lines with their values, and steps below."""
    rows = [(f"{y(tick):.1f}", f"{y(tick) + 4:.1f}", show(tick)) for tick in y.ticks()]
    return "".join(
        f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line}" y2="{line}"/>'
        f'<text x="{LEFT - 5}" y="{text}" text-anchor="end">{value}</text>'
        for line, text, value in rows
    ) + "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{int(tick):,}</text>'
        for tick in x.ticks()
        if tick == int(tick)
    )


def _draw(curve: Curve, colour: str, x: Scale, y: Scale) -> str:
    points = _thin(curve.steps, curve.values)
    if len(points) == 1:
        (step, value) = points[0]
        return f'<circle class="dot {colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
    if not curve.smooth or len(points) < 20:
        return _line(points, colour, x, y)
    reach = math.ceil(SMOOTHING * len(points) / 2)
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    smoothed = [(step, np.mean([value for _, value in window])) for (step, _), window in zip(points, windows)]
    return _line(points, f"{colour} raw", x, y) + _line(smoothed, colour, x, y)


def _line(points: Sequence[tuple[float, float]], classes: str, x: Scale, y: Scale) -> str:
    pairs = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline class="{classes}" points="{pairs}"/>'


def _thin(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means of equally many neighbours."""
    pieces = np.array_split(np.array([steps, values], float), min(MAX_POINTS, len(values)), axis=1)
    return [tuple(piece.mean(axis=1)) for piece in pieces]


def _round_numbers(low: float, high: float, is_log: bool = False) -> list[float]:
    """About five round numbers between two."""
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if len(decades) > 4 else (1, 2, 5)
        return [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [round(i * size, 12) for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def samples(run: Run, max_shown: int) -> str:
    """A card for each prompt: its text, and side by side the reference, the target, the base and each checkpoint, as time goes."""
    steps = [folder for folder in run.samples if folder.name.startswith("step_")]
    shown = choose(steps, max_shown)
    cards: dict[Any, list[tuple[Path, dict]]] = {}
    for folder in [*shown, *(folder for folder in run.samples if folder not in steps)]:  # these have prompts of their own
        for result in read_results(folder):
            prompt = result["name"] if folder in steps else (result["name"], result["text"])
            cards.setdefault(prompt, []).append((folder, result))
    note = f"<p class=lead>{len(shown)} of {len(steps)} samplings are shown.</p>" if len(shown) < len(steps) else ""
    return note + "".join(card(run, takes) for takes in cards.values())


def choose(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in sorted(set(chosen.tolist()))]


def card(run: Run, takes: Sequence[tuple[Path, dict]]) -> str:
    """One prompt. takes: (folder, line of results.jsonl), oldest first"""
    folder, newest = takes[-1]
    given = [(kind, newest[f"{kind}_wav"]) for kind in ("reference", "target") if f"{kind}_wav" in newest]
    players = [f"<div><h3>{kind}</h3>{player(run, folder / name)}</div>" for kind, name in given]
    players += [f"<div><h3>{title(folder)}</h3>{answer(run, folder, result)}</div>" for folder, result in takes]
    source = f"<footer>{escape(newest.get('source', ''))}</footer>"
    return f"<article><p class=text>{escape(newest['text'])}</p><div class=takes>{''.join(players)}</div>{source}</article>"


def title(folder: Path) -> str:
    return "step 0, the base" if folder.name == "step_0" else escape(folder.name.replace("_", " "))


def answer(run: Run, folder: Path, result: dict) -> str:
    """One sample: a player, its codes against their target, and the figures."""
    facts = [f"{result['frames']} frames" + (f" of {result['target_frames']}" if "target_frames" in result else "")]
    if "code_match" in result:
        facts.append(f"{result['code_match']:.0%} of codes match")
    facts.append("ended by itself" if result["stopped"] else "was cut off")
    if result.get("runaway"):
        facts.append(f"stuck: {result['runaway']}")
    if "heard" in result:
        facts.append(f"recognised as “{result['heard']}”: {result['word_errors']} of {result['words']} words wrong")
    if "speaker_similarity" in result:
        facts.append(f"voice {result['speaker_similarity']:.2f}")
    facts = facts if result["frames"] else ["nothing was generated"]
    kind = "facts" if result["stopped"] and not result.get("runaway") else "bad facts"
    sound = player(run, folder / result["wav"]) if "wav" in result else ""
    return f'{sound}{picture(run, folder, result)}<p class="{kind}">{escape(" · ".join(facts))}</p>'


def player(run: Run, path: Path) -> str:
    sound = base64.b64encode(read_inside(run, path)).decode()
    return f'<audio controls preload=metadata src="data:audio/wav;base64,{sound}"></audio>'


def picture(run: Run, folder: Path, result: dict) -> str:
    """The codes of the target and of the sample, and below where they differ."""
    for key in ("codes", "target_codes"):
        if key in result:
            read_inside(run, folder / result[key])
    image = figure(folder, result)
    if not image.shape[1]:
        return ""
    alt = "codes: target, sample, differences" if "target_codes" in result else "codes of the sample"
    return f'<img class=codes style="height:{image.shape[0] * 5}px" alt="{alt}" src="{as_url(image)}">'


def read_inside(run: Run, path: Path) -> bytes:
    """A file of the run; raises DataError for one that results.jsonl names outside of the run's folder."""
    if not path.resolve().is_relative_to(run.folder.resolve()):
        raise DataError(f"{path}: a sample's file outside {run.folder}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Figures in words, data, settings


def figures(run: Run) -> str:
    """A line for each figure that says something: its name, its value, and what that means."""
    return "".join(
        f"<li class={found.kind}><b>{escape(found.title)}</b> <b>{escape(found.value)}</b> {escape(found.text)}</li>"
        for found in verdicts.find(run.lines)
    )


def facts(run: Run) -> str:
    """The rest, in one line."""
    train, val = (run.lines.get(split, [{}])[-1] for split in ("train", "val"))
    seconds = sum(line.get("step_time_sec") or 0 for line in run.lines.get("train", []))
    peak = train.get("peak_memory_bytes")
    parts = {
        "steps": train.get("step"),
        "in training steps": _duration(seconds),
        "tokens per second": train.get("tokens_per_sec"),
        "peak memory": f"{peak / 2**30:.1f} GiB" if peak else None,
        "training loss": train.get("loss"),
        "validation audio loss": val.get("audio_loss"),
        "validation audio accuracy": f"{val['audio_accuracy']:.1%}" if val.get("audio_accuracy") is not None else None,
    }
    shown = ((name, value if isinstance(value, str) else show(value)) for name, value in parts.items() if value is not None)
    return "; ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in shown)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def data_summary(run: Run) -> str:
    """The contents of the manifests, where they still exist."""
    lines = []
    for flag in ("train_manifest", "val_manifest"):
        spec = run.settings.get(flag)
        for path, weight in split_weights(spec) if spec else []:
            name = f"{path}{f', weight {weight:g}' * (weight != 1)}"
            lines.append(f"<li><b>{flag.split('_')[0]}</b> {escape(name)}: {escape(_contents(path))}</li>")
    return f"<ul class=box>{''.join(lines) or '<li>no manifest is named</li>'}</ul>"


def _contents(path: Path) -> str:
    try:
        manifest = read_manifest(path)
        count = min(len(manifest), MAX_RECORDS_READ)
        records: list[Record] = [manifest[index] for index in range(count)]
    except DataError as error:
        return f"cannot be read now: {error}"
    kinds = Counter(str((record.chatml.misc or {}).get("kind", "")) for record in records)
    named = ", ".join(f"{kind} {number:,}" for kind, number in kinds.most_common(8) if kind)
    speakers = {record.chatml.speaker for record in records} - {None}
    first = f" (in the first {count:,})" if count < len(manifest) else ""
    found = f"{sum(len(record.audio) for record in records):,} clips, {len(speakers):,} speakers{first}"
    return f"{len(manifest):,} records, {found}" + f"; {named}" * bool(named)


def settings_tables(run: Run) -> str:
    """What was changed, and folded away what was not and what it ran with."""
    values = {name: value for name, value in run.settings.items() if not isinstance(value, dict)}
    for name, value in run.settings.items():
        values |= {f"{name}: {key}": item for key, item in value.items()} if isinstance(value, dict) else {}
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    rows = [(name, "" if value is None else str(value)) for name, value in values.items()]
    changed = [row for row in rows if row[0] in defaults and values[row[0]] != defaults[row[0]]]
    rest = table([row for row in rows if row not in changed], ("setting", "value"))
    return f"{table(changed, ('changed', 'value'))}<details><summary>the rest, as it is by default</summary>{rest}</details>"


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"


def escape(text: Any) -> str:
    return html.escape(str(text))


# ---------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { --ink: #1d2329; --soft: #5d6872; --line: #dfe3e8; --page: #f6f7f9; --card: #fff; color-scheme: light dark;
  --good: #1a7f37; --fair: #a06a00; --bad: #b3261e;
  --c0: #2563c9; --c1: #d9631e; --c2: #2b8a4b; --c3: #a2339b; --c4: #b08a00; --c5: #118a9e; --c6: #c0304f; --c7: #6a6f78 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --line: #343b43; --page: #15191d; --card: #1e2429;
  --good: #5ac26f; --fair: #dcb93f; --bad: #ff8a80;
  --c0: #6ea3f5; --c1: #f29a60; --c2: #66c285; --c3: #d684d0; --c4: #dcb93f; --c5: #54c2d4; --c6: #f07f97; --c7: #a7adb6 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem }
h3 { margin: .2rem 0 .3rem; font-size: .85rem; color: var(--soft); font-weight: 600 }
p { margin: .4rem 0 } small, footer, .facts, .lead { color: var(--soft); font-size: .85rem }
.takes, .charts { display: grid; gap: .8rem }
.takes { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.3rem), 1fr)); gap: .8rem .6rem; margin-top: .6rem } .takes > div { min-width: 0 }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.chart, article, .wide, .box { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem }
article { margin-bottom: .8rem } .box { list-style: none; margin: 0 } .box li { padding: .25rem 0 .25rem 1.5rem }
.box [class]::before { content: "●"; float: left; margin-left: -1.5rem; color: var(--bad) }
.box .good::before { color: var(--good) } .box .fair::before { color: var(--fair) } .bad.facts { color: var(--bad) }
nav, a { color: var(--soft) }
details { margin-top: .8rem } summary { cursor: pointer; color: var(--soft); margin-bottom: .5rem }
.chart { margin: 0 } figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline; font-size: .9rem }
.now { margin-left: auto; color: var(--soft); font-size: .8rem }
svg { display: block; width: 100%; height: auto; margin-top: .4rem } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.grid { stroke: var(--line) } polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round }
polyline.raw { stroke-width: 1; opacity: .3 } .dot { fill: currentColor }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem } .legend span::before { content: "— "; font-weight: 700 }
article .text { font-size: 1.05rem; white-space: pre-wrap; margin: 0 } article footer { margin-top: .8rem; font-size: .75rem }
audio { display: block; width: 100%; height: 2.4rem }
.codes { display: block; width: 100%; image-rendering: pixelated; margin: .5rem 0 .2rem; border-radius: .2rem }
.wide { overflow-x: auto; padding: 0 } table { border-collapse: collapse; width: 100%; font-size: .85rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem; border-bottom: 1px solid var(--line) }
td:first-child { white-space: nowrap; width: 12rem }
th { color: var(--soft); font-weight: 600; white-space: nowrap } tbody tr:last-child td { border-bottom: 0 }
@media (max-width: 30rem) { body { padding: 1rem .5rem } article { padding: .6rem } td { padding: .3rem .5rem } }
""" + "".join(f".c{n} {{ color: var(--c{n}) }}" for n in range(8))


def page(run: Run, max_shown: int = 6) -> str:
    """The whole page."""
    settings = run.settings
    device = f"{settings.get('world_size', '?')} rank(s) on {settings.get('device', '?')}"
    method = f"LoRA of rank {settings['lora_r']}" if settings.get("lora_r") else "full fine-tune"
    commit = f", commit {str(settings['git_commit'])[:10]}" if settings.get("git_commit") else ""
    lead = f"{method} of {settings.get('base_ckpt', '?')}, {device}{commit}"
    name = "/".join(run.folder.resolve().parts[-2:]).lstrip("/")
    legend = "Pictures show codes, a column for each frame: the target, the sample, and in red where they differ."
    heard = f"<h2 id=listen>Listen</h2><p class=lead>{legend}</p>{samples(run, max_shown)}" if run.samples else ""
    parts = [*["listen"] * bool(heard), "figures", "curves", "settings", "data"]
    nav = " · ".join(f'<a href="#{part}">{part}</a>' for part in parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title><style>{STYLE}</style></head><body>
<h1>{escape(name)}</h1><p class=lead>{escape(lead)}</p>
<nav>{nav}</nav>
{heard}
<h2 id=figures>What the figures say</h2><ul class=box>{figures(run)}</ul><p class=lead>{facts(run)}</p>
<h2 id=curves>Curves</h2><div class=charts>{charts(run)}</div>
<h2 id=settings>Settings</h2>{settings_tables(run)}
<h2 id=data>Data</h2>{data_summary(run)}
</body></html>
"""


@says_errors
def main(argv: Sequence[str]) -> int:
    parser = parser_of("report", __doc__)
    parser.add_argument("output_dir", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, help="default: report.html in that folder")
    parser.add_argument("--occasions", type=int, default=6, help="most samplings to show, the first and last included")
    args = parser.parse_args(argv)
    out = args.out or args.output_dir / "report.html"
    write_text(out, page(read_run(args.output_dir), max(1, args.occasions)))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
