"""Seed-TTS-eval's lists of lines, and how it compares a transcript with its text.

source: github.com/BytedanceSpeech/seed-tts-eval, run_wer.py
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import jiwer
from zhon.hanzi import punctuation

from common import DataError

DELETED = dict.fromkeys(map(ord, {*punctuation, *string.punctuation} - {"'"}))


def read_meta(path: Path) -> list[dict]:
    """Lines as `generate --lines` takes them, of a list of utt|prompt_text|prompt_wav|text[|recording of the text].

    raises: DataError
    """
    try:
        rows = [line.split("|") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--lines {path}: cannot be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        if len(row) not in (4, 5) or not all(field.strip() for field in row[:4]):
            raise DataError(f"{path} line {number}: expected utt|prompt_text|prompt_wav|text, perhaps with |recording")
    names = ("id", "ref_text", "ref_audio", "text")
    lines = [dict(zip(names, (field.strip() for field in row))) for row in rows]
    return [line | {"ref_audio": str((path.parent / line["ref_audio"]).resolve())} for line in lines]


def normalise(text: str, language: str) -> str:
    """A text as its words are compared: separated by blanks; Mandarin ("zh") by characters, which become simplified ones."""
    text = text.translate(DELETED).replace("  ", " ")
    if language != "zh":
        return text.lower()
    import zhconv

    return " ".join(zhconv.convert(text, "zh-cn"))


@dataclass(frozen=True)
class Errors:
    """What has to be inserted, deleted or replaced to get from a transcript to its text."""

    word_errors: int
    words: int
    char_errors: int
    chars: int

    @classmethod
    def of(cls, transcript: str, text: str, language: str) -> Errors:
        """raises: ValueError for a text without words"""
        wanted, found = normalise(text, language), normalise(transcript, language)
        if not wanted.strip():
            raise ValueError("no words")
        measured = (jiwer.process_words(wanted, found), jiwer.process_characters(wanted, found))
        counts = [(m.substitutions + m.deletions + m.insertions, m.hits + m.substitutions + m.deletions) for m in measured]
        return cls(*counts[0], *counts[1])
