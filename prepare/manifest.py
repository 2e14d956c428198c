"""Manifests: files of ChatML records. Every record is validated; a problem names file, record, field and remedy.

A record:

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | part | [str | part, ...]}, ...],
     "start_index": int?, "speaker": str?, "misc": {}?}
    part: {"type": "text", "text": str} or {"type": "audio", "audio_url": path, "offset": sec?, "duration": sec?}

The text and audio of assistant turns from `start_index` on train; all other turns are context. `audio_url` is relative to
the manifest, or absolute: a waveform, or codes `[K, T]` as `.npy` or `.safetensors`. `audio_label_url` beside it gives label
audio that differs from the input audio of an assistant turn.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

from common import DataError, MissingAudioError, listing

ROLES = ("system", "user", "assistant")
CODE_SUFFIXES = (".npy", ".safetensors")
CHANGES = "speaker_changes_sec"  # in misc: seconds of a record's last clip at which another speaker begins
SPEAKER_TAG = re.compile(r"\bSPEAKER(\d+)\b")  # "[SPEAKER0] ..." of a turn, "SPEAKER0: ..." of a scene
# The tokens that upstream puts between turns and around clips. <|AUDIO|> and <|AUDIO_OUT|> in a text are the collator's to find.
CONTROL = re.compile(r"<\|(audio_(out_)?bos|audio_eos|begin_of_text|end_of_text|(start|end)_header_id|eo[mt]_id|recipient)\|>")

FEW = 4  # records are the least that evaluation should have
MAX_SEC = 1e7  # about four months
MAX_RECORD_BYTES = 2**26  # of a record's JSON, with the clips that are in it
MAX_TEXT_BYTES = 2**30  # of a file that is read as a whole: tables, JSON lists

# ---------------------------------------------------------------------------------------------------------------------
# Records and their clips


@dataclass
class AudioPart:
    """One clip a record refers to; times in seconds."""

    path: Path | None  # None: `raw_audio` holds the waveform
    offset_sec: float | None = None
    duration_sec: float | None = None  # None: up to the end
    is_output: bool = True  # of an assistant turn
    field: str = ""  # of the record, for messages
    label_path: Path | None = None
    raw_audio: bytes | None = dataclasses.field(default=None, repr=False)  # `field` is one of its own

    @property
    def holds_codes(self) -> bool:
        return self.path is not None and self.path.suffix in CODE_SUFFIXES

    @property
    def label(self) -> AudioPart | None:
        """The label audio beside this clip, as a clip of its own."""
        if self.label_path is None:
            return None
        return AudioPart(self.label_path, self.offset_sec, self.duration_sec, True, f"{self.field} (audio_label_url)")


@dataclass
class Record:
    """A validated record: the official ChatML sample and its clips, in the order of their placeholders."""

    chatml: ChatMLSample
    audio: list[AudioPart]
    source: str  # "manifest.jsonl record 3 (line 4)"

    def clips(self) -> list[AudioPart]:
        """Its clips; label audio follows the clip beside it."""
        return [clip for part in self.audio for clip in (part, part.label) if clip is not None]

    def parts(self) -> list[str | TextContent | AudioContent]:
        """The content parts of all turns, in order."""
        return [part for turn in self.chatml.messages for part in parts_of(turn.content)]

    def trained(self) -> list[AudioPart]:
        """The clips that train."""
        num_before = len(self.cropped(self.chatml.start_index or 0).audio)
        return [part for part in self.audio[num_before:] if part.is_output]

    def cropped(self, num_turns: int) -> Record:
        """The record's first turns alone, with their clips."""
        misc = {name: value for name, value in (self.chatml.misc or {}).items() if name != CHANGES}  # of the clip left out
        chatml = dataclasses.replace(self.chatml, messages=self.chatml.messages[:num_turns], misc=misc)
        short = dataclasses.replace(self, chatml=chatml)
        num_clips = sum(isinstance(part, AudioContent) for part in short.parts())
        return dataclasses.replace(short, audio=self.audio[:num_clips])

    def changes_sec(self) -> list[float]:
        """Seconds of the last clip at which another speaker begins."""
        return (self.chatml.misc or {}).get(CHANGES, [])

    def speakers(self) -> list[str | None]:
        """The speaker of each clip, None where it is unclear.

        All clips belong to the record's `speaker`, unless texts have several speaker tags. Then a clip belongs to the tag
        in the text between the clip before it and itself (SPEAKER0 is `speaker`); without exactly one tag it is unclear.
        """
        tags, clips = set(), []
        for part in self.parts():
            if isinstance(part, AudioContent):
                clips.append(tags)
                tags = set()
            else:
                tags = tags | set(SPEAKER_TAG.findall(part if isinstance(part, str) else part.text))
        name = self.chatml.speaker or None
        if name is None or len(tags.union(*clips) - {"0"}) == 0:
            return [name] * len(clips)
        names = [min(tags) if len(tags) == 1 else None for tags in clips]
        return [name if tag == "0" else tag and f"{name}, SPEAKER{tag}" for tag in names]


# ---------------------------------------------------------------------------------------------------------------------
# Files of records


class Manifest(Sequence[Record]):
    """The records of one file. A record is parsed when it is read; memory holds only an index of them.

    path:   of the file, for messages
    folder: relative audio paths start from here
    spans:  [records, 2] int64, start and end of each record's JSON in the file at `path`, or in `blob`
    places: [records, 2] int32, record and line number in the file (from 0 and 1); None with a blob
    digest: of the content
    blob:   JSON pairs [source, value], of records that are not lines of a file
    """

    def __init__(
        self, path: Path, folder: Path, spans: np.ndarray, places: np.ndarray | None, digest: str, blob: bytes | None = None
    ):
        self.path, self.folder = path, folder
        self.spans, self.places, self.digest = spans, places, digest
        self._blob = blob
        self._stamp = None if blob is not None else _stamp(os.stat(path))

    @classmethod
    def of_lines(cls, path: Path) -> Manifest:
        """Index a JSONL file; blank lines are skipped."""
        ends, digest, size = [], hashlib.sha256(), 0
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
                size += len(block)
                begun = next((int(found[-1]) for found in reversed(ends) if len(found)), 0)
                if size - begun > MAX_RECORD_BYTES:
                    problem = f"a record of more than {MAX_RECORD_BYTES} bytes; name files of audio instead of raw_audio"
                    raise DataError(f"{path} line {sum(map(len, ends)) + 1}: {problem}")
            stops = np.append(np.concatenate([*ends, np.zeros(0, np.int64)]), size)
            starts = np.append(0, stops[:-1] + 1)
            kept = np.ones(len(starts), bool)
            for line in np.flatnonzero(stops - starts < len('{"messages":[]}')):
                file.seek(starts[line])
                kept[line] = bool(file.read(stops[line] - starts[line]).removeprefix(b"\xef\xbb\xbf").strip())
        lines = np.flatnonzero(kept)
        places = np.stack([np.arange(len(lines)), lines + 1], axis=1).astype(np.int32)
        return cls(path, path.parent, np.stack([starts, stops], axis=1)[kept], places, digest.hexdigest())

    @classmethod
    def of_values(cls, path: Path, folder: Path, values: Iterable[tuple[str, Any]]) -> Manifest:
        """values: (source, decoded JSON) of each record; source names it in messages"""
        lines, digest = [], hashlib.sha256()  # of the values alone: a dataset that is moved stays the same
        for source, value in values:
            try:
                lines.append(json.dumps((source, value), ensure_ascii=False).encode("utf-8", "surrogatepass"))
                digest.update(json.dumps(value).encode())
            except RecursionError:
                raise DataError(f"{source}: JSON nested too deeply to be a record") from None
        stops = np.cumsum([0, *map(len, lines)], dtype=np.int64)
        blob = b"".join(lines)
        return cls(path, folder, np.stack([stops[:-1], stops[1:]], axis=1), None, digest.hexdigest(), blob)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        """raises: DataError naming file, record, field and remedy"""
        source, value = self.value(index)
        return parse_record(value, self.folder, source)

    def values(self) -> Iterator[tuple[str, Any]]:
        """`value` of every record; the file is opened once."""
        with open(self.path, "rb") as file:
            yield from (self.value(index, file) for index in range(len(self)))

    def value(self, index: int, file: BinaryIO | None = None) -> tuple[str, Any]:
        """(source, decoded JSON) of a record, without validation. file: of the manifest, where it is open already"""
        start, stop = self.spans[index].tolist()
        if self._blob is not None:
            return tuple(json.loads(self._blob[start:stop].decode("utf-8", "surrogatepass")))
        record, line = self.places[index].tolist()
        with open(self.path, "rb") if file is None else contextlib.nullcontext(file) as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise DataError(f"{self.path}: has changed since it was opened; start again, from the checkpoint if it trained")
            file.seek(start)
            text = _decode(file.read(stop - start), f"{self.path} line {line}")
        return f"{self.path} record {record} (line {line})", parse_json(text, self.path, line)

    def subset(self, indices: np.ndarray) -> Manifest:
        places = None if self.places is None else self.places[indices]
        spans = self.spans[indices]
        digest = hashlib.sha256(self.digest.encode() + spans.tobytes()).hexdigest()
        subset = Manifest(self.path, self.folder, spans, places, digest, self._blob)
        subset._stamp = self._stamp
        return subset


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def read_manifest(path: str | Path) -> Manifest:
    """Open a manifest, a JSON list or JSONL; `check` reads all of it.

    raises: DataError naming the file and the remedy
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such manifest file")
        with open(path, "rb") as file:
            is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        if is_list:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise DataError(f"{path}: a JSON list of more than {MAX_TEXT_BYTES} bytes; write one record per line (JSONL)")
            values = parse_json(_decode(path.read_bytes(), path), path, line=1)
            manifest = Manifest.of_values(path, path.parent, ((f"{path} record {i}", v) for i, v in enumerate(values)))
        else:
            manifest = Manifest.of_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not manifest:
        raise DataError(f"{path}: the manifest is empty")
    return manifest


def check(manifest: Manifest, skip_missing: bool = False) -> tuple[Manifest, list[str]]:
    """Validate every record. Audio files have to exist; they are not opened.

    skip_missing: leave out records whose audio files do not exist
    returns: the manifest without the records left out, and what is wrong with those
    raises:  DataError with all problems
    """
    kept, errors = scan(manifest)
    missing = [str(error) for error in errors if skip_missing and isinstance(error, MissingAudioError)]
    report_problems([str(error) for error in errors if not (skip_missing and isinstance(error, MissingAudioError))])
    if missing and not kept:
        raise DataError(f"{manifest.path}: the audio of every record is missing, first {missing[0]}")
    return kept, missing


def scan(manifest: Manifest) -> tuple[Manifest, list[DataError]]:
    """The valid records, and what is wrong with the others."""
    kept, errors = np.ones(len(manifest), bool), []
    for index in range(len(manifest)):
        try:
            manifest[index]
        except DataError as error:
            errors.append(error)
            kept[index] = False
    return manifest.subset(kept) if errors else manifest, errors


def share_held_out(share: float, count: int, most: float = 0.1) -> float:
    """The share of so many records to hold out, so that they are at least FEW, or `most` of all where that is less."""
    return max(share, min(FEW / count, most))


def report_problems(problems: Sequence[str], what: str = "records cannot be used") -> None:
    """Raise one DataError with all problems, if there are any."""
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(listing(f"{len(problems)} {what}:", problems))


def _decode(content: bytes, source: Path | str) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text ({error}); save the manifest as UTF-8 JSON or JSONL") from None


def parse_json(text: str, path: Path, line: int) -> Any:
    """Decode JSON that begins at `line` of a file; DataError with the line of a mistake. NaN stays NaN."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise DataError(
            f"{path} line {at}: broken JSON ({error.msg} at column {error.colno}). A manifest is one JSON list, or one "
            "complete JSON object per line"
        ) from None
    except RecursionError:
        raise DataError(f"{path} line {line}: JSON nested too deeply to be a record") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path} line {line}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Several manifests


class Mixture(Sequence[Record]):
    """The records of several manifests in a row. A manifest's weight is how often an epoch uses each of its records.

    With 2 every epoch uses every record twice; with 0.5 it uses one half of them, and the next epoch the other half.
    """

    def __init__(self, parts: Sequence[Manifest], weights: Sequence[float] | None = None):
        self.parts = list(parts)
        self.weights = [1.0] * len(self.parts) if weights is None else list(weights)
        self._stops = np.cumsum([len(part) for part in self.parts])

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts]

    @property
    def digest(self) -> str:
        return hashlib.sha256(" ".join(part.digest for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self._stops, index, side="right"))
        return self.parts[part][index - int(self._stops[part]) + len(self.parts[part])]

    def subset(self, chosen: np.ndarray) -> Mixture:
        """The records where `chosen` [records] bool is true; manifests without any such record are left out."""
        pieces = np.split(chosen, self._stops[:-1])
        kept = [(part.subset(piece), w) for part, piece, w in zip(self.parts, pieces, self.weights) if piece.any()]
        return Mixture(*zip(*kept)) if kept else Mixture([])


def split_weights(spec: str) -> list[tuple[str, float]]:
    """(path, weight) of each manifest in "path", "path:weight" or a comma-separated list of them.

    raises: DataError for a weight that is not a positive number
    """
    if Path(spec).exists():
        return [(spec, 1.0)]
    found = []
    for item in filter(None, (item.strip() for item in spec.split(","))):
        path, colon, weight = item.rpartition(":")
        if not colon or Path(item).exists():
            found.append((item, 1.0))
            continue
        try:
            value = float(weight)
        except ValueError:
            raise DataError(f"{item}: no such manifest file, and {weight!r} is not a weight (path:weight)") from None
        if not 0 < value < math.inf:
            raise DataError(f"{item}: the weight has to be above 0")
        found.append((path, value))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One record


def parse_record(value: Any, folder: Path, source: str, to_train: bool = True) -> Record:
    """Turn a decoded JSON value into a Record.

    folder:   relative paths start from here
    source:   names the record in messages
    to_train: some turn has to train; a prompt has none
    raises:   DataError naming record, field and remedy
    """
    return _Parser(folder, source).record(value, to_train)


@dataclass
class _Parser:
    folder: Path
    source: str
    audio: list[AudioPart] = field(default_factory=list)

    def fail(self, where: str, problem: str, kind: type[DataError] = DataError) -> NoReturn:
        message = f"{self.source}: {where}: {problem}"
        raise kind(message.encode("utf-8", "backslashreplace").decode())  # it may quote what no file can hold

    def record(self, value: Any, to_train: bool) -> Record:
        if not isinstance(value, dict):
            self.fail("record", f"expected an object with `messages`, found {shown(value)}")
        messages = value.get("messages")
        if not isinstance(messages, list) or not messages:
            found = f"keys {sorted(map(str, value))}" if "messages" not in value else shown(messages)
            self.fail("messages", f"expected a non-empty list of turns, found {found}")
        unknown = set(value) - {"messages", "start_index", "speaker", "misc"}
        if unknown:
            self.fail("record", f"unknown keys {sorted(unknown)}; put extra information under `misc`")
        turns = [self.turn(turn, f"messages[{i}]") for i, turn in enumerate(messages)]
        start = self.start_index(value.get("start_index"), turns)
        if to_train:
            self.check_trained(turns, start or 0)
        speaker, misc = _absent_if_nan(value.get("speaker")), _absent_if_nan(value.get("misc"))
        if speaker is not None and not isinstance(speaker, str):
            self.fail("speaker", f"expected text, found {shown(speaker)}")
        if misc is not None and not isinstance(misc, dict):
            self.fail("misc", f"expected an object, found {shown(misc)}")
        changes = (misc or {}).get(CHANGES, [])
        if not isinstance(changes, list) or not all(isinstance(v, (int, float)) and 0 <= v <= MAX_SEC for v in changes):
            self.fail("misc.speaker_changes_sec", f"expected a list of seconds, found {shown(changes)}")
        return Record(ChatMLSample(turns, start_index=start, misc=misc, speaker=speaker), self.audio, self.source)

    def start_index(self, value: Any, turns: Sequence[Message]) -> int | None:
        start = _absent_if_nan(value)
        if start is None:
            return None
        if isinstance(start, bool) or not isinstance(start, (int, float)) or abs(start) == math.inf or start != int(start):
            self.fail("start_index", f"expected a whole number of turns, found {shown(start)}")
        if not 0 <= start < len(turns):
            count = len(turns)
            self.fail("start_index", f"{start} leaves no turn to train; the record has {count} turns (0 to {count - 1})")
        return int(start)

    def check_trained(self, turns: Sequence[Message], start: int) -> None:
        trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i >= start]
        if not trained:
            self.fail("messages", "no assistant turn from start_index on, so there is nothing to train")
        for i in trained:
            if not _has_content(turns[i].content):
                problem = "empty, though the turn is to be trained; give its text or audio, or take it out"
                self.fail(f"messages[{i}].content", problem)

    def turn(self, turn: Any, where: str) -> Message:
        if not isinstance(turn, dict):
            self.fail(where, f"expected an object with `role` and `content`, found {shown(turn)}")
        unknown = set(turn) - {"role", "content", "recipient"}
        if unknown:
            self.fail(where, f"unknown keys {sorted(unknown)}; a turn has `role` and `content`")
        role = turn.get("role")
        if role not in ROLES:
            self.fail(f"{where}.role", f"{shown(role)} is not one of {', '.join(ROLES)}")
        recipient = _absent_if_nan(turn.get("recipient"))
        if recipient is not None and (role != "assistant" or not isinstance(recipient, str)):
            self.fail(f"{where}.recipient", "only an assistant turn can have a recipient, and it is text")
        content = turn.get("content")
        if isinstance(content, str):
            return Message(role, self.text(content, f"{where}.content"), recipient)
        if isinstance(content, list):
            parts = [self.part(part, f"{where}.content[{i}]", role) for i, part in enumerate(content)]
            return Message(role, parts, recipient)
        return Message(role, self.part(content, f"{where}.content", role), recipient)

    def part(self, part: Any, where: str, role: str) -> TextContent | AudioContent:
        if isinstance(part, str):
            return TextContent(self.text(part, where))
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                self.fail(f"{where}.text", f"expected text, found {shown(part.get('text'))}")
            return TextContent(self.text(part["text"], f"{where}.text"))
        if kind != "audio":
            self.fail(where, f'expected text, {{"type": "text", ...}} or {{"type": "audio", ...}}, found {shown(part)}')
        return self.clip(part, where, role)

    def clip(self, part: dict, where: str, role: str) -> AudioContent:
        unknown = set(part) - {"type", "audio_url", "raw_audio", "offset", "duration", "row_id", "audio_label_url"}
        if unknown:
            self.fail(where, f"unknown keys {sorted(unknown)} of an audio part")
        offset, duration = (self.seconds(part.get(name), f"{where}.{name}") for name in ("offset", "duration"))
        if duration == 0:
            self.fail(f"{where}.duration", "0 seconds of audio; leave it out for the whole clip")
        url, raw = part.get("audio_url"), _absent_if_nan(part.get("raw_audio"))
        path = raw_bytes = label_path = None
        raw = raw if raw != "" else None
        if raw is None:
            path = self.file(url, f"{where}.audio_url")
        else:
            try:
                raw_bytes = base64.b64decode(raw, validate=True)
            except (TypeError, ValueError):
                self.fail(f"{where}.raw_audio", "not base64")
        if _absent_if_nan(part.get("audio_label_url")) is not None:
            if role != "assistant":
                self.fail(f"{where}.audio_label_url", "only an assistant turn has label audio")
            label_path = self.file(part["audio_label_url"], f"{where}.audio_label_url")
        self.audio.append(AudioPart(path, offset, duration, role == "assistant", where, label_path, raw_bytes))
        return AudioContent(audio_url=url if isinstance(url, str) else "", raw_audio=raw, offset=offset, duration=duration)

    def seconds(self, value: Any, where: str) -> float | None:
        sec = _absent_if_nan(value)
        if sec is not None and (isinstance(sec, bool) or not isinstance(sec, (int, float)) or not 0 <= sec <= MAX_SEC):
            self.fail(where, f"expected seconds, found {shown(sec)}")
        return sec

    def file(self, url: Any, where: str) -> Path:
        if not isinstance(url, str) or not url:
            self.fail(where, f"expected a path, found {shown(url)}")
        if leaves_folder(url):
            self.fail(where, f"{shown(url)} leaves the manifest's folder; move the file there, or give its absolute path")
        path = self.folder / url
        try:
            exists = path.is_file()
        except (OSError, ValueError):  # a name the file system cannot hold
            exists = False
        if not exists:
            problem = f"audio file {str(path)[:1000]} does not exist; paths are relative to the manifest's folder, or absolute"
            self.fail(where, problem, MissingAudioError)
        return path

    def text(self, text: str, where: str) -> str:
        if found := CONTROL.search(text):
            self.fail(where, f"the text holds {found[0]}, which is a command to the model; write it in other words")
        try:
            text.encode()
        except UnicodeEncodeError:
            remedy = "escape both halves (\\ud83d\\ude00) or neither"
            self.fail(where, f"half a character, which no tokenizer reads: {shown(text)}; {remedy}")
        return text


def audio_parts(record: dict) -> Iterator[dict]:
    """The audio parts of a ChatML record that is decoded JSON, to be changed in place."""
    for turn in record["messages"]:
        for part in parts_of(turn["content"]):
            if isinstance(part, dict) and part.get("type") == "audio":
                yield part


def parts_of(content: Any) -> list:
    """The parts of a turn's content, which may be one that is not in a list."""
    return content if isinstance(content, list) else [content]


def leaves_folder(path: str) -> bool:
    """Whether a relative path climbs out of its folder. Links are not followed: a dataset may be made of them."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir


def _has_content(content: Any) -> bool:
    return any(part if isinstance(part, str) else isinstance(part, AudioContent) or part.text for part in parts_of(content))


def _absent_if_nan(value: Any) -> Any:
    """NaN means "absent" in exported tables, and upstream reads it as None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def shown(value: Any) -> str:
    """A value as JSON, at most 80 characters, for messages."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "deeply nested JSON"
    return text if len(text) <= 80 else text[:77] + "..."
