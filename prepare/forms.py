"""Any common form of dataset -> ChatML records, as manifest.py describes them.

    messages      JSON or JSONL of chats: `<audio>` tags with an `audios` list (ms-swift), `input_audio` and `audio_url` parts
                  (OpenAI), `conversations` with from / value (ShareGPT)
    samples       a metadata.json whose `samples` name audio_file, transcript_file, speaker_id, ref_audio_file, ref_speakers, ...
    LJSpeech      metadata.csv with `id|text|normalised text`, clips in wavs/
    audio folder  metadata.jsonl or metadata.csv with `file_name` and a transcript, as Hugging Face datasets writes them
    Kaldi         wav.scp and text, and where they exist utt2spk and segments
    pairs         a folder of x.wav (flac, ogg, mp3) beside x.txt; subfolders are speakers
    table         CSV, TSV, JSON or JSONL rows whose columns have familiar names (rows.COLUMNS): Common Voice, NeMo, ...

chats.py and rows.py make a record of each chat or row. What is changed on the way is counted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import DataError
from prepare.chats import chat_key, from_chat, is_chatml
from prepare.manifest import Manifest, Mixture, check, parse_json, read_manifest, report_problems, shown, split_weights
from prepare.rows import AUDIO_SUFFIXES, Origin, Row, columns_of

FORMS = __doc__.split("\n\n")[1]
PEEKED_BYTES = 10_000_000  # the form of a JSONL file is recognised by so much of its beginning

Rows = Iterator[tuple[str, Any]]  # (source, a row or chat, or the DataError there is instead)


@dataclass
class Form:
    """How a dataset was recognised: its name (None: plain ChatML), and the reader of its rows or chats."""

    name: str | None
    read: Callable[[Path], Rows]


@dataclass
class Conversion:
    """What a dataset was recognised as, and its records."""

    form: str
    folder: Path  # relative audio paths start from here
    records: Iterable[tuple[str, dict]] = ()  # (source, ChatML), made while they are read, once
    num_records: int = 0  # of the manifest that `open_manifest` made of them
    repairs: Counter[str] = field(default_factory=Counter)  # complete when all records have been read
    problems: list[str] = field(default_factory=list)  # with records that were left out; complete then too


def open_manifest(path: str | Path, tolerant: bool = False) -> tuple[Manifest, Conversion | None]:
    """The records of a dataset in any known form; and, unless it is ChatML already, how it was converted.

    tolerant: leave out records that cannot be converted; they are in `Conversion.problems`
    raises: DataError naming file, record, field and remedy
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


CHECKED_AT_START = 100_000  # manifests of more records are read and checked as training goes


def open_records(spec: str, skip_missing: bool = False) -> tuple[Mixture, list[str], list[Conversion]]:
    """The records of one or more datasets in any known form; see `manifest.split_weights` for the form of `spec`.

    Manifests of up to CHECKED_AT_START records are read through here, longer ones as training goes.

    returns: the records; those left out with `skip_missing` because their audio does not exist; what had to be converted
    raises:  DataError
    """
    parts, weights, skipped, conversions = [], [], [], []
    for path, weight in split_weights(spec):
        part, conversion = open_manifest(path)
        conversions += [conversion] if conversion else []
        if skip_missing or len(part) <= CHECKED_AT_START:
            part, missing = check(part, skip_missing)
            skipped += missing
        parts.append(part)
        weights.append(weight)
    return Mixture(parts, weights), skipped, conversions


def recognise(path: str | Path) -> str | None:
    """The name of the form, or None for ChatML that needs no conversion.

    raises: DataError for a path that does not exist or an unknown form
    """
    return _recognise(Path(path)).name


def convert(path: str | Path) -> Conversion:
    """Recognise a dataset in any known form, ChatML included; its records are read and converted one by one.

    raises: DataError if it cannot be read at all; what is wrong with single records is in `Conversion.problems`
    """
    path = Path(path)
    form = _recognise(path)
    conversion = Conversion(form.name or "ChatML", path if path.is_dir() else path.parent)
    conversion.records = _make_records(form.read(path), conversion)
    return conversion


def _make_records(rows: Rows, conversion: Conversion) -> Iterator[tuple[str, dict]]:
    seen: dict[str, str] = {}
    make = from_chat if conversion.form in ("ChatML", "messages") else lambda row, origin: Row(row, origin).record()
    for source, value in rows:
        origin = Origin(source, conversion.folder)
        try:
            if isinstance(value, DataError):
                raise DataError(f"{source}: {value}")
            record = make(value, origin)
            identity = record.pop("id", None)
            if identity is not None and seen.setdefault(identity, source) != source:
                raise DataError(f"{source}: id {identity!r} was used before, at {seen[identity]}; give each sample its own")
        except DataError as error:
            conversion.problems.append(str(error))
        else:
            conversion.repairs += origin.repairs
            yield source, record


# ---------------------------------------------------------------------------------------------------------------------
# Recognising


def _recognise(path: Path) -> Form:
    if path.is_dir():
        return _recognise_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such manifest file or folder")
    if path.name == "wav.scp":
        return Form("Kaldi", lambda path: _read_kaldi(path.parent))
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _recognise_table(path)
    first = _peek_json(path)
    if isinstance(first, dict) and isinstance(first.get("samples"), list):
        return Form("samples", _read_samples)
    values = first if isinstance(first, list) else [first]
    objects = [value for value in values if isinstance(value, dict)]
    chats = [value for value in objects if chat_key(value)]
    if chats or not values:  # broken records are left to the reader
        return Form(None if all(map(is_chatml, chats)) else "messages", _read_values)
    if objects and "audio" in columns_of(objects[0]):
        return Form("table", _read_values)
    raise _unknown(path, f"keys {sorted(map(str, objects[0]))}" if objects else shown(values[:1]))


def _recognise_folder(folder: Path) -> Form:
    names = sorted(os.listdir(folder))
    if "metadata.json" in names:
        return Form("samples", lambda path: _read_samples(path / "metadata.json"))
    if "wav.scp" in names:
        return Form("Kaldi", _read_kaldi)
    if "metadata.jsonl" in names:
        return Form("audio folder", lambda path: _read_values(path / "metadata.jsonl"))
    if "metadata.csv" in names:
        form = _recognise_table(folder / "metadata.csv")
        return Form("audio folder" if form.name == "table" else form.name, lambda path: form.read(path / "metadata.csv"))
    if any(path.with_suffix(".txt").is_file() for path in _audio_files(folder)):
        return Form("pairs", _read_pairs)
    raise _unknown(folder, f"files {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}" if names else "an empty folder")


def _recognise_table(path: Path) -> Form:
    first = next(iter(_lines(path)), (1, ""))[1]
    header = [name.strip().strip('"') for name in re.split(r"[|,;\t]", first)]
    columns = columns_of(dict.fromkeys(header, True))
    if "audio" in columns and ("text" in columns or "text_file" in columns):
        return Form("table", _read_table)
    if first.count("|") in (1, 2):
        return Form("LJSpeech", _read_ljspeech)
    raise _unknown(path, f"a first line of {shown(header)}")


def _unknown(path: Path, found: str) -> DataError:
    return DataError(f"{path}: not a form of dataset known here: found {found}. Known forms:\n{FORMS}")


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def _read_samples(path: Path) -> Rows:
    values = parse_json(_text(path), path, line=1)
    samples = values.get("samples") if isinstance(values, dict) else None
    if not isinstance(samples, list):
        raise DataError(f"{path}: no `samples` list in it; found {shown(values)}")
    return ((f"{path} sample {i}", row) for i, row in enumerate(samples))


def _read_values(path: Path) -> Rows:
    """The decoded JSON of each record of a JSON list or JSONL file."""
    manifest = read_manifest(path)
    return (manifest.value(index) for index in range(len(manifest)))


def _read_table(path: Path) -> Rows:
    text = _text(path)
    header = next(line for line in text.split("\n") if line.strip())
    return _table_rows(path, text, max("|,;\t", key=header.count))


def _table_rows(path: Path, text: str, delimiter: str) -> Rows:
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
    """Whether quotes are syntax. Tables with tabs have both kinds: in Common Voice quotes are plain characters."""
    if delimiter == "\t":
        try:
            widths = {len(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row}
        except csv.Error:
            return csv.QUOTE_NONE
        return csv.QUOTE_MINIMAL if len(widths) == 1 else csv.QUOTE_NONE
    return csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL


def _read_ljspeech(path: Path) -> Rows:
    return ((f"{path} line {number}", _ljspeech_row(line)) for number, line in _lines(path))


def _ljspeech_row(line: str) -> dict | DataError:
    """id|text or id|text|normalised text; the last is the transcript."""
    name, *texts = line.split("|")
    is_path = Path(name).suffix.lower() in AUDIO_SUFFIXES
    filled = [text for text in texts if text.strip()]
    if len(texts) > (1 if is_path else 2):  # a speaker, or the number of one, must not be taken for the text
        return DataError(f"{len(texts) + 1} fields; name them in a first line such as audio|text|speaker")
    return {"audio": name if is_path else f"wavs/{name}.wav", "id": name} | ({"text": filled[-1]} if filled else {})


def _read_pairs(folder: Path) -> Rows:
    return ((str(path), _pair_row(path.relative_to(folder))) for path in _audio_files(folder))


def _pair_row(clip: Path) -> dict:
    speaker = clip.parts[0] if len(clip.parts) > 1 else None
    name = str(clip.with_suffix(""))  # as an id: two clips beside one text are a mistake
    return {"audio": str(clip), "text_file": f"{name}.txt", "speaker": speaker, "id": name}


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Kaldi

KaldiTable = dict[str, tuple[int, str]]  # key -> (line number, rest of the line)


def _read_kaldi(folder: Path) -> Rows:
    tables = {name: _kaldi_table(folder / name) for name in ("wav.scp", "text", "utt2spk", "segments")}
    for name in ("wav.scp", "text"):
        if not tables[name]:
            raise DataError(f"{folder / name}: missing or empty; a Kaldi folder has wav.scp and text")
    return _kaldi_rows(folder, tables)


def _kaldi_rows(folder: Path, tables: dict[str, KaldiTable]) -> Rows:
    for utterance, (line, text) in tables["text"].items():
        yield f"{folder / 'text'} line {line}", _kaldi_row(utterance, text, tables)
    listed = "segments" if tables["segments"] else "wav.scp"
    for utterance, (line, _) in tables[listed].items():
        if utterance not in tables["text"]:
            problem = f"{utterance!r} has no line in text; add it, or take this one out"
            yield f"{folder / listed} line {line}", DataError(problem)


def _kaldi_row(utterance: str, text: str, tables: dict[str, KaldiTable]) -> dict | DataError:
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
    return {"audio": audio, "text": text, "speaker": tables["utt2spk"].get(utterance, (0, None))[1], **span}


def _kaldi_table(path: Path) -> KaldiTable:
    """raises: DataError for a key that occurs twice"""
    table: KaldiTable = {}
    for number, line in _lines(path) if path.is_file() else ():
        key, rest = (line.split(maxsplit=1) + [""])[:2]
        if key in table:
            raise DataError(f"{path} line {number}: {key!r} was used before, in line {table[key][0]}; give each its own")
        table[key] = (number, rest.strip())
    return table


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


def _peek_json(path: Path) -> Any:
    """The value of a JSON file, or those of a JSONL file's first lines, up to PEEKED_BYTES; broken lines are left out."""
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
