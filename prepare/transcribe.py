"""Write the missing transcripts of a table of clips, as `prepare cut` makes it, or of a folder of clips.

    bash launch.sh prepare transcribe cuts.jsonl --language en
    bash launch.sh prepare transcribe clips/ --model openai/whisper-large-v3-turbo
    bash launch.sh prepare transcribe cuts.jsonl --text script.txt

A table gets them in its own lines, a folder as NAME.txt beside each clip. Transcripts that are there stay. After an
interruption the same command goes on with what is missing.

--text: what was read, in the order of the table. Each clip gets the script's own words in the place of the recognised ones.
Clips that do not fit the script, and those without any word, are moved from TABLE.jsonl to TABLE.left_out.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common import ConfigError, DataError, listing, write_lines, write_text
from generate.judges import Recogniser, Transcript, resample
from prepare.align import align, words_of
from prepare.audio import MAX_TRANSCRIBED_SEC, duration_sec, read_ahead, read_waveform
from prepare.folders import Listing, without_text
from prepare.forms import recognise
from prepare.manifest import AudioPart, read_manifest, shown
from prepare.rows import COLUMNS, Origin, Row
from prepare.tables import UnclearError, read_text
from process.gpu import on_gpu

LOW = 0.6  # mean probability of a transcript's tokens below which it is listed
SAVE_SEC = 20.0  # what a killed run loses of a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="a .jsonl with a row for each clip, or a folder of clips")
    parser.add_argument(
        "--model",
        default="openai/whisper-large-v3",
        help="of transformers, name or folder: Whisper, or with a CTC head (bare words without punctuation: for --text)",
    )
    parser.add_argument("--language", default="", help="as in en; default: Whisper guesses it for each clip")
    parser.add_argument("--text", type=Path, metavar="SCRIPT", help="what was read, as plain text; for a table")
    parser.add_argument("--force", action="store_true", help="transcribe clips that have a transcript too, and replace it")
    parser.add_argument("--batch_size", type=int, default=8, help="clips that Whisper transcribes at once")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ConfigError("--batch_size: expected 1 or more")
    if args.text and args.input.is_dir():
        raise ConfigError(f"--text needs a table: bash launch.sh prepare cut {args.input} --out cuts.jsonl")
    script = read_text(args.text) if args.text else ""
    clips = Folder(args.input) if args.input.is_dir() else Table(args.input)
    todo = clips.todo(args.force)
    refuse_long(todo, args.input)
    problems = transcribe(clips, todo, args) if todo else []
    print(f"{len(todo) - len(problems)} transcripts written, {clips.num_clips - len(todo)} were there: {args.input}")
    lines = clips.finish(script, args.text)
    print("\n".join(f"  {line}" for line in lines))
    if problems:
        raise DataError(listing(f"{len(problems)} clips could not be read:", problems))
    print(f"next: bash launch.sh prepare check {args.input}")
    return 0


def refuse_long(todo: Sequence[tuple[Any, AudioPart, str]], given: Path) -> None:
    """raises: DataError for recordings that have to be cut first"""
    seconds = [(part, part.duration_sec or duration_sec(part)) for _, part, _ in todo]
    long = [f"{part.path} ({sec / 60:.1f} minutes)" for part, sec in seconds if sec > MAX_TRANSCRIBED_SEC]
    if long:
        what = given if given.is_dir() else "RECORDING"
        remedy = f"longer than {MAX_TRANSCRIBED_SEC} s; cut them first: bash launch.sh prepare cut {what} --out cuts.jsonl"
        raise DataError(listing(f"{len(long)} clips are {remedy}", long))


def transcribe(clips: Table | Folder, todo: Sequence[tuple[Any, AudioPart, str]], args: argparse.Namespace) -> list[str]:
    """Fill what is missing; returns what is wrong with clips that cannot be read."""
    device = torch.device("cuda" if on_gpu(args.device) else "cpu")
    recogniser = Recogniser(args.model, device, args.language)
    problems, saved = [], time.monotonic()
    waiting = read_ahead(read_clip, todo, 4)
    try:
        with tqdm(total=len(todo), desc="transcripts", unit="clip") as progress:
            while batch := list(islice(waiting, args.batch_size)):
                problems += [str(samples) for _, samples in batch if isinstance(samples, DataError)]
                batch = [(key, samples) for key, samples in batch if not isinstance(samples, DataError)]
                for (key, _), found in zip(batch, recogniser([samples for _, samples in batch])):
                    clips.put(key, found)
                progress.update(len(batch))
                if time.monotonic() - saved > SAVE_SEC:
                    clips.save()
                    saved = time.monotonic()
    finally:
        clips.save()
    return problems


def read_clip(clip: tuple[Any, AudioPart, str]) -> tuple[Any, np.ndarray | DataError]:
    key, part, source = clip
    try:
        return key, resample(*read_waveform(part, source))
    except DataError as error:
        return key, error


# ---------------------------------------------------------------------------------------------------------------------
# Tables and folders


class Folder:
    """Clips that get NAME.txt beside them."""

    def __init__(self, path: Path):
        self.path, self.listing = path, Listing(path)
        self.clips = [clip for clip in self.listing.clips if not AudioPart(Path(clip)).holds_codes]
        self.num_clips = len(self.clips)
        self.new: dict[str, Transcript] = {}
        if not self.clips:
            raise DataError(f"{path}: no recording in this folder")
        try:
            form = recognise(path)
        except UnclearError:  # of tables that name these clips
            raise
        except DataError:  # most clips have no text
            form = "pairs"
        if form != "pairs":
            raise DataError(f"{path}: a dataset that has its transcripts already ({form or 'ChatML'})")

    def todo(self, force: bool) -> list[tuple[str, AudioPart, str]]:
        names = self.clips if force else without_text(self.listing)
        return [(name, AudioPart(self.path / name, None, None, True, "clip"), name) for name in names]

    def put(self, name: str, found: Transcript) -> None:
        self.new[name] = found
        if found.text:
            write_text((self.path / name).with_suffix(".txt"), f"{found.text}\n")

    def save(self) -> None:
        pass

    def finish(self, script: str, script_path: Path | None) -> list[str]:
        wordless = [name for name, found in self.new.items() if not found.text]
        lines = [listing(f"{len(wordless)} clips have no word; move them elsewhere:", wordless)] if wordless else []
        return lines + summary(list(self.new.items()), "the .txt of that name")


class Table:
    """A .jsonl with a row for each clip; it is replaced as a whole whenever it is saved."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix != ".jsonl":
            raise DataError(f"{path}: expected a folder of clips, or a .jsonl with a row for each, as prepare cut writes it")
        self.sources, self.rows = zip(*read_manifest(path).values()) if path.is_file() else ((), ())
        if not self.rows:
            raise DataError(f"{path}: {'there is no row in it' if path.is_file() else 'no such file or folder'}")
        for source, row in zip(self.sources, self.rows):
            if not isinstance(row, dict) or "messages" in row:
                raise DataError(f"{source}: expected a row with audio and text, as prepare cut writes it, found {shown(row)}")
        names = {name.lower(): name for row in self.rows for name in row}
        self.text = next((names[name] for name in COLUMNS["text"] if name in names), "text")
        self.num_clips = len(self.rows)
        self.wordless: set[int] = set()

    def todo(self, force: bool) -> list[tuple[int, AudioPart, str]]:
        found = []
        for i, (source, row) in enumerate(zip(self.sources, self.rows)):
            if force or not str(row.get(self.text) or "").strip():
                origin = Origin(source, self.path.parent)
                clip = Row(row, origin)
                url, span = clip.clip("audio")["audio_url"], clip.span()
                part = AudioPart(self.path.parent / url, span.get("offset"), span.get("duration"), True, "audio")
                found.append((i, part, source))
        return found

    def put(self, i: int, found: Transcript) -> None:
        row = self.rows[i]
        row.pop("recognised", None)
        row[self.text] = found.text
        row |= {"language": found.language} if found.language else {}
        row |= {"confidence": round(found.confidence, 3)} if found.confidence is not None else {}
        (self.wordless.discard if found.text else self.wordless.add)(i)

    def save(self, without: Sequence[int] = ()) -> None:
        write_lines(self.path.resolve(), [row for i, row in enumerate(self.rows) if i not in without])

    def finish(self, script: str, script_path: Path | None) -> list[str]:
        """Give the clips the script's words, move those that cannot be used out of the table. raises: DataError"""
        unfit, lines = self.follow(script, script_path) if script_path else (set(), [])
        left_out = sorted(self.wordless | unfit)
        if len(left_out) == len(self.rows):
            raise DataError(f"{self.path}: no clip {f'fits {script_path}' if unfit else 'has a word'}; it is left as it is")
        if left_out:
            beside = self.path.with_name(f"{self.path.stem}.left_out.jsonl")
            before = [row for _, row in read_manifest(beside).values()] if beside.exists() else []
            write_lines(beside.resolve(), before + [self.rows[i] for i in left_out])
            unfit -= self.wordless
            lines.append(f"left out {len(self.wordless)} clips without a word, {len(unfit)} not in the script -> {beside}")
        if script_path or left_out:
            self.save(left_out)
        kept = [row for i, row in enumerate(self.rows) if i not in left_out]
        named = [(f"{row.get('audio')} from {row.get('start', 0)} s", row) for row in kept]
        known = [(n, Transcript(str(r.get(self.text)), r.get("language", ""), r.get("confidence"))) for n, r in named]
        return lines + summary(known, f"its `{self.text}` in {self.path}, or take the line out")

    def follow(self, script: str, script_path: Path) -> tuple[set[int], list[str]]:
        """Give each clip the script's words; returns the clips that do not fit, and what of the script is in no clip."""
        words = words_of(script)
        if not words:
            raise DataError(f"--text {script_path}: there is no word in it")
        starts = [start for _, start in words] + [len(script)]
        spoken = [words_of(str(row.get("recognised") or row.get(self.text) or "")) for row in self.rows]
        found = align([[word for word, _ in clip] for clip in spoken], [word for word, _ in words])
        used = {i for place in found if place for i in range(*place)}
        for row, place in zip(self.rows, found):
            if place:
                row.setdefault("recognised", row.get(self.text))
                row.pop("confidence", None)  # of words that the script replaces
                row[self.text] = " ".join(script[starts[place[0]] : starts[place[1]]].split())
        lost = len(words) - len(used)
        lines = [f"{lost} of {len(words)} words of {script_path} are in no clip"] if lost else []
        return {i for i, place in enumerate(found) if not place}, lines


def summary(found: Sequence[tuple[str, Transcript]], where: str) -> list[str]:
    """Languages; the clips to listen to."""
    languages = Counter(transcript.language for _, transcript in found if transcript.language)
    lines = [f"language {', '.join(f'{name} {count}' for name, count in languages.most_common())}"] if languages else []
    doubtful = sorted((t.confidence, name, t.text) for name, t in found if t.confidence is not None and t.confidence < LOW)
    if doubtful:
        title = f"{len(doubtful)} of low confidence: listen, and correct {where}"
        lines.append(listing(title, [f"{name} ({share:.2f}): {shown(text)}" for share, name, text in doubtful]))
    return lines
