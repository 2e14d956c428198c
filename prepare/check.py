"""Read a whole dataset with its audio; list what is in it and what is wrong with it, before a GPU is used.

    bash launch.sh prepare check train.jsonl --base_ckpt folder --max_tokens 8192 --world_size 8 --report report.html

Exit status 0: training works; 1: training would end with an error, and all errors are listed; 2: nothing could be checked.
Tokens are counted by the checkpoint's tokenizer, given by --base_ckpt. The time of an epoch needs a speed as well:
--tokens_per_sec, or --like with the output folder of a run.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from boson_multimodal.data_types import TextContent

import data
from collate import ExtendedHiggsAudioSampleCollator, create_collator
from common import DataError, MissingAudioError, write_text
from config import Config
from export import pretrained
from prepare import prompts
from prepare.audio import AudioStore
from prepare.clips import Clip, Key, inspect_clips, key_of
from prepare.findings import odd_scripts, place, script_of, sound_faults, text_faults
from prepare.forms import open_manifest
from prepare.manifest import AudioPart, Manifest, Record, parts_of, scan, shown
from prepare.overlap import transcripts
from prepare.report import MAX_ON_PAGE, RENDERERS, Finding, Report, histogram, render_text
from prepare.rows import add_reading_arguments, reading_of
from prepare.trim import trim
from process.monitor import read_lines

OUTLIER = 6.0  # robust deviations (of the log of characters per second) from the median
PAST_END_SEC = 0.1  # spans may go beyond their file by this much: times are rounded
NUM_SPEAKERS = 10  # the largest are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="a dataset in any known form (docs/datasets.md)")
    parser.add_argument("--report", type=Path, help="also write the whole report: .html or .json")
    parser.add_argument("--trim", type=Path, metavar="FILE", help="write ChatML whose spans leave 0.2 s of silence at the ends")
    parser.add_argument("--transcripts", action="store_true", help="does each text fit its clip? by --base_ckpt or --asr_model")
    parser.add_argument("--asr_model", default="", help="with --transcripts: speech recognition model (transformers)")
    parser.add_argument("--codes_dir", type=Path, default=Path("codes"), help="with --transcripts: what prepare encode wrote")
    parser.add_argument("--audio_tokenizer", default=Config.audio_tokenizer, help="the codec of --codes_dir")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where these models run")
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
    parser.add_argument("--tokens_per_sec", type=float, default=0.0, help="speed of all GPUs together, for the epoch's time")
    parser.add_argument("--like", type=Path, help="take the speed from this run's metrics.jsonl")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    manifest, conversion = open_manifest(args.manifest, True, reading_of(args))
    folder = pretrained.find_base(args.base_ckpt, args.base_revision or None) if args.base_ckpt else None
    config = pretrained.read_base_config(folder) if folder else None
    speed = args.tokens_per_sec or (speed_of(args.like) if args.like else 0.0)
    report = Report()
    if conversion:
        report.figures["form"] = f"{conversion.form}, read as ChatML"
        report.problems["broken records"] += conversion.problems
        report.notices["how it was read"] += conversion.summary()
        report.notices["changed"] += [f"{count} x {what}" for what, count in conversion.repairs.most_common()]
        report.notices["left out, they have no text"] += conversion.skipped
    records = valid_records(manifest, report, args.missing_audio == "skip")
    clips: dict[Key, Clip] = {}
    if not args.no_audio:
        clips = inspect_clips(records, report, config, args.num_workers)
        records = records_with(records, clips, report)
        report.figures["records"]["with readable audio"] = len(records)
    describe_records(records, report, is_phrased=bool(conversion and conversion.examples))
    describe_clips(records, clips, report)
    if args.transcripts:
        describe_transcripts(records, clips, report, args)
    dataset, lengths = data.ChatMLDataset(records, None, None), None
    if config:
        dataset = data.ChatMLDataset(records, pretrained.load_tokenizer(folder), KnownFrames(config, clips))
        dataset, lengths = describe_lengths(dataset, create_collator(config), report, args)
    describe_epoch(dataset, lengths, report, args, speed)
    if args.trim:
        report.figures["trimmed"] = trim(records, clips, args.trim)
    print(render_text(report))
    if args.report:
        write_text(args.report, RENDERERS[args.report.suffix](report, f"{args.manifest}"))
    return 0 if report.trainable else 1


def check_arguments(args: argparse.Namespace) -> None:
    """raises: DataError, before any audio is read"""
    if args.report:
        if args.report.suffix not in RENDERERS:
            raise DataError(f"--report {args.report}: choose a name that ends in {', '.join(RENDERERS)}")
        try:
            args.report.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--report {args.report}: cannot be written: {error}") from None
    if min(args.batch_size, args.grad_accum, args.world_size, args.num_workers) < 1 or args.max_tokens < 0:
        names = "--batch_size, --grad_accum, --world_size and --num_workers"
        raise DataError(f"{names} are 1 or more, --max_tokens is not negative")
    if args.trim and args.trim.exists():
        raise DataError(f"--trim {args.trim}: it exists; choose another name")
    if args.no_audio and (args.trim or args.transcripts):
        raise DataError("--trim and --transcripts need the audio (no --no_audio)")
    if args.transcripts and not (args.base_ckpt or args.asr_model):
        raise DataError("--transcripts needs a model: --base_ckpt with one that has learnt to speak, or --asr_model")
    for name in ("max_tokens", "tokens_per_sec", "like"):
        if getattr(args, name) and (not args.base_ckpt or args.no_audio):
            raise DataError(f"--{name} needs --base_ckpt, whose tokenizer counts tokens, and the audio (no --no_audio)")


def speed_of(output_dir: Path) -> float:
    """Median tokens per second of a run."""
    try:
        lines = read_lines(output_dir / "metrics.jsonl").get("train", [])
        return statistics.median(line["tokens_per_sec"] for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--like {output_dir}: no speed to be read from its metrics.jsonl: {error}") from None


def valid_records(manifest: Manifest, report: Report, skip_missing: bool) -> Manifest:
    """The manifest without its broken records, which go to the report."""
    kept, errors = scan(manifest)
    for error in errors:
        if not isinstance(error, MissingAudioError):
            report.problems["broken records"].append(str(error))
        elif skip_missing:
            report.notices["left out, their audio is missing"].append(str(error))
        else:
            report.problems["missing audio"].append(str(error))
    report.figures["records"] = {"in the manifest": len(manifest), "valid": len(kept)}
    if not kept:
        report.problems["no record is left"].append(f"{manifest.path}: none of its records can be used")
    return kept


def records_with(records: Manifest, clips: dict[Key, Clip], report: Report) -> Manifest:
    """The records whose clips can all be read, with label audio as long as the clip beside it."""
    kept = np.ones(len(records), bool)
    for index, record in enumerate(records):
        kept[index] = all(key_of(part) in clips for part in record.clips())
        for part in record.audio if kept[index] else ():
            frames, label_frames = (clips[key_of(clip)].num_frames for clip in (part, part.label or part))
            if label_frames != frames:
                report.problems["label audio of another length"].append(
                    f"{record.source}: {part.field}: audio_label_url has {label_frames} frames, audio_url {frames}"
                )
                kept[index] = False
    return records.subset(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def describe_records(records: Manifest, report: Report, is_phrased: bool) -> None:
    """is_phrased: prompts and texts were made from rows here, as `generate` makes them"""
    turns, speakers = [], Counter()
    for record in records:  # in one pass: each record is parsed anew
        turns.append(len(record.chatml.messages))
        speakers[record.chatml.speaker] += 1
        if not is_phrased:
            describe_prompt(record, report)
    report.figures["records without a speaker"] = speakers.pop(None, 0)
    report.figures["speakers"] = len(speakers)
    report.figures["records of a speaker"] = spread(list(speakers.values()))
    report.figures["turns of a record"] = spread(turns)


def spread(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return {}
    middle, high, most = np.quantile(values, [0.5, 0.95, 1.0]).tolist()
    return {"median": middle, "p95": high, "max": most}


def describe_clips(records: Manifest, clips: dict[Key, Clip], report: Report) -> None:
    if not clips:
        return
    figures, notices = report.figures, report.notices
    figures["minutes of training audio"] = sum(clips[key_of(part)].sec for record in records for part in record.trained()) / 60
    figures["minutes of different audio"] = sum({clip.digest: clip.sec for clip in clips.values()}.values()) / 60
    figures["seconds of a clip"] = spread([clip.sec for clip in clips.values()])
    figures["frames of a clip"] = spread([clip.num_frames for clip in clips.values()])
    rates = Counter(f"{clip.rate_hz} Hz" if clip.rate_hz else "ready-made codes" for clip in clips.values())
    figures["clips by sample rate"] = dict(rates.most_common())
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        seconds[record.chatml.speaker or "no speaker"] += [clips[key_of(part)].sec for part in record.trained()]
    largest = sorted(seconds.items(), key=lambda item: -sum(item[1]))
    figures["minutes of the largest speakers"] = {name: sum(sec) / 60 for name, sec in largest[:NUM_SPEAKERS]}
    report.speakers = [
        {"speaker": name, "clips": len(sec), "minutes": sum(sec) / 60, "seconds of a clip": spread(sec)}
        for name, sec in largest[:MAX_ON_PAGE]
    ]
    heard = [clip for clip in clips.values() if clip.sound]
    report.histograms = {
        "clips by length": histogram([clip.sec for clip in clips.values()], (0, 1, 2, 4, 6, 8, 10, 15, 20, 30, 60), "s"),
        "clips by silence at both ends": histogram(
            [clip.sound.lead_sec + clip.sound.tail_sec for clip in heard], (0, 0.1, 0.2, 0.4, 0.6, 1, 2), "s"
        ),
        "clips by level of speech above pauses": histogram(
            [clip.sound.snr_db for clip in heard], (0, 10, 15, 20, 30, 40, 60), "dB"
        ),
    }
    find_faults(records, clips, report)
    notices["duplicates"] += find_duplicates(records, clips)
    notices["text and duration do not fit"] += find_outliers(records, clips)


def find_faults(records: Manifest, clips: dict[Key, Clip], report: Report) -> None:
    """What is wrong with clips and texts, each with the clip, its seconds and its text, for the player of the page."""
    texts: dict[Key, str] = {}
    spoken = []
    for record in records:
        known = transcripts(record)
        texts |= {key_of(part): text for part, text in zip(record.audio, known)} if len(known) == len(record.audio) else {}
        spoken.append((record, known[-1] if known else ""))

    for key, clip in clips.items():
        for title, what in sound_faults(clip.sound, clip.sec, clip.rate_hz):
            report.notices[title].append(finding(key, texts.get(key, ""), clips, what))
        if clip.past_end_sec > PAST_END_SEC:
            what = f"its span ends {clip.past_end_sec:.2f} s after the end of the file"
            title = "spans beyond the end of their file: correct the times"
            report.problems[title].append(finding(key, texts.get(key, ""), clips, what))
    odd = odd_scripts([script_of(text) for _, text in spoken])
    for record, text in spoken:
        faults = [
            *text_faults(text),
            *([("another script than the others", script_of(text))] if script_of(text) in odd else []),
        ]
        for title, what in faults if record.audio else ():
            report.notices[title].append(finding(key_of(record.audio[-1]), text, clips, what))


def finding(key: Key, text: str, clips: dict[Key, Clip], what: str) -> Finding:
    """A line about a clip with its text, for the player of the page."""
    clip = clips[key]
    return Finding.of(place(clip.name, text, clip.sec, what), clip.path, *key[1:])


def find_duplicates(records: Manifest, clips: dict[Key, Clip]) -> list[str]:
    """Records whose clips have the same content as those of an earlier record, with the same text or another."""
    first: dict[tuple, tuple[str, list[str]]] = {}
    duplicates = []
    for record in records:
        content = tuple(clips[key_of(part)].digest for part in record.audio)
        if not content:
            continue
        texts = texts_of(record)
        source, texts_before = first.setdefault(content, (record.source, texts))
        if source != record.source:
            with_text = "and the same text as" if texts == texts_before else "but ANOTHER TEXT than"
            clip, span = clips[key_of(record.audio[-1])], key_of(record.audio[-1])[1:]
            duplicates.append(Finding.of(f"{record.source}: the same audio {with_text} {source}", clip.path, *span))
    return duplicates


def texts_of(record: Record) -> list[str]:
    """All texts of a record, in order."""
    parts = [part.text if isinstance(part, TextContent) else part for part in record.parts()]
    return [part for part in parts if isinstance(part, str)]


def find_outliers(records: Manifest, clips: dict[Key, Clip]) -> list[Finding]:
    """Clips with far more or far fewer characters per second than is usual here."""
    by_script: dict[str, list[tuple[float, Key, str]]] = defaultdict(list)  # a second holds more letters than Chinese characters
    for record in records:
        texts = transcripts(record)
        if texts and (text := texts[-1].strip()):
            key = key_of(record.audio[-1])
            by_script[script_of(text)].append((math.log(len(text) / clips[key].sec), key, text))
    found = []
    for lines in (lines for lines in by_script.values() if len(lines) >= 10):
        middle = statistics.median(speed for speed, *_ in lines)
        deviation = max(0.05, 1.4826 * statistics.median(abs(speed - middle) for speed, *_ in lines))
        usual = f"characters per second, usual are {math.exp(middle):.1f}"
        odd = [line for line in lines if abs(line[0] - middle) > OUTLIER * deviation]
        odd.sort(key=lambda line: -abs(line[0] - middle))
        found += [finding(key, text, clips, f"{math.exp(speed):.1f} {usual}") for speed, key, text in odd]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and transcripts


def describe_prompt(record: Record, report: Report) -> None:
    """Where a chat differs from what `generate` will send: ChatML trains as it is."""
    known, turns = transcripts(record), record.chatml.messages
    if not known or not record.audio:
        return
    before = [(turn.role, "".join(map(shown_part, parts_of(turn.content)))) for turn in turns[:-2]]
    if odd := prompts.oddity(before, known[-1]):
        report.notices["prompts that `generate` phrases in another way"].append(f"{record.source}: {odd}")
    if (sent := prompts.normalise(known[-1])) != known[-1]:
        what = f"{record.source}: {shown(known[-1])} is sent as {shown(sent)}"
        report.notices["texts that `generate` changes before it sends them, unless --normalize no is given"].append(what)


def shown_part(part: Any) -> str:
    return part if isinstance(part, str) else getattr(part, "text", prompts.CLIP)


def describe_transcripts(records: Manifest, clips: dict[Key, Clip], report: Report, args: argparse.Namespace) -> None:
    from prepare import match  # takes seconds: models and judges

    title = "texts that are probably not those of their clips: listen"
    for record, what in match.suspects(records, args):
        report.notices[title].append(finding(key_of(record.audio[-1]), transcripts(record)[-1], clips, what))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and steps


class KnownFrames(AudioStore):
    """The lengths of clips that were inspected: nothing has to be encoded."""

    def __init__(self, config: Any, clips: dict[Key, Clip]):
        self.num_codebooks = config.audio_num_codebooks
        self.clips = clips

    def num_frames(self, part: AudioPart, source: str) -> int:
        return self.clips[key_of(part)].num_frames


def describe_lengths(
    dataset: data.ChatMLDataset, collator: ExtendedHiggsAudioSampleCollator, report: Report, args: argparse.Namespace
) -> tuple[data.ChatMLDataset, np.ndarray | None]:
    """Tokens and positions of the records; records that training refuses go to the report.

    returns: the dataset without them, and the positions of its records; None without audio, and for a checkpoint with
             Whisper, where they depend on the waveforms
    """
    has_whisper = collator.feature_extractor is not None
    num_tokens, lengths = np.zeros(len(dataset), np.int32), np.zeros(len(dataset), np.int32)
    for index, record in enumerate(dataset.records):
        try:
            num_tokens[index] = len(usable_ids(dataset, record, collator))
            if not (has_whisper or args.no_audio):
                frames = [(dataset.store.num_frames(part, record.source), part.is_output) for part in record.audio]
                lengths[index] = collator.num_positions(int(num_tokens[index]), frames)
        except DataError as error:
            report.problems["records that training refuses"].append(str(error))
    kept = num_tokens > 0
    dataset, lengths = data.ChatMLDataset(dataset.records.subset(kept), dataset.tokenizer, dataset.store), lengths[kept]
    report.figures["text tokens of a record"] = spread(num_tokens[kept])
    if has_whisper and args.max_tokens:
        problem = "this checkpoint has Whisper: lengths are not known beforehand; use --batch_size"
        report.problems["--max_tokens"].append(problem)
    if has_whisper or args.no_audio:
        return dataset, None
    report.figures["positions of a record"] = spread(lengths)
    return fit(dataset, collator, lengths, report, args) if args.max_tokens else (dataset, lengths)


def usable_ids(dataset: data.ChatMLDataset, record: Record, collator: ExtendedHiggsAudioSampleCollator) -> list[int]:
    """The record's tokens. raises: DataError for a record that the dataset or the collator would refuse"""
    input_ids, _ = dataset.ids(record)
    count = sum(token in (collator.audio_in_token_id, collator.audio_out_token_id) for token in input_ids)
    if count != len(record.audio):
        counts = f"{count} audio placeholders but {len(record.audio)} clips"
        raise DataError(f"{record.source}: {counts}; take <|AUDIO|> and <|AUDIO_OUT|> out of its texts")
    codes = [part for part in record.audio if part.holds_codes and not part.is_output]
    if codes and collator.feature_extractor:
        raise DataError(f"{record.source}: {codes[0].field}: codes, but this checkpoint reads input audio as waveforms")
    return input_ids


def fit(
    dataset: data.ChatMLDataset,
    collator: ExtendedHiggsAudioSampleCollator,
    lengths: np.ndarray,
    report: Report,
    args: argparse.Namespace,
) -> tuple[data.ChatMLDataset, np.ndarray]:
    """The records that fit --max_tokens, as in training; with --long error longer records are problems."""
    title = f"longer than --max_tokens {args.max_tokens}"
    if args.long == "error":
        long = np.flatnonzero(lengths > args.max_tokens).tolist()
        report.problems[title] += [f"{dataset.records[index].source}: {lengths[index]} positions" for index in long]
    try:
        how = "skip" if args.long == "error" else args.long
        dataset, lengths, changes = data.fit_lengths(dataset, collator, lengths, args.max_tokens, how)
    except DataError as error:  # nothing is left
        report.problems["no record is left"].append(str(error))
        return data.ChatMLDataset(dataset.records.subset(np.zeros(len(lengths), bool)), None, None), lengths[:0]
    report.notices[title] += changes if args.long != "error" else []
    return dataset, lengths


def describe_epoch(
    dataset: data.ChatMLDataset, lengths: np.ndarray | None, report: Report, args: argparse.Namespace, speed: float
) -> None:
    """Steps and time of an epoch, planned as in training."""
    if not len(dataset):
        return
    batching = data.Batching(args.batch_size, args.max_tokens if lengths is not None else 0, lengths)
    loader = data.Loader(dataset, None, batching, world_size=args.world_size, grad_accum=args.grad_accum)
    steps = loader.num_steps(data.Position(0, 0), 1)
    report.figures["steps of an epoch"] = steps
    report.figures["samples of a step"] = len(dataset) / steps
    if lengths is None:
        return
    report.figures["tokens of an epoch"] = int(lengths.sum())
    if speed:
        report.figures["hours of an epoch"] = int(lengths.sum()) / speed / 3600
        report.figures["tokens per second"] = speed
