"""Clips as codes [K, T]: ready-made codes are read as they are, waveforms are encoded once by the official codec.

    CodecInfo     a codec's figures, read without loading it
    load_codec    the official HiggsAudioTokenizer
    AudioStore    clips as codes; encoded clips are kept in a cache (codes_cache.py)

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import soundfile
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from common import DataError, read_json, reason, sha256_of, write_text
from config import REVISIONS
from prepare import hub
from prepare.codes_cache import CacheWriter, CodesCache, digest
from prepare.manifest import AudioPart, Record

T = TypeVar("T")
R = TypeVar("R")

FRAME_RATE_HZ = 25.0  # of the published codec: 24,000 samples per second, 960 per frame
RATIOS = (8, 5, 4, 2, 3)  # the strides of its encoder
CODEC_NOTE = "codec.json"  # in a cache's folder
FFMPEG_SUFFIXES = (".m4a", ".aac", ".webm", ".mp4", ".wma", ".amr")  # libsndfile does not read these
STREAMED_BYTES = 0.9 * (2**31 - 2**16)  # programs that write a WAV file to a pipe put about 2 or 4 GB in its header
MAX_CUT_OFF = 0.1  # share of a file that may be missing at its end: some headers only estimate the length
# What a file may claim: checked before anything is decoded or read as a whole.
RATES_HZ, MAX_CHANNELS = (4_000, 384_000), 32
MAX_CLIP_SEC, MAX_CLIP_SAMPLES = 900, 45_000_000  # of one channel: 15 minutes at 48 kHz
MAX_TRANSCRIBED_SEC = 30  # what Whisper takes at once; longer recordings are cut first
MAX_FILE_BYTES, MAX_CODES_BYTES = 2**34, 2**27  # a day of 16-bit stereo at 48 kHz, and of codes in 64 bits
BLOCK_SAMPLES = 2**20  # of all channels, decoded at once
UNREADABLE = (soundfile.LibsndfileError, RuntimeError, OSError, TypeError)  # what opening and reading a file may raise

# ---------------------------------------------------------------------------------------------------------------------
# Codec


@dataclass(frozen=True)
class CodecInfo:
    """A codec's figures, read without loading it."""

    identity: str  # the same for all copies of a codec
    sample_rate_hz: int
    frame_rate_hz: float
    num_codebooks: int
    codebook_size: int

    @classmethod
    def of_folder(cls, folder: Path) -> CodecInfo:
        """raises: DataError if the folder does not hold a codec"""
        config = _read_config(folder)
        try:
            identity, bins = _identity(config, folder / "model.pth"), config["bins"]
            if not 0 < bins <= 2**15:
                raise ValueError(f"{bins} codes per codebook do not fit 16 bits")
            return cls(identity, config["sample_rate"], _frame_rate_hz(config), config["n_q"], bins)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"--audio_tokenizer {folder}: not the files of a codec: {error!r}") from None


def _read_config(folder: Path) -> dict:
    try:
        config = read_json(folder / "config.json")
        if not 0 < _frame_rate_hz(config) <= min(RATES_HZ):
            raise ValueError("no possible frame rate")
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"--audio_tokenizer {folder}: config.json is not the codec's: {error!r}") from None
    return config


def _frame_rate_hz(config: dict) -> float:
    return config["sample_rate"] / math.prod(config["ratios"])


def _identity(config: dict, weights: Path) -> str:
    """Digest of the configuration and of the weights.

    PyTorch's zip files hold a checksum of every tensor: a few kilobytes are read. Older files are read as a whole.
    """
    sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    if zipfile.is_zipfile(weights):
        with zipfile.ZipFile(weights) as file:
            sha256.update(repr([(entry.file_size, entry.CRC) for entry in file.infolist()]).encode())
    else:
        with open(weights, "rb") as file:
            sha256.update(_content_of(file))
    return sha256.hexdigest()[:16]


def codec_folder(name_or_path: str) -> Path | None:
    """The codec's folder on this machine: the one that is named, or a download from the Hub; None if there is none."""
    if Path(name_or_path).exists():
        return Path(name_or_path)
    try:
        revision = REVISIONS.get(name_or_path)
        found = [try_to_load_from_cache(name_or_path, file, revision=revision) for file in ("config.json", "model.pth")]
    except ValueError:  # no name that the Hub could have
        return None
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None


def download_codec(name_or_path: str) -> Path:
    """The codec's folder on this machine, downloaded from the Hub where necessary. raises: DataError"""
    try:
        return codec_folder(name_or_path) or hub.fetch(name_or_path, REVISIONS.get(name_or_path))
    except hub.HubError as error:
        raise DataError(f"--audio_tokenizer: no folder {name_or_path}; {error}") from None


def codec_frame_rate_hz(name_or_path: str) -> float:
    """Frames per second by the codec's config; the published codec's where the config is not on this machine."""
    folder = codec_folder(name_or_path)
    return _frame_rate_hz(_read_config(folder)) if folder else FRAME_RATE_HZ


def load_codec(name_or_path: str, device: str | torch.device):
    """The official `HiggsAudioTokenizer` from a folder or the Hub, without remote code.

    raises: DataError if its dependencies or files are missing
    """
    module = import_codec()
    folder = download_codec(str(name_or_path))
    try:
        return module.load_higgs_audio_tokenizer(str(folder), device=str(device))
    except (OSError, TypeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"--audio_tokenizer {name_or_path}: cannot load the codec: {reason(error)}") from None


def import_codec():
    """Upstream's codec module, changed so that it is safe and can be imported.

    It loads a plain HuBERT with `trust_remote_code=True`: here no code from the Hub is run. It uses one function of
    torchaudio, which does not import beside every torch: `_resample` replaces it there.
    """
    from transformers import HubertModel

    class PlainHubert:
        @staticmethod
        def from_pretrained(name: str, trust_remote_code: bool = False, **kwargs):
            try:
                return HubertModel.from_pretrained(name, revision=REVISIONS.get(name, "main"), **kwargs)
            except OSError as error:
                raise DataError(hub.why_not(name) or reason(error)) from None

    try:
        import torchaudio
    except (ImportError, OSError):
        torchaudio, functional = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.functional")
        torchaudio.functional, functional.resample = functional, _resample
        sys.modules |= {"torchaudio": torchaudio, "torchaudio.functional": functional}
    try:
        from boson_multimodal.audio_processing import higgs_audio_tokenizer as module
    except ImportError as error:
        raise DataError(
            f"the audio codec needs a package that is missing: {error}. pip install -r requirements-codec.txt"
        ) from None
    module.AutoModel = PlainHubert
    module.HiggsAudioTokenizer.load_state_dict = _load_weights
    return module


def _load_weights(codec: torch.nn.Module, weights: dict[str, Tensor], **_) -> None:
    """`load_state_dict` that names what is missing, where upstream would leave random weights that encode noise.

    HuBERT's weights may be missing: they come from its own checkpoint.
    """
    missing = torch.nn.Module.load_state_dict(codec, weights, strict=False).missing_keys
    missing = [name for name, _ in codec.named_parameters() if name in missing and not name.startswith("semantic_model.")]
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing in model.pth, first {missing[0]}")


def _resample(waveform: Tensor, orig_freq: int, new_freq: int) -> Tensor:
    """torchaudio's `resample` by julius, the package it was taken from; they differ by 0.05 % on white noise."""
    import julius

    shared = math.gcd(orig_freq, new_freq)
    old, new, margin = orig_freq // shared, new_freq // shared, 20
    padded = torch.nn.functional.pad(waveform, (margin * old, margin * old))
    length = math.ceil(waveform.shape[-1] * new / old)
    return julius.resample_frac(padded, old, new, zeros=6, rolloff=0.99)[..., margin * new :][..., :length]


# ---------------------------------------------------------------------------------------------------------------------
# Files of codes and waveforms


def read_codes(path: Path, num_codebooks: int, codebook_size: int, source: str) -> Tensor:
    """Codes [K, T] int64 from `.npy` or `.safetensors` (one tensor); DataError for anything else."""
    try:
        if path.suffix == ".npy":
            _npy_shape(path)
            codes = np.load(path, allow_pickle=False)
        else:
            with safe_open(path, framework="np") as file:
                codes = file.get_tensor(_only_tensor(file))
    except Exception as error:  # each reader has its own exceptions for a damaged file
        raise DataError(f"{source}: {path} cannot be read as codes: {reason(error)}") from None
    expected = f"expected an integer array [{num_codebooks} codebooks, frames] of codes 0 to {codebook_size - 1}"
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.shape[1] == 0:
        raise DataError(f"{source}: {path} holds {codes.dtype} {list(codes.shape)}; {expected}")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise DataError(f"{source}: {path} holds codes {low} to {high}; {expected}, without stream ids")
    return torch.from_numpy(codes.astype(np.int64))


def read_codes_shape(path: Path, source: str) -> list[int]:
    """Shape of the array in `.npy` or `.safetensors`, from the file's header alone."""
    try:
        if path.suffix == ".npy":
            return _npy_shape(path)
        with safe_open(path, framework="np") as file:
            return file.get_slice(_only_tensor(file)).get_shape()
    except Exception as error:
        raise DataError(f"{source}: {path} cannot be read as codes: {reason(error)}") from None


def read_lengths(path: Path, count: int) -> np.ndarray | None:
    """The lengths [count] int32 that a run has kept beside its codes, or None. raises: DataError for a damaged file"""
    if not path.is_file():
        return None
    if read_codes_shape(path, "lengths") != [count] or (lengths := np.load(path, allow_pickle=False)).dtype != np.int32:
        raise DataError(f"{path}: damaged, it does not hold the lengths of {count} records; delete it")
    return lengths


def _npy_shape(path: Path) -> list[int]:
    """Shape of the array in a file that is as long as its header says. raises: ValueError, OSError"""
    size = path.stat().st_size
    if size > MAX_CODES_BYTES:
        raise ValueError(f"{size} bytes, more than the codes of a day")
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
            raise ValueError(f"its header promises {dtype} {list(shape)}, which does not fit its {size} bytes")
    return list(shape)


def _only_tensor(file) -> str:
    names = list(file.keys())
    if len(names) != 1:
        raise ValueError(f"holds {len(names)} tensors, expected one")
    return names[0]


def read_waveform(part: AudioPart, source: str) -> tuple[np.ndarray, int]:
    """Mono float32 samples and their rate in Hz; `offset` and `duration` are applied while reading.

    raises: DataError for a file that is not audio, is too long, is cut off, or holds NaN or infinity
    """
    name = f"{source}: {part.field}: {part.path or 'raw_audio'}"
    try:
        with open_audio(part) as file:
            rate, start, stop = file.samplerate, *checked_span(part, file)
            if stop <= start:
                raise DataError(f"{name}: no audio left after offset and duration")
            samples, done = np.empty(stop - start, np.float32), 0
            for block in blocks_of(file, start, stop, BLOCK_SAMPLES // file.channels, name):
                samples[done : done + len(block)] = block.mean(axis=1)
                done += len(block)
    except UNREADABLE as error:
        raise DataError(f"{name} is not readable audio: {error}") from None
    return samples[:done], rate


def blocks_of(file: soundfile.SoundFile, start: int, stop: int, size: int, name: str) -> Iterator[np.ndarray]:
    """[n, channels] float32 of each block of `size` samples, the last one shorter.

    raises: DataError for a file that cannot be read to its end, is cut off, or holds NaN or infinity
    """
    rate, done = file.samplerate, 0
    try:
        file.seek(start)
        while len(block := file.read(min(size, stop - start - done), "float32", True)):
            if not np.isfinite(block).all():
                raise DataError(f"{name} holds samples that are no finite numbers")
            done += len(block)
            yield block
    except UNREADABLE as error:
        raise DataError(f"{name} is not readable audio{f' from {done / rate:.0f} s on' * (done > 0)}: {error}") from None
    if done < (1 - MAX_CUT_OFF) * (stop - start):
        raise DataError(f"{name} is cut off: {done / rate:.2f} s of {(stop - start) / rate:.2f} s are there")


def duration_sec(part: AudioPart) -> float:
    """Seconds of a waveform, from the file's header alone; 0 if it cannot be read."""
    try:
        with open_audio(part) as file:
            start, stop = span(part, file.samplerate, len(file))
            return max(0, stop - start) / file.samplerate
    except (*UNREADABLE, ValueError):  # ValueError: a name no file can have
        return 0.0


def expected_frames(sec: float, ratios: Sequence[int] = RATIOS) -> int:
    """Frames that the official codec makes of a clip of `sec` seconds; upstream: `_xcodec_encode`.

    The acoustic encoder is a stack of strided convolutions. HuBERT makes 50 frames per second; every `step`-th is used.
    If the two lengths differ, the acoustic encoder runs again on a padded waveform, and the shorter length counts.

    ratios: of the codec's config
    """

    def acoustic(length: int) -> int:
        for stride in ratios:
            length = (length + 2 * math.ceil(stride / 2) - 2 * stride) // stride + 1
        return length

    num_samples, step = math.ceil(sec * 24_000 - 1e-6), math.prod(ratios) // 480
    semantic = math.ceil((math.ceil(num_samples / 1.5) + 240) // 320 / step)
    if acoustic(num_samples) == semantic:
        return semantic
    return min(semantic, acoustic(num_samples + 320 * step))


def open_audio(part: AudioPart) -> soundfile.SoundFile:
    """raises: LibsndfileError, OSError; RuntimeError for a WAV file that is cut off, which libsndfile does not report"""
    if part.path is not None and part.path.suffix.lower() in FFMPEG_SUFFIXES:
        _open_regular(part.path).close()
        return _checked(_open_by_ffmpeg(part.path))
    with io.BytesIO(part.raw_audio) if part.path is None else _open_regular(part.path) as file:
        form, size = struct.unpack("<4sI", file.read(8).ljust(8))
        there, promised = file.seek(0, os.SEEK_END), size + 8
    if form == b"RIFF" and there < (1 - MAX_CUT_OFF) * promised < STREAMED_BYTES:
        raise RuntimeError(f"it is cut off: {there} of {promised} bytes are there")
    return _checked(soundfile.SoundFile(io.BytesIO(part.raw_audio) if part.path is None else part.path))


def _checked(opened: soundfile.SoundFile) -> soundfile.SoundFile:
    """raises: RuntimeError for a file whose header claims what no recording has"""
    if not RATES_HZ[0] <= opened.samplerate <= RATES_HZ[1] or opened.channels > MAX_CHANNELS:
        raise RuntimeError(
            f"{opened.samplerate} samples per second, {opened.channels} channels; expected {RATES_HZ[0]} to {RATES_HZ[1]}, "
            f"and at most {MAX_CHANNELS}"
        )
    return opened


def _open_regular(path: Path) -> BinaryIO:
    """A file that has an end. raises: OSError for others: devices, those of /proc, and those that claim terabytes"""
    stat = os.stat(path)
    if not path.is_file() or not 0 < stat.st_size <= MAX_FILE_BYTES:
        raise OSError(f"a regular file of 1 to {MAX_FILE_BYTES} bytes is expected, found one of {stat.st_size}")
    return open(path, "rb")


def checked_span(part: AudioPart, file: soundfile.SoundFile) -> tuple[int, int]:
    """`span` of a waveform. raises: RuntimeError for a clip that is too long to train on, or to decode"""
    start, stop = span(part, file.samplerate, len(file))
    if stop - start > min(MAX_CLIP_SEC * file.samplerate, MAX_CLIP_SAMPLES):
        sec = min(MAX_CLIP_SEC, MAX_CLIP_SAMPLES / file.samplerate)
        found = f"{(stop - start) / file.samplerate:.0f} s at {file.samplerate} Hz"
        raise RuntimeError(f"it has {found}, and a clip at most {sec:.0f} s; cut it with offset and duration")
    return start, stop


def _open_by_ffmpeg(path: Path) -> soundfile.SoundFile:
    """A file that libsndfile does not read, decoded as a whole into a temporary one. raises: OSError, RuntimeError"""
    if not (ffmpeg := shutil.which("ffmpeg")):
        raise RuntimeError(f"{path.suffix} needs ffmpeg, which is not installed; or: ffmpeg -i {path.name} {path.stem}.wav")
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = [ffmpeg, "-nostdin", "-v", "error", "-y", "-i", f"file:{path.absolute()}", "-vn", "-fs", str(MAX_FILE_BYTES)]
        command.append(f"file:{wav.name}")
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"ffmpeg: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
        return soundfile.SoundFile(wav.name)  # which stays open when the name is gone


def span(part: AudioPart, rate_hz: float, length: int) -> tuple[int, int]:
    """(start, stop) of a clip among `length` samples or frames; nothing is left if start >= stop."""
    start = min(length, round((part.offset_sec or 0.0) * rate_hz))
    return start, length if part.duration_sec is None else min(length, start + round(part.duration_sec * rate_hz))


def read_ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """`function` of each item, in order; threads compute at most 2 * num_threads items ahead."""
    waiting: deque = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---------------------------------------------------------------------------------------------------------------------
# Store


def _clip_key(content: bytes, part: AudioPart) -> bytes:
    """A clip's key: the digest of its file's content, its offset and its duration."""
    return digest(content, float(part.offset_sec or 0), part.duration_sec and float(part.duration_sec))


def _file_key(path: Path) -> bytes:
    """Key of a file that has not changed, found without reading it. raises: OSError"""
    stat = os.stat(path)
    return digest(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


def find_codec(name_or_path: str, cache_dir: Path) -> CodecInfo:
    """The codec's figures: from its files on this machine, else from a cache made with it, else from the Hub.

    raises: DataError if none of these has it
    """
    folder = codec_folder(name_or_path)
    if folder is None:
        notes = sorted(cache_dir.glob(f"*/{CODEC_NOTE}"), key=lambda path: path.stat().st_mtime)
        for path in reversed(notes):
            names, info = _read_note(path)
            if name_or_path in names:
                return info
    return CodecInfo.of_folder(folder or download_codec(name_or_path))


def _read_note(path: Path) -> tuple[list[str], CodecInfo]:
    """(names, figures) of the codec of a cache. raises: DataError"""
    try:
        note = read_json(path)
        info = CodecInfo(**note["codec"])
        if Path(info.identity).name != info.identity or min(info.num_codebooks, info.codebook_size, info.sample_rate_hz) < 1:
            raise ValueError("impossible figures")
        return [str(name) for name in note["names"]], info
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete it") from None


def _note_codec(folder: Path, name: str, info: CodecInfo) -> None:
    """Write the codec's figures beside the cache, so that reading the cache does not need the codec."""
    path = folder / CODEC_NOTE
    names = {name, *(_read_note(path)[0] if path.exists() else ())}
    write_text(path, json.dumps({"names": sorted(names), "codec": asdict(info)}, indent=2) + "\n")


@dataclass(frozen=True)
class _Prepared:
    """A clip that was read, ready for the codec."""

    name: str  # for messages
    key: bytes
    content: bytes  # digest of its file
    file_key: bytes | None  # None: there is no file
    samples: np.ndarray | None  # mono, at the codec's rate; None: its codes are in the cache


class AudioStore:
    """Clips as codes. Ready-made codes are read as they are; waveforms are encoded once, into a cache.

    num_codebooks, codebook_size: of the checkpoint (1024 codes, without the stream ids)
    frame_rate_hz:                frames per second, for `offset` and `duration` of ready-made codes
    cache_dir:                    holds a `CodesCache` for each codec
    codec:                        folder or Hub name; only needed for waveforms, and not if the cache has its figures
    """

    def __init__(self, num_codebooks: int, codebook_size: int, frame_rate_hz: float, cache_dir: Path, codec: str = ""):
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.frame_rate_hz = frame_rate_hz
        self.cache_dir = Path(cache_dir)
        self.codec = codec

    @classmethod
    def of(cls, config: Any, cache_dir: Path, codec: str) -> AudioStore:
        """For a checkpoint with this `HiggsAudioConfig`. codec: as --audio_tokenizer names it, or none"""
        frames = config.audio_num_codebooks, config.audio_codebook_size, codec_frame_rate_hz(codec)
        return cls(*frames, cache_dir, "" if codec == "none" else codec)

    @functools.cached_property
    def codec_info(self) -> CodecInfo:
        """raises: DataError if the codec cannot be found, or does not fit the checkpoint"""
        if not self.codec:
            raise DataError("the manifest names waveforms, which need a codec: give --audio_tokenizer")
        info = find_codec(self.codec, self.cache_dir)
        if info.num_codebooks < self.num_codebooks or info.codebook_size > self.codebook_size:
            raise DataError(
                f"--audio_tokenizer {self.codec} has {info.num_codebooks} codebooks of {info.codebook_size} codes, the "
                f"checkpoint {self.num_codebooks} of {self.codebook_size}"
            )
        return info

    @functools.cached_property
    def cache(self) -> CodesCache:
        """The cache as it was at the first use or the last `refresh`; processes forked later share its index."""
        info = self.codec_info
        return CodesCache(self.cache_dir / info.identity, info.num_codebooks)

    def refresh(self) -> None:
        """Open the cache again, with what was added since."""
        self.__dict__.pop("cache", None)

    def codes(self, part: AudioPart, source: str) -> Tensor:
        """[K, T] int64; a waveform must have been encoded before."""
        if not part.holds_codes:
            codes = self._cached(part, source, CodesCache.codes)
            return torch.from_numpy(codes[: self.num_codebooks].astype(np.int64))
        codes = read_codes(part.path, self.num_codebooks, self.codebook_size, f"{source}: {part.field}")
        start, stop = self._frames(part, source, codes.shape)
        return codes[:, start:stop]

    def num_frames(self, part: AudioPart, source: str) -> int:
        """Frames of a clip, without reading its codes; a waveform must have been encoded before."""
        if not part.holds_codes:
            return self._cached(part, source, CodesCache.num_frames)
        start, stop = self._frames(part, source, read_codes_shape(part.path, f"{source}: {part.field}"))
        return stop - start

    def missing(self, records: Iterable[Record]) -> list[tuple[AudioPart, str]]:
        """The waveforms that `encode` has to read, each once; no audio file is opened here.

        Files that were copied, moved or touched are among them: `encode` finds them in the cache by their content.
        """
        return [(clip, source) for _, clip, source in self._missing(records)]

    def missing_places(self, records: Iterable[Record]) -> list[tuple[int, int]]:
        """Where these are: (index of the record, of the clip among `Record.clips`)."""
        return [place for place, _, _ in self._missing(records)]

    def _missing(self, records: Iterable[Record]) -> Iterator[tuple[tuple[int, int], AudioPart, str]]:
        seen = set()
        for number, record in enumerate(records):
            for index, clip in enumerate(record.clips()):
                content = clip.path or hashlib.sha256(clip.raw_audio).digest()
                if clip.holds_codes or (content, clip.offset_sec, clip.duration_sec) in seen:
                    continue
                seen.add((content, clip.offset_sec, clip.duration_sec))
                key = self._key(clip, record.source)
                if key is None or key not in self.cache:
                    yield (number, index), clip, record.source

    def encode(
        self, load: Callable[[], Any], clips: Iterable[tuple[AudioPart, str]], num_threads: int = 4
    ) -> Iterator[str | None]:
        """Encode clips into the cache; yields None for each clip, or what is wrong with its audio.

        Clips are encoded one at a time: in a padded batch 1 to 16 % of the codes change (random weights), and upstream
        batches only clips whose common length is a multiple of the frame. Threads read and resample ahead of the codec.

        load:   returns the codec; called at the first clip that is not in the cache
        raises: DataError if the codec cannot be loaded, or the cache cannot be written
        """
        codec = functools.cache(functools.partial(self._load, load))
        prepare = functools.partial(self._prepare, contents={})
        try:
            _note_codec(self.cache.folder, self.codec, self.codec_info)
            with CacheWriter(self.cache.folder) as writer:
                for prepared in read_ahead(prepare, clips, num_threads):
                    yield self._add(prepared, codec, writer)
        except OSError as error:
            raise DataError(f"{self.cache_dir}: codes cannot be written: {error}; what was written before is kept") from None
        finally:
            self.refresh()

    def _prepare(self, clip: tuple[AudioPart, str], contents: dict[bytes, bytes]) -> _Prepared | DataError:
        """Read, decode and resample a clip that is not in the cache. contents: digests of the files read so far, by key"""
        part, source = clip
        name, info = f"{source}: {part.field}: {part.path or 'raw_audio'}", self.codec_info
        try:
            file_key = self._file_key(part, source)
            content = self._content(part, file_key) or contents.get(file_key) or _read_content(part.path, name)
            contents[file_key] = content
            key = _clip_key(content, part)
            if key in self.cache:
                return _Prepared(name, key, content, file_key, None)
            samples, rate = read_waveform(part, source)
            if len(samples) < rate / info.frame_rate_hz:
                raise DataError(
                    f"{name}: {len(samples) / rate:.3f} s of audio is less than one frame ({1 / info.frame_rate_hz} s)"
                )
            if self._file_key(part, source) != file_key:
                raise DataError(f"{name} was changed while it was read; encode again when it is whole")
        except DataError as error:
            return error
        if rate != info.sample_rate_hz:
            import librosa  # takes a second

            samples = librosa.resample(samples, orig_sr=rate, target_sr=info.sample_rate_hz)  # as `codec.encode` would
        return _Prepared(name, key, content, file_key, samples)

    def _add(self, prepared: _Prepared | DataError, codec: Callable[[], Any], writer: CacheWriter) -> str | None:
        """Encode and write one clip; returns what is wrong with it, or None."""
        if isinstance(prepared, DataError):
            return str(prepared)
        if prepared.file_key and self.cache.content(prepared.file_key) is None:
            writer.add_file(prepared.file_key, prepared.content)
        if prepared.samples is None or prepared.key in writer:
            return None
        rate = self.codec_info.sample_rate_hz
        try:
            codes = codec().encode(prepared.samples, rate)
        except torch.OutOfMemoryError:
            seconds = len(prepared.samples) / rate
            return f"{prepared.name}: {seconds:.0f} s are more than the device's memory takes; cut it with offset and duration"
        writer.add_clip(prepared.key, codes.cpu().numpy())
        return None

    def _load(self, load: Callable[[], Any]) -> Any:
        """The codec. raises: DataError if the cache has another codec of the same name"""
        codec = load()
        folder = codec_folder(self.codec)
        if folder and CodecInfo.of_folder(folder) != self.codec_info:
            raise DataError(
                f"--audio_tokenizer {self.codec} is not the codec of that name in {self.cache_dir}; start again, and its "
                "clips get a cache of their own"
            )
        return codec

    def _cached(self, part: AudioPart, source: str, read: Callable[[CodesCache, bytes], T | None]) -> T:
        key = self._key(part, source)
        found = None if key is None else read(self.cache, key)
        if found is None:
            raise DataError(
                f"{source}: {part.field}: {part.path or 'raw_audio'} has not been encoded, or has changed since; run "
                f"bash launch.sh prepare encode MANIFEST --out {self.cache_dir}"
            )
        return found

    def _key(self, part: AudioPart, source: str) -> bytes | None:
        """The clip's key in the cache; None if its file was never read."""
        content = self._content(part, self._file_key(part, source))
        return content and _clip_key(content, part)

    def _file_key(self, part: AudioPart, source: str) -> bytes | None:
        try:
            return None if part.path is None else _file_key(part.path)
        except OSError as error:
            raise DataError(f"{source}: {part.field}: {error}") from None

    def _content(self, part: AudioPart, file_key: bytes | None) -> bytes | None:
        """Digest of the file that holds the clip, if it is known without reading the file."""
        return _content_of(io.BytesIO(part.raw_audio)) if file_key is None else self.cache.content(file_key)

    def _frames(self, part: AudioPart, source: str, shape: Sequence[int]) -> tuple[int, int]:
        """(start, stop) of a clip in ready-made codes of this shape."""
        if len(shape) != 2 or shape[0] != self.num_codebooks:
            raise DataError(
                f"{source}: {part.field}: {part.path} holds an array {list(shape)}; expected [{self.num_codebooks} "
                "codebooks, frames]"
            )
        start, stop = span(part, self.frame_rate_hz, shape[1])
        if start >= stop:
            raise DataError(f"{source}: {part.field}: no frames left of {shape[1]} after offset and duration")
        return start, stop


def _read_content(path: Path, name: str) -> bytes:
    """Digest of a file. raises: DataError"""
    try:
        with _open_regular(path) as file:
            return _content_of(file)
    except OSError as error:
        raise DataError(f"{name} is not readable audio: {error}") from None


def _content_of(file: BinaryIO) -> bytes:
    """[16] bytes: the digest of a file's content."""
    return sha256_of(file)[:16]


def starts(pieces: Sequence[Tensor]) -> Tensor:
    """Where each piece begins in their concatenation along the last dimension, int64."""
    lengths = torch.tensor([0, *(piece.shape[-1] for piece in pieces)], dtype=torch.long)
    return lengths.cumsum(0)[:-1]
