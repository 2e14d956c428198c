"""What to generate: lines of a file or of the command line, records of a manifest; long texts in chunks.

A line is {"text": ..., "ref_audio": path or list, "ref_text": text or list, "scene": ...,
"system": ..., "ref_in_system": true, "id": ..., "seed": ...}, of which only the text is needed, or
a ChatML record. voices.py says what a reference can be.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import DataError
from generate.files import file_name
from generate.scores import WORD
from generate.voices import VOICES, find_voices, text_or_file
from prepare.manifest import AudioPart, Record, parse_record, parts_of, read_manifest
from prepare.prompts import context, normalise

LINE_KEYS = ("text", "ref_audio", "ref_text", "ref_in_system", "scene", "system", "id", "seed")


@dataclass(frozen=True)
class Line:
    """One text to generate."""

    name: str  # of its files
    turns: list[dict]  # ChatML before the text
    chunks: list[Any]  # contents of user turns, each answered after the one before
    folder: Path  # what relative audio paths start from
    source: str  # for messages
    seed: int | None = None
    target: list[AudioPart] = field(default_factory=list)  # the right answer, where that is known
    kind: str = "records"  # by which scores are grouped
    is_record: bool = False  # ChatML, whose text stays as it is

    def record(self, history: Sequence[dict], chunk: Any) -> Record:
        """The prompt of a chunk; raises DataError naming the problem."""
        turns = [*self.turns, *history, {"role": "user", "content": chunk}]
        return parse_record({"messages": turns}, self.folder, self.source, to_train=False)

    @property
    def text(self) -> str:
        return "\n".join(last_text(self.record([], chunk)) for chunk in self.chunks)


@dataclass(frozen=True)
class Chunking:
    """How texts are prepared: normalised as the official example does, and cut where they are long; 0 for any number."""

    words: int = 0
    turns: int = 0
    normalize: bool = True


def read_lines(path: Path, chunking: Chunking, voices: Path = VOICES) -> list[Line]:
    """The lines of a JSON or JSONL file; raises DataError. voices: the folder of named voices"""
    manifest = read_manifest(path)
    lines = []
    for index in range(len(manifest)):
        source, value = manifest.value(index)
        name = f"{index:05d}"
        if isinstance(value, dict) and "messages" in value:
            lines.append(line_of_record(value, name, manifest.folder, source))
        else:
            lines.append(line_of_request(value, name, manifest.folder, source, chunking, voices))
    return lines


def takes_of(lines: Sequence[Line], count: int, seed: int) -> list[Line]:
    """Each line so many times, called NAME-1, NAME-2, ... with the next seeds; raises DataError if two have one name.

    seed: of lines without one
    """
    if count > 1:
        numbered = [(line, number) for line in lines for number in range(count)]
        lines = [replace(x, name=f"{x.name}-{n + 1}", seed=(seed if x.seed is None else x.seed) + n) for x, n in numbered]
    seen: set[str] = set()
    for line in lines:
        if line.name in seen:
            raise DataError(f"{line.source}: id: several lines are called {line.name}; give each its own")
        seen.add(line.name)
    return list(lines)


def line_of_record(value: dict, name: str, folder: Path, source: str) -> Line:
    """A ChatML record; its last answer, if it has one, is the target."""
    record = parse_record(value, folder, source, to_train=False)
    prompt, target = split_answer(record)
    turns = value["messages"][: len(prompt.chatml.messages)]
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{source}: messages: the answer has to follow a user turn, the text to generate")
    kind = str((record.chatml.misc or {}).get("kind", Line.kind))
    return Line(name, turns[:-1], [turns[-1]["content"]], folder, source, target=target, kind=kind, is_record=True)


def line_of_request(
    value: Any, name: str, folder: Path, source: str, chunking: Chunking, voices: Path = VOICES
) -> Line:
    """A text with its references; see this file's docstring."""
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not value["text"].strip():
        raise DataError(f'{source}: expected {{"text": ...}} or a ChatML record with `messages`')
    unknown = set(value) - set(LINE_KEYS)
    if unknown:
        raise DataError(f"{source}: unknown keys {sorted(unknown)}; a line has {', '.join(LINE_KEYS)}")
    seed = value.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise DataError(f"{source}: seed: expected a whole number, 0 or more, found {seed!r}")
    names, texts = (_as_list(value.get(key), f"{source}: {key}") for key in ("ref_audio", "ref_text"))
    if not isinstance(in_system := value.get("ref_in_system", False), bool):
        raise DataError(f"{source}: ref_in_system: expected true or false, found {in_system!r}")
    if not isinstance(scene := value.get("scene") or "", str):
        raise DataError(f"{source}: scene: expected text, found {scene!r}")
    try:
        found = find_voices(names, texts, in_system, folder, voices)
        scene = text_or_file(scene, folder, "scene")
        split_text(value["text"], chunking)  # a tag without a text is an error before the final period is added
        text = normalise(value["text"]) if chunking.normalize else value["text"]
        chunks, turns = split_text(text, chunking), context(text, found, scene, value.get("system"))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return Line(file_name(str(value.get("id", name))), turns, chunks, folder, source, seed)


def _as_list(value: Any, what: str) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise DataError(f"{what}: expected text, or a list with one for each speaker")
    return values


def split_answer(record: Record) -> tuple[Record, list[AudioPart]]:
    """The record without the assistant's last turn, and that turn's clips; all of it if the user's turn is last."""
    turns = record.chatml.messages
    if turns[-1].role != "assistant":
        return record, []
    prompt = record.cropped(len(turns) - 1)
    return prompt, record.audio[len(prompt.audio) :]


def last_text(record: Record) -> str:
    """The text of the last turn."""
    parts = parts_of(record.chatml.messages[-1].content)
    return "".join(part if isinstance(part, str) else getattr(part, "text", "") for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Long texts

SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?:\s+|$)|[。！？]+\s*|\n\s*\n|$)", re.DOTALL)
TURN = re.compile(r"^(?=[ \t]*\[SPEAKER\d+\])", re.MULTILINE)
TAG = re.compile(r"\s*(\[SPEAKER\d+\]\s*)?")


def split_text(text: str, chunking: Chunking = Chunking()) -> list[str]:
    """Chunks of at most so many words and speaker turns, cut between turns, else between sentences, else between words.

    A chunk that begins inside a turn begins with its `[SPEAKERn]` again.
    raises: DataError for a speaker tag without a text
    """
    chunks: list[str] = []
    words = turns = 0
    for turn in filter(str.strip, TURN.split(text)):
        tag = TAG.match(turn)
        if not turn[tag.end() :]:
            raise DataError(f"text: nothing follows {turn.strip()}")
        for index, piece in enumerate(_pieces(turn[tag.end() :], chunking.words)):
            opens, size = index == 0, len(WORD.findall(piece))
            if chunks and words + size <= (chunking.words or math.inf) and not (opens and turns == chunking.turns > 0):
                chunks[-1] += (tag[1] or "") + piece if opens else piece
                words, turns = words + size, turns + opens
            else:
                chunks.append((tag[1] or "") + piece)
                words, turns = size, 1
    return [chunk.strip() for chunk in chunks]


def _pieces(text: str, max_words: int) -> Iterator[str]:
    """Sentences with the space after them, and sentences of more than `max_words` in parts."""
    for sentence in SENTENCE.findall(text):
        starts = [match.start() for match in WORD.finditer(sentence)]
        bounds = [0, *starts[max_words::max_words], len(sentence)] if max_words else [0, len(sentence)]
        yield from (sentence[start:stop] for start, stop in itertools.pairwise(bounds) if start < stop)
