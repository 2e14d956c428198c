"""Codes by content, on disk: a folder that any number of processes read and add to at once, and that survives kills.

It knows nothing of audio or codecs (audio.py does), which is why it is a module of its own. Each process that adds has files
of its own, which only grow and which nobody else changes:

    NAME.codes   blocks [K, T] int16, one after the other
    NAME.clips   where in it each clip's block is (CLIP rows), written once the block is on the disk
    NAME.files   what was in which audio file (FILE rows), so that a file that has not changed is not read again

Opening reads all .clips and .files into sorted arrays; a clip that several processes have added is taken from any of them.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common import DataError

CLIP = np.dtype([("key", "S16"), ("offset", "<u8"), ("num_frames", "<u4"), ("crc32", "<u4")])
FILE = np.dtype([("key", "S16"), ("content", "V16")])
COMMIT_SEC = 1.0  # how much work a kill can cost
MAX_OPEN_SHARDS = 256  # each holds a file descriptor


def digest(*values: object) -> bytes:
    """[16] bytes that stand for the values."""
    return hashlib.sha256(repr(values).encode()).digest()[:16]


class _Table:
    """The rows of several files, sorted by their `key`. A kill can tear the last row of a file: that one is not there."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        contents = [path.read_bytes() for path in paths]
        rows = [np.frombuffer(content, dtype, count=len(content) // dtype.itemsize) for content in contents]
        merged = np.concatenate([*rows, np.zeros(0, dtype)])
        self.keys, first = np.unique(merged["key"], return_index=True)
        self.rows = merged[first]
        self.origins = np.repeat(np.arange(len(rows), dtype=np.int32), list(map(len, rows)))[first]  # indices of paths

    def find(self, key: bytes) -> int | None:
        """Index of the row."""
        stored = key.rstrip(b"\0")  # as numpy gives it back
        index = int(np.searchsorted(self.keys, stored))
        return index if index < len(self.keys) and self.keys[index] == stored else None


class CodesCache:
    """What a folder held when it was opened; keys and contents are digests of 16 bytes. Processes forked later share it."""

    def __init__(self, folder: Path, num_codebooks: int):
        self.folder = folder
        self.num_codebooks = num_codebooks
        paths = sorted(folder.glob("*.clips"))
        self._shards = [path.with_suffix(".codes") for path in paths]
        self._clips = _Table(paths, CLIP)
        self._files = _Table(sorted(folder.glob("*.files")), FILE)
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._clips.rows)

    def __contains__(self, key: bytes) -> bool:
        return self._clips.find(key) is not None

    def content(self, file_key: bytes) -> bytes | None:
        """Digest of the content of a file, if it is known."""
        index = self._files.find(file_key)
        return None if index is None else self._files.rows[index]["content"].tobytes()

    def num_frames(self, key: bytes) -> int | None:
        index = self._clips.find(key)
        return None if index is None else int(self._clips.rows[index]["num_frames"])

    def codes(self, key: bytes) -> np.ndarray | None:
        """[K, T] int16, or None. raises: DataError if the disk has not kept what was written"""
        index = self._clips.find(key)
        return None if index is None else self._read(index)

    def items(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """(key, codes) of every clip, sorted by key."""
        return ((key.ljust(16, b"\0"), self._read(index)) for index, key in enumerate(self._clips.keys.tolist()))

    def _read(self, index: int) -> np.ndarray:
        _, offset, num_frames, crc32 = self._clips.rows[index].item()
        shard, size = int(self._clips.origins[index]), 2 * self.num_codebooks * num_frames
        block = self._shard(shard)[offset : offset + size]
        if len(block) < size or zlib.crc32(block) != crc32:
            path = self._shards[shard]
            raise DataError(f"{path} is damaged; delete it and {path.with_suffix('.clips').name}, and encode again")
        return block.view("<i2").reshape(self.num_codebooks, num_frames)

    def _shard(self, number: int) -> np.ndarray:
        """The bytes of a file of codes, memory-mapped by this process when it first needs it; none if the file is gone."""
        if number not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.clear()
            path = self._shards[number]
            there = path.is_file() and path.stat().st_size
            self._open[number] = np.asarray(np.memmap(path, np.uint8, mode="r")) if there else np.zeros(0, np.uint8)
        return self._open[number]


class CacheWriter:
    """Adds to a folder, in files of its own that appear with their first row. A context; `in` says what it has added."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._name = uuid.uuid4().hex
        self._open: dict[str, io.BufferedWriter] = {}
        self._added: set[bytes] = set()
        self._rows: list[tuple] = []  # of clips whose codes may not be on the disk yet
        self._committed_at = time.monotonic()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_) -> None:
        self.commit()
        for file in self._open.values():
            file.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._added

    def add_file(self, key: bytes, content: bytes) -> None:
        if key not in self:
            self._added.add(key)
            self._file("files").write(np.array((key, content), FILE).tobytes())

    def add_clip(self, key: bytes, codes: np.ndarray) -> None:
        """codes: [K, T], any integer type"""
        self._added.add(key)
        block = np.ascontiguousarray(codes, "<i2").tobytes()
        file = self._file("codes")
        self._rows.append((key, file.tell(), codes.shape[1], zlib.crc32(block)))
        file.write(block)
        if time.monotonic() - self._committed_at > COMMIT_SEC:
            self.commit()

    def commit(self) -> None:
        """Make everything that was added last."""
        if self._rows:
            _sync(self._file("codes"))
            self._file("clips").write(np.array(self._rows, CLIP).tobytes())
        for file in self._open.values():
            _sync(file)
        self._rows = []
        self._committed_at = time.monotonic()

    def _file(self, suffix: str) -> io.BufferedWriter:
        if suffix not in self._open:
            self._open[suffix] = open(self.folder / f"{self._name}.{suffix}", "xb")
        return self._open[suffix]


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
