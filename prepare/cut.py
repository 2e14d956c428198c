"""Long recordings of one speaker -> a table of clips of 3 to 15 s, cut at pauses. Audio is not copied: the table has spans.

    bash launch.sh prepare cut talk.wav more_recordings/ --out cuts.jsonl --speaker anna
    bash launch.sh prepare transcribe cuts.jsonl --language en

silero-vad finds the speech. Cuts are chosen so that little speech is lost, pauses at the cuts are long, and no long pause is
left inside a clip. Formats that need ffmpeg (m4a, mp4, ...) are decoded once, into FLAC files in a folder beside the table.
Of several speakers: once for each, and train on all tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import DataError, listing, write_lines
from prepare.audio import MAX_TRANSCRIBED_SEC
from prepare.folders import Listing
from prepare.rows import WAVEFORM_SUFFIXES
from prepare.speech import Recording, listen_to_all
from prepare.trim import KEPT_SEC

LONG_PAUSE_SEC = 1.0  # from here on a pause is as good a place for a cut as any, and better not inside a clip
UNEVEN_DB = 6.0  # twice the amplitude
NUM_EXAMPLES = 3  # of what was dropped, the longest
TOO_SHORT, NO_PAUSE = "shorter than --min_sec", "no pause to cut at within --max_sec"


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
        raise DataError(f"--min_sec and --max_sec: expected 0.5 <= min_sec < max_sec <= {MAX_TRANSCRIBED_SEC}")
    if args.out.suffix != ".jsonl":
        raise DataError(f"--out {args.out}: choose a name that ends in .jsonl")
    if args.out.exists() and not args.force:
        raise DataError(f"--out {args.out}: it exists; choose another name, or replace it with --force")
    folder = args.out.with_name(f"{args.out.stem}_audio")  # of what is decoded
    sources = find_recordings(args.input, folder.resolve())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.stem}.", dir=args.out.parent) as scratch:
        recordings = listen_to_all(sources, Path(scratch))
        pieces = [cut(recording, args.min_sec, args.max_sec) for recording in recordings]
        lines = describe(recordings, pieces, args)
        for recording in recordings:
            if recording.path != recording.source:
                folder.mkdir(exist_ok=True)
                recording.path = recording.path.replace(folder / recording.path.name)
    write_table(recordings, pieces, args.out, args.speaker)
    print("\n".join(lines))
    return 0


def find_recordings(inputs: Sequence[Path], decoded: Path) -> list[Path]:
    """The files that are named, and those of the folders but for what was decoded before. raises: DataError"""
    found = []
    for path in inputs:
        if path.is_dir():
            clips = [path / clip for clip in Listing(path).clips if clip.lower().endswith(WAVEFORM_SUFFIXES)]
            if not clips:
                raise DataError(f"{path}: no recording in this folder; expected files {', '.join(WAVEFORM_SUFFIXES)}")
            found += [clip for clip in clips if decoded not in clip.resolve().parents]
        elif path.is_file() and path.suffix.lower() in WAVEFORM_SUFFIXES:
            found.append(path)
        else:
            problem = f"expected a recording ({', '.join(WAVEFORM_SUFFIXES)})" if path.is_file() else "no such file or folder"
            raise DataError(f"{path}: {problem}")
    return list({path.resolve(): path for path in found}.values())


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
    write_lines(out, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def describe(recordings: Sequence[Recording], pieces: Sequence[list[Piece]], args: argparse.Namespace) -> list[str]:
    """What was found, what is kept, what is not and why. raises: DataError if nothing is kept"""
    minutes = sum(recording.sec for recording in recordings) / 60
    without = [f"{recording.source}: {recording.without_speech}" for recording in recordings if not recording.speech]
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
        f"next: bash launch.sh prepare transcribe {args.out} --language en  # or another",
    ]


def describe_loudness(recordings: Sequence[Recording], pieces: Sequence[list[Piece]]) -> list[str]:
    """Levels of the clips; what to do where they are far apart, between files or within them."""
    levels = [[r.level_db(p.start, p.end) for p in found if not p.dropped] for r, found in zip(recordings, pieces)]
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
