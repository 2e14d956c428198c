"""A row of a table -> a ChatML record: a user turn with the text, an assistant turn with the audio, references before them.

What a column means is told by its name (COLUMNS) or by --columns. What is changed on the way is counted in `Origin.repairs`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlparse

from common import ConfigError, DataError, split_list
from prepare import prompts
from prepare.audio import FFMPEG_SUFFIXES
from prepare.manifest import CODE_SUFFIXES, leaves_folder, shown
from prepare.prompts import Phrasing, Voice

WAVEFORM_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".sph", *FFMPEG_SUFFIXES)
AUDIO_SUFFIXES = (*WAVEFORM_SUFFIXES, *CODE_SUFFIXES)
# Folders of clips that tables name without a folder, and folders that never name a speaker.
AUDIO_FOLDERS = ("clips", "wavs", "wav", "audio", "audios", "flac", "mp3")
KINDS_OF_FILES = (
    "wav|flac|mp3|ogg|opus|txt|text|lab|label|transcript|transcription|audio|clip|data|dataset|recording|segment|corpus"
)
STORAGE = re.compile(rf"({KINDS_OF_FILES})s?([\d_.\-].*)?", re.IGNORECASE)
SPLIT = re.compile(
    r"(train|training|dev|test|val|valid|validation|validated|eval|evaluation)([-_]?(clean|other|set|data|split|\d+))*",
    re.IGNORECASE,
)
NOBODY = {"", "-", "?", "n/a", "nan", "none", "null", "unknown", "unk", "speaker"}  # what tables write for "no speaker"
# Names of columns and keys, in order of preference; upper and lower case are the same.
COLUMNS = {
    "audio": (
        *("audio", "audio_file", "audio_path", "audio_filepath", "audio_url", "file_name", "wav", "wav_path", "wav_file"),
        *("path", "filepath", "file", "filename", "wav_filename", "source"),
    ),
    "text": (
        *("text_normalized", "normalized_text", "normalised_text", "text", "transcript", "raw_transcription", "transcription"),
        *("sentence", "raw_text", "txt", "target"),
    ),
    "text_file": ("transcript_file", "transcript_path", "text_file", "txt_file"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "speaker_name", "client_id"),
    "ref_audio": ("ref_audio", "ref_audio_file", "ref_audio_path", "reference_audio", "prompt_audio", "ref_wav", "prompt_wav"),
    "ref_text": ("ref_text", "ref_transcript", "reference_text", "prompt_text"),
    "ref_text_file": ("ref_transcript_file", "ref_text_file"),
    "scene": ("scene",),
    "system": ("system",),
    "offset": ("offset", "start", "start_sec", "start_time"),
    "end": ("end", "end_sec", "end_time"),
    "duration": ("duration", "duration_sec"),
    "channel": ("channel",),
    "ref_speakers": ("ref_speakers",),
    "id": ("id", "utt_id", "sample_id"),
    "split": ("split",),
}


DEFAULT_PHRASING = Phrasing()
MAX_TRANSCRIPT_BYTES = 2**20  # of a file that holds one text
MAX_SEC_PARTS = 3  # hours, minutes, seconds


class MissingTextError(DataError):
    """A row without a text."""


@dataclass(frozen=True)
class Reading:
    """How rows are to be read; the flags of `add_reading_arguments`."""

    columns: dict[str, str] = field(default_factory=dict)
    speaker: str = ""
    speaker_from: int | re.Pattern | None = None
    audio_root: Path | None = None
    skip_missing_text: bool = False
    split: str = ""
    normalize: bool = True
    phrasing: Phrasing | None = DEFAULT_PHRASING  # None: a row without scene and reference gets no system turn
    unpack_to: Path | None = None  # a folder for audio that is inside other files
    allow_outside: tuple[Path, ...] = ()  # folders that texts may come from, beside the dataset's own


DEFAULT_READING = Reading()


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how rows are read (ChatML is never changed)").add_argument
    add(
        "--columns",
        default="",
        help="audio=wav_filename,text=transcript,speaker=voice; numbers in a table without header; =none",
    )
    add("--speaker", default="", metavar="NAME", help="the speaker of all clips")
    add(
        "--speaker_from",
        default="",
        metavar="HOW",
        help="folder:1 of the clip's path (-1: the last), or regex:PATTERN with a group",
    )
    add(
        "--audio_root",
        type=Path,
        metavar="DIR",
        help="audio paths start here, and absolute ones that are gone are looked for here",
    )
    add(
        "--allow_outside",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="texts may come from here too; links out of the dataset's folder are refused otherwise",
    )
    add("--missing_text", choices=("error", "skip"), default="error", help="for rows without a text")
    add("--split", default="", help="read only this split")
    add("--normalize", choices=("yes", "no"), default="yes", help="change texts as upstream's example does")
    add("--scene_share", type=float, default=Phrasing.scene_share, help="share of records with the official scene")
    add("--system_share", type=float, default=Phrasing.system_share, help="share of references in the system turn")


def reading_of(args: argparse.Namespace, unpack_to: Path | None = None) -> Reading:
    """raises: ConfigError for an impossible flag"""
    columns = {name.strip(): column.strip() for name, _, column in (item.partition("=") for item in split_list(args.columns))}
    if not all(name in COLUMNS and column for name, column in columns.items()):
        raise ConfigError(f"--columns {args.columns}: expected audio=COLUMN,text=COLUMN; the names are {', '.join(COLUMNS)}")
    if args.audio_root and not args.audio_root.is_dir():
        raise ConfigError(f"--audio_root {args.audio_root}: no such folder")
    if not (0 <= args.scene_share <= 1 and 0 <= args.system_share <= 1):
        raise ConfigError("--scene_share and --system_share are between 0 and 1")
    return Reading(
        columns,
        args.speaker,
        _speaker_from(args.speaker_from),
        args.audio_root,
        args.missing_text == "skip",
        args.split,
        args.normalize == "yes",
        Phrasing(args.scene_share, args.system_share, getattr(args, "seed", 0)),
        unpack_to,
        tuple(args.allow_outside),
    )


def _speaker_from(spec: str) -> int | re.Pattern | None:
    """The number of a folder, or a pattern. raises: ConfigError"""
    kind, _, rest = spec.partition(":")
    try:
        if not spec:
            return None
        if kind == "folder" and int(rest):
            return int(rest)
        if kind == "regex" and re.compile(rest).groups:
            return re.compile(rest)
    except (ValueError, re.error):
        pass
    raise ConfigError(f"--speaker_from {spec}: expected folder:1, folder:-1, or regex:PATTERN with a group: 'regex:([^_]+)_'")


@dataclass
class Origin:
    """Where a record comes from, how it is read, and what was found and changed on the way."""

    source: str  # for messages
    folder: Path  # of the dataset
    reading: Reading = DEFAULT_READING
    repairs: Counter = field(default_factory=Counter)
    used: Counter = field(default_factory=Counter)  # (meaning, column)

    @property
    def root(self) -> Path:
        """Relative audio paths start here."""
        return self.reading.audio_root or self.folder


class Row:
    """A row of a table by the meaning of its columns."""

    def __init__(self, row: Any, origin: Origin):
        if not isinstance(row, dict):
            raise DataError(f"{origin.source}: expected an object with an audio and a text, found {shown(row)}")
        self.row, self.origin, self.columns = row, origin, columns_of(row, origin.reading.columns)

    def record(self) -> dict:
        """The ChatML record, with the row's `id` beside it. raises: DataError, MissingTextError"""
        written, clip, speaker = self.text("text"), self.clip("audio"), self.speaker()
        if not written:
            remedy = f"expected a column of {names_of('text')}"
            if "text_file" in self.columns:
                remedy = f"{self.get('text_file')} is empty; write it, or leave it out by prepare convert --missing_text skip"
            elif has_empty_text(self.row):
                remedy = "write it (a .jsonl: bash launch.sh prepare transcribe FILE), or leave it out by prepare convert --missing_text skip"
            raise MissingTextError(f"{self.origin.source}: no text; {remedy}")
        reading, misc = self.origin.reading, self.rest()
        text = prompts.normalise(written) if reading.normalize else written
        if text != written:
            misc.setdefault("text", written)
            self.origin.repairs["texts were changed as upstream's example does (--normalize no leaves them)"] += 1
        voices, scene, system = self.voices(), self.plain("scene") or "", self.plain("system")
        if system is None and reading.phrasing:
            voices, scene = reading.phrasing.choose(f"{text} {clip['audio_url']}", voices, scene)
        elif not voices and not scene:
            system = system or ""
        try:
            record = prompts.record(text, clip | self.span(), voices, scene, system, speaker)
        except DataError as error:
            raise DataError(f"{self.origin.source}: {error}") from None
        if "id" in self.columns:
            record["id"] = str(self.get("id"))
        for name in ("audio", "text" if "text" in self.columns else "text_file", "speaker"):
            self.origin.used[name, self.columns.get(name)] += 1
        return record | ({"misc": misc} if misc else {})

    def get(self, name: str) -> Any:
        return self.row[self.columns[name]] if name in self.columns else None

    def where(self, name: str) -> str:
        return f"{self.origin.source}: {self.columns[name]}"

    def text(self, name: str) -> str | None:
        """The text in a column, or in the file that its companion column names."""
        value = self.get(name)
        if value is None and f"{name}_file" in self.columns:
            value = _text_file(self.get(f"{name}_file"), self.where(f"{name}_file"), self.origin)
        if not isinstance(value, (str, int, float, type(None))):
            raise DataError(f"{self.where(name)}: expected text, found {shown(value)}")
        text = "" if value is None else str(value).strip()
        if name == "ref_text" and text and self.row.get("speaker_tag"):
            text = f"{self.row['speaker_tag']} {text}"
        return text or None

    def plain(self, name: str) -> str | None:
        value = self.get(name)
        if not isinstance(value, (str, type(None))):
            raise DataError(f"{self.where(name)}: expected text, found {shown(value)}")
        return value

    def speaker(self) -> str | None:
        value, reading = self.get("speaker"), self.origin.reading
        if not isinstance(value, (str, int, float, type(None))):
            raise DataError(f"{self.where('speaker')}: expected a name, found {shown(value)}")
        if reading.speaker:
            return reading.speaker
        if reading.speaker_from is not None:
            return _speaker_in_path(self.get("audio"), reading.speaker_from, self.origin.source)
        name = "" if value is None else str(value).strip()
        if name and (name.lower() in NOBODY or STORAGE.fullmatch(name) or SPLIT.fullmatch(name)):
            self.origin.repairs[f"{name!r} is not the name of a speaker: left out"] += 1
            return None
        return name or None

    def clip(self, name: str) -> dict:
        if name not in self.columns:
            raise DataError(f"{self.origin.source}: no {name}; expected a column of {names_of(name)}")
        return audio_part(self.get(name), self.where(name), self.origin)

    def span(self) -> dict[str, float]:
        """`offset` and `duration` of the clip. A duration alone describes the file and cuts nothing."""
        if "offset" not in self.columns and "end" not in self.columns:
            return {}
        names = [name for name in ("offset", "end", "duration") if name in self.columns]
        sec = {name: _seconds(self.get(name), self.where(name)) for name in names}
        if "end" in sec:
            sec["duration"] = round(sec.pop("end") - sec.setdefault("offset", 0.0), 6)
        return sec

    def voices(self) -> list[Voice]:
        """The references in this row, and in the objects of its `ref_speakers`."""
        clips, texts = self.listed("ref_audio"), self.listed("ref_text")
        as_part = lambda clip: audio_part(clip, self.where("ref_audio"), self.origin)  # noqa: E731
        voices = prompts.voices_of(clips, texts, as_part, self.origin.source)
        several = self.get("ref_speakers") or []
        if not isinstance(several, list):
            raise DataError(f"{self.where('ref_speakers')}: expected a list, found {shown(several)}")
        for number, value in enumerate(several):
            row = Row(value, replace(self.origin, source=f"{self.origin.source}: ref_speakers[{number}]"))
            row.clip("ref_audio")  # it has to have one
            voices += row.voices()
        return voices

    def listed(self, name: str) -> list:
        value = self.get(name)
        if isinstance(value, list):
            return value
        value = self.text(name) if name == "ref_text" else value
        return [] if value is None else [value]

    def rest(self) -> dict:
        """The simple values of columns without a meaning, the split and the channel."""
        meant = set(self.columns.values())
        extra = {name: v for name, v in self.row.items() if name not in meant and not is_absent(v)}
        extra |= {name: self.get(name) for name in ("split", "channel") if name in self.columns}
        kept = {name: v for name, v in extra.items() if isinstance(v, (str, int, float))}
        self.origin.repairs.update(f"`{name}` was left out" for name in extra if name not in kept)
        return kept


def names_of(meaning: str) -> str:
    """The column names of a meaning, the usual ones first; or others, given by --columns."""
    return ", ".join(sorted(COLUMNS[meaning], key=lambda name: "normal" in name)) + f", or --columns {meaning}=COLUMN"


def columns_of(row: dict, given: dict[str, str] | None = None) -> dict[str, str]:
    """Meaning -> the row's key for it, among the keys that have a value. given: --columns"""
    return _meanings(tuple(key for key, value in row.items() if not is_absent(value)), tuple((given or {}).items()))


@functools.lru_cache(maxsize=1000)
def _meanings(present: tuple[Any, ...], given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    keys = {str(key).strip().lower(): key for key in present}
    found = {name: keys[alias] for name, aliases in COLUMNS.items() for alias in reversed(aliases) if alias in keys}
    for name, column in given:
        found.pop(name, None)
        if column.lower() in keys:
            found[name] = keys[column.lower()]
    return found


def has_empty_text(row: dict) -> bool:
    return any(is_absent(value) for key, value in row.items() if str(key).strip().lower() in COLUMNS["text"])


def is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _seconds(value: Any, where: str) -> float:
    """Seconds, or hours, minutes and seconds as 1:02:03.5 (SRT: 01:02:03,5)."""
    try:
        *larger, sec = str(value).replace(",", ".").split(":", MAX_SEC_PARTS - 1)
        total = sum(60**power * int(part) for power, part in enumerate(reversed(larger), 1)) + float(sec)
        if not math.isfinite(total):
            raise ValueError(value)
        return total
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: expected seconds, found {shown(value)}") from None


def _speaker_in_path(audio: Any, how: int | re.Pattern, source: str) -> str:
    path = PurePath(str(audio.get("path") if isinstance(audio, dict) else audio).replace("\\", "/"))
    if isinstance(how, re.Pattern):
        found = how.search(path.as_posix())
        if found and found[1]:
            return found[1]
        raise DataError(f"{source}: --speaker_from regex:{how.pattern} does not match {path}")
    folders = [name for name in path.parts[:-1] if name != "/"]
    try:
        return folders[how - 1 if how > 0 else how]
    except IndexError:
        raise DataError(f"{source}: --speaker_from folder:{how}, but {path} has {len(folders)} folders") from None


def _text_file(name: Any, where: str, origin: Origin) -> str:
    path = origin.folder / str(name)
    try:
        check_inside(path, origin.folder, origin.reading)
        if path.stat().st_size > MAX_TRANSCRIPT_BYTES:
            raise OSError(f"{path.stat().st_size} bytes are too many for one text")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {path} cannot be read as UTF-8 text: {error}") from None


def check_inside(path: Path, folder: Path, reading: Reading = DEFAULT_READING) -> None:
    """OSError unless this is a regular file that a dataset in `folder` may take texts from, after links were followed.

    Otherwise a stranger's dataset could make a transcript of any file of this machine. A Hub cache keeps the files of one
    repository in its folders snapshots/ and blobs/.
    """
    if path.exists() and not path.is_file():  # a device or a pipe could be read for ever
        raise OSError("it is no regular file")
    real, root = path.resolve(), folder.resolve()
    cached = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    repository = [parent for parent in cached if parent.name.startswith(("datasets--", "models--", "spaces--"))]
    roots = [root, *repository, *(path.resolve() for path in (reading.audio_root, *reading.allow_outside) if path)]
    if not any(real.is_relative_to(root) for root in roots):
        raise OSError("it leaves the dataset's folder; move it there, or name its folder with --allow_outside DIR")
    if not path.exists():
        raise OSError("there is no such file")


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
        return {
            "type": "audio",
            "audio_url": find_audio(value, origin.root, origin.repairs, origin.reading.audio_root) or value,
        }
    except (OSError, ValueError):  # a name the file system cannot hold
        raise DataError(f"{where}: {shown(value)} is not a path") from None


def find_audio(name: str, root: Path, repairs: Counter, moved_to: Path | None = None) -> str | None:
    """The path of the file that a table names, from `root` or absolute; None if there is no such file.

    moved_to: where the file may be if an absolute path is gone
    """
    if (root / name).is_file():
        return name
    if "\\" in name:
        return find_audio(name.replace("\\", "/"), root, repairs, moved_to)
    for place in AUDIO_FOLDERS:
        if not leaves_folder(name) and (root / place / name).is_file():
            repairs[f"clips were found in {place}/"] += 1
            return os.path.join(place, name)
    parts = PurePath(name).parts
    for first in range(1, len(parts)) if moved_to else ():
        if (moved_to / Path(*parts[first:])).is_file():
            repairs["paths were found again below --audio_root"] += 1
            return os.path.join(*parts[first:])
    if Path(name).is_file():
        repairs["paths that started from the working directory are absolute now"] += 1
        return os.path.abspath(name)
    return None
