"""Records whose spans leave out the silence before and after the speech, but for KEPT_SEC: pauses at the ends are learnt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common import write_lines
from prepare.clips import Clip, Key, key_of
from prepare.convert import move_paths
from prepare.manifest import Manifest, audio_parts

KEPT_SEC = 0.2
LEAST_SEC = 0.05  # cutting less than this is not worth a span


def trim(records: Manifest, clips: dict[Key, Clip], out: Path) -> str:
    """Write the records as ChatML; returns what was done. Ready-made codes, and clips with label audio, stay as they are."""
    cut_sec: list[float] = []
    write_lines(out, _trimmed(records, clips, out.parent, cut_sec))
    return f"{len(cut_sec)} clips by {sum(cut_sec):.1f} s -> {out}, {len(records)} records"


def _trimmed(records: Manifest, clips: dict[Key, Clip], folder: Path, cut_sec: list[float]) -> Iterator[dict]:
    for index, record in enumerate(records):
        _, value = records.value(index)
        move_paths(value, records.folder, folder)
        for part, clip in zip(audio_parts(value), record.audio, strict=True):
            found = clips[key_of(clip)]
            ends = (found.sound.lead_sec, found.sound.tail_sec) if found.sound and clip.label is None else (0.0, 0.0)
            before, after = (max(0.0, sec - KEPT_SEC) for sec in ends)
            if before + after > LEAST_SEC:
                part |= {"offset": round((clip.offset_sec or 0) + before, 3), "duration": round(found.sec - before - after, 3)}
                cut_sec.append(before + after)
        yield value
