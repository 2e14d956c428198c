"""Dialogues made of single lines, for `prepare pair --dialogues`: a text of `[SPEAKERn]` turns and one clip.

Lines that follow each other in one recording become one clip, cut from it, so the pauses between turns stay as they were.
Lines of the channels of one call become one clip too, each from its own channel until the next one begins.
Lines of given speakers are joined whatever files they come from: their clips are written one after the other, as they are.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import librosa
import numpy as np
import soundfile

from common import DataError
from prepare.audio import FRAME_RATE_HZ, read_codes, read_codes_shape, read_waveform, span
from prepare.manifest import AudioPart
from prepare.overlap import TOUCHING_SEC, Line

MAX_TURNS = 4
MAX_SEC = 30.0
MAX_PAUSE_SEC = 2.0  # after a longer one something else begins


def candidates(lines: Sequence[Line], speakers: Sequence[str], rng: random.Random) -> list[list[Line]]:
    """Lines that could be a dialogue, in its order: 2 to MAX_TURNS turns, of one split. No line is in two of them.

    speakers: whose lines are joined; none: those of one recording, where they follow each other
    """
    found = list(_of_speakers(lines, speakers, rng) if speakers else _of_recordings(lines, rng))
    rng.shuffle(found)
    return found


def _can_join(line: Line) -> bool:
    """One text without a speaker tag of its own, and one clip of a file, without label audio."""
    is_plain = line.is_plain and line.speaker is not None and len(line.spans) == 1 and isinstance(line.spans[0][0], str)
    return is_plain and not re.match(r"speaker\d", line.texts[0])


def _of_speakers(lines: Sequence[Line], speakers: Sequence[str], rng: random.Random) -> Iterator[list[Line]]:
    """A line each of two or three of the speakers."""
    pools: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if _can_join(line) and line.speaker in speakers:
            pools[line.split][line.speaker].append(line)
    for pool in pools.values():
        for members in pool.values():
            rng.shuffle(members)
        while len(pool) > 1:
            chosen = rng.sample(sorted(pool), min(len(pool), rng.randint(2, 3)))
            yield [pool[name].pop() for name in chosen]
            pool = {name: members for name, members in pool.items() if members}


def _of_recordings(lines: Sequence[Line], rng: random.Random) -> Iterator[list[Line]]:
    recordings = defaultdict(list)
    for line in lines:
        for source, start, stop in line.spans:
            recordings[line.recording or source].append((start, stop, line))
    for spans in recordings.values():
        run: list[Line] = []
        for start, _, line in [*sorted(spans, key=lambda item: item[:2]), (0, 0, None)]:
            if run and (line is None or not _can_join(line) or not _follows(run[-1], start, line.split)):
                yield from _cut(run, rng)
                run = []
            if line is not None and _can_join(line):
                run.append(line)


def _follows(before: Line, start: float, split: str) -> bool:
    """Whether what starts then goes on with the conversation; lines spoken at the same time cannot be told apart."""
    return before.split == split and -TOUCHING_SEC <= start - before.spans[0][2] <= MAX_PAUSE_SEC


def _cut(run: list[Line], rng: random.Random) -> Iterator[list[Line]]:
    """Pieces of several speakers, of a random number of turns."""
    while run:
        num_turns, size = rng.randint(2, MAX_TURNS), 1
        while size < len(run):
            piece = run[: size + 1]
            if len(turns(piece)) > num_turns or piece[-1].spans[0][2] - piece[0].spans[0][1] > MAX_SEC:
                break
            size += 1
        piece, run = run[:size], run[size:]
        if len(turns(piece)) > 1:
            yield piece


def turns(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each turn."""
    return [list(group) for _, group in groupby(lines, key=lambda line: line.speaker)]


def speakers_of(lines: Sequence[Line]) -> list[str]:
    """SPEAKER0, SPEAKER1, ...: in the order in which they begin."""
    return list(dict.fromkeys(line.speaker for line in lines))


def script(lines: Sequence[Line], texts: Sequence[str]) -> str:
    """The text to be spoken. texts: of the lines"""
    numbers = speakers_of(lines)
    said = dict(zip((line.index for line in lines), texts))
    return "\n".join(
        f"[SPEAKER{numbers.index(turn[0].speaker)}] {' '.join(said[line.index] for line in turn)}" for turn in turns(lines)
    )


def changes(lines: Sequence[Line], begins_sec: Sequence[float]) -> list[float]:
    """Seconds at which another speaker begins. begins_sec: of the lines"""
    return [round(sec, 3) for sec, (a, b) in zip(begins_sec[1:], pairwise(lines)) if a.speaker != b.speaker]


def _is_one_stretch(lines: Sequence[Line]) -> bool:
    return all(_follows(before, after.spans[0][1], after.split) for before, after in pairwise(lines))


def shared_clip(lines: Sequence[Line]) -> tuple[dict[str, float], list[float]] | None:
    """`offset` and `duration` of lines that follow each other in one recording, and where each begins in it; else None."""
    sources, starts, stops = zip(*(line.spans[0] for line in lines))
    if len(set(sources)) > 1 or not _is_one_stretch(lines):
        return None
    times = {"offset": starts[0], "duration": round(stops[-1] - starts[0], 6)}
    return times, [start - starts[0] for start in starts]


def lasting(parts: Sequence[AudioPart], lines: Sequence[Line]) -> list[AudioPart]:
    """The clips of lines; of channels of one call each goes on until the next line begins, so pauses stay as they were."""
    if lines[0].recording is None or len({line.recording for line in lines}) > 1 or not _is_one_stretch(lines):
        return list(parts)
    begins = [line.spans[0][1] for line in lines]
    return [replace(part, duration_sec=end - begin) for part, begin, end in zip(parts, begins, begins[1:])] + [parts[-1]]


def write_joined(parts: Sequence[tuple[AudioPart, str]], path: Path) -> tuple[Path, list[float]]:
    """Write clips one after the other; returns the file, and the seconds at which each begins.

    parts: clips and where they come from, for messages
    raises: DataError if some are codes and some are not
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holds_codes = {part.holds_codes for part, _ in parts}
    if len(holds_codes) > 1:
        raise DataError(f"{parts[0][1]}, {parts[1][1]}: codes and a waveform make no dialogue; give all lines in one form")
    if holds_codes == {True}:
        pieces, rate = [_codes(part, source) for part, source in parts], FRAME_RATE_HZ
        path = path.with_suffix(".npy")
        np.save(path, np.concatenate(pieces, axis=1))
    else:
        waveforms = [read_waveform(part, source) for part, source in parts]
        rate = max(rate for _, rate in waveforms)
        pieces = [librosa.resample(samples, orig_sr=own, target_sr=rate) for samples, own in waveforms]
        path = path.with_suffix(".flac")
        soundfile.write(path, np.concatenate(pieces), rate)
    return path, [sum(piece.shape[-1] for piece in pieces[:n]) / rate for n in range(len(pieces))]


def _codes(part: AudioPart, source: str) -> np.ndarray:
    """[K, T]"""
    codes = read_codes(part.path, read_codes_shape(part.path, source)[0], np.iinfo(np.int64).max, source)
    return codes[:, slice(*span(part, FRAME_RATE_HZ, codes.shape[1]))].numpy().astype(np.int16)
