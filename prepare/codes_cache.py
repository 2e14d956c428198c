"""A cache of codes on disk: any number of processes read it and add to it at once, and a kill does not damage it.

Each process that adds clips has files of its own. They only grow, and no other process changes them:

    NAME.codes   blocks [K, T] int16, one after the other
    NAME.clips   CLIP rows: where each clip's block is, written after the block is on the disk
    NAME.files   FILE rows: the content of each audio file, so that an unchanged file is not read again

Opening reads all .clips and .files into sorted arrays. A clip that several processes added is read from any of them.

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
COMMIT_SEC = 1.0  # seconds of work that a kill can lose
MAX_OPEN_SHARDS = 256  # each holds a file descriptor
MAX_TABLE_BYTES = 2**31  # of .clips and .files, which are read as a whole


def digest(*values: object) -> bytes:
    """[16] bytes: a key made of the values."""
    return hashlib.sha256(repr(values).encode()).digest()[:16]


class _Table:
    """The rows of several files, sorted by `key`. A kill can leave an incomplete last row in a file: it is ignored."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        for path in paths:
            if not path.is_file() or path.stat().st_size > MAX_TABLE_BYTES:
                raise DataError(f"{path} is damaged; delete it")
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
    """A cache's state when it was opened. Keys and contents are digests of 16 bytes. Processes forked later share it."""

    def __init__(self, folder: Path, num_codebooks: int):
        self.folder = folder
        self.num_codebooks = num_codebooks
        paths = sorted(folder.glob("*.clips"))
        self._shards = [path.with_suffix(".codes") for path in paths]
        self._clips = _Table(paths, CLIP)
        self._files = _Table(sorted(folder.glob("*.files")), FILE)
        self._open: dict[int, io.FileIO] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # the loader's workers open files of their own

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
        """[K, T] int16, or None. raises: DataError if the file is damaged"""
        index = self._clips.find(key)
        return None if index is None else self._read(index)

    def items(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """(key, codes) of every clip, sorted by key."""
        return ((key.ljust(16, b"\0"), self._read(index)) for index, key in enumerate(self._clips.keys.tolist()))

    def _read(self, index: int) -> np.ndarray:
        _, offset, num_frames, crc32 = self._clips.rows[index].item()
        shard, size = int(self._clips.origins[index]), 2 * self.num_codebooks * num_frames
        block = self._block(shard, offset, size)
        if block is None or zlib.crc32(block) != crc32:
            path = self._shards[shard]
            raise DataError(f"{path} is damaged; delete it and {path.with_suffix('.clips').name}, and encode again")
        return np.frombuffer(block, "<i2").reshape(self.num_codebooks, num_frames)

    def _block(self, shard: int, offset: int, size: int) -> bytes | None:
        """Bytes of a file of codes, None if it is gone or too short. Not memory-mapped: whoever reads a mapped file that is
        being cut off gets SIGBUS."""
        try:
            if shard not in self._open:
                if len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.clear()
                self._open[shard] = open(self._shards[shard], "rb", buffering=0)
            number = self._open[shard].fileno()
            return os.pread(number, size, offset) if offset + size <= os.fstat(number).st_size else None
        except OSError:
            return None


class CacheWriter:
    """Adds clips to a cache, in files of its own. A context manager; `key in writer` is true for clips it has added."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._name = uuid.uuid4().hex
        self._open: dict[str, io.BufferedWriter] = {}
        self._added: set[bytes] = set()
        self._rows: list[tuple] = []  # CLIP rows of blocks that may not be on the disk yet
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
        """Write everything that was added to the disk."""
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
