"""Any common form of dataset -> ChatML records, as manifest.py describes them. docs/datasets.md lists all of them:

    chats         JSON or JSONL of messages: ms-swift, OpenAI, ShareGPT
    samples       a metadata.json whose `samples` name audio_file, transcript_file, speaker_id, ref_audio_file, ref_speakers, ...
    tables        CSV, TSV, pipes, JSON or JSONL rows: LJSpeech, Common Voice, GPT-SoVITS, Piper, NeMo, audio folders, ...
    folders       Kaldi; x.wav beside x.txt, x.lab or x.normalized.txt; folders with tables in them: LibriSpeech, AISHELL-3, ...

chats.py and rows.py make a record of each chat or row. What is changed on the way is counted, what is unclear is an error.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import DataError, suggestion
from prepare.audio import FFMPEG_SUFFIXES, MAX_TRANSCRIBED_SEC, duration_sec
from prepare.channels import one_channel_each
from prepare.chats import chat_key, from_chat, is_chatml
from prepare.folders import Finder, Listing, read_beside, read_kaldi, read_lists, read_timed_beside, without_text
from prepare.manifest import (
    CODE_SUFFIXES,
    MAX_RECORD_BYTES,
    AudioPart,
    Manifest,
    Mixture,
    audio_parts,
    check,
    parse_json,
    read_manifest,
    report_problems,
    shown,
    split_weights,
)
from prepare.packed import PACKED, from_hub, read_packed
from prepare.rows import (
    AUDIO_SUFFIXES,
    DEFAULT_READING,
    WAVEFORM_SUFFIXES,
    MissingTextError,
    Origin,
    Reading,
    Row,
    columns_of,
    find_audio,
    has_empty_text,
    names_of,
)
from prepare.tables import SAMPLED, Found, Rows, UnclearError, kind_of, numbered_lines, read_table, read_text
from prepare.timed import SUBTITLES, is_cut, read_cuts, read_timed, timed_rows

FORMS = __doc__.split("\n\n")[1]
PEEKED_BYTES = 10_000_000  # the form of a JSONL file is recognised by so much of its beginning
CHECKED_AT_START = 100_000  # manifests of more records are read and checked as training goes
NUM_EXAMPLES = 3
NUM_SPEAKERS = 5  # the largest are named
NUM_MEASURED = 2000  # clips of larger sets are counted, not opened
TABLES = (".csv", ".tsv", ".txt", ".list", ".lst", ".cleaned")
HUB_NAME = re.compile(r"(?!.*\.[a-z]+$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)+")  # OWNER/NAME, not a file's name
OTHERS = {  # kinds of files that are not read, and what to do with them
    **dict.fromkeys((".zip", ".gz", ".tgz", ".rar", ".7z"), "an archive; unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as CSV"),
    **dict.fromkeys((".docx", ".doc", ".pdf", ".odt"), "a document; save the texts as CSV, beside the names of their clips"),
    **dict.fromkeys(CODE_SUFFIXES, "codes of a clip; name the table or the folder that has its text too"),
}


@dataclass
class Conversion:
    """What a dataset was recognised as, and its records. All but the first three is complete when the records were read."""

    form: str
    folder: Path  # relative audio paths start here
    notes: dict[str, str] = field(default_factory=dict)  # what became audio, text, speaker
    records: Iterable[tuple[str, dict]] = ()  # (source, ChatML), made while they are read, once
    num_records: int = 0
    repairs: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)  # with records that were left out
    skipped: list[str] = field(default_factory=list)  # rows without a text, where that is allowed
    used: Counter = field(default_factory=Counter)  # (meaning, column)
    examples: list[tuple[str, str, str | None]] = field(default_factory=list)  # (clip, text, speaker)
    speakers: Counter = field(default_factory=Counter)
    texts: Counter = field(default_factory=Counter)
    changed: list[str] = field(default_factory=list)  # examples of texts that were normalised
    clips: list[tuple[str | None, AudioPart]] = field(default_factory=list)  # (speaker, clip) of the first NUM_MEASURED

    def summary(self) -> list[str]:
        """What became audio, text and speaker; examples; the largest speakers; doubts. Empty for chats."""
        if not self.examples:
            return []
        roles = {name: self.notes.get(name) or self._columns(name) for name in ("audio", "text", "speaker")}
        lines = [f"{name:8} {role}" for name, role in roles.items()]
        lines += [f"example  {clip} | {shown(text)} | {speaker or 'no speaker'}" for clip, text, speaker in self.examples]
        return [*lines, self._largest(), *(f"changed  {example}" for example in self.changed), *self.doubts()]

    def _largest(self) -> str:
        """The largest speakers by minutes, or by clips where there are too many to open."""
        is_quick = self.num_records <= NUM_MEASURED and not any(clip.path.suffix in FFMPEG_SUFFIXES for _, clip in self.clips)
        minutes: Counter = Counter()
        for name, clip in self.clips if is_quick else ():
            minutes[name] += duration_sec(clip) / 60
        minutes = +minutes  # ready-made codes have no header of seconds
        largest = (minutes or self.speakers).most_common(NUM_SPEAKERS)
        shares = [f"{name or 'no speaker'} {f'{n:.1f} min' if minutes else f'{n} clips'}" for name, n in largest]
        return f"speakers {', '.join(shares)}{' ...' if len(self.speakers) > NUM_SPEAKERS else ''}"

    def _columns(self, meaning: str) -> str:
        names = [meaning] if meaning != "text" else ["text", "text_file"]
        found = {column: count for (name, column), count in self.used.items() if name in names and column}
        return ", ".join(f"`{column}`" for column in sorted(found, key=found.get, reverse=True)) or "none"

    def doubts(self) -> list[str]:
        """What is often a mistake, though it need not be one."""
        found = []
        num_named = sum(self.speakers.values()) - self.speakers[None]
        if self.examples and not num_named:
            found.append("no clip has a speaker: if all are of one, give --speaker NAME; clips without one get no reference")
        elif self.examples and self.speakers[None]:
            found.append(f"{self.speakers[None]} clips have no speaker")
        text, count = max(self.texts.items(), key=lambda item: item[1], default=("", 0))
        if count >= 5 and count > 0.02 * self.num_records:
            found.append(f"{count} clips have the same text: {shown(text)}")
        return found


def open_manifest(
    path: str | Path, tolerant: bool = False, reading: Reading = DEFAULT_READING
) -> tuple[Manifest, Conversion | None]:
    """The records of a dataset in any known form; and, unless it is ChatML already, how it was converted.

    tolerant: leave out records that cannot be converted; they are in `Conversion.problems`
    raises: DataError naming file, record, field and remedy
    """
    path = located(path)
    found = _recognise(path, reading)
    if found.form is None and not reading.audio_root:
        return read_manifest(path), None
    conversion = _convert(path, found, reading)
    manifest = Manifest.of_values(path, conversion.folder, conversion.records)
    if not (tolerant and manifest):
        report_problems(conversion.problems)
    if not manifest:
        raise DataError(f"{path}: {conversion.form} without any record")
    return manifest, conversion


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


def recognise(path: str | Path, reading: Reading = DEFAULT_READING) -> str | None:
    """The name of the form, or None for ChatML that needs no conversion.

    raises: DataError for a path that does not exist, or an unknown or unclear form
    """
    return _recognise(located(path), reading).form


def convert(path: str | Path, reading: Reading = DEFAULT_READING) -> Conversion:
    """Recognise a dataset in any known form, ChatML included; its records are read and converted one by one.

    raises: DataError if it cannot be read at all; what is wrong with single records is in `Conversion.problems`
    """
    path = located(path)
    return _convert(path, _recognise(path, reading), reading)


def located(path: str | Path) -> Path:
    """A dataset's file or folder; one that is named as on the Hub and is not here is downloaded. raises: DataError"""
    path = Path(path)
    is_of_hub = HUB_NAME.fullmatch(str(path)) and not Path(path.parts[0]).exists()
    return from_hub(str(path)) if is_of_hub else path


def _convert(path: Path, found: Found, reading: Reading) -> Conversion:
    folder = reading.audio_root or (path if path.is_dir() else path.parent)
    conversion = Conversion(found.form or "ChatML", folder, found.notes)
    rows_reading = replace(reading, columns={}) if found.notes else reading  # such a reader has used --columns itself
    records = _make_records(found, path if path.is_dir() else path.parent, conversion, rows_reading)
    conversion.records = records if found.is_chat else one_channel_each(_judged(records, conversion, reading), folder, reading)
    return conversion


def _make_records(found: Found, folder: Path, conversion: Conversion, reading: Reading) -> Iterator[tuple[str, dict]]:
    seen: dict[str, str] = {}
    splits: set[str] = set()
    for source, value in found.rows():
        origin = Origin(source, folder, reading)
        try:
            if isinstance(value, DataError):
                raise type(value)(f"{source}: {value}")
            record = moved(from_chat(value, origin), origin) if found.is_chat else Row(value, origin).record()
            identity = record.pop("id", None)
            if identity is not None and seen.setdefault(identity, source) != source:
                raise DataError(f"{source}: id {identity!r} was used before, at {seen[identity]}; give each sample its own")
        except DataError as error:
            is_skipped = isinstance(error, MissingTextError) and reading.skip_missing_text
            (conversion.skipped if is_skipped else conversion.problems).append(str(error))
            continue
        split = str(record.get("misc", {}).get("split", "")) if reading.split else ""
        splits.add(split)
        if split == reading.split:
            conversion.repairs += origin.repairs
            conversion.used += origin.used
            conversion.num_records += 1
            yield source, record
    if reading.split and not conversion.num_records:
        there = ", ".join(sorted(splits - {""})) or "none"
        raise DataError(f"--split {reading.split}: no record of this split; its splits are: {there}")


def moved(record: dict, origin: Origin) -> dict:
    """A chat whose audio is looked for below --audio_root, in place."""
    for part in audio_parts(record) if origin.reading.audio_root else ():
        for name in ("audio_url", "audio_label_url"):
            if isinstance(part.get(name), str):
                part[name] = find_audio(part[name], origin.root, origin.repairs, origin.root) or part[name]
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Judging rows


def _judged(records: Iterator[tuple[str, dict]], conversion: Conversion, reading: Reading) -> Iterator[tuple[str, dict]]:
    """The records, after a look at the first of them. raises: DataError if they would train something false"""
    first = list(itertools.islice(records, SAMPLED))
    if "text" not in reading.columns:
        _judge_texts([text_of(record) for _, record in first], conversion)
    if "offset" not in reading.columns:
        _judge_spans([record["messages"][-1]["content"] for _, record in first], conversion.folder)
    for source, record in itertools.chain(first, records):
        text, speaker = text_of(record), record.get("speaker")
        said, clip = record["messages"][-2]["content"], record["messages"][-1]["content"]
        if text != said and len(conversion.changed) < NUM_EXAMPLES:
            conversion.changed.append(f"{shown(text)} -> {shown(said)}")
        if len(conversion.clips) < NUM_MEASURED and clip["audio_url"]:
            span = clip.get("offset"), clip.get("duration")
            conversion.clips.append((speaker, AudioPart(conversion.folder / clip["audio_url"], *span)))
        conversion.texts[text] += 1
        conversion.speakers[speaker] += 1
        if len(conversion.examples) < NUM_EXAMPLES:
            conversion.examples.append((clip["audio_url"] or "raw audio", text, speaker))
        yield source, record


def text_of(record: dict) -> str:
    """The text of a record made of a row, as it was written."""
    return record.get("misc", {}).get("text") or record["messages"][-2]["content"]


def _judge_texts(texts: list[str], conversion: Conversion) -> None:
    column = conversion.notes.get("text") or conversion._columns("text")
    kind = kind_of(texts)
    num_different = len(set(texts))
    problem = None
    if kind == "phonemes":
        problem = "these are phonemes; the model reads written texts"
    elif kind in ("number", "language", "label") and len(texts) >= 4:
        problem = f"these are no sentences, but {kind}s"
    elif all(text.lower().endswith(AUDIO_SUFFIXES) for text in texts) and texts:
        problem = "these are names of files"
    elif len(texts) >= 20 and num_different <= len(texts) / 10:
        problem = f"only {num_different} different texts in {len(texts)} rows, as if they were speakers or labels"
    if problem:
        seen = ", ".join(shown(text) for text in list(dict.fromkeys(texts))[:3])
        raise UnclearError(f"text from {column}: {problem} ({seen}); name the right column with --columns text=COLUMN")


def _judge_spans(clips: list[dict], folder: Path) -> None:
    """Spans that were cut already: files that are as long as the span, though it begins later. And times in other units."""
    cut = [clip for clip in clips if clip.get("duration") and clip["audio_url"]][:20]
    whole = [duration_sec(AudioPart(folder / clip["audio_url"])) for clip in cut]
    late = [(clip, sec) for clip, sec in zip(cut, whole) if sec and clip.get("offset", 0) + clip["duration"] > sec + 0.1]
    fitting = [clip for clip, sec in late if abs(sec - clip["duration"]) < 0.15 and clip["offset"] > 0.2]
    if len(fitting) > len(cut) / 2:
        clip = fitting[0]
        raise UnclearError(
            f"{clip['audio_url']} is {clip['duration']:g} s long, as is its span from {clip['offset']:g} s on: the clips have "
            "been cut already. Give --columns offset=none,end=none"
        )
    if len(late) > len(cut) / 2:
        clip, sec = late[0]
        start = clip.get("offset", 0)
        times = f"{start:g} to {start + clip['duration']:g} s of {clip['audio_url']}, which has {sec:.1f} s"
        remedy = "Times are in seconds; --columns offset=none,end=none reads whole files"
        raise UnclearError(f"most spans end after their files: {times}. {remedy}")


# ---------------------------------------------------------------------------------------------------------------------
# Recognising


def _recognise(path: Path, reading: Reading) -> Found:
    if path.is_dir():
        return _recognise_folder(path, reading)
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*")]
        raise DataError(f"{path}: no such manifest file or folder{suggestion(path.name, beside)}")
    if path.name == "wav.scp":
        return Found("Kaldi", lambda: read_kaldi(path.parent, reading))
    if path.suffix.lower() in PACKED:
        return read_packed([path], reading)
    if path.name.endswith((".jsonl.gz",)):
        return Found("Lhotse", lambda: read_cuts(path))
    if path.suffix.lower() in WAVEFORM_SUFFIXES:
        remedy = f"or bash launch.sh prepare cut {path} --out cuts.jsonl"
        raise DataError(f"{path}: a recording; name the table or the folder that has its text too, {remedy}")
    if path.suffix.lower() in OTHERS:
        raise _unknown(path, OTHERS[path.suffix.lower()])
    if path.suffix.lower() in (*SUBTITLES, ".textgrid"):
        found = _recognise_timed(path, reading)
        if found is None:
            raise DataError(f"{path}: no text with times in it")
        return found
    if path.suffix.lower() in TABLES and not _begins_as_json(path):
        return _recognise_timed(path, reading) or _recognise_table(path, reading)
    first = _peek_json(path)
    if isinstance(first, dict) and isinstance(first.get("segments"), list):
        return _recognise_timed(path, reading)
    if isinstance(first, dict) and isinstance(first.get("samples"), list):
        return Found("samples", lambda: _read_samples(path))
    values = first if isinstance(first, list) else [first]
    objects = [value for value in values if isinstance(value, dict)]
    chats = [value for value in objects if chat_key(value)]
    if objects and is_cut(objects[0]):
        return Found("Lhotse", lambda: read_cuts(path))
    if chats or not values:  # broken records are left to the reader
        return Found(None if all(map(is_chatml, chats)) else "messages", lambda: _read_values(path), is_chat=True)
    if objects and "audio" in columns_of(objects[0], reading.columns):
        have_text = any({"text", "text_file"} & columns_of(row, reading.columns).keys() for row in objects)
        if not have_text and has_empty_text(objects[0]):
            raise DataError(f"{path}: {len(objects)} clips, no transcripts: bash launch.sh prepare transcribe {path}")
        return Found("table", lambda: _read_values(path))
    raise _unknown(path, f"keys {sorted(map(str, objects[0]))}, {_needed()}" if objects else shown(values[:1]))


def _recognise_folder(folder: Path, reading: Reading) -> Found:
    listing = Listing(folder, reading)
    packed = next((found for suffix in PACKED if (found := listing.with_suffix(suffix))), None)
    if packed:
        return read_packed([folder / path for path in packed], reading)
    if "train.jsonl" in listing and "leakage.json" in listing:
        return _of_splits(listing, reading)
    if "metadata.json" in listing:
        return Found("samples", lambda: _read_samples(folder / "metadata.json"))
    if "wav.scp" in listing:
        return Found("Kaldi", lambda: read_kaldi(folder, reading))
    if "metadata.jsonl" in listing:
        return Found("audio folder", lambda: _read_values(folder / "metadata.jsonl"))
    if "metadata.csv" in listing:
        found = _recognise_table(folder / "metadata.csv", reading, listing)
        found.form = {"table": "audio folder", "table without header": "LJSpeech"}[found.form]
        return found
    found = read_timed_beside(listing, reading) or read_beside(listing, reading) or read_lists(listing, reading)
    if found:
        return found
    raise _without_transcripts(listing) or _unknown(folder, _what_is_there(listing))


def _without_transcripts(listing: Listing) -> DataError | None:
    """What to type for a folder of recordings alone, or with texts beside few of them."""
    recordings = [path for path in listing.clips if path.lower().endswith(WAVEFORM_SUFFIXES)]
    clips = without_text(listing)
    texts = listing.with_suffix(*(suffix for suffix in (*TABLES, *OTHERS, ".json") if suffix not in CODE_SUFFIXES))
    if not clips or (texts and len(clips) == len(recordings)):
        return None
    kinds = Counter(Path(path).suffix.lower() for path in recordings)
    found = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
    lacking = "no transcripts" if clips == recordings else f"{len(clips)} without a transcript"
    first = [duration_sec(AudioPart(listing.root / path)) for path in clips[:NUM_EXAMPLES]]
    if min(first) > MAX_TRANSCRIBED_SEC:
        remedy = f"; cut long recordings: bash launch.sh prepare cut {listing.root} --out cuts.jsonl"
    else:
        remedy = f": bash launch.sh prepare transcribe {listing.root}"
    return DataError(f"{listing.root}: {found} found, {lacking}{remedy}")


def _what_is_there(listing: Listing) -> str:
    if not listing.files:
        return "an empty folder"
    for suffix, kind in OTHERS.items():
        if suffix not in AUDIO_SUFFIXES and (found := listing.with_suffix(suffix)):
            return f"{found[0]}, {kind}"
    names = sorted({path.partition("/")[0] + "/" * ("/" in path) for path in listing.files})
    kinds = Counter(Path(path).suffix.lower() for path in listing.clips)
    clips = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
    remedy = f"x.txt, x.lab beside x.wav, or a table; bash launch.sh prepare transcribe {listing.root} writes them"
    texts = f"; {clips}, and no text for most of them ({remedy})" if clips else ""
    return f"files {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}{texts}"


def _of_splits(listing: Listing, reading: Reading) -> Found:
    """A folder that `prepare pair` made: train.jsonl, or the split that was asked for."""
    path = listing.root / f"{reading.split or 'train'}.jsonl"
    if not path.is_file():
        raise DataError(f"--split {reading.split}: there is no {path}")
    return Found("paired", lambda: _read_values(path), is_chat=True)


def _recognise_timed(path: Path, reading: Reading) -> Found | None:
    """A transcript with times, given by itself: its recording has the same name."""
    segments = read_timed(path)
    clip = Finder(reading.audio_root or path.parent)(path.stem) if segments else None
    if segments and not clip:
        raise DataError(f"{path}: a transcript with times, but no recording of its name beside it ({path.stem}.wav, .mp3, ...)")
    notes = {"audio": str(clip), "text": "its segments", "speaker": "as the transcript says"}
    return Found("transcript with times", lambda: timed_rows(path, clip, segments, None), notes) if segments else None


def _recognise_table(path: Path, reading: Reading, listing: Listing | None = None) -> Found:
    root = reading.audio_root or path.parent
    find = Finder(root, "", listing)
    if reading.audio_root:
        find = functools.partial(find_audio, root=root, repairs=Counter(), moved_to=root)
    found = read_table(path, reading, find)
    if found:
        return found
    first = next(iter(numbered_lines(path)), (1, ""))[1]
    header = [name.strip().strip('"') for name in re.split(r"[|,;\t]", first)]
    raise _unknown(path, f"a first line of {shown(header)}, where no field names a clip that exists (--audio_root), {_needed()}")


def _needed() -> str:
    return f"where a table has audio ({names_of('audio')}) and text ({names_of('text')})"


def _unknown(path: Path, found: str) -> DataError:
    return DataError(f"{path}: not a form of dataset known here: found {found}. Known forms:\n{FORMS}")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _read_samples(path: Path) -> Rows:
    values = parse_json(read_text(path), path, line=1)
    samples = values.get("samples") if isinstance(values, dict) else None
    if not isinstance(samples, list):
        raise DataError(f"{path}: no `samples` list in it; found {shown(values)}")
    return ((f"{path} sample {i}", row) for i, row in enumerate(samples))


def _read_values(path: Path) -> Rows:
    """The decoded JSON of each record of a JSON list or JSONL file."""
    return read_manifest(path).values()


def _begins_as_json(path: Path) -> bool:
    """Whether a list, as those of WeNet, holds JSON."""
    with open(path, "rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b'{"', b"[{"))


def _peek_json(path: Path) -> Any:
    """The value of a JSON file, or those of a JSONL file's first lines, up to PEEKED_BYTES; broken lines are left out."""
    try:
        with open(path, "rb") as file:
            head = file.read(PEEKED_BYTES) + file.readline(MAX_RECORD_BYTES)
            is_whole = not file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    text = head.decode("utf-8-sig", "replace")
    if text.lstrip()[:1] == "[":
        return [value for _, value in _read_values(path)]
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and not _decoded(lines[0]):
        for value in _decoded(text if is_whole else read_text(path)):  # one object on several lines
            return value
    values = [value for line in lines for value in _decoded(line)]
    return values[0] if is_whole and len(lines) == len(values) == 1 else values


def _decoded(text: str) -> list[Any]:
    """The JSON value, or none."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []
