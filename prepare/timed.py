"""Transcripts with times beside a long recording: each line becomes a clip, cut from the recording.

.srt .vtt          subtitles; `<v Anna>` and `[SPEAKER_00]:` name a speaker
.json              of Whisper and WhisperX: `segments` of start, end, text, perhaps speaker
.TextGrid          of Praat and the Montreal aligner: the intervals of one tier (utterances), or of one tier per speaker
.txt               labels of Audacity: start, end, text, with tabs
cuts.jsonl(.gz)    of Lhotse
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import DataError
from prepare.manifest import shown
from prepare.tables import Rows, numbered_lines, read_text

SUBTITLES = (".srt", ".vtt")
STAMP = r"((?:\d{1,4}:)?\d{1,4}:\d{1,4}[.,]\d{1,9})"
CUE = re.compile(rf"{STAMP}\s*-->\s*{STAMP}[^\n]*\n(.*?)(?=\n\s*\n|\Z)", re.DOTALL)
SPOKEN_BY = re.compile(r"(?:<v(?:\.[^ >]*)? ([^>]+)>|\[(SPEAKER_\d+)\]:?)\s*")
MAX_CUT = 2**24  # characters of a cut of Lhotse
MARKUP = re.compile(r"</?[^>]+>|\{\\[^}]*\}")
WORDS_PER_INTERVAL = 1.5  # TextGrid tiers with fewer are words or phones, not utterances


@dataclass
class Segment:
    start: float | str  # seconds, or hours, minutes and seconds
    end: float | str
    text: str
    speaker: str | None = None


def read_timed(path: Path) -> list[Segment] | None:
    """The lines of a transcript with times; None for a file of another kind. raises: DataError for a broken one"""
    suffix = path.suffix.lower()
    if suffix in SUBTITLES:
        return _subtitles(read_text(path))
    if suffix == ".textgrid":
        return _textgrid(path)
    if suffix == ".json":
        return _whisper(path)
    if suffix == ".txt":
        return _labels(path)
    return None


def timed_rows(path: Path, clip: str, segments: list[Segment], speaker: str | None) -> Rows:
    """A row for each segment that has a text. speaker: of those that do not name one"""
    for number, segment in enumerate(segments):
        if segment.text.strip():
            span = {"offset": segment.start, "end": segment.end}
            yield (
                f"{path} segment {number}",
                {"audio": clip, "text": segment.text, "speaker": segment.speaker or speaker, **span},
            )


def _subtitles(text: str) -> list[Segment]:
    segments = []
    for start, end, lines in CUE.findall(text.replace("\r\n", "\n")):
        named = SPOKEN_BY.match(lines.strip())
        words = MARKUP.sub("", SPOKEN_BY.sub("", lines))
        segments.append(Segment(start, end, " ".join(words.split()), named and (named[1] or named[2])))
    return segments


def _whisper(path: Path) -> list[Segment] | None:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None
    segments = value.get("segments") if isinstance(value, dict) else None
    if not isinstance(segments, list) or not all(isinstance(s, dict) and {"start", "end", "text"} <= set(s) for s in segments):
        return None
    return [Segment(s["start"], s["end"], str(s["text"]), s.get("speaker")) for s in segments]


def _labels(path: Path) -> list[Segment] | None:
    """Start, end and text in each line; lines that begin with a backslash hold frequencies."""
    lines = [line.rstrip("\r").split("\t") for _, line in numbered_lines(path) if not line.startswith("\\")]
    number = re.compile(r"\d+[.,]\d+")
    if not lines or not all(len(cells) == 3 and number.fullmatch(cells[0]) and number.fullmatch(cells[1]) for cells in lines):
        return None
    return [Segment(*cells) for cells in lines]


def _textgrid(path: Path) -> list[Segment]:
    """The utterances of a TextGrid, in Praat's long form or its short one. raises: DataError"""
    try:
        text = path.read_bytes().decode("utf-16" if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither UTF-8 nor UTF-16 ({error}); save it from Praat as UTF-8") from None
    tokens = [text or number for text, number in re.findall(r'"((?:[^"]|"")*)"|(?<![\w\[])(-?\d+(?:\.\d+)?)(?![\w\]])', text)]
    tiers: dict[str, list[Segment]] = {}
    try:
        at = tokens.index("IntervalTier")
        while at < len(tokens) and tokens[at] == "IntervalTier":
            name, count = tokens[at + 1], min(int(tokens[at + 4]), len(tokens))
            rows = [tokens[at + 5 + 3 * i : at + 8 + 3 * i] for i in range(count)]
            tiers[name] = [Segment(float(start), float(end), words.replace('""', '"')) for start, end, words in rows]
            at += 5 + 3 * count
    except (ValueError, IndexError):
        raise DataError(f"{path}: not a TextGrid that can be read; save it from Praat as a text file") from None
    utterances = {name: found for name, found in tiers.items() if _num_words(found) > WORDS_PER_INTERVAL}
    if not utterances:
        raise DataError(f"{path}: no tier of utterances; its tiers are {', '.join(tiers)}")
    for name, found in utterances.items() if len(utterances) > 1 else ():
        for segment in found:
            segment.speaker = name
    return sorted((segment for found in utterances.values() for segment in found), key=lambda segment: segment.start)


def _num_words(segments: list[Segment]) -> float:
    """Words of an interval, on average; characters of a text without blanks count as words."""
    texts = [segment.text.strip() for segment in segments if segment.text.strip()]
    words = [max(len(text.split()), sum(ord(c) > 0x2E80 for c in text)) for text in texts]
    return sum(words) / max(1, len(words))


# ---------------------------------------------------------------------------------------------------------------------
# Lhotse


def is_cut(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("supervisions"), list) and "recording" in value


def read_cuts(path: Path) -> Rows:
    """The supervisions of each cut, whose times are relative to it."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    try:
        with opened as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_CUT), ""), start=1):
                if len(line) == MAX_CUT:
                    raise DataError(f"{path} line {number}: more than {MAX_CUT} characters are no cut of Lhotse")
                if line.strip():
                    yield from _rows_of_cut(line, f"{path} line {number}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: cannot be read: {error}") from None


def _rows_of_cut(line: str, source: str) -> Iterator[tuple[str, Any]]:
    try:
        cut = json.loads(line)
        (origin,) = cut["recording"]["sources"]
        for piece in cut["supervisions"]:
            times = {"offset": cut.get("start", 0) + piece.get("start", 0), "duration": piece["duration"]}
            whole = times["offset"] == 0 and abs(times["duration"] - cut["recording"].get("duration", -1)) < 0.01
            if origin["type"] != "file":
                raise DataError(f"its audio is of type {shown(origin['type'])}, not a file")
            row = {"audio": origin["source"], "text": piece.get("text"), "speaker": piece.get("speaker"), "id": piece.get("id")}
            if len(origin.get("channels", [])) > 1:
                row["channel"] = ("left", "right")[piece.get("channel", cut.get("channel"))]
            yield source, row | ({} if whole else times)
    except DataError as error:
        yield source, error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        yield source, DataError(f"not a cut of Lhotse that names one recording: {error!r}")
