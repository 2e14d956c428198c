"""What is in a clip: its length, and what is wrong with its sound."""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from common import DataError
from prepare.audio import (
    FRAME_RATE_HZ,
    UNREADABLE,
    blocks_of,
    checked_span,
    expected_frames,
    open_audio,
    read_codes,
    read_codes_shape,
    span,
)
from prepare.findings import Listener, Sound
from prepare.manifest import AudioPart, Manifest
from prepare.report import Report

Key = tuple[str, float | None, float | None]  # of a clip: its file, offset, duration


@dataclass(frozen=True)
class Clip:
    """The figures of a clip."""

    name: str
    sec: float
    num_frames: int
    rate_hz: int  # 0: ready-made codes
    digest: str  # of its content
    path: str = ""  # of its file
    past_end_sec: float = 0.0  # by which its span goes beyond the file
    sound: Sound | None = None  # None: ready-made codes


def key_of(part: AudioPart) -> Key:
    source = str(part.path) if part.path is not None else hashlib.sha256(part.raw_audio).hexdigest()
    return source, part.offset_sec, part.duration_sec


def inspect_clips(records: Manifest, report: Report, config: Any, num_workers: int) -> dict[Key, Clip]:
    """Open every clip once; clips that cannot be read go to the report.

    config: of the checkpoint, whose codebooks ready-made codes have to fit; or None
    """
    parts: dict[Key, tuple[AudioPart, str]] = {}
    for record in records:
        for part in record.clips():
            parts.setdefault(key_of(part), (part, record.source))
    codebooks = (config.audio_num_codebooks, config.audio_codebook_size) if config else None
    clips = {}
    with ProcessPoolExecutor(num_workers) as pool:
        found = pool.map(functools.partial(inspect_clip, codebooks=codebooks), parts.values(), chunksize=8)
        for key, clip in zip(parts, tqdm(found, total=len(parts), desc="audio", unit="clip")):
            if isinstance(clip, Clip):
                clips[key] = clip
            else:
                report.problems["unreadable audio"].append(clip)
    return clips


def inspect_clip(item: tuple[AudioPart, str], codebooks: tuple[int, int] | None) -> Clip | str:
    """A clip's figures, or what is wrong with it. codebooks: (number, size), or None"""
    part, source = item
    try:
        return inspect_codes(part, source, codebooks) if part.holds_codes else inspect_waveform(part, source)
    except DataError as error:
        return str(error)


def name_of(part: AudioPart, source: str) -> str:
    name = f"{source}: {part.field}: raw_audio" if part.path is None else f"{part.path}"
    return name + (f" from {part.offset_sec or 0:g} s" if part.offset_sec or part.duration_sec else "")


def inspect_codes(part: AudioPart, source: str, codebooks: tuple[int, int] | None) -> Clip:
    place = f"{source}: {part.field}"
    shape = read_codes_shape(part.path, place)
    if not codebooks and len(shape) != 2:
        raise DataError(f"{place}: {part.path} holds an array {shape}; expected [codebooks, frames]")
    codes = read_codes(part.path, *(codebooks or (shape[0], np.iinfo(np.int64).max)), place)
    start, stop = span(part, FRAME_RATE_HZ, shape[1])
    if stop <= start:
        raise DataError(f"{place}: no frames left of {shape[1]} in {part.path} after offset and duration")
    digest = hashlib.sha256(codes[:, start:stop].numpy().tobytes()).hexdigest()
    return Clip(name_of(part, source), (stop - start) / FRAME_RATE_HZ, stop - start, 0, digest, str(part.path))


def inspect_waveform(part: AudioPart, source: str) -> Clip:
    """Read in blocks: ten hours need no more memory than ten seconds."""
    place = f"{source}: {part.field}: {part.path or 'raw_audio'}"
    digest, num_samples = hashlib.sha256(), 0
    try:
        with open_audio(part) as file:
            rate, (start, stop) = file.samplerate, checked_span(part, file)
            past_end = (part.offset_sec or 0) + (part.duration_sec or 0) - len(file) / rate
            listener = Listener(rate, file.channels)
            for samples in blocks_of(file, start, stop, 500 * listener.block_size, place):
                digest.update(samples.tobytes())
                listener.add(samples)
                num_samples += len(samples)
    except UNREADABLE as error:
        raise DataError(f"{place} is not readable audio: {error}") from None
    sec = num_samples / rate
    if sec * FRAME_RATE_HZ < 1:
        raise DataError(f"{place}: {sec:.3f} s of audio is less than one frame")
    path, past_end = str(part.path or ""), max(0.0, past_end) if part.duration_sec else 0.0
    frames = expected_frames(sec)
    return Clip(name_of(part, source), sec, frames, rate, digest.hexdigest(), path, past_end, listener.sound())
