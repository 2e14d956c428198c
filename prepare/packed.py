"""Files that hold audio themselves: Parquet and Arrow of Hugging Face datasets, datasets on the Hub, tar shards of WebDataset.

`prepare convert` writes the audio beside its output; everything else asks for that first.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import DataError, reason, write_whole
from prepare import hub
from prepare.rows import AUDIO_SUFFIXES, SPLIT, Reading, columns_of
from prepare.tables import Found, Rows

PACKED = {".parquet": "Parquet", ".arrow": "Arrow", ".tar": "a tar shard"}
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-datasets.txt"
MAX_MEMBER_BYTES = 2**27  # of a file in a shard, which is read as a whole
SUFFIX_OF = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"\xff\xf3": ".mp3"}


def read_packed(paths: Sequence[Path], reading: Reading) -> Found:
    """The rows of files of one kind. raises: DataError if a package is missing and cannot be installed"""
    kind = paths[0].suffix.lower()
    if kind == ".tar":
        return Found("WebDataset", lambda: _of_tars(paths, reading))
    optional("pyarrow")
    return Found(PACKED[kind], lambda: _of_tables(paths, reading))


def _of_tables(paths: Sequence[Path], reading: Reading) -> Rows:
    for path in paths:
        split = next((part for part in (path.stem.split("-")[0], path.parent.name) if SPLIT.fullmatch(part)), None)
        number = 0
        for batch in _batches(path):
            for row in batch.to_pylist():
                row |= {"split": split} if split and "split" not in row else {}
                yield f"{path} row {number}", _unpacked(row, f"{path.stem}-{number:06d}", path, reading)
                number += 1


def from_hub(name: str) -> Path:
    """The folder on this machine of OWNER/NAME, a dataset on the Hub, or of one folder in it, OWNER/NAME/FOLDER.

    raises: DataError
    """
    owner, title, *inside = name.split("/")
    folder = "/".join(inside)
    try:
        root = hub.fetch(f"{owner}/{title}", patterns=[f"{folder}/*"] if folder else None, repo_type="dataset")
    except hub.HubError as error:
        raise DataError(f"no file or folder {name} here; {error}") from None
    if not (root / folder).is_dir():
        raise DataError(f"{name}: {owner}/{title} has no folder {folder}")
    return root / folder


def optional(package: str) -> Any:
    """A package that few datasets need, installed into this virtual environment when it is first used. raises: DataError"""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    found = functools.partial(importlib.util.find_spec, package)
    if not found() and sys.prefix != sys.base_prefix:
        print(f"installing {package}: {' '.join(command)}", file=sys.stderr)
        subprocess.run(command, stdin=subprocess.DEVNULL)
        importlib.invalidate_caches()
    if not found():
        raise DataError(f"this needs the package {package}, which could not be installed: pip install -r {REQUIREMENTS}")
    return importlib.import_module(package)


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64)
        else:
            yield from pyarrow.ipc.open_stream(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read: {error}") from None


def _unpacked(row: dict, name: str, path: Path, reading: Reading) -> dict | DataError:
    """The row with the path of a file instead of the bytes of its audio."""
    column = columns_of(row, reading.columns).get("audio")
    audio = row.get(column)
    if not isinstance(audio, dict) or not audio.get("bytes"):
        return row
    try:
        return row | {column: write_audio(audio["bytes"], name, audio.get("path") or "", path, reading)}
    except DataError as error:
        return error


def write_audio(content: bytes, name: str, called: str, path: Path, reading: Reading) -> str:
    """Write audio into the folder for it; returns its absolute path. called: its name where it comes from"""
    if reading.unpack_to is None:
        raise DataError(f"{path} holds the audio itself; unpack it: bash launch.sh prepare convert {path} lines.jsonl")
    suffix = Path(called).suffix.lower()
    if suffix not in AUDIO_SUFFIXES:
        suffix = next((found for start, found in SUFFIX_OF.items() if content.startswith(start)), "")
    if not suffix:
        raise DataError(f"{path}: {name}: its audio is of an unknown kind, beginning with {content[:4]!r}")
    target = (reading.unpack_to / f"{name}{suffix}").absolute()
    if not target.is_file() or target.stat().st_size != len(content):
        write_whole(target, lambda file: file.write(content))
    return str(target)


def _of_tars(paths: Sequence[Path], reading: Reading) -> Rows:
    """The samples of shards: files that follow each other and share a name up to its first dot."""
    for path in paths:
        try:
            with tarfile.open(path) as shard:
                key, parts = None, {}
                for member in shard:
                    if not member.isfile() or Path(member.name).name.startswith("."):
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if (folder, stem) != key and parts:
                        yield f"{path}: {key[1]}", _sample(parts, f"{path.stem}-{key[1]}", path, reading)
                        parts = {}
                    key = folder, stem
                    if member.size > MAX_MEMBER_BYTES:
                        raise OSError(f"{member.name} claims {member.size} bytes, more than {MAX_MEMBER_BYTES}")
                    parts[f".{kind.lower()}"] = shard.extractfile(member).read()
                if parts:
                    yield f"{path}: {key[1]}", _sample(parts, f"{path.stem}-{key[1]}", path, reading)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read: {reason(error)}") from None


def _sample(parts: dict[str, bytes], name: str, path: Path, reading: Reading) -> dict | DataError:
    """parts: the content of its files, by suffix"""
    try:
        row = json.loads(parts[".json"]) if ".json" in parts else {}
        text = next((parts[suffix].decode() for suffix in (".txt", ".lab") if suffix in parts), None)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON or text: {error}")
    clips = [suffix for suffix in parts if suffix in AUDIO_SUFFIXES]
    if not isinstance(row, dict) or len(clips) != 1:
        return DataError(f"expected one audio file and a .json or .txt, found {', '.join(parts)}")
    known = columns_of(row, reading.columns)
    row = {key: value for key, value in row.items() if key != known.get("audio")}
    row |= {"text": text} if text is not None and "text" not in known else {}
    try:
        return row | {"audio": write_audio(parts[clips[0]], name, clips[0] and f"x{clips[0]}", path, reading)}
    except DataError as error:
        return error
