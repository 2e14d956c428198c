"""Clips as codes [K, T]: ready-made ones are read, waveforms go through the official codec once.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from torch import Tensor

from manifest import AudioPart, DataError, Record

FRAME_RATE_HZ = 25.0  # of the published codec: 24,000 samples per second, 960 per frame


def codec_frame_rate_hz(name_or_path: str) -> float:
    """Frames per second, from the codec's config where it is a folder, else the published codec's."""
    path = Path(name_or_path) / "config.json"
    if not path.is_file():
        return FRAME_RATE_HZ
    try:
        config = json.loads(path.read_text())
        return config["sample_rate"] / math.prod(config["ratios"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--audio_tokenizer {name_or_path}: config.json is not the codec's: {error!r}") from None


def load_codec(name_or_path: str, device: str | torch.device):
    """The official `HiggsAudioTokenizer` from a folder or the Hub, without remote code.

    raises: DataError if its dependencies or files are missing
    """
    module = import_codec()
    try:
        return module.load_higgs_audio_tokenizer(str(name_or_path), device=str(device))
    except (OSError, json.JSONDecodeError, TypeError, ValueError) as error:
        raise DataError(f"--audio_tokenizer {name_or_path}: cannot load the codec: {error}") from None


def import_codec():
    """Upstream's codec module, made safe and importable.

    It asks for its HuBERT with `trust_remote_code=True`, though that is a plain HuBERT: here no code from the Hub is run.
    It uses one function of torchaudio, which cannot be imported beside every torch: there `_resample` takes its place.
    """
    from transformers import HubertModel

    class PlainHubert:
        @staticmethod
        def from_pretrained(name: str, trust_remote_code: bool = False, **kwargs):
            return HubertModel.from_pretrained(name, **kwargs)

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
    return module


def _resample(waveform: Tensor, orig_freq: int, new_freq: int) -> Tensor:
    """torchaudio's function, by the package it was taken from: with its window and padding 0.05 % apart on white noise."""
    import julius

    shared = math.gcd(orig_freq, new_freq)
    old, new, margin = orig_freq // shared, new_freq // shared, 20
    padded = torch.nn.functional.pad(waveform, (margin * old, margin * old))
    length = math.ceil(waveform.shape[-1] * new / old)
    return julius.resample_frac(padded, old, new, zeros=6, rolloff=0.99)[..., margin * new :][..., :length]


def read_codes(path: Path, num_codebooks: int, codebook_size: int, source: str) -> Tensor:
    """Codes [K, T] int64 from `.npy` or `.safetensors` (one tensor); DataError for anything else."""
    try:
        if path.suffix == ".npy":
            codes = np.load(path, allow_pickle=False)
        else:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise ValueError(f"holds {len(names)} tensors, expected one")
                codes = file.get_tensor(names[0])
    except Exception as error:  # each reader has its own exceptions for a damaged file
        raise DataError(f"{source}: {path} cannot be read as codes: {error}") from None
    expected = f"expected an integer array [{num_codebooks} codebooks, frames] of codes 0 to {codebook_size - 1}"
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.shape[1] == 0:
        raise DataError(f"{source}: {path} holds {codes.dtype} {list(codes.shape)}; {expected}")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise DataError(f"{source}: {path} holds codes {low} to {high}; {expected}, without stream ids")
    return torch.from_numpy(codes.astype(np.int64))


def read_waveform(part: AudioPart, source: str) -> tuple[np.ndarray, int]:
    """Mono float32 samples and their rate in Hz; `offset` and `duration` are applied while reading."""
    try:
        with soundfile.SoundFile(io.BytesIO(part.raw_audio) if part.path is None else part.path) as file:
            rate = file.samplerate
            file.seek(min(len(file), round((part.offset_sec or 0.0) * rate)))
            num_samples = -1 if part.duration_sec is None else round(part.duration_sec * rate)
            samples = file.read(num_samples, dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{source}: {part.field}: {part.path or 'raw_audio'} is not readable audio: {error}") from None
    if len(samples) == 0:
        raise DataError(f"{source}: {part.field}: no audio left in {part.path or 'raw_audio'} after offset and duration")
    return samples, rate


class AudioStore:
    """Clips as codes. Ready-made codes are read where they lie; waveforms are encoded once into `cache_dir`.

    num_codebooks, codebook_size: of the checkpoint (1024 codes, stream ids not counted)
    frame_rate_hz:                frames per second, for `offset` and `duration` of ready-made codes
    cache_dir:                    one `.npy` per encoded clip
    codec_id:                     what the cache is for: clips encoded by another codec are not found
    """

    def __init__(self, num_codebooks: int, codebook_size: int, frame_rate_hz: float, cache_dir: Path, codec_id: str = ""):
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.frame_rate_hz = frame_rate_hz
        self.cache_dir = Path(cache_dir)
        self.codec_id = codec_id

    def codes(self, part: AudioPart, source: str) -> Tensor:
        """[K, T] int64; a waveform must have been encoded before."""
        if not part.holds_codes:
            path = self._cached(part)
            if not path.is_file():
                raise DataError(f"{source}: {part.field}: {part.path or 'raw_audio'} has not been encoded")
            return read_codes(path, self.num_codebooks, self.codebook_size, source)
        codes = read_codes(part.path, self.num_codebooks, self.codebook_size, f"{source}: {part.field}")
        if part.offset_sec is None and part.duration_sec is None:
            return codes
        start = round((part.offset_sec or 0.0) * self.frame_rate_hz)
        stop = codes.shape[1] if part.duration_sec is None else start + round(part.duration_sec * self.frame_rate_hz)
        if start >= min(stop, codes.shape[1]):
            raise DataError(f"{source}: {part.field}: no frames left of {codes.shape[1]} after offset and duration")
        return codes[:, start:stop]

    def num_frames(self, part: AudioPart, source: str) -> int:
        """Frames of a clip."""
        return self.codes(part, source).shape[1]

    def missing(self, records: Iterable[Record]) -> list[tuple[AudioPart, str]]:
        """The waveforms of the records that still have to be encoded, each once."""
        found: dict[Path, tuple[AudioPart, str]] = {}
        for record in records:
            for part in record.audio:
                for clip in filter(None, (part, part.label)):
                    if not clip.holds_codes:
                        found.setdefault(self._cached(clip), (clip, record.source))
        return [clip for path, clip in found.items() if not path.is_file()]

    def encode(self, codec, clips: Sequence[tuple[AudioPart, str]]) -> None:
        """Encode clips with the official codec, each written under a temporary name and renamed when whole."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        for part, source in clips:
            samples, rate = read_waveform(part, source)
            if len(samples) < rate / self.frame_rate_hz:
                raise DataError(
                    f"{source}: {part.field}: {len(samples) / rate:.3f} s of audio is less than one frame ({1 / self.frame_rate_hz} s)"
                )
            codes = codec.encode(samples, rate)[: self.num_codebooks].cpu().numpy().astype(np.int16)
            path = self._cached(part)
            temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
            with open(temporary, "wb") as file:
                np.save(file, codes)
            os.replace(temporary, path)

    def _cached(self, part: AudioPart) -> Path:
        if part.path is None:
            content = hashlib.sha256(part.raw_audio).hexdigest()
        else:
            stat = part.path.stat()
            content = f"{part.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        key = f"{content} {part.offset_sec} {part.duration_sec} {self.codec_id}"
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
