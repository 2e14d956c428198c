"""What training reads: manifest -> ChatML -> samples -> micro-batches.

    read_manifest   JSON list or JSONL of ChatML records; every problem names file, record, field and remedy
    AudioStore      audio parts -> codes [K, T], from ready-made codes or through the codec, once per clip
    ChatMLDataset   a record -> the official `prepare_chatml_sample` -> `ChatMLDatasetSample`
    Loader          seeded, rank-sharded, epoch-aware micro-batches; its position is saved and restored

The record, and which turns train:

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | part | [str | part, ...]}, ...],
     "start_index": int?, "speaker": str?, "misc": {}?}
    part: {"type": "text", "text": str} or {"type": "audio", "audio_url": path, "offset": sec?, "duration": sec?}

Assistant turns from `start_index` on train, text and audio; earlier ones, and everything else, are context. `audio_url`
is relative to the manifest, or absolute: a waveform, or codes `[K, T]` as `.npy` or `.safetensors`. `audio_label_url`
beside it gives the label audio of an assistant turn where that differs from its input.

Legend: K codebooks, T frames.

    python data.py MANIFEST BASE_CKPT      # what the manifest holds, record by record
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from collate import IGNORE_INDEX, CollateError, ExtendedHiggsAudioBatchInput, ExtendedHiggsAudioSampleCollator, starts

ROLES = ("system", "user", "assistant")
CODE_SUFFIXES = (".npy", ".safetensors")


class DataError(ValueError):
    """A problem with the user's data; the message names file, record, field and remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Manifest -> records


@dataclass
class AudioPart:
    """One clip a record refers to; times in seconds."""

    path: Path | None  # None: `raw_audio` holds the waveform
    offset_sec: float | None
    duration_sec: float | None
    is_output: bool  # of an assistant turn
    field: str  # where it stands, for messages
    label_path: Path | None = None
    raw_audio: bytes | None = field(default=None, repr=False)

    @property
    def holds_codes(self) -> bool:
        return self.path is not None and self.path.suffix in CODE_SUFFIXES

    @property
    def label(self) -> AudioPart | None:
        """The label audio beside this clip, as a clip of its own."""
        if self.label_path is None:
            return None
        return AudioPart(self.label_path, self.offset_sec, self.duration_sec, True, f"{self.field} (audio_label_url)")


@dataclass
class Record:
    """A validated record: the official ChatML sample and its clips, in the order of their placeholders."""

    chatml: ChatMLSample
    audio: list[AudioPart]
    source: str  # "manifest.jsonl record 3 (line 4)"


def read_manifest(path: str | Path) -> list[Record]:
    """Read and validate a manifest (a JSON list, or JSONL); audio files are looked for, not opened.

    raises: DataError naming file, record, field and remedy
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such manifest file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save the manifest as UTF-8 JSON or JSONL") from None
    records = [parse_record(value, path.parent, source) for source, value in _read_json(path, text)]
    if not records:
        raise DataError(f"{path}: the manifest is empty")
    return records


def _read_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(source, value) of each record, from a JSON list or from one JSON value per line."""
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        for index, value in enumerate(_parse_json(text, f"{path}", line=1)):
            yield f"{path} record {index}", value
        return
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends here.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for index, (number, line) in enumerate(lines):
        yield f"{path} record {index} (line {number})", _parse_json(line, f"{path}", line=number)


def _parse_json(text: str, source: str, line: int) -> Any:
    try:
        return json.loads(text.lstrip("\ufeff"), parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise DataError(
            f"{source} line {at}: broken JSON ({error.msg} at column {error.colno}). A manifest is one JSON list, or one "
            "complete JSON object per line"
        ) from None


def _reject_constant(name: str):
    return math.nan  # NaN stands for "absent" in exported tables; upstream reads it as None, and so do the checks below


def parse_record(value: Any, folder: Path, source: str) -> Record:
    """Turn a decoded JSON value into a Record. folder: what relative paths start from."""

    def fail(where: str, problem: str):
        raise DataError(f"{source}: {where}: {problem}")

    if not isinstance(value, dict):
        fail("record", f"expected an object with `messages`, found {_shown(value)}")
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        found = f"keys {sorted(map(str, value))}" if "messages" not in value else _shown(messages)
        fail("messages", f"expected a non-empty list of turns, found {found}")
    unknown = set(value) - {"messages", "start_index", "speaker", "misc"}
    if unknown:
        fail("record", f"unknown keys {sorted(unknown)}; put extra information under `misc`")
    audio: list[AudioPart] = []
    turns = [_parse_turn(turn, f"messages[{i}]", folder, audio, fail) for i, turn in enumerate(messages)]
    start = _absent_if_nan(value.get("start_index"))
    if start is not None:
        if isinstance(start, bool) or not isinstance(start, (int, float)) or start != int(start):
            fail("start_index", f"expected a whole number of turns, found {_shown(start)}")
        if not 0 <= start < len(turns):
            fail("start_index", f"{start} leaves no turn to train; the record has {len(turns)} turns (0 to {len(turns) - 1})")
    if not any(turn.role == "assistant" for turn in turns[int(start or 0) :]):
        fail("messages", "no assistant turn from start_index on, so there is nothing to train")
    speaker, misc = _absent_if_nan(value.get("speaker")), _absent_if_nan(value.get("misc"))
    if speaker is not None and not isinstance(speaker, str):
        fail("speaker", f"expected text, found {_shown(speaker)}")
    if misc is not None and not isinstance(misc, dict):
        fail("misc", f"expected an object, found {_shown(misc)}")
    chatml = ChatMLSample(turns, start_index=None if start is None else int(start), misc=misc, speaker=speaker)
    return Record(chatml, audio, source)


def _parse_turn(turn: Any, where: str, folder: Path, audio: list[AudioPart], fail: Callable) -> Message:
    if not isinstance(turn, dict):
        fail(where, f"expected an object with `role` and `content`, found {_shown(turn)}")
    unknown = set(turn) - {"role", "content", "recipient"}
    if unknown:
        fail(where, f"unknown keys {sorted(unknown)}; a turn has `role` and `content`")
    role = turn.get("role")
    if role not in ROLES:
        fail(f"{where}.role", f"{_shown(role)} is not one of {', '.join(ROLES)}")
    recipient = _absent_if_nan(turn.get("recipient"))
    if recipient is not None and (role != "assistant" or not isinstance(recipient, str)):
        fail(f"{where}.recipient", "only an assistant turn can have a recipient, and it is text")
    content = turn.get("content")
    if isinstance(content, str):
        return Message(role, content, recipient)
    is_list = isinstance(content, list)
    parts = [
        _parse_part(part, f"{where}.content[{i}]" if is_list else f"{where}.content", role, folder, audio, fail)
        for i, part in enumerate(content if is_list else [content])
    ]
    return Message(role, parts if is_list else parts[0], recipient)


def _parse_part(part: Any, where: str, role: str, folder: Path, audio: list[AudioPart], fail: Callable):
    if isinstance(part, str):
        return TextContent(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            fail(f"{where}.text", f"expected text, found {_shown(part.get('text'))}")
        return TextContent(part["text"])
    if kind != "audio":
        fail(where, f'expected text, {{"type": "text", ...}} or {{"type": "audio", ...}}, found {_shown(part)}')
    unknown = set(part) - {"type", "audio_url", "raw_audio", "offset", "duration", "row_id", "audio_label_url"}
    if unknown:
        fail(where, f"unknown keys {sorted(unknown)} of an audio part")
    for name in ("offset", "duration"):
        sec = _absent_if_nan(part.get(name))
        if sec is not None and (isinstance(sec, bool) or not isinstance(sec, (int, float)) or sec < 0 or math.isinf(sec)):
            fail(f"{where}.{name}", f"expected seconds, found {_shown(sec)}")
    offset, duration = (_absent_if_nan(part.get(name)) for name in ("offset", "duration"))
    if duration == 0:
        fail(f"{where}.duration", "0 seconds of audio; leave it out for the whole clip")
    url, raw = part.get("audio_url"), _absent_if_nan(part.get("raw_audio"))
    path = raw_bytes = None
    if raw is not None:
        try:
            raw_bytes = base64.b64decode(raw, validate=True)
        except (TypeError, ValueError):
            fail(f"{where}.raw_audio", "not base64")
    else:
        path = _existing_file(url, f"{where}.audio_url", folder, fail)
    label_path = None
    if _absent_if_nan(part.get("audio_label_url")) is not None:
        if role != "assistant":
            fail(f"{where}.audio_label_url", "only an assistant turn has label audio")
        label_path = _existing_file(part["audio_label_url"], f"{where}.audio_label_url", folder, fail)
    audio.append(AudioPart(path, offset, duration, role == "assistant", where, label_path, raw_bytes))
    return AudioContent(audio_url=url if isinstance(url, str) else "", raw_audio=raw, offset=offset, duration=duration)


def _existing_file(url: Any, where: str, folder: Path, fail: Callable) -> Path:
    if not isinstance(url, str) or not url:
        fail(where, f"expected a path, found {_shown(url)}")
    path = folder / url
    if not path.is_file():
        fail(where, f"audio file {path} does not exist; paths are relative to the manifest's folder, or absolute")
    return path


def _absent_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Audio -> codes


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

    def missing(self, records: Sequence[Record]) -> list[tuple[AudioPart, str]]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Records -> samples


@dataclass
class Sample(ChatMLDatasetSample):
    """The official sample, and where it came from."""

    source: str = ""


class ChatMLDataset(Dataset):
    """Map-style: `dataset[i]` is record i as the official `prepare_chatml_sample` reads it, with its codes.

    tokenizer:      of the checkpoint
    store:          where clips become codes
    with_waveforms: add the waveforms of input audio, for a checkpoint with Whisper
    """

    def __init__(self, records: Sequence[Record], tokenizer, store: AudioStore, with_waveforms: bool = False):
        self.records = records
        self.tokenizer = tokenizer
        self.store = store
        self.with_waveforms = with_waveforms

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        input_ids, label_ids, audio_contents, _ = prepare_chatml_sample(record.chatml, self.tokenizer)
        if input_ids is None:
            raise DataError(f"{record.source}: the official prepare_chatml_sample refuses this record")
        assert len(audio_contents) == len(record.audio)
        codes = [self.store.codes(part, record.source) for part in record.audio]
        labels = self._label_codes(record, codes)
        waveforms, rates = self._waveforms(record) if self.with_waveforms else ([], [])
        K = self.store.num_codebooks
        return Sample(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            label_ids=torch.tensor(label_ids, dtype=torch.long),
            audio_ids_concat=torch.cat(codes, dim=1) if codes else torch.zeros((K, 0), dtype=torch.long),
            audio_ids_start=starts(codes),
            audio_label_ids_concat=labels,
            audio_waveforms_concat=torch.cat(waveforms) if waveforms else torch.zeros(0),
            audio_waveforms_start=starts(waveforms),
            audio_sample_rate=torch.tensor(rates, dtype=torch.float32),
            audio_speaker_indices=torch.zeros(0, dtype=torch.long),
            source=record.source,
        )

    def _label_codes(self, record: Record, codes: list[Tensor]) -> Tensor | None:
        """Label audio [K, T] of all clips, their own codes where none is given; None where none is given at all."""
        if not any(part.label_path for part in record.audio):
            return None
        labels = []
        for part, own in zip(record.audio, codes):
            label = self.store.codes(part.label, record.source) if part.label else own
            if label.shape != own.shape:
                raise DataError(
                    f"{record.source}: {part.field}: audio_label_url has {label.shape[1]} frames, audio_url {own.shape[1]}; "
                    "label audio stands frame by frame beside the input"
                )
            labels.append(label)
        return torch.cat(labels, dim=1)

    def _waveforms(self, record: Record) -> tuple[list[Tensor], list[int]]:
        waveforms, rates = [], []
        for part in record.audio:
            if part.is_output:
                continue
            if part.holds_codes:
                raise DataError(
                    f"{record.source}: {part.field}: {part.path} holds codes, but this checkpoint hears input audio through "
                    "Whisper; give the waveform"
                )
            samples, rate = read_waveform(part, record.source)
            waveforms.append(torch.from_numpy(samples))
            rates.append(rate)
        return waveforms, rates


# ---------------------------------------------------------------------------------------------------------------------
# Samples -> micro-batches


def hold_out(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(the rest, the held-out part): at least one record each, chosen by the seed, both in the manifest's order."""
    num_held = min(len(records) - 1, max(1, round(share * len(records))))
    held = set(epoch_order(len(records), seed, epoch=-1)[:num_held])
    return [r for i, r in enumerate(records) if i not in held], [r for i, r in enumerate(records) if i in held]


class Position(NamedTuple):
    """Where training stands in its data: so many samples of this epoch are done. Independent of the world size."""

    epoch: int
    samples_done: int


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order of an epoch: a function of (seed, epoch) alone."""
    if not shuffle:
        return list(range(num_samples))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()


def plan_steps(order: Sequence[int], batch_size: int, world_size: int, grad_accum: int) -> list[list[list[int]]]:
    """Cut an epoch into optimizer steps of up to world_size * grad_accum micro-batches of sample indices.

    Every sample appears exactly once. A short last step is filled up with micro-batches of one sample, written as
    -1 - index, whose labels are masked: every rank takes part equally often, and nothing counts twice.
    """
    micro_batches = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    per_step = world_size * grad_accum
    steps = [micro_batches[i : i + per_step] for i in range(0, len(micro_batches), per_step)]
    for step in steps:
        while len(step) % world_size:
            step.append([-1 - step[0][0]])
    return steps


class _MicroBatches(Dataset):
    """Collated micro-batches by sample indices; a DataError is returned, so that it reaches the user without the
    traceback of a worker process."""

    def __init__(self, dataset: ChatMLDataset, collator: ExtendedHiggsAudioSampleCollator):
        self.dataset = dataset
        self.collator = collator

    def __getitem__(self, indices: list[int]) -> ExtendedHiggsAudioBatchInput | Exception:
        try:
            return self.collator([self._sample(index) for index in indices])
        except (DataError, CollateError) as error:
            return DataError(str(error))

    def _sample(self, index: int) -> Sample:
        if index >= 0:
            return self.dataset[index]
        sample = self.dataset[-1 - index]
        sample.label_ids = torch.full_like(sample.label_ids, IGNORE_INDEX)
        return sample


class _EpochSampler(Sampler):
    """The index lists of this rank, set anew for each epoch so that workers outlive an epoch."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Micro-batches of this rank, grouped by optimizer step.

    `for step in loader.epoch(position)` yields `(micro_batches, position_after)`; the order depends on (seed, epoch), the
    grouping also on the world size, and every sample is used exactly once per epoch.
    """

    def __init__(
        self,
        dataset: ChatMLDataset,
        collator: ExtendedHiggsAudioSampleCollator,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.num_samples = len(dataset)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.grad_accum = grad_accum
        self.seed = seed
        self.shuffle = shuffle
        self._sampler = _EpochSampler()
        self._loader = DataLoader(
            _MicroBatches(dataset, collator),
            sampler=self._sampler,
            batch_size=None,  # the sampler yields whole micro-batches
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers else None,
            generator=torch.Generator().manual_seed(seed),  # not the global one: workers must not change the run
        )

    def steps_in_epoch(self) -> int:
        return math.ceil(math.ceil(self.num_samples / self.batch_size) / (self.world_size * self.grad_accum))

    def epoch(self, position: Position) -> Iterator[tuple[list[ExtendedHiggsAudioBatchInput], Position]]:
        """The optimizer steps of an epoch from `position` on; raises DataError for a sample that cannot be read."""
        order = epoch_order(self.num_samples, self.seed, position.epoch, self.shuffle)[position.samples_done :]
        steps = plan_steps(order, self.batch_size, self.world_size, self.grad_accum)
        mine = [step[self.rank :: self.world_size] for step in steps]
        self._sampler.batches = [indices for step in mine for indices in step]
        batches = iter(self._loader)
        done = position.samples_done
        for step, own in zip(steps, mine):
            micro_batches = [next(batches) for _ in own]
            for micro_batch in micro_batches:
                if isinstance(micro_batch, Exception):
                    raise micro_batch
            done += sum(index >= 0 for indices in step for index in indices)
            yield micro_batches, Position(position.epoch, done)


def open_demo_or_manifest(argv: Sequence[str]) -> tuple[ChatMLDataset, Any]:
    """The dataset and model config for `python data.py` and `python collate.py`: MANIFEST BASE_CKPT, or the demo's."""
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig
    from transformers import AutoTokenizer

    if not argv:
        from tools.demo import make_demo  # an offline example; only this command needs it

        manifest, checkpoint = make_demo(Path("runs/demo-data"))
    elif len(argv) == 2:
        manifest, checkpoint = argv
    else:
        raise SystemExit("usage: MANIFEST BASE_CKPT, or nothing for the demo's data")
    config = HiggsAudioConfig.from_pretrained(checkpoint)
    store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, FRAME_RATE_HZ, Path("runs/codes"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return ChatMLDataset(read_manifest(manifest), tokenizer, store, config.encode_whisper_embed), config


def main(argv: Sequence[str]) -> None:
    dataset, _ = open_demo_or_manifest(argv)
    print(f"{len(dataset)} records")
    for index in range(min(5, len(dataset))):
        sample = dataset[index]
        supervised = (sample.label_ids != IGNORE_INDEX).sum().item()
        print(
            f"\n{sample.source}: {len(sample.input_ids)} tokens, {supervised} of them labels, codes {tuple(sample.audio_ids_concat.shape)}"
        )
        print(dataset.tokenizer.decode(sample.input_ids))


if __name__ == "__main__":
    main(sys.argv[1:])
