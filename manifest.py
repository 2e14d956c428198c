"""What a manifest holds: ChatML records, validated; every problem names file, record, field and remedy.

The record, and which turns train:

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | part | [str | part, ...]}, ...],
     "start_index": int?, "speaker": str?, "misc": {}?}
    part: {"type": "text", "text": str} or {"type": "audio", "audio_url": path, "offset": sec?, "duration": sec?}

Assistant turns from `start_index` on train, text and audio; earlier ones, and everything else, are context. `audio_url`
is relative to the manifest, or absolute: a waveform, or codes `[K, T]` as `.npy` or `.safetensors`. `audio_label_url`
beside it gives the label audio of an assistant turn where that differs from its input.

    python manifest.py MANIFEST      # what it holds
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

ROLES = ("system", "user", "assistant")
CODE_SUFFIXES = (".npy", ".safetensors")


class DataError(ValueError):
    """A problem with the user's data; the message names file, record, field and remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Manifest -> records


@dataclass
class AudioPart:
    """One clip a record refers to; times in seconds."""

    path: Path | None  # None: `raw_audio` holds the waveform
    offset_sec: float | None
    duration_sec: float | None
    is_output: bool  # of an assistant turn
    field: str  # where it stands, for messages
    label_path: Path | None = None
    raw_audio: bytes | None = field(default=None, repr=False)

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


def read_manifest(path: str | Path) -> list[Record]:
    """Read and validate a manifest (a JSON list, or JSONL); audio files are looked for, not opened.

    raises: DataError naming file, record, field and remedy
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such manifest file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save the manifest as UTF-8 JSON or JSONL") from None
    records = [parse_record(value, path.parent, source) for source, value in _read_json(path, text)]
    if not records:
        raise DataError(f"{path}: the manifest is empty")
    return records


def _read_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(source, value) of each record, from a JSON list or from one JSON value per line."""
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        for index, value in enumerate(_parse_json(text, f"{path}", line=1)):
            yield f"{path} record {index}", value
        return
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends here.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for index, (number, line) in enumerate(lines):
        yield f"{path} record {index} (line {number})", _parse_json(line, f"{path}", line=number)


def _parse_json(text: str, source: str, line: int) -> Any:
    try:
        return json.loads(text.lstrip("\ufeff"), parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise DataError(
            f"{source} line {at}: broken JSON ({error.msg} at column {error.colno}). A manifest is one JSON list, or one "
            "complete JSON object per line"
        ) from None


def _reject_constant(name: str):
    return math.nan  # NaN stands for "absent" in exported tables; upstream reads it as None, and so do the checks below


def parse_record(value: Any, folder: Path, source: str) -> Record:
    """Turn a decoded JSON value into a Record. folder: what relative paths start from."""

    def fail(where: str, problem: str):
        raise DataError(f"{source}: {where}: {problem}")

    if not isinstance(value, dict):
        fail("record", f"expected an object with `messages`, found {_shown(value)}")
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        found = f"keys {sorted(map(str, value))}" if "messages" not in value else _shown(messages)
        fail("messages", f"expected a non-empty list of turns, found {found}")
    unknown = set(value) - {"messages", "start_index", "speaker", "misc"}
    if unknown:
        fail("record", f"unknown keys {sorted(unknown)}; put extra information under `misc`")
    audio: list[AudioPart] = []
    turns = [_parse_turn(turn, f"messages[{i}]", folder, audio, fail) for i, turn in enumerate(messages)]
    start = _absent_if_nan(value.get("start_index"))
    if start is not None:
        if isinstance(start, bool) or not isinstance(start, (int, float)) or start != int(start):
            fail("start_index", f"expected a whole number of turns, found {_shown(start)}")
        if not 0 <= start < len(turns):
            fail("start_index", f"{start} leaves no turn to train; the record has {len(turns)} turns (0 to {len(turns) - 1})")
    if not any(turn.role == "assistant" for turn in turns[int(start or 0) :]):
        fail("messages", "no assistant turn from start_index on, so there is nothing to train")
    speaker, misc = _absent_if_nan(value.get("speaker")), _absent_if_nan(value.get("misc"))
    if speaker is not None and not isinstance(speaker, str):
        fail("speaker", f"expected text, found {_shown(speaker)}")
    if misc is not None and not isinstance(misc, dict):
        fail("misc", f"expected an object, found {_shown(misc)}")
    chatml = ChatMLSample(turns, start_index=None if start is None else int(start), misc=misc, speaker=speaker)
    return Record(chatml, audio, source)


def _parse_turn(turn: Any, where: str, folder: Path, audio: list[AudioPart], fail: Callable) -> Message:
    if not isinstance(turn, dict):
        fail(where, f"expected an object with `role` and `content`, found {_shown(turn)}")
    unknown = set(turn) - {"role", "content", "recipient"}
    if unknown:
        fail(where, f"unknown keys {sorted(unknown)}; a turn has `role` and `content`")
    role = turn.get("role")
    if role not in ROLES:
        fail(f"{where}.role", f"{_shown(role)} is not one of {', '.join(ROLES)}")
    recipient = _absent_if_nan(turn.get("recipient"))
    if recipient is not None and (role != "assistant" or not isinstance(recipient, str)):
        fail(f"{where}.recipient", "only an assistant turn can have a recipient, and it is text")
    content = turn.get("content")
    if isinstance(content, str):
        return Message(role, content, recipient)
    is_list = isinstance(content, list)
    parts = [
        _parse_part(part, f"{where}.content[{i}]" if is_list else f"{where}.content", role, folder, audio, fail)
        for i, part in enumerate(content if is_list else [content])
    ]
    return Message(role, parts if is_list else parts[0], recipient)


def _parse_part(part: Any, where: str, role: str, folder: Path, audio: list[AudioPart], fail: Callable):
    if isinstance(part, str):
        return TextContent(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            fail(f"{where}.text", f"expected text, found {_shown(part.get('text'))}")
        return TextContent(part["text"])
    if kind != "audio":
        fail(where, f'expected text, {{"type": "text", ...}} or {{"type": "audio", ...}}, found {_shown(part)}')
    unknown = set(part) - {"type", "audio_url", "raw_audio", "offset", "duration", "row_id", "audio_label_url"}
    if unknown:
        fail(where, f"unknown keys {sorted(unknown)} of an audio part")
    for name in ("offset", "duration"):
        sec = _absent_if_nan(part.get(name))
        if sec is not None and (isinstance(sec, bool) or not isinstance(sec, (int, float)) or sec < 0 or math.isinf(sec)):
            fail(f"{where}.{name}", f"expected seconds, found {_shown(sec)}")
    offset, duration = (_absent_if_nan(part.get(name)) for name in ("offset", "duration"))
    if duration == 0:
        fail(f"{where}.duration", "0 seconds of audio; leave it out for the whole clip")
    url, raw = part.get("audio_url"), _absent_if_nan(part.get("raw_audio"))
    path = raw_bytes = None
    if raw is not None:
        try:
            raw_bytes = base64.b64decode(raw, validate=True)
        except (TypeError, ValueError):
            fail(f"{where}.raw_audio", "not base64")
    else:
        path = _existing_file(url, f"{where}.audio_url", folder, fail)
    label_path = None
    if _absent_if_nan(part.get("audio_label_url")) is not None:
        if role != "assistant":
            fail(f"{where}.audio_label_url", "only an assistant turn has label audio")
        label_path = _existing_file(part["audio_label_url"], f"{where}.audio_label_url", folder, fail)
    audio.append(AudioPart(path, offset, duration, role == "assistant", where, label_path, raw_bytes))
    return AudioContent(audio_url=url if isinstance(url, str) else "", raw_audio=raw, offset=offset, duration=duration)


def _existing_file(url: Any, where: str, folder: Path, fail: Callable) -> Path:
    if not isinstance(url, str) or not url:
        fail(where, f"expected a path, found {_shown(url)}")
    path = folder / url
    if not path.is_file():
        fail(where, f"audio file {path} does not exist; paths are relative to the manifest's folder, or absolute")
    return path


def _absent_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
