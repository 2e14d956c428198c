"""Recordings with a speaker in each channel, as of telephone calls: the channel that a row names, as a file of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import soundfile

from common import DataError, write_whole
from prepare.rows import Reading
from prepare.tables import SAMPLED, UnclearError

NAMES = {"left": 0, "right": 1, "l": 0, "r": 1, "a": 0, "b": 1}


def one_channel_each(records: Iterator[tuple[str, dict]], folder: Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    """The records, those that name a channel of a recording with the path of a file that holds only this channel.

    `misc.channel_of` is then the recording, whose channels are one conversation.

    folder: where relative audio paths start
    raises: DataError if it is unclear which channel is meant, or there is no folder for such files
    """
    first = list(itertools.islice(records, SAMPLED))
    named = {str(record["misc"]["channel"]).lower() for _, record in first if "channel" in record.get("misc", {})}
    from_one = "2" in named and "0" not in named
    written: set[Path] = set()
    for source, record in itertools.chain(first, records):
        clip, channel = record["messages"][-1]["content"], str(record.get("misc", {}).get("channel", "")).lower()
        if channel and clip["audio_url"]:
            number = int(channel) - from_one if channel.isdecimal() else NAMES.get(channel, -1)
            number = None if named == {"1"} else number
            url = clip["audio_url"]
            clip["audio_url"] = _channel_of(folder / url, url, number, source, reading, written)
            if clip["audio_url"] != url:
                record["misc"]["channel_of"] = url
        yield source, record


def _channel_of(path: Path, url: str, number: int | None, source: str, reading: Reading, written: set[Path]) -> str:
    """The path of a file that holds one channel of a recording, or the recording's own if it has only one."""
    try:
        with soundfile.SoundFile(path) as sound:
            if sound.channels == 1:
                return url
            if number is None:
                raise UnclearError(f"{source}: channel 1 may be the left or the right one; write left and right in the column")
            if not 0 <= number < sound.channels:
                raise DataError(f"{source}: {url} has {sound.channels} channels; expected 0 and 1, 1 and 2, or left and right")
            if reading.unpack_to is None:
                remedy = "part them: bash launch.sh prepare convert DATASET lines.jsonl"
                raise DataError(f"{source}: {url} has {sound.channels} channels; {remedy}")
            target = (reading.unpack_to / f"{url.strip('/').replace('/', '-')}-channel{number}.wav").absolute()
            if target not in written:
                write_whole(target, lambda file: _copy(sound, number, file))
                written.add(target)
    except (soundfile.LibsndfileError, OSError):
        return url  # whoever reads the clip names what is wrong
    return str(target)


def _copy(sound: soundfile.SoundFile, number: int, file: object) -> None:
    subtype = sound.subtype if soundfile.check_format("WAV", sound.subtype) else "PCM_16"
    with soundfile.SoundFile(file, "w", sound.samplerate, 1, subtype, format="WAV") as one:
        for block in sound.blocks(1 << 16, always_2d=True):
            one.write(block[:, number])
