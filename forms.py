"""Any common form of dataset -> ChatML records, as manifest.py describes them.

    messages      JSON or JSONL of chats: `<audio>` tags with an `audios` list (ms-swift), `input_audio` and `audio_url` parts
                  (OpenAI), `conversations` with from / value (ShareGPT)
    samples       a metadata.json whose `samples` name audio_file, transcript_file, speaker_id, ref_audio_file, ...
    LJSpeech      metadata.csv with `id|text|normalised text`, clips in wavs/
    audio folder  metadata.jsonl or metadata.csv with `file_name` and a transcript, as Hugging Face datasets writes them
    Kaldi         wav.scp and text, and where they exist utt2spk and segments
    pairs         a folder of x.wav (flac, ogg, mp3) beside x.txt; subfolders are speakers
    table         CSV, TSV, JSON or JSONL rows whose columns have familiar names (see COLUMNS)

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from manifest import DataError, Manifest, parse_json, read_manifest, report_problems

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
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".npy", ".safetensors")
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
    "offset": ("offset", "start", "start_sec"),
    "duration": ("duration", "duration_sec"),
    "id": ("id", "utt_id", "sample_id"),
}
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
RECORD_KEYS = ("messages", "start_index", "speaker", "misc")
FOREIGN_KEYS = ("audio", "path", "url")  # of audio parts
PEEKED_BYTES = 10_000_000  # a JSONL file is judged by so much of its beginning


@dataclass
class Conversion:
    """What a dataset was recognised as, and its records."""

    form: str
    folder: Path  # what relative audio paths start from
    records: list[tuple[str, dict]] = field(default_factory=list)  # (where it stood, ChatML)
    repairs: Counter[str] = field(default_factory=Counter)
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
    if not tolerant:
        report_problems(conversion.problems)
    return Manifest.of_values(path, conversion.folder, conversion.records), conversion


def recognise(path: Path) -> str | None:
    """The name of the form, or None for ChatML that needs no conversion.

    raises: DataError for a path that does not exist or an unknown form
    """
    return _reader(Path(path))[0]


def convert(path: str | Path) -> Conversion:
    """Read a dataset in any known form, ChatML included.

    raises: DataError if it cannot be read at all; what is wrong with single records is in `Conversion.problems`
    """
    path = Path(path)
    form, read = _reader(path)
    conversion = Conversion(form or "ChatML", path if path.is_dir() else path.parent)
    seen: dict[str, str] = {}
    for source, make in read(path):
        try:
            value = make(conversion.repairs)
            identity = value.pop("id", None)
            if identity is not None and seen.setdefault(identity, source) != source:
                raise DataError(f"{source}: id {identity!r} was used before, at {seen[identity]}; give each sample its own")
            conversion.records.append((source, value))
        except DataError as error:
            conversion.problems.append(str(error))
    if not conversion.records:
        report_problems(conversion.problems)
        raise DataError(f"{path}: {form} without any record")
    return conversion


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
    if objects and _find(objects[0], "audio"):
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
    row = dict.fromkeys(header, "")
    if _find(row, "audio") and (_find(row, "text") or _find(row, "text_file")):
        return "table", _read_table
    if first.count("|") in (1, 2):
        return "LJSpeech", _read_ljspeech
    raise _unknown(path, f"a first line of {_shown(header)}")


def _unknown(path: Path, found: str) -> DataError:
    return DataError(f"{path}: not a form of dataset known here: found {found}. Known forms:\n  {FORMS}")


# ---------------------------------------------------------------------------------------------------------------------
# Records


def make_record(text: str, audio: dict, speaker: str | None = None, references: Sequence[tuple[str | None, dict]] = ()) -> dict:
    """A ChatML record that speaks `text` as `audio`, after references (their text, or None, and their audio).

    A reference with text is an earlier exchange, one without stands in the system turn: the official inference's phrasings.
    """
    exchanges = [pair for pair in references if pair[0] is not None]
    voices = [audio for words, audio in references if words is None]
    messages = [{"role": "system", "content": scene_with_voices(voices)}] if voices else []
    for words, clip in [*exchanges, (text, audio)]:
        messages += [{"role": "user", "content": words}, {"role": "assistant", "content": clip}]
    record: dict[str, Any] = {"messages": messages}
    if exchanges:
        record["start_index"] = len(messages) - 1
    return record | ({"speaker": speaker} if speaker else {})


def scene_with_voices(voices: Sequence[dict]) -> list[dict]:
    """The system turn that gives each speaker a voice, as content parts."""
    parts, before = [], "Generate audio following instruction.\n\n<|scene_desc_start|>\n"
    for number, voice in enumerate(voices):
        parts += [{"type": "text", "text": f"{before}SPEAKER{number}: "}, voice]
        before = "\n"
    return [*parts, {"type": "text", "text": "\n<|scene_desc_end|>"}]


def _from_row(row: dict, source: str, folder: Path, repairs: Counter) -> dict:
    """A record from the values of a row, by the names of its columns."""

    def get(name: str) -> Any:
        column = _find(row, name)
        return row[column] if column is not None else None

    def text_of(name: str) -> str | None:
        value = get(name)
        if value is None and get(f"{name}_file") is not None:
            path = folder / str(get(f"{name}_file"))
            try:
                value = path.read_text(encoding="utf-8-sig").strip()
            except (OSError, ValueError) as error:
                raise DataError(f"{source}: {name}_file: {path} cannot be read as UTF-8 text: {error}") from None
        if value is not None and not isinstance(value, (str, int, float)):
            raise DataError(f"{source}: {_find(row, name)}: expected text, found {_shown(value)}")
        return None if value is None else str(value).strip()

    text, audio = text_of("text"), get("audio")
    for name, value in (("text", text), ("audio", audio)):
        if value is None or value == "":
            raise DataError(f"{source}: no {name}; expected a column of {', '.join(COLUMNS[name])}")
    clip = audio_part(audio, f"{source}: {_find(row, 'audio')}", folder, repairs)
    if get("offset") is not None:  # a duration alone describes the file, it does not cut it
        clip |= {name: _seconds(get(name), f"{source}: {name}") for name in ("offset", "duration") if get(name) is not None}
    references = []
    if get("ref_audio") is not None:
        reference = audio_part(get("ref_audio"), f"{source}: {_find(row, 'ref_audio')}", folder, repairs)
        references = [(text_of("ref_text"), reference)]
    speaker = get("speaker")
    if not isinstance(speaker, (str, int, float, type(None))):
        raise DataError(f"{source}: {_find(row, 'speaker')}: expected a name, found {_shown(speaker)}")
    record = make_record(text, clip, None if speaker is None else str(speaker), references)
    known = {_find(row, name) for name in COLUMNS}
    misc = {name: v for name, v in row.items() if name not in known and isinstance(v, (str, int, float)) and v != ""}
    if get("id") is not None:
        record["id"] = str(get("id"))
    return record | ({"misc": misc} if misc else {})


def _find(row: dict, name: str) -> str | None:
    """The key of the row that means `name` and has a value."""
    lowered = {str(key).strip().lower(): key for key, value in row.items() if not _is_absent(value)}
    return next((lowered[column] for column in COLUMNS[name] if column in lowered), None)


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _seconds(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: expected seconds, found {_shown(value)}") from None


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
        if not (folder / value).is_file() and Path(value).is_file():
            repairs["paths that started from the working directory are absolute now"] += 1
            value = os.path.abspath(value)
    except (OSError, ValueError):  # a name the file system cannot hold
        raise DataError(f"{where}: {_shown(value)} is not a path") from None
    return {"type": "audio", "audio_url": value}


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
        if "from" in turn or _plain_role(turn.get("role")) != turn.get("role"):
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
    messages = [_turn(turn, f"{source}: {key}[{i}]", folder, repairs) for i, turn in enumerate(value[key])]
    if isinstance(value.get("system"), str):
        messages.insert(0, {"role": "system", "content": value["system"]})
        repairs["`system` beside the messages became a system turn"] += 1
    if clips:
        messages = _place_clips(messages, clips, source, repairs)
    record: dict[str, Any] = {"messages": messages}
    record |= {name: value[name] for name in ("start_index", "speaker") if not _is_absent(value.get(name))}
    extra = {
        n: v for n, v in value.items() if n not in (*RECORD_KEYS, key, "audios", "audio", "system") and v not in (None, [], {})
    }
    if any(extra.get(name) for name in ("images", "videos")):
        raise DataError(f"{source}: images and videos are nothing this model reads; leave the record out")
    misc = value.get("misc") if isinstance(value.get("misc"), dict) else {}
    kept = {name: v for name, v in extra.items() if isinstance(v, (str, int, float))}
    repairs.update(f"`{name}` was left out" for name in extra if name not in kept)
    repairs.update(f"`{name}` went to `misc`" for name in kept)
    return record | ({"misc": misc | kept} if misc or kept else {})


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
    return {"role": plain, "content": content} | ({"recipient": turn["recipient"]} if turn.get("recipient") else {})


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
    if last["role"] == "assistant" and said and not any(turn["role"] == "user" for turn in before):
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


def _rows(rows: Iterator[tuple[str, Any]], folder: Path) -> Iterator:
    for source, row in rows:
        yield source, lambda repairs, r=row, s=source: _from_row(_checked_row(r, s), s, folder, repairs)


def _checked_row(row: Any, source: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected an object with an audio and a text, found {_shown(row)}")
    return row


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
    first = text.split("\n", 1)[0]
    delimiter = max("|,;\t", key=first.count)
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "|" else 0
    )

    def rows() -> Iterator[tuple[str, dict]]:
        try:
            for row in reader:
                named = {name.strip(): v for name, v in row.items() if name is not None and v not in ("", "nan", "NaN", None)}
                yield f"{path} line {reader.line_num}", named
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: broken table: {error}") from None

    return _rows(rows(), path.parent)


def _read_ljspeech(path: Path) -> Iterator:
    def rows() -> Iterator[tuple[str, dict]]:
        for number, line in _lines(path):
            name, *texts = line.split("|")
            audio = name if Path(name).suffix.lower() in AUDIO_SUFFIXES else f"wavs/{name}.wav"
            said = [text.strip() for text in texts if text.strip()]
            yield f"{path} line {number}", {"audio": audio, "id": name} | ({"text": said[-1]} if said else {})

    return _rows(rows(), path.parent)


def _read_kaldi(folder: Path) -> Iterator:
    tables = {name: _kaldi_table(folder / name) for name in ("wav.scp", "text", "utt2spk", "segments")}
    for name in ("wav.scp", "text"):
        if not tables[name]:
            raise DataError(f"{folder / name}: missing or empty; a Kaldi folder has wav.scp and text")

    def rows() -> Iterator[tuple[str, dict]]:
        for utterance, (line, said) in tables["text"].items():
            source = f"{folder / 'text'} line {line}"
            row = {"text": said, "speaker": tables["utt2spk"].get(utterance, (0, None))[1]}
            recording = utterance
            if tables["segments"]:
                recording, start, end = (tables["segments"].get(utterance, (0, ""))[1].split() + [None] * 3)[:3]
                if start is not None and end is not None:
                    begin = _seconds(start, f"{folder / 'segments'}: {utterance}")
                    row |= {"offset": begin, "duration": _seconds(end, f"{folder / 'segments'}: {utterance}") - begin}
            audio = tables["wav.scp"].get(recording, (0, None))[1]
            if audio and audio.endswith("|"):
                audio = None
                source += " (wav.scp gives a command; commands are not run: write the audio to a file)"
            yield source, row | {"audio": audio}

    return _rows(rows(), folder)


def _kaldi_table(path: Path) -> dict[str, tuple[int, str]]:
    """key -> (line number, rest of the line); DataError for a key that occurs twice."""
    table: dict[str, tuple[int, str]] = {}
    for number, line in _lines(path) if path.is_file() else ():
        key, _, rest = line.strip().partition(" ")
        if key in table:
            raise DataError(f"{path} line {number}: {key!r} was used before, in line {table[key][0]}; give each its own")
        table[key] = (number, rest.strip())
    return table


def _read_pairs(folder: Path) -> Iterator:
    def rows() -> Iterator[tuple[str, dict]]:
        for path in _audio_files(folder):
            inside = path.relative_to(folder)
            speaker = inside.parts[0] if len(inside.parts) > 1 else None
            yield str(path), {"audio": str(inside), "text_file": str(inside.with_suffix(".txt")), "speaker": speaker}

    return _rows(rows(), folder)


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
    """The value of a JSON file, or those of the lines of a JSONL file, as many as PEEKED_BYTES hold; broken ones left out."""
    try:
        with open(path, "rb") as file:
            head = file.read(PEEKED_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    text, is_whole = head.decode("utf-8-sig", "replace"), len(head) < PEEKED_BYTES
    if text.lstrip()[:1] == "[":
        return [value for _, value in _read_values(path)]
    pieces = [text] * is_whole + text.split("\n")[: None if is_whole else -1]
    values = []
    for number, piece in enumerate(pieces):
        try:
            values.append(json.loads(piece))
        except (ValueError, RecursionError):
            continue
        if number == 0 and is_whole:
            return values[0]
    return values


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise SystemExit("usage: python forms.py PATH")
    try:
        conversion = convert(argv[0])
        report_problems(conversion.problems)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{conversion.form}: {len(conversion.records)} records")
    for repair, count in conversion.repairs.most_common():
        print(f"  {count} x {repair}")
    source, value = conversion.records[0]
    print(f"\n{source}\n{json.dumps(value, ensure_ascii=False, indent=2)}")


if __name__ == "__main__":
    main(sys.argv[1:])
