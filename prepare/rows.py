"""A row of a table -> a ChatML record: a user turn with the text, an assistant turn with the audio, references before them.

What a column means is told by its name (COLUMNS). What is changed on the way is counted in `Origin.repairs`.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from common import DataError
from prepare import prompts
from prepare.manifest import leaves_folder, shown
from prepare.prompts import Voice

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".m4a", ".aac", ".npy", ".safetensors")
AUDIO_FOLDERS = ("clips", "wavs")  # where Common Voice and LJSpeech keep the files they name without a folder
# Names of columns and keys, in order of preference; upper and lower case are the same.
COLUMNS = {
    "audio": (
        *("audio", "audio_file", "audio_path", "audio_filepath", "audio_url", "file_name", "wav", "wav_path", "wav_file"),
        *("path", "filepath", "file", "filename"),
    ),
    "text": ("text", "transcript", "transcription", "normalized_text", "normalised_text", "sentence", "raw_text"),
    "text_file": ("transcript_file", "transcript_path", "text_file", "txt"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "speaker_name", "client_id"),
    "ref_audio": ("ref_audio", "ref_audio_file", "ref_audio_path", "reference_audio", "prompt_audio", "ref_wav", "prompt_wav"),
    "ref_text": ("ref_text", "ref_transcript", "reference_text", "prompt_text"),
    "ref_text_file": ("ref_transcript_file", "ref_text_file"),
    "offset": ("offset", "start", "start_sec", "start_time"),
    "end": ("end", "end_sec", "end_time"),
    "duration": ("duration", "duration_sec"),
    "ref_speakers": ("ref_speakers",),
    "id": ("id", "utt_id", "sample_id"),
}


@dataclass
class Origin:
    """Where a record comes from: its source (for messages), the folder of its paths, and what was changed in it."""

    source: str
    folder: Path
    repairs: Counter = field(default_factory=Counter)


class Row:
    """A row of a table by the meaning of its columns."""

    def __init__(self, row: Any, origin: Origin):
        if not isinstance(row, dict):
            raise DataError(f"{origin.source}: expected an object with an audio and a text, found {shown(row)}")
        self.row, self.origin, self.columns = row, origin, columns_of(row)

    def record(self) -> dict:
        """The ChatML record, with the row's `id` beside it."""
        text, clip, speaker = self.text("text"), self.clip("audio"), self.get("speaker")
        if not text:
            raise DataError(f"{self.origin.source}: no text; expected a column of {', '.join(COLUMNS['text'])}")
        if not isinstance(speaker, (str, int, float, type(None))):
            raise DataError(f"{self.where('speaker')}: expected a name, found {shown(speaker)}")
        speaker = None if speaker is None else str(speaker)
        voices = [Voice(voice.clip("ref_audio"), voice.text("ref_text")) for voice in self.voices()]
        system = None if voices else ""
        record = prompts.record(text, clip | self.span(), voices, system=system, speaker=speaker)
        if "id" in self.columns:
            record["id"] = str(self.get("id"))
        misc = self.rest()
        return record | ({"misc": misc} if misc else {})

    def get(self, name: str) -> Any:
        return self.row[self.columns[name]] if name in self.columns else None

    def where(self, name: str) -> str:
        return f"{self.origin.source}: {self.columns[name]}"

    def text(self, name: str) -> str | None:
        """The text in a column, or in the file that its companion column names."""
        value = self.get(name)
        if value is None and f"{name}_file" in self.columns:
            value = _text_file(self.get(f"{name}_file"), self.where(f"{name}_file"), self.origin.folder)
        if not isinstance(value, (str, int, float, type(None))):
            raise DataError(f"{self.where(name)}: expected text, found {shown(value)}")
        text = "" if value is None else str(value).strip()
        if name == "ref_text" and text and self.row.get("speaker_tag"):
            text = f"{self.row['speaker_tag']} {text}"
        return text or None

    def clip(self, name: str) -> dict:
        if name not in self.columns:
            raise DataError(f"{self.origin.source}: no {name}; expected a column of {', '.join(COLUMNS[name])}")
        return audio_part(self.get(name), self.where(name), self.origin)

    def span(self) -> dict[str, float]:
        """`offset` and `duration` of the clip. A duration alone describes the file and cuts nothing."""
        if "offset" not in self.columns and "end" not in self.columns:
            return {}
        names = [name for name in ("offset", "end", "duration") if name in self.columns]
        sec = {name: _seconds(self.get(name), self.where(name)) for name in names}
        if "end" in sec:
            sec["duration"] = sec.pop("end") - sec.setdefault("offset", 0.0)
        return sec

    def voices(self) -> Iterator[Row]:
        """The row itself, or objects in it, that name a reference."""
        if "ref_audio" in self.columns:
            yield self
        several = self.get("ref_speakers") or []
        if not isinstance(several, list):
            raise DataError(f"{self.where('ref_speakers')}: expected a list, found {shown(several)}")
        for number, voice in enumerate(several):
            source = f"{self.origin.source}: ref_speakers[{number}]"
            yield Row(voice, Origin(source, self.origin.folder, self.origin.repairs))

    def rest(self) -> dict:
        """The simple values of columns without a meaning."""
        extra = {name: v for name, v in self.row.items() if name not in self.columns.values() and not is_absent(v)}
        kept = {name: v for name, v in extra.items() if isinstance(v, (str, int, float))}
        self.origin.repairs.update(f"`{name}` was left out" for name in extra if name not in kept)
        return kept


def columns_of(row: dict) -> dict[str, str]:
    """Meaning -> the row's key for it, among the keys that have a value."""
    keys = {str(key).strip().lower(): key for key, value in row.items() if not is_absent(value)}
    return {name: keys[alias] for name, aliases in COLUMNS.items() for alias in reversed(aliases) if alias in keys}


def is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _seconds(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: expected seconds, found {shown(value)}") from None


def _text_file(name: Any, where: str, folder: Path) -> str:
    path = folder / str(name)
    try:
        if leaves_folder(str(name)):
            raise OSError("it leaves the dataset's folder; move the file there, or give its absolute path")
        if not path.is_file():  # a device could be read for ever
            raise OSError("there is no such file")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {path} cannot be read as UTF-8 text: {error}") from None


def audio_part(value: Any, where: str, origin: Origin) -> dict:
    """A ChatML audio part from a path, a file: or data: URL, or an object that holds one."""
    if isinstance(value, dict):
        if isinstance(value.get("data"), str):  # OpenAI's input_audio
            return {"type": "audio", "audio_url": "", "raw_audio": value["data"].rpartition("base64,")[2]}
        value = next((value[key] for key in ("path", "url", "audio_url", "audio") if value.get(key)), None)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: expected a path to audio, found {shown(value)}")
    if value.startswith("data:"):
        return {"type": "audio", "audio_url": "", "raw_audio": value.rpartition("base64,")[2]}
    if re.match(r"https?://", value):
        raise DataError(f"{where}: {value} is on the network; download it and give the file's path")
    if value.startswith("file://"):
        value = unquote(urlparse(value).path)
    try:
        return {"type": "audio", "audio_url": _find_file(value, origin)}
    except (OSError, ValueError):  # a name the file system cannot hold
        raise DataError(f"{where}: {shown(value)} is not a path") from None


def _find_file(name: str, origin: Origin) -> str:
    """The path of the file from the dataset's folder; the name itself if there is no such file, which the parser reports."""
    if (origin.folder / name).is_file():
        return name
    for place in AUDIO_FOLDERS:
        if not leaves_folder(name) and (origin.folder / place / name).is_file():
            origin.repairs[f"clips were found in {place}/"] += 1
            return os.path.join(place, name)
    if Path(name).is_file():
        origin.repairs["paths that started from the working directory are absolute now"] += 1
        return os.path.abspath(name)
    return name
