"""Read a whole dataset, audio included, and say what is there and what is wrong with it, before a GPU is spent.

    python -m tools.prepare check train.jsonl --base_ckpt folder --max_tokens 8192 --world_size 8 --report report.html

Exit status 0: training on it works; 1: it would end with an error, all of which are listed; 2: there is nothing to check.
Tokens need the checkpoint's tokenizer, so they are only counted with --base_ckpt. The time an epoch takes is only given with a
speed: --tokens_per_sec, or --like with the output folder of a run.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import html
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

import checkpoint
import data
from audio import FRAME_RATE_HZ, MAX_CUT_OFF, AudioStore, open_audio, read_codes, read_codes_shape, span
from collate import create_collator
from forms import open_manifest
from manifest import AudioPart, DataError, Manifest, MissingAudioError, Record

CLIPPED = 0.999  # an absolute sample value from here on counts as clipped
MAX_CLIPPED_SHARE = 0.001
SILENT = 10 ** (-60 / 20)  # a block of 20 ms whose largest value stays below -60 dB counts as silent
MAX_SILENT_SHARE = 0.5
OUTLIER = 6.0  # robust deviations (of the log of characters per second) from the median
LONG_SEC = 60.0  # a clip longer than this is rarely what one wants the model to say at once
SHOWN = 20  # items of a list in the table; the JSON report has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="a dataset in one of the forms of forms.py")
    parser.add_argument("--report", type=Path, help="also write the whole report: .html, .json or .md")
    parser.add_argument("--missing_audio", choices=("error", "skip"), default="error", help="as in train.py")
    parser.add_argument("--no_audio", action="store_true", help="check the records only, open no audio")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that read audio")
    parser.add_argument("--base_ckpt", default="", help="checkpoint folder, or on the Hub: counts tokens with its tokenizer")
    parser.add_argument("--base_revision", default="")
    parser.add_argument("--max_tokens", type=int, default=0, help="as in train.py, like the next three")
    parser.add_argument("--long", choices=("error", "skip", "crop"), default="error")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--grad_accum", type=int, default=1)
    parser.add_argument("--world_size", type=int, default=1, help="GPUs the epoch is divided among")
    parser.add_argument("--tokens_per_sec", type=float, default=0.0, help="speed to reckon the epoch's time with")
    parser.add_argument("--like", type=Path, help="take the speed from this run's metrics.jsonl")


@dataclass
class Report:
    """Named figures, and lists of what was noticed; every rendering shows the same."""

    figures: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # training would fail
    notices: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # worth a look

    @property
    def trainable(self) -> bool:
        return not any(self.problems.values())


def run(args: argparse.Namespace) -> int:
    if args.report and args.report.suffix not in RENDERERS:
        raise DataError(f"--report {args.report}: choose a name that ends in {', '.join(RENDERERS)}")
    if args.max_tokens and not args.base_ckpt:
        raise DataError("--max_tokens needs --base_ckpt: tokens are counted with the checkpoint's tokenizer")
    manifest, conversion = open_manifest(args.manifest, tolerant=True)
    report = Report()
    if conversion:
        report.figures["form"] = f"{conversion.form}, read as ChatML"
        report.problems["broken records"] += conversion.problems
        report.notices["repaired"] = [f"{count} x {what}" for what, count in conversion.repairs.most_common()]
    records = read_records(manifest, report, args.missing_audio == "skip")
    folder = find_checkpoint(args)
    config = checkpoint.read_base_config(folder) if folder else None
    clips = {} if args.no_audio else inspect_clips(records, report, config, args.num_workers)
    records = [record for record in records if args.no_audio or all(key_of(part) in clips for part in record.audio)]
    describe(records, clips, report)
    if folder and records:
        describe_tokens(records, clips, report, config, checkpoint.load_tokenizer(folder), args)
    print(render_text(report))
    if args.report:
        content = RENDERERS[args.report.suffix](report, f"{args.manifest}")
        checkpoint.write_whole(args.report, lambda file: file.write(content.encode()))
    return 0 if report.trainable and records else 1


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    if not args.base_ckpt:
        return None
    revision = args.base_revision or (checkpoint.BASE_REVISION if args.base_ckpt == checkpoint.BASE_CKPT else None)
    return checkpoint.find_base(args.base_ckpt, revision)


def read_records(manifest: Manifest, report: Report, skip_missing: bool) -> list[Record]:
    """The valid records; what is wrong with the others goes to the report."""
    records = []
    for index in range(len(manifest)):
        try:
            records.append(manifest[index])
        except MissingAudioError as error:
            if skip_missing:
                report.notices["left out, their audio is missing"].append(str(error))
            else:
                report.problems["missing audio"].append(str(error))
        except DataError as error:
            report.problems["broken records"].append(str(error))
    report.figures["records"] = f"{len(records):,} of {len(manifest):,}"
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Audio


@dataclass(frozen=True)
class Clip:
    """What was found in a clip."""

    sec: float
    rate_hz: int  # 0: ready-made codes
    digest: str  # of its content
    clipped_share: float = 0.0
    silent_share: float = 0.0


def key_of(part: AudioPart) -> tuple:
    source = part.path if part.path is not None else hashlib.sha256(part.raw_audio).hexdigest()
    return source, part.offset_sec, part.duration_sec


def inspect_clips(records: Sequence[Record], report: Report, config: Any, num_workers: int) -> dict[tuple, Clip]:
    """Open every clip once; those that cannot be read go to the report, and their records are left out afterwards.

    config: the checkpoint's, whose codebooks ready-made codes have to fit; None if it is not known
    """
    parts: dict[tuple, tuple[AudioPart, str]] = {}
    for record in records:
        for part in record.audio:
            parts.setdefault(key_of(part), (part, record.source))
    codebooks = (config.audio_num_codebooks, config.audio_codebook_size) if config else None
    inspect = functools.partial(inspect_clip, codebooks=codebooks)
    clips = {}
    with ProcessPoolExecutor(max(1, num_workers)) as pool:
        found = pool.map(inspect, parts.values(), chunksize=8)
        for key, clip in zip(parts, tqdm(found, total=len(parts), desc="audio", unit="clip")):
            if isinstance(clip, Clip):
                clips[key] = clip
            else:
                report.problems["unreadable audio"].append(clip)
    return clips


def inspect_clip(item: tuple[AudioPart, str], codebooks: tuple[int, int] | None) -> Clip | str:
    """A clip's figures, or what is wrong with it. Waveforms are read in blocks, so that ten hours need no more memory.

    codebooks: the checkpoint's (number, size), or None
    """
    part, source = item
    try:
        return inspect_codes(part, source, codebooks) if part.holds_codes else inspect_waveform(part, source)
    except DataError as error:
        return str(error)


def inspect_codes(part: AudioPart, source: str, codebooks: tuple[int, int] | None) -> Clip:
    place = f"{source}: {part.field}"
    shape = read_codes_shape(part.path, place)
    if codebooks:
        read_codes(part.path, *codebooks, place)
    elif len(shape) != 2:
        raise DataError(f"{place}: {part.path} holds an array {shape}; expected [codebooks, frames]")
    start, stop = span(part, FRAME_RATE_HZ, shape[1])
    if stop <= start:
        raise DataError(f"{place}: no frames left of {shape[1]} in {part.path} after offset and duration")
    return Clip((stop - start) / FRAME_RATE_HZ, 0, hashlib.sha256(part.path.read_bytes()).hexdigest())


def inspect_waveform(part: AudioPart, source: str) -> Clip:
    place = f"{source}: {part.field}: {part.path or 'raw_audio'}"
    digest, num_samples, num_clipped, num_silent, num_blocks = hashlib.sha256(), 0, 0, 0, 0
    try:
        with open_audio(part) as file:
            rate, (start, stop) = file.samplerate, span(part, file.samplerate, len(file))
            block_size = max(1, rate // 50)  # 20 ms
            file.seek(start)
            while num_samples < stop - start:
                wanted = min(stop - start - num_samples, 500 * block_size)
                samples = file.read(wanted, dtype="float32", always_2d=True)
                if not len(samples):
                    break
                if not np.isfinite(samples).all():
                    raise DataError(f"{place} holds samples that are no finite numbers")
                digest.update(samples.tobytes())
                samples = np.abs(samples).max(axis=1)
                loudest = np.maximum.reduceat(samples, np.arange(0, len(samples), block_size))
                num_samples, num_clipped = num_samples + len(samples), num_clipped + int((samples >= CLIPPED).sum())
                num_silent, num_blocks = num_silent + int((loudest < SILENT).sum()), num_blocks + len(loudest)
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError) as error:
        raise DataError(f"{place} is not readable audio: {error}") from None
    if num_samples < (1 - MAX_CUT_OFF) * (stop - start):
        raise DataError(f"{place} is cut off: {num_samples / rate:.2f} s of {(stop - start) / rate:.2f} s are there")
    if num_samples < rate / FRAME_RATE_HZ:
        raise DataError(f"{place}: {num_samples / rate:.3f} s of audio is less than one frame")
    return Clip(num_samples / rate, rate, digest.hexdigest(), num_clipped / num_samples, num_silent / num_blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def describe(records: Sequence[Record], clips: dict[tuple, Clip], report: Report) -> None:
    figures, notices = report.figures, report.notices
    speakers = Counter(record.chatml.speaker for record in records if record.chatml.speaker is not None)
    figures["speakers"] = f"{len(speakers):,}" + (
        f", {min(speakers.values()):,} to {max(speakers.values()):,} records each" if speakers else ""
    )
    figures["turns"] = spread([len(record.chatml.messages) for record in records])
    found = [[(part, clips[key_of(part)]) for part in record.audio if key_of(part) in clips] for record in records]
    spoken = [[clip for part, clip in pairs if part.is_output] for pairs in found]
    if not clips:
        return
    figures["hours spoken by the assistant"] = f"{sum(clip.sec for own in spoken for clip in own) / 3600:.2f}"
    figures["hours of different audio"] = f"{sum({clip.digest: clip.sec for clip in clips.values()}.values()) / 3600:.2f}"
    figures["seconds of a clip"] = spread([clip.sec for clip in clips.values()])
    figures["frames of a clip"] = spread([math.ceil(clip.sec * FRAME_RATE_HZ) for clip in clips.values()])
    rates = Counter(f"{clip.rate_hz:,} Hz" if clip.rate_hz else "codes" for clip in clips.values())
    figures["clips by sample rate"] = ", ".join(f"{rate}: {count:,}" for rate, count in rates.most_common())
    for (path, *_), clip in clips.items():
        name = f"{path}" if isinstance(path, Path) else "raw_audio"
        if clip.clipped_share > MAX_CLIPPED_SHARE:
            notices["clipped"].append(f"{name}: {clip.clipped_share:.1%} of its samples")
        if clip.silent_share > MAX_SILENT_SHARE:
            notices["mostly silent"].append(f"{name}: {clip.silent_share:.0%} below -60 dB")
        if clip.sec > LONG_SEC:
            notices[f"longer than {LONG_SEC:.0f} s"].append(f"{name}: {clip.sec:,.0f} s")
    notices["duplicates"] += find_duplicates(records, found)
    notices["text and duration do not fit"] += find_outliers(records, found)


def spread(values: Sequence[float]) -> str:
    if not len(values):
        return "none"
    middle, high, most = np.quantile(values, [0.5, 0.95, 1.0])
    return f"median {middle:,.4g}, 95 % below {high:,.4g}, longest {most:,.4g}"


def find_duplicates(records: Sequence[Record], found: Sequence[Sequence[tuple[AudioPart, Clip]]]) -> list[str]:
    """Records whose last clip is, by content, that of an earlier record with the same turns' texts."""
    first: dict[tuple, str] = {}
    duplicates = []
    for record, pairs in zip(records, found):
        key = (*(clip.digest for _, clip in pairs), *texts_of(record))
        if first.setdefault(key, record.source) != record.source:
            duplicates.append(f"{record.source}: the same as {first[key]}")
    return duplicates


def texts_of(record: Record) -> Iterator[str]:
    for turn in record.chatml.messages:
        for part in turn.content if isinstance(turn.content, list) else [turn.content]:
            if isinstance(part, str) or part.type == "text":
                yield part if isinstance(part, str) else part.text


def find_outliers(records: Sequence[Record], found: Sequence[Sequence[tuple[AudioPart, Clip]]]) -> list[str]:
    """Records whose last text is said far faster or slower than the others'."""
    speeds: dict[int, float] = {}
    for index, (record, pairs) in enumerate(zip(records, found)):
        turns = record.chatml.messages
        *_, said = ["", *texts_of(Record(type(record.chatml)(turns[:-1]), [], ""))]
        if pairs and pairs[-1][0].is_output and said.strip():
            speeds[index] = math.log(len(said.strip()) / pairs[-1][1].sec)
    if len(speeds) < 10:
        return []
    middle = statistics.median(speeds.values())
    deviation = 1.4826 * statistics.median(abs(speed - middle) for speed in speeds.values()) or 0.05
    odd = {index: speed for index, speed in speeds.items() if abs(speed - middle) > OUTLIER * max(deviation, 0.05)}
    return [
        f"{records[index].source}: {math.exp(speed):.1f} characters per second, usual are {math.exp(middle):.1f}"
        for index, speed in sorted(odd.items(), key=lambda item: -abs(item[1] - middle))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and steps


class KnownFrames(AudioStore):
    """Lengths of clips from what was found in them: nothing has to be encoded to know them."""

    def __init__(self, config: Any, clips: dict[tuple, Clip]):
        self.num_codebooks = config.audio_num_codebooks
        self.clips = clips

    def num_frames(self, part: AudioPart, source: str) -> int:
        return math.ceil(self.clips[key_of(part)].sec * FRAME_RATE_HZ - 1e-6) if self.clips else 0


def describe_tokens(
    records: list[Record], clips: dict[tuple, Clip], report: Report, config: Any, tokenizer: Any, args: argparse.Namespace
) -> None:
    collator = create_collator(config, strict=True)
    dataset = data.ChatMLDataset(records, tokenizer, KnownFrames(config, clips))
    report.figures["text tokens of a record"] = spread([len(dataset.ids(record)[0]) for record in records])
    if not clips and any(record.audio for record in records):
        return
    lengths, _ = data.measure_lengths(dataset, collator)
    report.figures["positions of a record"] = spread(lengths)
    batching = data.Batching(args.batch_size, args.max_tokens, lengths)
    if args.max_tokens:
        long = np.flatnonzero(lengths > args.max_tokens)
        listed = [f"{records[i].source}: {lengths[i]} positions" for i in long]
        (report.problems if args.long == "error" else report.notices)[f"longer than --max_tokens {args.max_tokens}"] += listed
        kept = lengths[lengths <= args.max_tokens]
        batching = data.Batching(args.batch_size, args.max_tokens, kept)
        lengths = kept
    if not len(lengths):
        return
    order, bounds = data.plan_micro_batches(data.epoch_order([len(lengths)], [1.0], 0, 0), batching, (0, 0))
    steps = math.ceil((len(bounds) - 1) / (args.world_size * args.grad_accum))
    report.figures["steps of an epoch"] = f"{steps:,} on {args.world_size} GPU(s), {len(order) / steps:.1f} samples each"
    speed = args.tokens_per_sec or (speed_of(args.like) if args.like else 0.0)
    if speed:
        hours = lengths.sum() / speed / 3600
        report.figures["time of an epoch"] = f"{hours:.2f} h at {speed:,.0f} tokens per second"


def speed_of(output_dir: Path) -> float:
    """Median tokens per second of a run."""
    try:
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        return statistics.median(line["tokens_per_sec"] for line in lines if line["split"] == "train")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--like {output_dir}: no speed to be read from its metrics.jsonl: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def sections(report: Report, limit: int | None) -> Iterator[tuple[str, str, list[str]]]:
    """(severity, title, items) of each list; with a limit its rest is only counted."""
    for severity, lists in (("problem", report.problems), ("notice", report.notices)):
        for title, items in lists.items():
            if items:
                more = [f"... and {len(items) - limit} more"] if limit and len(items) > limit else []
                yield severity, f"{title}: {len(items)}", [*items[:limit], *more]


def verdict(report: Report) -> str:
    return "training on this works" if report.trainable else "training on this would fail"


def render_text(report: Report) -> str:
    width = max(map(len, report.figures))
    lines = [f"{name:{width}}  {value}" for name, value in report.figures.items()]
    for severity, title, items in sections(report, SHOWN):
        lines += ["", f"{'! ' if severity == 'problem' else ''}{title}", *(f"  {item}" for item in items)]
    return "\n".join([*lines, "", verdict(report)])


def render_markdown(report: Report, name: str) -> str:
    lines = [f"# {name}", "", f"**{verdict(report)}**", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in report.figures.items()]
    for severity, title, items in sections(report, None):
        lines += ["", f"## {'Problem: ' if severity == 'problem' else ''}{title}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td{padding:.2rem 1rem .2rem 0;vertical-align:top}td:first-child{color:#666}
.problem summary{color:#b00020}.verdict{font-weight:600}li{overflow-wrap:anywhere}"""


def render_html(report: Report, name: str) -> str:
    escape: Callable[[Any], str] = functools.partial(html.escape, quote=True)
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in report.figures.items())
    lists = "".join(
        f'<details class="{severity}"{" open" if severity == "problem" else ""}><summary>{escape(title)}</summary>'
        f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul></details>"
        for severity, title, items in sections(report, None)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(name)}</title><style>{STYLE}</style><h1>{escape(name)}</h1><p class="verdict">{verdict(report)}</p>'
        f"<table>{rows}</table>{lists}</html>\n"
    )


def render_json(report: Report, name: str) -> str:
    lists = {"problems": dict(report.problems), "notices": dict(report.notices)}
    content = {"manifest": name, "trainable": report.trainable, "figures": report.figures, **lists}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


RENDERERS: dict[str, Callable[[Report, str], str]] = {".html": render_html, ".json": render_json, ".md": render_markdown}
