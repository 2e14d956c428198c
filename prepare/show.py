"""One sample as the model reads it: its turns, its tokens, and the delay-pattern grid of its first frames.

    bash launch.sh prepare show train.jsonl 3 --base_ckpt folder

Trained tokens and codes are coloured, or marked with * without colours. Ids and labels are those of the official
`prepare_chatml_sample` and collator.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
from collate import create_collator
from common import DataError
from config import BASE_CKPT, Config
from export import pretrained
from loss import IGNORE_INDEX
from prepare.audio import FRAME_RATE_HZ, AudioStore, duration_sec, expected_frames
from prepare.forms import open_manifest
from prepare.manifest import AudioPart, Record, parts_of

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="a dataset in any known form (docs/datasets.md)")
    parser.add_argument("record", type=int, help="which record, from 0")
    parser.add_argument("--base_ckpt", default=BASE_CKPT, help="for its tokenizer and config: a folder, or on the Hub")
    parser.add_argument("--base_revision", default="")
    parser.add_argument("--codes_dir", type=Path, help="cache of the codes of waveforms")
    parser.add_argument("--audio_tokenizer", default=Config.audio_tokenizer, help="codec of that cache")
    parser.add_argument("--columns", type=int, default=12, help="columns of the grid")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def run(args: argparse.Namespace) -> int:
    manifest, _ = open_manifest(args.manifest)
    if not 0 <= args.record < len(manifest):
        raise DataError(f"{args.manifest}: no record {args.record}; there are {len(manifest)}, from 0")
    record = manifest[args.record]
    folder = pretrained.find_base(args.base_ckpt, args.base_revision or None)
    config, tokenizer = pretrained.read_base_config(folder), pretrained.load_tokenizer(folder)
    use_color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    mark = Marker(use_color)

    print(record.source, *([f"speaker {printable(record.chatml.speaker)}"] if record.chatml.speaker else []), sep="\n")
    with tempfile.TemporaryDirectory() as nowhere:
        store = AudioStore.of(config, args.codes_dir or Path(nowhere), args.audio_tokenizer)
        show_turns(record, store, mark)
        dataset = data.ChatMLDataset([record], tokenizer, store, with_waveforms=config.encode_whisper_embed)
        show_tokens(*dataset.ids(record), tokenizer, mark)
        has_waveforms = not all(part.holds_codes for part in record.audio)
        if has_waveforms and (not args.codes_dir or store.missing([record])):
            remedy = f"bash launch.sh prepare encode {args.manifest} --out codes; then add --codes_dir codes"
            print(f"\nno grid: its waveforms have no codes yet; make them with {remedy}")
            return 0
        show_grid(create_collator(config)([dataset[0]]), config, args.columns, mark)
    return 0


@dataclass
class Marker:
    """Marks what trains."""

    use_color: bool

    def __call__(self, text: str, trains: bool) -> str:
        if self.use_color:
            return f"{GREEN if trains else GREY}{text}{PLAIN}"
        return f"{text}*" if trains else text

    @property
    def legend(self) -> str:
        return f"{GREEN}trained{PLAIN} / {GREY}not trained{PLAIN}" if self.use_color else "* is trained"


def printable(text: str) -> str:
    """The text with control characters escaped: they could move the cursor or change the terminal's colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_turns(record: Record, store: AudioStore, mark: Marker) -> None:
    """One line for each turn: its role, its text, its clips."""
    clips = iter(record.audio)
    for index, turn in enumerate(record.chatml.messages):
        trains = turn.role == "assistant" and index >= (record.chatml.start_index or 0)
        shown = []
        for part in parts_of(turn.content):
            text = part if isinstance(part, str) else getattr(part, "text", None)
            shown.append(describe_clip(next(clips), store, record.source) if text is None else printable(text))
        print(f"  {mark(turn.role, trains):12} {' '.join(shown)}")


def describe_clip(clip: AudioPart, store: AudioStore, source: str) -> str:
    """[file from 1 s for 2 s: 2.00 s, 50 frames]; for a waveform the frames that the codec will make."""
    cut = f" from {clip.offset_sec:g} s" if clip.offset_sec else ""
    cut += f" for {clip.duration_sec:g} s" if clip.duration_sec else ""
    if clip.holds_codes:
        frames = store.num_frames(clip, source)
        sec = frames / FRAME_RATE_HZ
    else:
        sec = duration_sec(clip)
        frames = expected_frames(sec)
    length = f"{sec:.2f} s, {frames} frames" if sec else "not readable"
    return f"[{printable(str(clip.path or 'raw_audio'))}{cut}: {length}]"


def show_tokens(input_ids: list[int], label_ids: list[int], tokenizer, mark: Marker) -> None:
    tokens = [tokenizer.decode([token]) for token in input_ids]
    trains = [label != IGNORE_INDEX for label in label_ids]
    print(f"\n{len(tokens)} tokens, {sum(trains)} of them trained ({mark.legend}):")
    print(" ".join(mark(printable(token), trained) for token, trained in zip(tokens, trains)))


def show_grid(batch: Any, config: Any, num_columns: int, mark: Marker) -> None:
    """The first columns of every output clip, one row for each codebook."""
    names = {config.audio_stream_bos_id: "BOS", config.audio_stream_eos_id: "EOS"}
    stops = [*batch.audio_out_ids_start.tolist()[1:], batch.audio_out_ids.shape[1]]
    for number, (start, stop) in enumerate(zip(batch.audio_out_ids_start.tolist(), stops)):
        ids, labels = batch.audio_out_ids[:, start:stop], batch.label_audio_ids[:, start:stop]
        supervised = int((labels != IGNORE_INDEX).sum())
        print(f"\noutput clip {number}: {ids.shape[1]} columns, {supervised} of {labels.numel()} cells trained ({mark.legend})")
        last = 3 if ids.shape[1] > num_columns else 0  # the end shows how the codebooks stop
        for k in range(ids.shape[0]):
            trains = labels[k] != IGNORE_INDEX
            cells = [mark(f"{names.get(int(i), int(i)):>4}", bool(t)).ljust(5) for i, t in zip(ids[k], trains)]
            shown = [*cells[: num_columns - last], "...", *cells[-last:]] if last else cells
            print(f"  codebook {k}: " + " ".join(shown))
    num_inputs = 0 if batch.audio_in_ids is None else len(batch.audio_in_ids_start)
    if num_inputs:
        print(f"\nand {num_inputs} input clip(s), {batch.audio_in_ids.shape[1]} columns")
