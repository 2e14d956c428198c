"""What generation writes: clips as codes (.npy) and as sound, and results.jsonl.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from common import write_lines, write_whole

SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
RESULTS_FILE = "results.jsonl"


def decode(codec, codes: Tensor) -> np.ndarray:
    """Codes [K, T] -> mono float32 samples at `codec.sampling_rate`."""
    with torch.no_grad():
        return codec.decode(codes[None])[0, 0]


def write_clip(path: Path, codes: Tensor, codec=None) -> None:
    """Codes [K, T] as .npy, or decoded in the format that the suffix names to libsndfile."""
    if path.suffix == ".npy":
        write_whole(path, lambda file: np.save(file, codes.numpy().astype(np.int16)))
        return
    samples, rate = decode(codec, codes), codec.sampling_rate

    def write(file) -> None:
        with soundfile.SoundFile(file, "w", rate, 1, format=path.suffix[1:].upper()) as sound:
            for start in range(0, len(samples), rate):  # libsndfile 1.2 crashes on minutes of Ogg at once
                sound.write(samples[start : start + rate])

    write_whole(path, write)


def write_only(path: Path, codes: Tensor, codec=None) -> dict[str, str]:
    """`path` itself, unless T is 0; returns its name."""
    if codes.shape[1]:
        write_clip(path, codes, codec)
    return {"file": path.name} if codes.shape[1] else {}


def write_both(path: Path, codes: Tensor, codec=None) -> dict[str, str]:
    """`path`.npy, and with a codec `path`.wav; returns the names of the files, by kind."""
    kinds = {"codes": ".npy"} | ({"wav": ".wav"} if codec is not None and codes.shape[1] else {})
    files = {kind: path.name + suffix for kind, suffix in kinds.items()}
    for name in files.values():
        write_clip(path.parent / name, codes, codec)
    return files


def write_results(folder: Path, results: Sequence[dict]) -> None:
    """FOLDER/results.jsonl: one object per clip; files are named relative to the folder."""
    write_lines(folder / RESULTS_FILE, results)


def add_result(folder: Path, result: dict) -> None:
    """One more line, for what has just been generated; the ranks of a node may share the file."""
    with open(folder / RESULTS_FILE, "ab", buffering=0) as file:
        file.write((json.dumps(result, ensure_ascii=False) + "\n").encode())


def read_results(folder: Path) -> list[dict]:
    """The lines of FOLDER/results.jsonl."""
    return [json.loads(line) for line in (folder / RESULTS_FILE).read_text(encoding="utf-8").splitlines()]


def file_name(name: str) -> str:
    """A name that is safe as a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:80] or "clip"
