"""Any common form of dataset -> ChatML records, as manifest.py describes them.

    messages      JSON or JSONL of chats: `<audio>` tags with an `audios` list (ms-swift), `input_audio` and `audio_url` parts
                  (OpenAI), `conversations` with from / value (ShareGPT)
    samples       a metadata.json whose `samples` name audio_file, transcript_file, speaker_id, ref_audio_file, ref_speakers, ...
    LJSpeech      metadata.csv with `id|text|normalised text`, clips in wavs/
    audio folder  metadata.jsonl or metadata.csv with `file_name` and a transcript, as Hugging Face datasets writes them
    Kaldi         wav.scp and text, and where they exist utt2spk and segments
    pairs         a folder of x.wav (flac, ogg, mp3) beside x.txt; subfolders are speakers
    table         CSV, TSV, JSON or JSONL rows whose columns have familiar names (see COLUMNS): Common Voice, NeMo, ...

A row becomes a user turn with the text and an assistant turn with the audio; a reference becomes an earlier exchange that does
not train or, without its text, part of the system turn: both as the official inference phrases them. Whatever is changed on
the way is counted, and only done where the intent is certain.

    python forms.py PATH      # which form it is, and its first record
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from common import DataError
from prepare import prompts
from prepare.manifest import Manifest, leaves_folder, parse_json, read_manifest, report_problems
from prepare.prompts import Voice

FORMS = "\n  ".join(
    [
        "ChatML JSON or JSONL ({'messages': ...}); also with `audios`, `input_audio`, `audio_url` parts, or `conversations`",
        "metadata.json with `samples` (audio_file, transcript_file, ...)",
        "LJSpeech metadata.csv (id|text)",
        "metadata.jsonl or metadata.csv with `file_name` and a transcript",
        "Kaldi wav.scp + text",
        "a folder of x.wav + x.txt",
        "CSV, TSV, JSON or JSONL rows with an audio and a text column",
    ]
)
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
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
RECORD_KEYS = ("messages", "start_index", "speaker", "misc")
TURN_KEYS = ("role", "content", "recipient")
LOSS_KEYS = ("loss", "weight")  # of turns: whether they train, as ms-swift and OpenAI say it
FOREIGN_KEYS = ("audio", "path", "url")  # of audio parts
PEEKED_BYTES = 10_000_000  # a JSONL file is judged by so much of its beginning


@dataclass
class Conversion:
    """What a dataset was recognised as, and its records."""

    form: str
    folder: Path  # what relative audio paths start from
    records: Iterable[tuple[str, dict]] = ()  # (where it stood, ChatML); made while they are read, once
    num_records: int = 0  # of the manifest that `open_manifest` made of them
    repairs: Counter[str] = field(default_factory=Counter)  # complete when the records have been read, as are:
    problems: list[str] = field(default_factory=list)  # with the records that are not among `records`


def open_manifest(path: str | Path, tolerant: bool = False) -> tuple[Manifest, Conversion | None]:
    """The records of a dataset in any known form, and how they were converted where they had to be.

    tolerant: leave out records that cannot be converted; `Conversion.problems` tells about them
    raises: DataError naming file, record, field and remedy; for an unknown form it lists the known ones and what was found
    """
    path = Path(path)
    if recognise(path) is None:
        return read_manifest(path), None
    conversion = convert(path)
    manifest = Manifest.of_values(path, conversion.folder, conversion.records)
    conversion.num_records = len(manifest)
    if not (tolerant and manifest):
        report_problems(conversion.problems)
    if not manifest:
        raise DataError(f"{path}: {conversion.form} without any record")
    return manifest, conversion


def recognise(path: str | Path) -> str | None:
    """The name of the form, or None for ChatML that needs no conversion.

    raises: DataError for a path that does not exist or an unknown form
    """
    return _reader(Path(path))[0]


def convert(path: str | Path) -> Conversion:
    """Recognise a dataset in any known form, ChatML included; its records are read and converted one by one.

    raises: DataError if it cannot be read at all; what is wrong with single records is in `Conversion.problems`
    """
    path = Path(path)
    form, read = _reader(path)
    conversion = Conversion(form or "ChatML", path if path.is_dir() else path.parent)
    conversion.records = _make_records(read(path), conversion)
    return conversion


def _make_records(found: Iterable[tuple[str, Callable]], conversion: Conversion) -> Iterator[tuple[str, dict]]:
    seen: dict[str, str] = {}
    for source, make in found:
        repairs: Counter[str] = Counter()
        try:
            value = make(repairs)
            identity = value.pop("id", None)
            if identity is not None and seen.setdefault(identity, source) != source:
                raise DataError(f"{source}: id {identity!r} was used before, at {seen[identity]}; give each sample its own")
        except DataError as error:
            conversion.problems.append(str(error))
        else:
            conversion.repairs += repairs
            yield source, value


# A reader yields (where a record stands, function that makes it and counts repairs); the function raises DataError.
Reader = Callable[[Path], Iterator[tuple[str, Callable[[Counter], dict]]]]


def _reader(path: Path) -> tuple[str | None, Reader]:
    if path.is_dir():
        return _folder_reader(path)
    if not path.is_file():
        raise DataError(f"{path}: no such manifest file or folder")
    if path.name == "wav.scp":
        return "Kaldi", lambda path: _read_kaldi(path.parent)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _table_reader(path)
    first = _peek_json(path)
    if isinstance(first, dict) and isinstance(first.get("samples"), list):
        return "samples", _read_samples
    values = first if isinstance(first, list) else [first]
    objects = [value for value in values if isinstance(value, dict)]
    chats = [value for value in objects if _chat_key(value)]
    if chats or not values:  # what is broken in it, or among it, its reader names
        return (None if all(map(_is_chatml, chats)) else "messages"), _read_messages
    if objects and "audio" in _columns(objects[0]):
        return "table", _read_json_rows
    raise _unknown(path, f"keys {sorted(map(str, objects[0]))}" if objects else _shown(values[:1]))


def _folder_reader(folder: Path) -> tuple[str, Reader]:
    names = sorted(os.listdir(folder))
    if "metadata.json" in names:
        return "samples", lambda path: _read_samples(path / "metadata.json")
    if "wav.scp" in names:
        return "Kaldi", _read_kaldi
    if "metadata.jsonl" in names:
        return "audio folder", lambda path: _read_json_rows(path / "metadata.jsonl")
    if "metadata.csv" in names:
        form, read = _table_reader(folder / "metadata.csv")
        return "audio folder" if form == "table" else form, lambda path: read(path / "metadata.csv")
    if any(path.with_suffix(".txt").is_file() for path in _audio_files(folder)):
        return "pairs", _read_pairs
    raise _unknown(folder, f"files {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}" if names else "an empty folder")


def _table_reader(path: Path) -> tuple[str, Reader]:
    first = next(iter(_lines(path)), (1, ""))[1]
    header = [name.strip().strip('"') for name in re.split(r"[|,;\t]", first)]
    columns = _columns(dict.fromkeys(header, True))
    if "audio" in columns and ("text" in columns or "text_file" in columns):
        return "table", _read_table
    if first.count("|") in (1, 2):
        return "LJSpeech", _read_ljspeech
    raise _unknown(path, f"a first line of {_shown(header)}")


def _unknown(path: Path, found: str) -> DataError:
    return DataError(f"{path}: not a form of dataset known here: found {found}. Known forms:\n  {FORMS}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> records


class _Row:
    """A row of a table by what its columns mean. source: where it stands; folder: what its paths start from"""

    def __init__(self, row: Any, source: str, folder: Path, repairs: Counter):
        if not isinstance(row, dict):
            raise DataError(f"{source}: expected an object with an audio and a text, found {_shown(row)}")
        self.row, self.source, self.folder, self.repairs = row, source, folder, repairs
        self.columns = _columns(row)

    def record(self) -> dict:
        """The ChatML record; its `id` is not part of that yet."""
        text, clip, speaker = self.text("text"), self.clip("audio"), self.get("speaker")
        if not text:
            raise DataError(f"{self.source}: no text; expected a column of {', '.join(COLUMNS['text'])}")
        if not isinstance(speaker, (str, int, float, type(None))):
            raise DataError(f"{self.source}: {self.columns['speaker']}: expected a name, found {_shown(speaker)}")
        voices = [Voice(voice.clip("ref_audio"), voice.text("ref_text")) for voice in self.voices()]
        system = None if voices else ""
        record = prompts.record(
            text, clip | self.span(), voices, system=system, speaker=None if speaker is None else str(speaker)
        )
        if "id" in self.columns:
            record["id"] = str(self.get("id"))
        misc = self.rest()
        return record | ({"misc": misc} if misc else {})

    def get(self, name: str) -> Any:
        return self.row[self.columns[name]] if name in self.columns else None

    def text(self, name: str) -> str | None:
        """The text of a column, or of the file that its companion names."""
        value = self.get(name)
        if value is None and f"{name}_file" in self.columns:
            value = _text_file(self.get(f"{name}_file"), f"{self.source}: {self.columns[f'{name}_file']}", self.folder)
        if not isinstance(value, (str, int, float, type(None))):
            raise DataError(f"{self.source}: {self.columns[name]}: expected text, found {_shown(value)}")
        words = "" if value is None else str(value).strip()
        if name == "ref_text" and words and self.row.get("speaker_tag"):
            words = f"{self.row['speaker_tag']} {words}"
        return words or None

    def clip(self, name: str) -> dict:
        if name not in self.columns:
            raise DataError(f"{self.source}: no {name}; expected a column of {', '.join(COLUMNS[name])}")
        return audio_part(self.get(name), f"{self.source}: {self.columns[name]}", self.folder, self.repairs)

    def span(self) -> dict[str, float]:
        """`offset` and `duration` of the clip; a duration alone describes the file, it does not cut it."""
        if "offset" not in self.columns and "end" not in self.columns:
            return {}
        names = [name for name in ("offset", "end", "duration") if name in self.columns]
        sec = {name: _seconds(self.get(name), f"{self.source}: {self.columns[name]}") for name in names}
        if "end" in sec:
            sec["duration"] = sec.pop("end") - sec.setdefault("offset", 0.0)
        return sec

    def voices(self) -> Iterator[_Row]:
        """The rows, or objects in this row, that name a reference."""
        if "ref_audio" in self.columns:
            yield self
        several = self.get("ref_speakers") or []
        if not isinstance(several, list):
            raise DataError(f"{self.source}: ref_speakers: expected a list, found {_shown(several)}")
        for number, voice in enumerate(several):
            yield _Row(voice, f"{self.source}: ref_speakers[{number}]", self.folder, self.repairs)

    def rest(self) -> dict:
        """What the columns without a meaning hold, as far as it is simple."""
        extra = {name: v for name, v in self.row.items() if name not in self.columns.values() and not _is_absent(v)}
        kept = {name: v for name, v in extra.items() if isinstance(v, (str, int, float))}
        self.repairs.update(f"`{name}` was left out" for name in extra if name not in kept)
        return kept


def _columns(row: dict) -> dict[str, str]:
    """Meaning -> the row's key for it, of those that have a value."""
    keys = {str(key).strip().lower(): key for key, value in row.items() if not _is_absent(value)}
    return {name: keys[alias] for name, aliases in COLUMNS.items() for alias in reversed(aliases) if alias in keys}


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _seconds(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: expected seconds, found {_shown(value)}") from None


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


def audio_part(value: Any, where: str, folder: Path, repairs: Counter) -> dict:
    """A ChatML audio part from a path, a file: or data: URL, or an object that holds one."""
    if isinstance(value, dict):
        if isinstance(value.get("data"), str):  # OpenAI's input_audio
            return {"type": "audio", "audio_url": "", "raw_audio": value["data"].rpartition("base64,")[2]}
        value = next((value[key] for key in ("path", "url", "audio_url", "audio") if value.get(key)), None)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: expected a path to audio, found {_shown(value)}")
    if value.startswith("data:"):
        return {"type": "audio", "audio_url": "", "raw_audio": value.rpartition("base64,")[2]}
    if re.match(r"https?://", value):
        raise DataError(f"{where}: {value} is on the network; download it and give the file's path")
    if value.startswith("file://"):
        value = unquote(urlparse(value).path)
    try:
        return {"type": "audio", "audio_url": _find_file(value, folder, repairs)}
    except (OSError, ValueError):  # a name the file system cannot hold
        raise DataError(f"{where}: {_shown(value)} is not a path") from None


def _find_file(name: str, folder: Path, repairs: Counter) -> str:
    """The path that leads to the file from `folder`; where there is no such file, the name: the parser will say so."""
    if (folder / name).is_file():
        return name
    for place in AUDIO_FOLDERS:
        if not leaves_folder(name) and (folder / place / name).is_file():
            repairs[f"clips were found in {place}/"] += 1
            return os.path.join(place, name)
    if Path(name).is_file():
        repairs["paths that started from the working directory are absolute now"] += 1
        return os.path.abspath(name)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Chats


def _chat_key(value: dict) -> str | None:
    return next((key for key in ("messages", "conversations", "conversation") if key in value), None)


def _is_chatml(value: dict) -> bool:
    """Whether a record shows no sign of another form; one that is broken is its own reader's to name."""
    if _chat_key(value) != "messages" or any(name in value for name in ("audios", "audio", "system")):
        return False
    if not isinstance(value["messages"], list):
        return True
    for turn in value["messages"]:
        if not isinstance(turn, dict):
            continue
        if set(turn) - set(TURN_KEYS) or _plain_role(turn.get("role")) != turn.get("role"):
            return False
        content = turn.get("content")
        if any(_is_foreign(part) for part in (content if isinstance(content, list) else [content])):
            return False
    return True


def _is_foreign(part: Any) -> bool:
    """Whether a content part names its audio in another form's way."""
    if not isinstance(part, dict):
        return False
    kind, named = part.get("type"), "audio_url" in part or "raw_audio" in part
    return kind in ("input_audio", "audio_url") or (kind == "audio" and not named and any(k in part for k in FOREIGN_KEYS))


def _plain_role(role: Any) -> Any:
    if not isinstance(role, str):
        return role
    lowered = role.strip().lower()
    return ROLE_NAMES.get(lowered, lowered)


def _read_messages(path: Path) -> Iterator:
    for source, value in _read_values(path):
        yield source, lambda repairs, v=value, s=source: _from_chat(v, s, path.parent, repairs)


def _from_chat(value: Any, source: str, folder: Path, repairs: Counter) -> dict:
    key = _chat_key(value) if isinstance(value, dict) else None
    if key is None or not isinstance(value[key], list) or not all(isinstance(turn, dict) for turn in value[key]):
        raise DataError(f"{source}: messages: expected a list of turns, found {_shown(value)}")
    audios = value.get("audios") or value.get("audio") or []
    audios = list(audios) if isinstance(audios, list) else [audios]
    clips = [audio_part(audio, f"{source}: audios[{i}]", folder, repairs) for i, audio in enumerate(audios)]
    turns = _single_turns(value[key], repairs)
    start = _first_that_trains(turns, value.get("start_index"), f"{source}: {key}", repairs)
    messages = [_turn(turn, f"{source}: {key}[{i}]", folder, repairs) for i, turn in enumerate(turns)]
    if isinstance(value.get("system"), str):
        messages.insert(0, {"role": "system", "content": value["system"]})
        repairs["`system` beside the messages became a system turn"] += 1
    if clips:
        messages = _place_clips(messages, clips, source, repairs)
    num_inserted = len(messages) - len(turns)  # all of them before the first that trains
    if num_inserted and type(start) in (int, float):
        start += num_inserted
    record: dict[str, Any] = {"messages": messages}
    record |= {name: v for name, v in (("start_index", start), ("speaker", value.get("speaker"))) if not _is_absent(v)}
    misc = _misc_of(value, {*RECORD_KEYS, key, "audios", "audio", "system"}, source, repairs)
    return record | ({"misc": misc} if misc else {})


def _misc_of(value: dict, known: set[str], source: str, repairs: Counter) -> dict:
    """`misc`, and what is neither it nor known."""
    extra = {name: v for name, v in value.items() if name not in known and not _is_absent(v) and v not in ([], {})}
    if any(extra.get(name) for name in ("images", "videos")):
        raise DataError(f"{source}: images and videos are nothing this model reads; leave the record out")
    misc = {} if _is_absent(value.get("misc")) else value["misc"]
    if not isinstance(misc, dict):
        raise DataError(f"{source}: misc: expected an object, found {_shown(misc)}")
    kept = {name: v for name, v in extra.items() if isinstance(v, (str, int, float))}
    repairs.update(f"`{name}` was left out" for name in extra if name not in kept)
    repairs.update(f"`{name}` went to `misc`" for name in kept)
    return misc | kept


def _single_turns(turns: Sequence[dict], repairs: Counter) -> list[dict]:
    """Turns of their own, also where one object holds a question and its answer."""
    single = []
    for turn in turns:
        if set(turn) == {"human", "assistant"}:
            repairs["human / assistant pairs became turns"] += 1
            single += [{"role": role, "content": turn[name]} for role, name in (("user", "human"), ("assistant", "assistant"))]
        else:
            single.append(turn)
    return single


def _first_that_trains(turns: Sequence[dict], start: Any, where: str, repairs: Counter) -> Any:
    """`start_index`, also where turns say by themselves whether they train; anything impossible stays for the parser."""
    silent = [i for i, turn in enumerate(turns) if any(turn.get(key) in (False, 0) for key in LOSS_KEYS)]
    silent = [i for i in silent if _plain_role(turns[i].get("role", turns[i].get("from"))) == "assistant"]
    if not silent:
        return start
    for i, turn in enumerate(turns[: silent[-1]]):
        if i not in silent and _plain_role(turn.get("role", turn.get("from"))) == "assistant":
            raise DataError(
                f"{where}[{silent[-1]}]: `loss` is off here but not in turn {i}; only the beginning of a record can be left out "
                "of the loss: split the record"
            )
    repairs["turns whose `loss` is off stand before `start_index` now"] += len(silent)
    return max(silent[-1] + 1, start if isinstance(start, int) else 0)


def _turn(turn: dict, where: str, folder: Path, repairs: Counter) -> dict:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if "role" not in turn and "from" in turn:
        repairs["from / value became role / content"] += 1
    plain = _plain_role(role)
    if plain != role:
        repairs[f"role {_shown(role)} became {_shown(plain)}"] += 1
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{i}]", folder, repairs) for i, part in enumerate(content)]
    elif isinstance(content, dict):
        content = _part(content, f"{where}.content", folder, repairs)
    known = ("role", "content", *(("from", "value") if "from" in turn else ()), *LOSS_KEYS)
    rest = {name: v for name, v in turn.items() if name not in known and not _is_absent(v) and v not in ([], {})}
    return {"role": plain, "content": content} | rest  # what is not known is the parser's to name


def _part(part: Any, where: str, folder: Path, repairs: Counter) -> Any:
    """A content part in ChatML; one that is ChatML already, or unknown, is left as it is."""
    kind = part.get("type") if isinstance(part, dict) else None
    if _is_foreign(part):
        value = next((part[key] for key in (kind, *FOREIGN_KEYS) if part.get(key)), None)
        repairs[f"`{kind}` parts became audio parts"] += 1
        timing = {name: part[name] for name in ("offset", "duration") if not _is_absent(part.get(name))}
        return audio_part(value, where, folder, repairs) | timing
    return part


def _place_clips(messages: list[dict], clips: list[dict], source: str, repairs: Counter) -> list[dict]:
    """Put the clips of an `audios` list where the `<audio>` tags are."""
    num_tags = sum(text.count("<audio>") for turn in messages for text in _texts(turn["content"]))
    if num_tags == 0 and len(clips) == 1:
        return _place_single_clip(messages, clips[0], source, repairs)
    if num_tags != len(clips):
        raise DataError(f"{source}: {num_tags} <audio> tags but {len(clips)} audios; each clip needs the tag that says where")
    left = iter(clips)
    repairs["`<audio>` tags became audio parts"] += num_tags
    return [turn | {"content": _replace_tags(turn["content"], left)} for turn in messages]


def _place_single_clip(messages: list[dict], clip: dict, source: str, repairs: Counter) -> list[dict]:
    """One clip without a tag: where it belongs is certain if the last turn is the assistant's and says nothing of its own."""
    *before, last = messages or [{"role": None, "content": None}]
    said = last["content"] if isinstance(last["content"], str) else None
    asked = before[-1]["content"] if before and before[-1]["role"] == "user" else None
    if last["role"] == "assistant" and said and all(turn["role"] == "system" for turn in before):
        repairs["the transcript beside a clip became the user's turn, the clip the assistant's"] += 1
        return [*before, {"role": "user", "content": said}, last | {"content": clip}]
    if (
        last["role"] == "assistant"
        and said is not None
        and said.strip() in ("", asked.strip() if isinstance(asked, str) else "")
    ):
        repairs["the clip became the assistant's turn, which had no words of its own"] += 1
        return [*before, last | {"content": clip}]
    raise DataError(f"{source}: an audio but no <audio> tag; write <audio> where the clip belongs")


def _texts(content: Any) -> list[str]:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def _replace_tags(content: Any, clips: Iterator[dict]) -> Any:
    if isinstance(content, list):
        replaced = [_replace_tags(part, clips) for part in content]
        return [part for group in replaced for part in (group if isinstance(group, list) else [group])]
    text = content.get("text") if isinstance(content, dict) else content
    if not isinstance(text, str) or "<audio>" not in text:
        return content
    parts: list[dict] = []
    for number, piece in enumerate(text.split("<audio>")):
        parts += [next(clips)] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts if len(parts) > 1 else parts[0]


# ---------------------------------------------------------------------------------------------------------------------
# Readers: rows


def _rows(rows: Iterable[tuple[str, Any]], folder: Path) -> Iterator[tuple[str, Callable[[Counter], dict]]]:
    """rows: (where it stands, a row, or the problem there is instead of one)"""
    for source, row in rows:
        yield source, lambda repairs, r=row, s=source: _make_row(r, s, folder, repairs)


def _make_row(row: Any, source: str, folder: Path, repairs: Counter) -> dict:
    if isinstance(row, DataError):
        raise DataError(f"{source}: {row}")
    return _Row(row, source, folder, repairs).record()


def _read_samples(path: Path) -> Iterator:
    values = parse_json(_text(path), path, line=1)
    samples = values.get("samples") if isinstance(values, dict) else None
    if not isinstance(samples, list):
        raise DataError(f"{path}: no `samples` list in it; found {_shown(values)}")
    return _rows(((f"{path} sample {i}", row) for i, row in enumerate(samples)), path.parent)


def _read_json_rows(path: Path) -> Iterator:
    return _rows(_read_values(path), path.parent)


def _read_table(path: Path) -> Iterator:
    text = _text(path)
    header = next(line for line in text.split("\n") if line.strip())
    return _rows(_table_rows(path, text, max("|,;\t", key=header.count)), path.parent)


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict | DataError]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=_quoting(text, delimiter), strict=True)
    header, line = [], 1
    try:
        for values in reader:
            source, line = f"{path} line {line}", reader.line_num + 1
            if not any(values):
                continue
            if not header:
                header = [name.strip() for name in values]
            elif len(values) == len(header):
                yield source, {name: None if v in ("nan", "NaN") else v for name, v in zip(header, values)}
            else:
                remedy = f"a text that holds {delimiter!r} or a line break needs quotes"
                yield source, DataError(f"{len(values)} fields under a header of {len(header)}; {remedy}")
    except csv.Error as error:
        raise DataError(f"{path} line {line}: broken table: {error}; a quote inside a quoted text is written twice") from None


def _quoting(text: str, delimiter: str) -> int:
    """Whether quotes mean anything. Tables with tabs come both ways: Common Voice has them as mere characters, unpaired too."""
    if delimiter == "\t":
        try:
            widths = {len(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row}
        except csv.Error:
            return csv.QUOTE_NONE
        return csv.QUOTE_MINIMAL if len(widths) == 1 else csv.QUOTE_NONE
    return csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL


def _read_ljspeech(path: Path) -> Iterator:
    return _rows(((f"{path} line {number}", _ljspeech_row(line)) for number, line in _lines(path)), path.parent)


def _ljspeech_row(line: str) -> dict | DataError:
    """id|text or id|text|normalised text; the last is what was said."""
    name, *texts = line.split("|")
    is_path = Path(name).suffix.lower() in AUDIO_SUFFIXES
    said = [text for text in texts if text.strip()]
    if len(texts) > (1 if is_path else 2):  # a speaker, or an index of one, must not be taken for what was said
        return DataError(f"{len(texts) + 1} fields; say what they are in a first line such as audio|text|speaker")
    return {"audio": name if is_path else f"wavs/{name}.wav", "id": name} | ({"text": said[-1]} if said else {})


def _read_kaldi(folder: Path) -> Iterator:
    tables = {name: _kaldi_table(folder / name) for name in ("wav.scp", "text", "utt2spk", "segments")}
    for name in ("wav.scp", "text"):
        if not tables[name]:
            raise DataError(f"{folder / name}: missing or empty; a Kaldi folder has wav.scp and text")
    return _rows(_kaldi_rows(folder, tables), folder)


KaldiTable = dict[str, tuple[int, str]]  # key -> (line number, rest of the line)


def _kaldi_rows(folder: Path, tables: dict[str, KaldiTable]) -> Iterator[tuple[str, dict | DataError]]:
    for utterance, (line, said) in tables["text"].items():
        yield f"{folder / 'text'} line {line}", _kaldi_row(utterance, said, tables)
    listed = "segments" if tables["segments"] else "wav.scp"
    for utterance, (line, _) in tables[listed].items():
        if utterance not in tables["text"]:
            yield (
                f"{folder / listed} line {line}",
                DataError(f"{utterance!r} has no line in text; add it, or take this one out"),
            )


def _kaldi_row(utterance: str, said: str, tables: dict[str, KaldiTable]) -> dict | DataError:
    recording, span = utterance, {}
    if tables["segments"]:
        fields = tables["segments"].get(utterance, (0, ""))[1].split()
        if len(fields) < 3:
            return DataError(f"{utterance!r} has no line `utterance recording start end` in segments")
        recording, start, end = fields[:3]
        span = {"offset": start} | ({} if end.startswith("-") else {"end": end})  # -1: up to the recording's end
    audio = tables["wav.scp"].get(recording, (0, ""))[1]
    if not audio:
        return DataError(f"{recording!r} has no line in wav.scp")
    if audio.endswith("|"):
        return DataError(f"wav.scp gives a command for {recording!r}; commands are not run: write the audio to a file")
    return {"audio": audio, "text": said, "speaker": tables["utt2spk"].get(utterance, (0, None))[1], **span}


def _kaldi_table(path: Path) -> KaldiTable:
    """raises: DataError for a key that occurs twice"""
    table: KaldiTable = {}
    for number, line in _lines(path) if path.is_file() else ():
        key, rest = (line.split(maxsplit=1) + [""])[:2]
        if key in table:
            raise DataError(f"{path} line {number}: {key!r} was used before, in line {table[key][0]}; give each its own")
        table[key] = (number, rest.strip())
    return table


def _read_pairs(folder: Path) -> Iterator:
    return _rows(((str(path), _pair_row(path.relative_to(folder))) for path in _audio_files(folder)), folder)


def _pair_row(clip: Path) -> dict:
    speaker = clip.parts[0] if len(clip.parts) > 1 else None
    name = str(clip.with_suffix(""))  # as an id: two clips beside one text are a mistake
    return {"audio": str(clip), "text_file": f"{name}.txt", "speaker": speaker, "id": name}


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not blank."""
    return [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]


def _read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(source, decoded JSON) of each record of a JSON list or JSONL file."""
    manifest = read_manifest(path)
    return (manifest.value(index) for index in range(len(manifest)))


def _peek_json(path: Path) -> Any:
    """The value of a JSON file, or those of a JSONL file's first lines, up to PEEKED_BYTES; broken ones are left out."""
    try:
        with open(path, "rb") as file:
            head = file.read(PEEKED_BYTES) + file.readline()
            is_whole = not file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    text = head.decode("utf-8-sig", "replace")
    if text.lstrip()[:1] == "[":
        return [value for _, value in _read_values(path)]
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and not _decoded(lines[0]):
        for value in _decoded(text if is_whole else _text(path)):  # one object on several lines
            return value
    values = [value for line in lines for value in _decoded(line)]
    return values[0] if is_whole and len(lines) == len(values) == 1 else values


def _decoded(text: str) -> list[Any]:
    """The JSON value, or none."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise SystemExit("usage: python forms.py PATH")
    try:
        conversion = convert(argv[0])
        records = list(conversion.records)
        report_problems(conversion.problems)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{conversion.form}: {len(records)} records")
    for repair, count in conversion.repairs.most_common():
        print(f"  {count} x {repair}")
    for source, value in records[:1]:
        print(f"\n{source}\n{json.dumps(value, ensure_ascii=False, indent=2)}")


if __name__ == "__main__":
    main(sys.argv[1:])
