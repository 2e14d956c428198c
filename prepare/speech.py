"""Where speech is in a recording, by silero-vad, and how loud it is; recordings of hours are read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

from common import DataError
from prepare import audio
from prepare.audio import BLOCK_SAMPLES, FFMPEG_SUFFIXES, UNREADABLE, open_audio
from prepare.findings import SILENT
from prepare.manifest import AudioPart

RATE_HZ, FRAME_SAMPLES = 16_000, 512  # what silero-vad takes
FRAME_SEC = FRAME_SAMPLES / RATE_HZ
LEAST_PAUSE_SEC = 0.15  # what is shorter may be the closure of a p, t or k


@dataclass
class Recording:
    """What is in a recording."""

    source: Path  # as it was given
    path: Path  # as the table names it
    speech: list[tuple[float, float]]  # start and end in seconds
    powers: np.ndarray  # mean square of each frame of FRAME_SEC

    @property
    def sec(self) -> float:
        return len(self.powers) * FRAME_SEC

    @property
    def without_speech(self) -> str:
        """What there is instead."""
        is_silent = self.powers.max(initial=0) < SILENT**2
        return "silence" if is_silent else "sound, but no speech: music or noise, or a voice far below them"

    def level_db(self, start: float, end: float) -> float:
        """RMS from `start` to `end` seconds, against full scale."""
        return float(10 * np.log10(self.powers[int(start / FRAME_SEC) : int(end / FRAME_SEC) + 1].mean() + 1e-12))


def listen_to_all(sources: Sequence[Path], scratch: Path) -> list[Recording]:
    """raises: DataError; before anything is listened to where a file shows at once that it is no audio"""
    paths = [decoded(path, scratch / f"{i}_{path.stem}.flac") for i, path in enumerate(sources)]
    num_threads = torch.get_num_threads()
    try:
        import silero_vad  # sets PyTorch to one thread, which is right for its small model

        vad = silero_vad.load_silero_vad()
        with tqdm(total=round(sum(map(length_sec, paths))), desc="speech", unit="s") as progress, torch.inference_mode():
            return [listen(source, path, vad, progress) for source, path in zip(sources, paths)]
    except ImportError as error:
        remedy = "bash launch.sh prepare cut installs it, or: pip install -r requirements-voice.txt"
        raise DataError(f"speech is found by silero-vad, which is missing ({error}); {remedy}") from None
    finally:
        torch.set_num_threads(num_threads)


def decoded(source: Path, flac: Path) -> Path:
    """The file itself, or a copy of one that ffmpeg would have to decode as a whole for each of its clips."""
    if source.suffix.lower() not in FFMPEG_SUFFIXES:
        length_sec(source)
        return source
    with opened(source) as file, soundfile.SoundFile(flac, "w", file.samplerate, file.channels) as copy:
        for block in blocks_of(file, source):
            copy.write(block)
    return flac


def opened(path: Path) -> soundfile.SoundFile:
    """raises: DataError"""
    try:
        return open_audio(AudioPart(path))
    except UNREADABLE as error:
        raise DataError(f"{path} is not readable audio: {error}") from None


def length_sec(path: Path) -> float:
    with opened(path) as file:
        if not len(file):
            raise DataError(f"{path}: there is no audio in it")
        return len(file) / file.samplerate


def listen(source: Path, path: Path, vad: Any, progress: tqdm) -> Recording:
    """Find the speech; an hour needs no more memory than a minute but for two numbers per frame."""
    from silero_vad import get_speech_timestamps_from_probs

    chances: list[float] = []  # that a frame is speech
    powers = []
    vad.reset_states()
    for frames in frames_of(path):
        powers.append((frames**2).mean(axis=1))
        chances += [vad(frame, RATE_HZ).item() for frame in torch.from_numpy(frames)]
        progress.update(round(len(frames) * FRAME_SEC))
    settings = {"min_silence_duration_ms": 1000 * LEAST_PAUSE_SEC, "speech_pad_ms": 0}
    found = get_speech_timestamps_from_probs(chances, RATE_HZ, return_seconds=True, time_resolution=3, **settings)
    return Recording(source, path, [(span["start"], span["end"]) for span in found], np.concatenate(powers))


def frames_of(path: Path) -> Iterator[np.ndarray]:
    """[n, FRAME_SAMPLES] float32 of each block, mono at RATE_HZ; what is left at the end is less than a frame."""
    with opened(path) as file:
        resampler, rest = soxr.ResampleStream(file.samplerate, RATE_HZ, 1, dtype="float32"), np.zeros(0, np.float32)
        for block in blocks_of(file, path):
            rest = np.append(rest, resampler.resample_chunk(block.mean(axis=1)))
            count = len(rest) // FRAME_SAMPLES
            yield rest[: count * FRAME_SAMPLES].reshape(count, FRAME_SAMPLES)
            rest = rest[count * FRAME_SAMPLES :]


def blocks_of(file: soundfile.SoundFile, path: Path) -> Iterator[np.ndarray]:
    """[n, channels] float32 of each block of a recording. raises: DataError"""
    return audio.blocks_of(file, 0, len(file), BLOCK_SAMPLES // file.channels, str(path))
