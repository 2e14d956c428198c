"""One self-contained HTML page about a run: figures, curves, what was said (to hear and to see), data, settings.

    python -m tools.report runs/voice [--out report.html]

Everything comes from what train.py leaves in the folder: config.json, metrics.jsonl and samples/ (each folder there with a
results.jsonl, from --sample_steps or `python -m generate --lines ... --out runs/voice/samples/NAME`).

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import DataError, write_whole
from metrics import figure, read_results, sounds
from prepare.manifest import Record, read_manifest, split_weights

MAX_POINTS = 400  # of a curve; more are averaged
MAX_RECORDS_READ = 20_000  # of a manifest, for the data's summary
SMOOTHING = 0.05  # of a training curve's points are averaged around each; the points stay visible behind

# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    settings: dict
    lines: dict[str, list[dict]]  # of metrics.jsonl, by split
    samples: list[Path]  # folders with a results.jsonl: by step, then others by name

    def series(self, split: str, name: str, index: int | None = None) -> tuple[list[float], list[float]]:
        """(steps, values) of a figure, where it is a number; `index` of a list."""
        points = []
        for line in self.lines.get(split, []):
            value = line.get(name)
            if index is not None and isinstance(value, list):
                value = value[index]
            if isinstance(value, (int, float)):
                points.append((line["step"], value))
        return [step for step, _ in points], [value for _, value in points]


def read_run(folder: Path) -> Run:
    """raises: DataError if this is not the folder of a run"""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        texts = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not the output folder of a run: {error}") from None
    lines: dict[str, list[dict]] = {}
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.setdefault(line["split"], []).append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(texts):  # the last line may be cut off, by a crash or because the run goes on
                raise DataError(f"{folder / 'metrics.jsonl'} line {number}: not an object with `split` and `step`") from None
    samples = [path.parent for path in (folder / "samples").glob("*/results.jsonl")]
    return Run(folder, settings, lines, sorted(samples, key=_step_then_name))


def _step_then_name(folder: Path) -> tuple:
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return (0, int(match[1])) if match else (1, folder.name)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class Curve:
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: bool = False


def charts(run: Run) -> str:
    """Every figure that has at least one point, training and evaluation in one chart."""

    def both(title: str, name: str, kind: str = "") -> str:
        train = Curve("training", *run.series("train", name), smooth=True)
        return chart(title, [train, Curve("validation", *run.series("val", name))], kind)

    def alone(title: str, name: str, split: str = "train", kind: str = "") -> str:
        return chart(title, [Curve("", *run.series(split, name), smooth=split == "train")], kind)

    def codebooks(title: str, name: str, kind: str = "") -> str:
        split = "val" if any(line.get(name) for line in run.lines.get("val", [])) else "train"
        count = max((len(line.get(name) or ()) for line in run.lines.get(split, [])), default=0)
        curves = [Curve(str(k), *run.series(split, name, k), smooth=split == "train") for k in range(count)]
        return chart(f"{title} by codebook, {'validation' if split == 'val' else 'training'}", curves, kind)

    return "".join(
        [
            both("Loss (nats)", "loss", "loss"),
            both("Text loss", "text_loss", "loss"),
            both("Audio loss", "audio_loss", "loss"),
            both("End-of-speech loss", "eos_loss", "loss"),
            codebooks("Audio loss", "codebook_losses", "loss"),
            both("Voice-consistency loss", "consistency_loss", "loss"),
            both("Text accuracy", "text_accuracy", "share"),
            both("Audio accuracy", "audio_accuracy", "share"),
            codebooks("Accuracy", "codebook_accuracies", "share"),
            alone("Samples that end by themselves", "stop_rate", "sample", "share"),
            alone("Length of samples against their targets", "duration_ratio", "sample"),
            alone("Codes of samples that match", "code_match", "sample", "share"),
            alone("Word error rate of samples", "word_error_rate", "sample"),
            alone("Speaker similarity of samples", "speaker_similarity", "sample"),
            alone("Gradient norm", "grad_norm"),
            alone("Learning rate", "lr"),
            alone("Tokens per second", "tokens_per_sec"),
            alone("Copy share", "copy_share", "val", "share"),
        ]
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 46, 18, 8, 22  # of a chart, in SVG units of about a pixel


def chart(title: str, curves: Sequence[Curve], kind: str = "") -> str:
    """Curves over steps as inline SVG; "" if none has a point.

    kind: "share" for values from 0 to 1, all of which is drawn; "loss" for those drawn on a log scale if they span decades
    """
    curves = [curve for curve in curves if len(curve.values)]
    if not curves:
        return ""
    values = [value for curve in curves for value in curve.values]
    steps = [step for curve in curves for step in curve.steps]
    least = min((value for value in values if value > 0), default=math.inf)
    is_log = kind == "loss" and max(values) > 50 * least
    low, high = (math.log10(least), math.log10(max(values))) if is_log else (min(values), max(values))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = (0.0, 1.0) if kind == "share" else (low - margin, high + margin)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        value = math.log10(max(value, least)) if is_log else value  # 0 stands at the bottom
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(low, high, is_log, y), _step_axis(first, last, x)]
    for number, curve in enumerate(curves):
        parts.append(_draw(curve, f"c{number % 8}", x, y))
    legend = "".join(f'<span class="c{n % 8}">{escape(c.label)}</span>' for n, c in enumerate(curves) if c.label)
    now = ", ".join(f"{curve.label} {show(curve.values[-1])}".strip() for curve in curves if len(curves) < 4)
    scale = " <small>log scale</small>" if is_log else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    head = f"<figcaption><b>{escape(title)}</b>{scale}<span class=now>{escape(now)}</span></figcaption>"
    return f"<figure class=chart>{head}{svg}<div class=legend>{legend}</div></figure>"


def _draw(curve: Curve, colour: str, x: Callable, y: Callable) -> str:
    points = _thin(curve.steps, curve.values)
    if len(points) == 1:
        (step, value) = points[0]
        return f'<circle class="dot {colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
    if not curve.smooth or len(points) < 20:
        return _line(points, colour, x, y)
    reach = math.ceil(SMOOTHING * len(points) / 2)
    values = [value for _, value in points]
    means = [np.mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    smoothed = [(step, mean) for (step, _), mean in zip(points, means)]
    return _line(points, f"{colour} raw", x, y) + _line(smoothed, colour, x, y)


def _line(points: Sequence[tuple[float, float]], classes: str, x: Callable, y: Callable) -> str:
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline class="{classes}" points="{places}"/>'


def _thin(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means of equally many neighbours."""
    pieces = np.array_split(np.arange(len(values)), min(MAX_POINTS, len(values)))
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    return [(steps[piece].mean(), values[piece].mean()) for piece in pieces]


def _grid(low: float, high: float, is_log: bool, y: Callable) -> str:
    """Horizontal lines with their values."""
    ticks = _round_numbers(10**low, 10**high, is_log) if is_log else _round_numbers(low, high)
    return "".join(
        f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{show(tick)}</text>'
        for tick in ticks
    )


def _step_axis(first: float, last: float, x: Callable) -> str:
    ticks = [tick for tick in _round_numbers(first, last) if tick == int(tick)]
    return "".join(f'<text x="{x(t):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{int(t):,}</text>' for t in ticks)


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
    """A card for each prompt: its text, reference, target and what was said, newest first."""
    shown = choose(run.samples, max_shown)
    note = f"<p>{len(shown)} of {len(run.samples)} occasions are shown.</p>" if len(shown) < len(run.samples) else ""
    cards: dict[tuple, list[tuple[str, Path, dict]]] = {}
    for folder in reversed(shown):
        for result in read_results(folder):
            key = (folder.name.startswith("step_") or folder.name, result["name"])  # other folders hold other prompts
            cards.setdefault(key, []).append((folder.name.replace("_", " "), folder, result))
    return note + "".join(card(run, occasions) for occasions in cards.values())


def choose(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in sorted(set(places.tolist()))]


def card(run: Run, occasions: Sequence[tuple[str, Path, dict]]) -> str:
    """One prompt. occasions: (title, folder, line of results.jsonl), newest first"""
    _, folder, newest = occasions[0]
    given = [(kind, name) for kind, name in sounds(newest) if kind != "said"]
    players = "".join(f"<div><h4>{kind}</h4>{player(run, folder / name)}</div>" for kind, name in given)
    said = "".join(f"<div><h4>{escape(title)}</h4>{answer(run, folder, result)}</div>" for title, folder, result in occasions)
    source = f"<footer>{escape(newest.get('source', ''))}</footer>"
    return f'<article><p class=text>{escape(newest["text"])}</p><div class="given">{players}</div>{said}{source}</article>'


def answer(run: Run, folder: Path, result: dict) -> str:
    """What was said on one occasion: a player, the codes against their target, and the figures."""
    facts = [f"{result['frames']} frames"]
    if "target_frames" in result:
        facts.append(f"target {result['target_frames']}")
        facts.append(f"{result['code_match']:.1%} of codes match")
    facts.append("ended by itself" if result["stopped"] else "was cut off")
    if "heard" in result:
        facts.append(f"heard as “{result['heard']}”: {result['word_errors']} of {result['words']} words wrong")
    if "speaker_similarity" in result:
        facts.append(f"voice {result['speaker_similarity']:.2f}")
    sound = player(run, folder / result["wav"]) if "wav" in result else ""
    return f"{sound}{picture(run, folder, result)}<p class=facts>{escape(' · '.join(facts))}</p>"


def player(run: Run, path: Path) -> str:
    return f'<audio controls preload=metadata src="{data_uri("audio/wav", read_inside(run, path))}"></audio>'


def picture(run: Run, folder: Path, result: dict) -> str:
    """The target's codes, the codes said, and below where they differ."""
    for key in ("codes", "target_codes"):
        if key in result:
            read_inside(run, folder / result[key])
    image = figure(folder, result)
    if not image.shape[1]:
        return ""
    alt = "codes: target, said, differences" if "target_codes" in result else "codes said"
    height = image.shape[0] * 5
    return f'<img class=codes style="height:{height}px" alt="{alt}" src="{data_uri("image/png", png(image))}">'


def read_inside(run: Run, path: Path) -> bytes:
    """A file of the run; what results.jsonl names elsewhere does not belong on the page."""
    if not path.resolve().is_relative_to(run.folder.resolve()):
        raise DataError(f"{path}: a sample's file outside {run.folder}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(image: np.ndarray) -> bytes:
    """[height, width, 3] uint8 -> a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # each row unfiltered
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------------------
# Figures, data, settings


def headline(run: Run) -> str:
    """The run's last figures, as tiles."""
    train, val, sample = (run.lines.get(split, [{}])[-1] for split in ("train", "val", "sample"))
    seconds = sum(line.get("step_time_sec") or 0 for line in run.lines.get("train", []))
    tiles = {
        "steps": train.get("step"),
        "training loss": train.get("loss"),
        "validation loss": val.get("loss"),
        "validation audio loss": val.get("audio_loss"),
        "validation audio accuracy": _percent(val.get("audio_accuracy")),
        "copy share": _percent(val.get("copy_share")),
        "samples end by themselves": _percent(sample.get("stop_rate")),
        "word error rate": _percent(sample.get("word_error_rate")),
        "speaker similarity": sample.get("speaker_similarity"),
        "tokens per second": train.get("tokens_per_sec"),
        "in training steps": _duration(seconds),
        "peak memory": f"{train['peak_memory_bytes'] / 2**30:.1f} GiB" if train.get("peak_memory_bytes") else None,
        "steps skipped": train.get("bad_steps") or None,
    }
    return "".join(
        f"<div><b>{escape(value if isinstance(value, str) else show(value))}</b>{escape(name)}</div>"
        for name, value in tiles.items()
        if value is not None
    )


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def data_summary(run: Run) -> str:
    """What the manifests hold, as far as they are still there."""
    rows = []
    for flag in ("train_manifest", "val_manifest"):
        spec = run.settings.get(flag)
        for path, weight in split_weights(spec) if spec else []:
            rows.append((flag.split("_")[0], str(path), f"{weight:g}", *_manifest_counts(path)))
    head = ("", "manifest", "weight", "records", "clips", "speakers", "kinds")
    return table(rows, head) if rows else "<p>No manifest is named.</p>"


def _manifest_counts(path: Path) -> tuple[str, str, str, str]:
    try:
        manifest = read_manifest(path)
        count = min(len(manifest), MAX_RECORDS_READ)
        records: list[Record] = [manifest[index] for index in range(count)]
    except DataError as error:
        return ("–", "–", "–", f"cannot be read now: {error}")
    more = f" in the first {count:,}" if count < len(manifest) else ""
    kinds = Counter(str((record.chatml.misc or {}).get("kind", "")) for record in records)
    named = ", ".join(f"{kind} {number:,}" for kind, number in kinds.most_common(8) if kind)
    speakers = {record.chatml.speaker for record in records} - {None}
    clips = sum(len(record.audio) for record in records)
    return (f"{len(manifest):,}", f"{clips:,}{more}", f"{len(speakers):,}{more}", named or "–")


def settings_table(run: Run) -> str:
    values = {name: value for name, value in run.settings.items() if not isinstance(value, dict)}
    for name, value in run.settings.items():
        if isinstance(value, dict):
            values |= {f"{name}: {key}": item for key, item in value.items()}
    return table([(name, "" if value is None else str(value)) for name, value in values.items()], ("setting", "value"))


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"


def show(value: float) -> str:
    """A number in few digits."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.3g}"


def escape(text: Any) -> str:
    return html.escape(str(text))


# ---------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { --ink: #1d2329; --soft: #5d6872; --line: #dfe3e8; --page: #f6f7f9; --card: #fff; color-scheme: light dark;
  --c0: #2563c9; --c1: #d9631e; --c2: #2b8a4b; --c3: #a2339b; --c4: #b08a00; --c5: #118a9e; --c6: #c0304f; --c7: #6a6f78 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --line: #343b43; --page: #15191d; --card: #1e2429;
  --c0: #6ea3f5; --c1: #f29a60; --c2: #66c285; --c3: #d684d0; --c4: #dcb93f; --c5: #54c2d4; --c6: #f07f97; --c7: #a7adb6 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem }
h4 { margin: .9rem 0 .3rem; font-size: .85rem; color: var(--soft); font-weight: 600 }
p { margin: .4rem 0 } small, footer, .facts, .lead { color: var(--soft); font-size: .85rem }
.tiles, .charts, .samples { display: grid; gap: .8rem }
.tiles { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); margin-top: 1.2rem }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)) }
.tiles > div, .chart, article, .wide { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem }
.tiles > div { color: var(--soft); font-size: .85rem } .tiles b { display: block; font-size: 1.25rem; color: var(--ink) }
.chart { margin: 0 } figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline; font-size: .9rem }
.now { margin-left: auto; color: var(--soft); font-size: .8rem }
svg { display: block; width: 100%; height: auto; margin-top: .4rem } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.grid { stroke: var(--line) } polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round }
polyline.raw { stroke-width: 1; opacity: .3 } .dot { fill: currentColor }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem } .legend span::before { content: "— "; font-weight: 700 }
article .text { font-size: 1.05rem; white-space: pre-wrap; margin: 0 } article footer { margin-top: .8rem; font-size: .75rem }
.given { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); gap: 0 .8rem }
audio { display: block; width: 100%; height: 2.4rem }
.codes { display: block; width: 100%; image-rendering: pixelated; margin: .5rem 0 .2rem; border-radius: .2rem }
.wide { overflow-x: auto; padding: 0 } table { border-collapse: collapse; width: 100%; font-size: .85rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem; border-bottom: 1px solid var(--line); min-width: 5rem }
td:first-child { white-space: nowrap } td:nth-child(2), td:last-child { min-width: 13rem }
th { color: var(--soft); font-weight: 600; white-space: nowrap } tbody tr:last-child td { border-bottom: 0 }
""" + "".join(f".c{n} {{ color: var(--c{n}) }}" for n in range(8))


def page(run: Run, max_shown: int = 4) -> str:
    """The whole page."""
    settings = run.settings
    device = f"{settings.get('world_size', '?')} rank(s) on {settings.get('device', '?')}"
    method = f"LoRA of rank {settings['lora_r']}" if settings.get("lora_r") else "full fine-tune"
    commit = f", commit {str(settings['git_commit'])[:10]}" if settings.get("git_commit") else ""
    lead = f"{method} of {settings.get('base_ckpt', '?')}, {device}{commit}"
    title = "/".join(run.folder.resolve().parts[-2:]).lstrip("/")
    heard = ""
    if run.samples:
        explained = "Pictures show codes, a column for a frame: the target, what was said, and in red where they differ."
        heard = f"<h2>Samples</h2><p class=lead>{explained}</p><div class=samples>{samples(run, max_shown)}</div>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p>
<div class=tiles>{headline(run)}</div>
<h2>Curves</h2><div class=charts>{charts(run)}</div>
{heard}
<h2>Data</h2>{data_summary(run)}
<h2>Settings</h2>{settings_table(run)}
</body></html>
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, help="default: report.html in that folder")
    parser.add_argument("--occasions", type=int, default=4, help="most sampling occasions to show, the first and last included")
    args = parser.parse_args(argv)
    try:
        content = page(read_run(args.output_dir), max(1, args.occasions)).encode()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or args.output_dir / "report.html"
    write_whole(out, lambda file: file.write(content))
    print(f"{out}: {len(content) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
