"""Which records belong together: those that share audio (the same content, overlapping parts of a file) or a speaker's text."""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

from boson_multimodal.data_types import AudioContent, Message, TextContent
from scipy.cluster.hierarchy import DisjointSet

from common import sha256_of
from prepare.manifest import AudioPart, Manifest, Record

DIARISED = re.compile(r"SPEAKER_\d+")  # a name that holds in one recording alone
TOUCHING_SEC = 0.001  # spans may overlap by this much: seconds in manifests are rounded

T = TypeVar("T")
Source = str | tuple[int, str]  # of clips: a file's path, or size and digest of `raw_audio`
Span = tuple[Source, float, float]  # a clip: its source, start and end in seconds


@dataclass
class Line:
    """A record, as far as pairing needs it."""

    index: int  # in the manifest
    speaker: str | None  # SPEAKER_00 and the like are one for each recording
    texts: list[str]  # of `transcripts`, words only
    context: list[Span]
    targets: list[Span]  # the clips that train, and their label audio
    is_plain: bool  # one transcript and its clip: can have a reference, and be one
    recording: str | None = None  # of which the clip's file is one channel
    group: int = -1  # records of one group go into one split
    split: str = "train"

    @property
    def spans(self) -> list[Span]:
        return self.context + self.targets


def read_lines(manifest: Manifest) -> Iterator[Line]:
    for index, record in enumerate(manifest):
        texts = transcripts(record)
        context, targets, trained = [], [], record.trained()
        for part in record.audio:
            spans = targets if part in trained else context
            spans += [span_of(clip) for clip in (part, part.label) if clip is not None]
        is_plain = len(texts) == len(record.audio) == 1
        speaker = record.chatml.speaker
        if speaker and DIARISED.fullmatch(speaker) and targets:
            speaker = f"{speaker} of {targets[0][0]}"
        misc = record.chatml.misc or {}
        if (recording := misc.get("channel_of")) and speaker is None:
            speaker = f"channel {misc.get('channel')} of {recording}"
        yield Line(index, speaker, [words(text) for text in texts], context, targets, is_plain, recording)


def transcripts(record: Record) -> list[str]:
    """The transcripts of a line, or of a reference (an earlier exchange) and a line, perhaps after a system turn.

    Empty for any other record: in a dialogue the user's texts may be prompts, not transcripts.
    """
    turns = record.chatml.messages
    start = len(turns) - 1
    turns = turns[turns[0].role == "system" :]
    if len(turns) != 2 and not (len(turns) == 4 and record.chatml.start_index == start):
        return []
    exchanges = list(zip(turns[::2], turns[1::2]))
    texts = [sole_text(user.content) for user, _ in exchanges]
    return texts if all(map(is_exchange, *zip(*exchanges))) else []


def is_exchange(user: Message, assistant: Message) -> bool:
    """Whether a turn is one text, and the next turn is one clip."""
    roles = user.role == "user" and assistant.role == "assistant" and assistant.recipient is None
    return roles and sole_text(user.content) is not None and isinstance(sole(assistant.content), AudioContent)


def sole(content: Any) -> Any:
    """The only part of a turn's content; of decoded JSON or of the official message."""
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def sole_text(content: Any) -> str | None:
    """The text of a turn that has nothing else."""
    part = sole(content)
    if isinstance(part, dict):
        return part.get("text")
    return part.text if isinstance(part, TextContent) else part if isinstance(part, str) else None


class _Words(dict):
    """For `str.translate`: keeps letters, digits and their marks; anything else becomes a space."""

    def __missing__(self, code: int) -> int | str:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else " "
        return self[code]


WORDS = _Words()


def words(text: str) -> str:
    """The words of a text: equal for two spellings of one sentence."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(WORDS).split())


def span_of(part: AudioPart) -> Span:
    source = str(part.path) if part.path is not None else (len(part.raw_audio), hashlib.sha256(part.raw_audio).hexdigest())
    start = part.offset_sec or 0.0
    return source, start, math.inf if part.duration_sec is None else start + part.duration_sec


class Contents:
    """The content of sources, equal for copies. Files are only read if another source has the same size."""

    def __init__(self, lines: Iterable[Line]):
        sources = {source for line in lines for source, _, _ in line.spans}
        self._sizes = {source: source[0] if isinstance(source, tuple) else os.stat(source).st_size for source in sources}
        self._count = Counter(self._sizes.values())
        self._known: dict[Source, str] = {}

    def __getitem__(self, source: Source) -> str:
        if source not in self._known:
            self._known[source] = self._digest(source)
        return self._known[source]

    def _digest(self, source: Source) -> str:
        if isinstance(source, tuple):
            return source[1]
        if self._count[self._sizes[source]] == 1:
            return f"size {self._sizes[source]}"
        with open(source, "rb") as file:
            return sha256_of(file).hex()


def overlapping(spans: Iterable[tuple[Span, T]], contents: Contents) -> Iterator[list[T]]:
    """Lists of the owners of spans that overlap, directly or through other spans."""
    owners: list[T] = []
    last, end = "", 0.0
    named = ((contents[source], start, stop, owner) for (source, start, stop), owner in spans)
    for content, start, stop, owner in sorted(named, key=itemgetter(0, 1)):
        if owners and (content != last or start > end - TOUCHING_SEC):
            yield owners
            owners = []
        last, end = content, max(stop, end if owners else 0.0)
        owners.append(owner)
    if owners:
        yield owners


def group_lines(lines: Sequence[Line]) -> None:
    """Set the group of each line. Lines share a group if they share audio, or speaker and text, also through others."""
    groups = DisjointSet(range(len(lines)))
    first: dict[Any, int] = {}
    for number, line in enumerate(lines):
        for text in filter(None, line.texts):
            groups.merge(first.setdefault((line.speaker, text), number), number)
    spans = ((span, number) for number, line in enumerate(lines) for span in line.spans)
    for numbers in overlapping(spans, Contents(lines)):
        for number in numbers[1:]:
            groups.merge(numbers[0], number)
    for number, line in enumerate(lines):
        line.group = groups[number]
