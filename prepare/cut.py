"""Long recordings of one speaker -> a table of clips of 3 to 15 s, cut at pauses. Audio is not copied: the table holds spans.

    bash launch.sh prepare cut talk.wav more_recordings/ --out cuts.jsonl --speaker anna
    bash launch.sh prepare transcribe cuts.jsonl --language en

silero-vad finds the speech. Cuts are chosen so that little speech is lost, pauses at the cuts are long, and no long pause is
left inside a clip. What libsndfile does not read (m4a, mp4, ...) is decoded once, into FLAC files in a folder beside the
table. Recordings of several speakers: once for each, then train on all tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

from common import DataError, listing, write_whole
from prepare.audio import BLOCK_SAMPLES, FFMPEG_SUFFIXES, MAX_CUT_OFF, open_audio
from prepare.findings import SILENT
from prepare.folders import Listing
from prepare.manifest import AudioPart
from prepare.rows import WAVEFORM_SUFFIXES
from prepare.trim import KEPT_SEC

RATE_HZ, FRAME_SAMPLES = 16_000, 512  # what silero-vad takes
FRAME_SEC = FRAME_SAMPLES / RATE_HZ
LEAST_PAUSE_SEC = 0.15  # what is shorter may be the closure of a p, t or k
LONG_PAUSE_SEC = 1.0  # from here on a pause is as good a place for a cut as any, and better not inside a clip
UNEVEN_DB = 6.0  # between files or clips: twice the amplitude
NUM_EXAMPLES = 3  # of what was dropped, the longest
TOO_SHORT, NO_PAUSE = "shorter than --min_sec", "no pause to cut at within --max_sec"

Span = tuple[float, float]  # start and end in seconds


@dataclass
class Recording:
    """What is in a recording. path: as the table names it; source: as it was given"""

    source: Path
    path: Path
    sec: float
    speech: list[Span]
    powers: np.ndarray  # mean square of each frame of FRAME_SEC


@dataclass
class Piece:
    """A stretch of speech. dropped: why it is no clip, or empty"""

    start: float
    end: float
    dropped: str = ""

    @property
    def sec(self) -> float:
        return self.end - self.start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="+", type=Path, help="recordings, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the table to write, a .jsonl")
    parser.add_argument("--speaker", default="", metavar="NAME", help="who speaks")
    parser.add_argument("--min_sec", type=float, default=3.0)
    parser.add_argument("--max_sec", type=float, default=15.0)
    parser.add_argument("--force", action="store_true", help="replace --out, with the transcripts that are in it")


def run(args: argparse.Namespace) -> int:
    if not 0.5 <= args.min_sec < args.max_sec <= 30:
        raise DataError(f"--min_sec {args.min_sec:g} --max_sec {args.max_sec:g}: expected 0.5 <= min_sec < max_sec <= 30")
    if args.out.suffix != ".jsonl":
        raise DataError(f"--out {args.out}: choose a name that ends in .jsonl")
    if args.out.exists() and not args.force:
        raise DataError(f"--out {args.out}: it exists; choose another name, or replace it with --force")
    paths = find_recordings(args.input)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.stem}.", dir=args.out.parent) as scratch:
        recordings = listen_to_all(paths, Path(scratch))
        pieces = [cut(recording, args.min_sec, args.max_sec) for recording in recordings]
        lines = describe(recordings, pieces, args)
        keep_copies(recordings, Path(scratch), args.out.with_name(f"{args.out.stem}_audio"))
        write_table(recordings, pieces, args.out, args.speaker)
    print("\n".join(lines))
    return 0


def find_recordings(inputs: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of the folders. raises: DataError"""
    found = []
    for path in inputs:
        if path.is_dir():
            clips = [path / clip for clip in Listing(path).clips if clip.lower().endswith(WAVEFORM_SUFFIXES)]
            if not clips:
                raise DataError(f"{path}: no recording in this folder; expected files {', '.join(WAVEFORM_SUFFIXES)}")
            found += clips
        elif path.is_file() and path.suffix.lower() in WAVEFORM_SUFFIXES:
            found.append(path)
        else:
            problem = f"expected a recording ({', '.join(WAVEFORM_SUFFIXES)})" if path.is_file() else "no such file or folder"
            raise DataError(f"{path}: {problem}")
    return list({path.resolve(): path for path in found}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Listening


def listen_to_all(paths: Sequence[Path], scratch: Path) -> list[Recording]:
    """raises: DataError, before anything is listened to where a header shows that a file is no audio"""
    total = sum(map(length_sec, paths))
    num_threads = torch.get_num_threads()
    from silero_vad import load_silero_vad  # sets PyTorch to one thread, which is right for its small model

    try:
        vad = load_silero_vad()
        with tqdm(total=round(total), desc="speech", unit="s") as progress, torch.inference_mode():
            return [listen(path, scratch / f"{i}_{path.stem}.flac", vad, progress) for i, path in enumerate(paths)]
    finally:
        torch.set_num_threads(num_threads)


def opened(path: Path) -> soundfile.SoundFile:
    """raises: DataError"""
    try:
        return open_audio(AudioPart(path, None, None, True, ""))
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError) as error:
        raise DataError(f"{path} is not readable audio: {error}") from None


def length_sec(path: Path) -> float:
    with opened(path) as file:
        if not len(file):
            raise DataError(f"{path}: there is no audio in it")
        return len(file) / file.samplerate


def listen(path: Path, copy: Path, vad: Any, progress: tqdm) -> Recording:
    """Find the speech, in memory for one block. copy: the FLAC that a file is decoded into if others read it badly"""
    from silero_vad import get_speech_timestamps_from_probs

    shares: list[float] = []  # probability of speech in each frame
    powers = []
    vad.reset_states()
    for frames in frames_of(path, copy if path.suffix.lower() in FFMPEG_SUFFIXES else None):
        powers.append((frames**2).mean(axis=1))
        shares += [vad(frame, RATE_HZ).item() for frame in torch.from_numpy(frames)]
        progress.update(round(len(frames) * FRAME_SEC))
    settings = {"min_silence_duration_ms": 1000 * LEAST_PAUSE_SEC, "speech_pad_ms": 0}
    found = get_speech_timestamps_from_probs(shares, RATE_HZ, return_seconds=True, time_resolution=3, **settings)
    speech = [(span["start"], span["end"]) for span in found]
    return Recording(path, copy if copy.exists() else path, len(shares) * FRAME_SEC, speech, np.concatenate(powers))


def frames_of(path: Path, copy: Path | None) -> Iterator[np.ndarray]:
    """[n, FRAME_SAMPLES] float32 of each block, mono at RATE_HZ, its end filled with silence. raises: DataError"""
    with opened(path) as file:
        resampler, rest = soxr.ResampleStream(file.samplerate, RATE_HZ, 1, dtype="float32"), np.zeros(0, np.float32)
        for block, is_last in blocks_of(file, path, copy):
            rest = np.append(rest, resampler.resample_chunk(block.mean(axis=1), last=is_last))
            rest = np.pad(rest, (0, -len(rest) % FRAME_SAMPLES if is_last else 0))
            count = len(rest) // FRAME_SAMPLES
            yield rest[: count * FRAME_SAMPLES].reshape(count, FRAME_SAMPLES)
            rest = rest[count * FRAME_SAMPLES :]


def blocks_of(file: soundfile.SoundFile, path: Path, copy: Path | None) -> Iterator[tuple[np.ndarray, bool]]:
    """([n, channels], whether it is the last) of each block. raises: DataError"""
    done, size, is_last = 0, BLOCK_SAMPLES // file.channels, False
    with soundfile.SoundFile(copy, "w", file.samplerate, file.channels) if copy else contextlib.nullcontext() as written:
        while not is_last:
            try:
                block = file.read(size, "float32", True)
            except soundfile.LibsndfileError as error:
                raise DataError(f"{path} is not readable audio from {done / file.samplerate:.0f} s on: {error}") from None
            done, is_last = done + len(block), len(block) < size
            if not np.isfinite(block).all():
                raise DataError(f"{path} holds samples that are no finite numbers")
            if is_last and done < (1 - MAX_CUT_OFF) * len(file):
                there = f"{done / file.samplerate:.0f} of {len(file) / file.samplerate:.0f} s are there"
                raise DataError(f"{path} is cut off: {there}; copy it again")
            if written:
                written.write(block)
            yield block, is_last


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


def cut(recording: Recording, min_sec: float, max_sec: float) -> list[Piece]:
    """Divide the speech at pauses so that the sum of these is smallest, all in seconds: speech that is dropped; what pauses at
    cuts lack of LONG_PAUSE_SEC; by what pauses inside a clip are longer. A clip keeps up to KEPT_SEC of the pauses beside it.
    """
    speech = recording.speech
    if not speech:
        return []
    ends = [0.0, *(time for span in speech for time in span), recording.sec]
    pauses = [max(0.0, after - before) for before, after in zip(ends[::2], ends[1::2])]  # before each stretch, after the last
    margins = [min(KEPT_SEC, pause / 2) for pause in pauses]
    best: list[tuple[float, int, Piece | None]] = [(0.0, 0, None)]  # of the first stretches: cost, where the last piece begins
    for stop in range(1, len(speech) + 1):
        options, spoken, inside = [], 0.0, 0.0
        for first in range(stop - 1, -1, -1):
            piece = Piece(speech[first][0] - margins[first], speech[stop - 1][1] + margins[stop])
            if piece.sec > max_sec and options:
                break
            spoken += speech[first][1] - speech[first][0]
            inside += max(0.0, pauses[first + 1] - LONG_PAUSE_SEC) if first + 1 < stop else 0.0
            piece.dropped = TOO_SHORT if piece.sec < min_sec else NO_PAUSE if piece.sec > max_sec else ""
            lacking = max(0.0, LONG_PAUSE_SEC - pauses[first]) if first else 0.0
            options.append((best[first][0] + lacking + (spoken if piece.dropped else inside), first, piece))
        best.append(min(options, key=lambda option: option[0]))
    pieces, stop = [], len(speech)
    while stop:
        _, stop, piece = best[stop]
        pieces.append(piece)
    return pieces[::-1]


def keep_copies(recordings: Sequence[Recording], scratch: Path, folder: Path) -> None:
    """Move what was decoded to its place."""
    for recording in recordings:
        if recording.path.parent == scratch:
            folder.mkdir(exist_ok=True)
            recording.path = recording.path.replace(folder / recording.path.name)


def write_table(recordings: Sequence[Recording], pieces: Sequence[list[Piece]], out: Path, speaker: str) -> None:
    """Paths are relative to the table where the audio is below its folder, as those of `prepare convert`."""
    rows = []
    for recording, found in zip(recordings, pieces):
        path, folder = recording.path.resolve(), out.parent.resolve()
        audio = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        who = {"speaker": speaker} if speaker else {}
        spans = [{"start": round(piece.start, 3), "end": round(piece.end, 3)} for piece in found if not piece.dropped]
        rows += [{"audio": audio, **span, **who, "text": ""} for span in spans]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(out, lambda file: file.write(content.encode("utf-8", "backslashreplace")))


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def describe(recordings: Sequence[Recording], pieces: Sequence[list[Piece]], args: argparse.Namespace) -> list[str]:
    """What was found, what is kept, what is not and why. raises: DataError if nothing is kept"""
    kept = [piece.sec for found in pieces for piece in found if not piece.dropped]
    dropped = [(r, piece) for r, found in zip(recordings, pieces) for piece in found if piece.dropped]
    without = [f"{recording.source}: {nothing_in(recording)}" for recording in recordings if not recording.speech]
    minutes = sum(recording.sec for recording in recordings) / 60
    if len(without) == len(recordings):
        raise DataError(listing(f"no speech in {minutes:.1f} minutes:", without))
    limits = {TOO_SHORT: args.min_sec, NO_PAUSE: args.max_sec}
    count = Counter(piece.dropped for _, piece in dropped)
    lines = [f"dropped  {num} x {why} {limits[why]:g}" for why, num in count.items()]
    if not kept:
        raise DataError(listing(f"no clip of {args.min_sec:g} to {args.max_sec:g} s; give other limits:", lines))
    lines += [f"dropped  {recording}" for recording in without]
    examples = sorted(dropped, key=lambda item: -item[1].sec)[:NUM_EXAMPLES]
    lines += [f"example  {r.source} from {piece.start:.1f} to {piece.end:.1f} s: {piece.dropped}" for r, piece in examples]
    lengths = f"{min(kept):.1f} to {max(kept):.1f} s, half of them above {np.median(kept):.1f} s"
    return [
        f"{len(kept)} clips, {sum(kept) / 60:.1f} of {minutes:.1f} minutes -> {args.out}",
        *(f"  {line}" for line in [f"lengths  {lengths}", *lines, *describe_loudness(recordings, pieces)]),
        f"next: bash launch.sh prepare transcribe {args.out} --language en",
    ]


def nothing_in(recording: Recording) -> str:
    is_silent = recording.powers.max() < SILENT**2
    return "silence" if is_silent else "sound, but no speech: music or noise, or speech far below it"


def describe_loudness(recordings: Sequence[Recording], pieces: Sequence[list[Piece]]) -> list[str]:
    """The levels of clips, and of files where there are several; what to do where they are far apart."""
    levels = [
        [level_db(r.powers[int(p.start / FRAME_SEC) : int(p.end / FRAME_SEC) + 1]) for p in found if not p.dropped]
        for r, found in zip(recordings, pieces)
    ]
    low, high = np.quantile([level for found in levels for level in found], [0.05, 0.95])
    lines = [f"loudness {low:.0f} to {high:.0f} dB (RMS, nine of ten clips)"]
    files = sorted((float(np.median(found)), r.source) for r, found in zip(recordings, levels) if found)
    apart = files[-1][0] - files[0][0]
    if apart > UNEVEN_DB:
        quiet, loud = files[0], files[-1]
        lines.append(
            f"         {quiet[1]} is {apart:.0f} dB quieter than {loud[1]}, and both would be learnt. Bring all to one level"
        )
    elif high - low > 2 * UNEVEN_DB:
        lines.append("         the speaker moved, or the gain did: both would be learnt. Bring each file to one level")
    else:
        return lines
    return [*lines, "         and cut again: ffmpeg -i IN.wav -af dynaudnorm -ar 48000 OUT.wav"]


def level_db(powers: np.ndarray) -> float:
    return float(10 * np.log10(powers.mean() + 1e-12))
