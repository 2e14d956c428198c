"""Long recordings of one speaker -> a table of clips of 3 to 15 s, cut at pauses. Audio is not copied: the table has spans.

    bash launch.sh prepare cut talk.wav more_recordings/ --out cuts.jsonl --speaker anna
    bash launch.sh prepare transcribe cuts.jsonl --language en

silero-vad finds the speech. Cuts are chosen so that little speech is lost, pauses at the cuts are long, and no long pause is
left inside a clip. Formats that need ffmpeg (m4a, mp4, ...) are decoded once, into FLAC files in a folder beside the table.
Of several speakers: once for each, and train on all tables.
"""

from __future__ import annotations

import argparse
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
from prepare.audio import BLOCK_SAMPLES, FFMPEG_SUFFIXES, MAX_CUT_OFF, MAX_TRANSCRIBED_SEC, open_audio
from prepare.findings import SILENT
from prepare.folders import Listing
from prepare.manifest import AudioPart
from prepare.rows import WAVEFORM_SUFFIXES
from prepare.trim import KEPT_SEC

RATE_HZ, FRAME_SAMPLES = 16_000, 512  # what silero-vad takes
FRAME_SEC = FRAME_SAMPLES / RATE_HZ
LEAST_PAUSE_SEC = 0.15  # what is shorter may be the closure of a p, t or k
LONG_PAUSE_SEC = 1.0  # from here on a pause is as good a place for a cut as any, and better not inside a clip
UNEVEN_DB = 6.0  # twice the amplitude
NUM_EXAMPLES = 3  # of what was dropped, the longest
TOO_SHORT, NO_PAUSE = "shorter than --min_sec", "no pause to cut at within --max_sec"


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


@dataclass
class Piece:
    """Stretches of speech from the one with the index `first` on."""

    start: float
    end: float
    first: int
    dropped: str = ""  # why it is no clip

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
    if not 0.5 <= args.min_sec < args.max_sec <= MAX_TRANSCRIBED_SEC:
        raise DataError(
            f"--min_sec {args.min_sec:g} --max_sec {args.max_sec:g}: expected 0.5 <= min_sec < max_sec <= {MAX_TRANSCRIBED_SEC}"
        )
    if args.out.suffix != ".jsonl":
        raise DataError(f"--out {args.out}: choose a name that ends in .jsonl")
    if args.out.exists() and not args.force:
        raise DataError(f"--out {args.out}: it exists; choose another name, or replace it with --force")
    sources = find_recordings(args.input)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.stem}.", dir=args.out.parent) as scratch:
        recordings = listen_to_all(sources, Path(scratch))
        pieces = [cut(recording, args.min_sec, args.max_sec) for recording in recordings]
        lines = describe(recordings, pieces, args)
        for recording in recordings:
            if recording.path != recording.source:
                recording.path = kept(recording.path, args.out.with_name(f"{args.out.stem}_audio"))
    write_table(recordings, pieces, args.out, args.speaker)
    print("\n".join(lines))
    return 0


def kept(path: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return path.replace(folder / path.name)


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


def listen_to_all(sources: Sequence[Path], scratch: Path) -> list[Recording]:
    """raises: DataError; before anything is listened to where a file shows at once that it is no audio"""
    paths = [decoded(path, scratch / f"{i}_{path.stem}.flac") for i, path in enumerate(sources)]
    num_threads = torch.get_num_threads()
    from silero_vad import load_silero_vad  # sets PyTorch to one thread, which is right for its small model

    try:
        vad = load_silero_vad()
        with tqdm(total=round(sum(map(length_sec, paths))), desc="speech", unit="s") as progress, torch.inference_mode():
            return [listen(source, path, vad, progress) for source, path in zip(sources, paths)]
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
        return open_audio(AudioPart(path, None, None, True, ""))
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError) as error:
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
    """[n, channels] float32 of each block. raises: DataError"""
    done, length = 0, len(file)
    try:
        while len(block := file.read(BLOCK_SAMPLES // file.channels, "float32", True)):
            done += len(block)
            if not np.isfinite(block).all():
                raise DataError(f"{path} holds samples that are no finite numbers")
            yield block
    except soundfile.LibsndfileError as error:
        raise DataError(f"{path} is not readable audio from {done / file.samplerate:.0f} s on: {error}") from None
    if done < (1 - MAX_CUT_OFF) * length:
        raise DataError(f"{path} is cut off: {done / file.samplerate:.0f} of {length / file.samplerate:.0f} s are there")


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


def cut(recording: Recording, min_sec: float, max_sec: float) -> list[Piece]:
    """Divide the speech at pauses so that the sum of these seconds is smallest: speech that is dropped, what pauses at cuts
    lack of LONG_PAUSE_SEC, and by what pauses inside a clip are longer. A clip keeps up to KEPT_SEC of the pauses beside it.
    """
    speech = recording.speech
    ends = [0.0, *(time for span in speech for time in span), recording.sec]
    pauses = [max(0.0, after - before) for before, after in zip(ends[::2], ends[1::2])]  # before each stretch, after the last
    margins = [min(KEPT_SEC, pause / 2) for pause in pauses]
    best: list[tuple[float, Piece | None]] = [(0.0, None)]  # cost of the first stretches, and the last piece of them
    for stop in range(1, len(speech) + 1):
        options, spoken, inside = [], 0.0, 0.0
        for first in range(stop - 1, -1, -1):
            piece = Piece(speech[first][0] - margins[first], speech[stop - 1][1] + margins[stop], first)
            if piece.sec > max_sec and options:
                break
            spoken += speech[first][1] - speech[first][0]
            inside += max(0.0, pauses[first + 1] - LONG_PAUSE_SEC) if first + 1 < stop else 0.0
            piece.dropped = TOO_SHORT if piece.sec < min_sec else NO_PAUSE if piece.sec > max_sec else ""
            lacking = max(0.0, LONG_PAUSE_SEC - pauses[first]) if first else 0.0
            options.append((best[first][0] + lacking + (spoken if piece.dropped else inside), piece))
        best.append(min(options, key=lambda option: option[0]))
    pieces, stop = [], len(speech)
    while stop:
        pieces.append(best[stop][1])
        stop = pieces[-1].first
    return pieces[::-1]


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
    minutes = sum(recording.sec for recording in recordings) / 60
    without = [f"{recording.source}: {nothing_in(recording)}" for recording in recordings if not recording.speech]
    if len(without) == len(recordings):
        raise DataError(listing(f"no speech in {minutes:.1f} minutes:", without))
    clips = [piece.sec for found in pieces for piece in found if not piece.dropped]
    dropped = [(recording, piece) for recording, found in zip(recordings, pieces) for piece in found if piece.dropped]
    limits = {TOO_SHORT: args.min_sec, NO_PAUSE: args.max_sec}
    reasons = Counter(piece.dropped for _, piece in dropped)
    lost = [f"dropped  {count} x {why} {limits[why]:g}" for why, count in reasons.items()]
    for recording, piece in sorted(dropped, key=lambda item: -item[1].sec)[:NUM_EXAMPLES]:
        lost.append(f"example  {recording.source} from {piece.start:.1f} to {piece.end:.1f} s: {piece.dropped}")
    if not clips:
        raise DataError(listing(f"no clip of {args.min_sec:g} to {args.max_sec:g} s; give other limits:", lost))
    lines = [f"lengths  {min(clips):.1f} to {max(clips):.1f} s, half of them above {np.median(clips):.1f} s", *lost]
    lines += [f"dropped  {recording}" for recording in without] + describe_loudness(recordings, pieces)
    return [
        f"{len(clips)} clips, {sum(clips) / 60:.1f} of {minutes:.1f} minutes -> {args.out}",
        *(f"  {line}" for line in lines),
        f"next: bash launch.sh prepare transcribe {args.out} --language en",
    ]


def nothing_in(recording: Recording) -> str:
    is_silent = recording.powers.max(initial=0) < SILENT**2
    return "silence" if is_silent else "sound, but no speech: music or noise, or a voice far below them"


def describe_loudness(recordings: Sequence[Recording], pieces: Sequence[list[Piece]]) -> list[str]:
    """Levels of the clips; what to do where they are far apart, between files or within them."""
    levels = []
    for recording, found in zip(recordings, pieces):
        spans = [recording.powers[int(p.start / FRAME_SEC) : int(p.end / FRAME_SEC) + 1] for p in found if not p.dropped]
        levels.append([float(10 * np.log10(powers.mean() + 1e-12)) for powers in spans])
    low, high = np.quantile(np.concatenate(levels), [0.05, 0.95])
    files = sorted((float(np.median(of_file)), str(r.source)) for r, of_file in zip(recordings, levels) if of_file)
    apart = files[-1][0] - files[0][0]
    lines = [f"loudness {low:.0f} to {high:.0f} dB (RMS, nine of ten clips)"]
    if apart > UNEVEN_DB:
        problem = f"{files[0][1]} is {apart:.0f} dB quieter than {files[-1][1]}"
        remedy = f"ffmpeg -i {files[0][1]} -af volume={apart:.0f}dB OUT.wav"
    elif high - low > 2 * UNEVEN_DB:
        problem, remedy = "the clips are uneven", "ffmpeg -i IN.wav -af dynaudnorm=g=15 OUT.wav"
    else:
        return lines
    return [*lines, f"         {problem}: all these levels would be learnt. Level it, and cut again: {remedy}"]
