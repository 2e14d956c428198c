"""Any known form of dataset -> ChatML. Prints the form it found, what became audio, text and speaker, and what it changed.

    bash launch.sh prepare convert wavs_and_texts/ train.jsonl

Training reads every form directly; converting shows what it will read. docs/datasets.md lists the forms. Audio is not
copied: paths become relative to the output if the audio is below its folder, otherwise absolute.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path

from common import DataError, listing, write_whole
from prepare.forms import convert, recognise
from prepare.manifest import audio_parts, read_manifest, report_problems
from prepare.rows import add_reading_arguments, reading_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="a file or folder in any known form (docs/datasets.md)")
    parser.add_argument("output", type=Path, help="the JSONL to write, or the JSON list where the name ends in .json")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    conversion = convert(args.input, reading_of(args, args.output.parent / f"{args.output.stem}_audio"))
    if args.output.exists() and not is_ours(args.output, args.input):
        raise DataError(f"{args.output}: choose another name for the output; only ChatML is written over, and never the input")
    lines = []
    for _, record in conversion.records:
        move_paths(record, conversion.folder, args.output.parent)
        # Half a character, which UTF-8 cannot hold, is written as a JSON escape.
        lines.append(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    report_problems(conversion.problems)
    if not lines:
        raise DataError(f"{args.input}: {conversion.form} without any record")
    begin, between, end = (b"[\n", b",\n", b"\n]\n") if args.output.suffix == ".json" else (b"", b"\n", b"\n")
    write_whole(args.output, lambda file: file.writelines([begin, between.join(lines), end]))
    print(f"{args.input}: {conversion.form}, {len(lines)} records -> {args.output}")
    changes = [f"{count} x {repair}" for repair, count in conversion.repairs.most_common()]
    print("\n".join(f"  {line}" for line in [*conversion.summary(), *changes]))
    if conversion.skipped:
        print(listing(f"{len(conversion.skipped)} rows without a text were skipped:", conversion.skipped))
    return 0


def is_ours(output: Path, source: Path) -> bool:
    """Whether a file may be written over: ChatML that is not the input. A folder's metadata.jsonl may be part of the input."""
    try:
        if not output.is_file() or output.samefile(source) or recognise(output) is not None:
            return False
        _, value = read_manifest(output).value(0)
    except DataError:
        return False
    return isinstance(value, dict) and "messages" in value


def move_paths(record: dict, old: Path, new: Path) -> None:
    """Change the audio paths of a ChatML record in place: they started from `old`, and now start from `new`."""
    way = _way(old, new)
    for part in audio_parts(record):
        for name in ("audio_url", "audio_label_url"):
            if isinstance(part.get(name), str) and part[name]:
                part[name] = _moved(part[name], old, way)


@functools.cache
def _way(old: Path, new: Path) -> str:
    return os.path.relpath(old, new)


def _moved(url: str, old: Path, way: str) -> str:
    if os.path.isabs(url):
        return os.path.normpath(url)
    path = os.path.normpath(f"{way}/{url}")
    return os.path.abspath(old / url) if path.split(os.sep)[0] == os.pardir else path
