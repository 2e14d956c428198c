"""What a model says by itself: prompts from records, the official `generate()` and collator, and how the answer compares.

    split_answer    a record without its last answer, and the clips of that answer
    as_prompt       its sample, as the official inference phrases it
    speak           a prompt -> codes, by the official `generate()` and collator
    Score           how well codes agree with what should have been said
    Results         answers in a folder: results.jsonl, codes as .npy, and .wav where there is a codec

Training (--sample_steps) and tools/generate.py speak in the same way, through this file.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from torch import Tensor

from prepare.manifest import AudioPart, Record

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
STOP_STRINGS = ("<|end_of_text|>", "<|eot_id|>")
RESULTS_FILE = "results.jsonl"

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def split_answer(record: Record) -> tuple[Record, list[AudioPart]]:
    """The record without the assistant's last turn, and that turn's clips; the record itself if the user has the last word."""
    turns = record.chatml.messages
    if turns[-1].role != "assistant":
        return record, []
    prompt = record.cropped(len(turns) - 1)
    return prompt, record.audio[len(prompt.audio) :]


def last_text(record: Record) -> str:
    """The text of the last turn."""
    content = record.chatml.messages[-1].content
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else getattr(part, "text", "") for part in parts)


_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # scripts in which every character counts as a word
WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def spoken_words(text: str) -> list[str]:
    """The words of a text as they sound: without speaker tags, punctuation and capitals."""
    text = re.sub(r"\[SPEAKER\d+\]", " ", text).casefold().replace("'", "").replace("\u2019", "")
    return WORD.findall(re.sub(r"[^\w\s]|_", " ", text))


def as_prompt(sample: ChatMLDatasetSample, tokenizer, force_audio: bool = False) -> ChatMLDatasetSample:
    """A sample whose last turn is the user's, with the assistant's header after it: the model continues from there.

    force_audio: the answer begins with <|audio_out_bos|>, so that the model has to speak (the serve engine's option)
    """
    header = ASSISTANT_HEADER + ("<|audio_out_bos|>" if force_audio else "")
    header = tokenizer.encode(header, add_special_tokens=False)
    input_ids = torch.cat([sample.input_ids, torch.tensor(header, dtype=torch.long)])
    return dataclasses.replace(sample, input_ids=input_ids, label_ids=None)


# ---------------------------------------------------------------------------------------------------------------------
# Speaking


@dataclass(frozen=True)
class Sampling:
    """How `generate()` chooses codes: the official serve engine's settings, with the official example's top_k."""

    temperature: float = 0.7  # 0: the likeliest code
    top_k: int = 50  # 0: all codes
    top_p: float = 0.95
    ras_win_len: int = 7  # repetition-aware: a code seen so often ...
    ras_win_max_num_repeat: int = 2  # ... in the last so many frames is drawn anew; 0 frames: off
    seed: int = 0
    max_new_tokens: int = 2048  # frames, delay columns and text tokens of one answer

    def arguments(self) -> dict[str, Any]:
        """For the official `generate()`."""
        values: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        if self.temperature > 0:
            values |= {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.ras_win_len > 0:
            values |= {"ras_win_len": self.ras_win_len, "ras_win_max_num_repeat": self.ras_win_max_num_repeat}
        return values


@dataclass
class Speech:
    """What the model said in answer to one prompt."""

    codes: list[Tensor]  # one [K, T] int64 per clip, as the codec takes them
    delayed: list[Tensor]  # the same as generated: [K, T + K + 1], with stream ids
    token_ids: list[int]  # text tokens after the prompt; a clip is one <|AUDIO_OUT|>
    stopped: bool  # ended by itself: <|audio_eos|>, then <|eot_id|> or <|end_of_text|>


def official_collator(config: HiggsAudioConfig) -> HiggsAudioSampleCollator:
    """The official collator as upstream's examples/generation.py sets it up, for a checkpoint without Whisper."""
    return HiggsAudioSampleCollator(
        whisper_processor=None,
        encode_whisper_embed=False,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        pad_token_id=config.pad_token_id,
        return_audio_in_tokens=config.encode_audio_in_tokens,
        use_delay_pattern=config.use_delay_pattern,
        audio_num_codebooks=config.audio_num_codebooks,
        round_to=1,
    )


def speak(
    model: HiggsAudioModel,
    tokenizer,
    prompt: ChatMLDatasetSample,
    max_new_tokens: int = 2048,
    generate: Callable | None = None,
    **sampling,
) -> Speech:
    """Generate from a prompt (see `as_prompt`); greedy unless `sampling` says otherwise.

    generate: another way to call the model's `generate`, for instance a PEFT wrapper's or `generate_sharded`
    sampling: arguments of the official `generate()`: do_sample, temperature, top_k, top_p, ras_win_len, seed, ...
    """
    model.set_audio_special_tokens(tokenizer)
    batch: HiggsAudioBatchInput = official_collator(model.config)([prompt])
    device = next(model.parameters()).device
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in vars(batch).items()}
    token_ids, delayed = (generate or model.generate)(
        **inputs,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        stop_strings=list(STOP_STRINGS),
        tokenizer=tokenizer,
        # Upstream fails on an audio placeholder that the model writes by itself, as an untrained one may.
        suppress_tokens=[model.config.audio_in_token_idx, model.config.audio_out_token_idx],
        **{"do_sample": False} | sampling,
    )
    new_ids = token_ids[0, len(prompt.input_ids) :].tolist()
    ends = [tokenizer.convert_tokens_to_ids(stop) for stop in STOP_STRINGS]
    audio_eos = tokenizer.convert_tokens_to_ids("<|audio_eos|>")
    stopped = new_ids[-1] in ends and audio_eos in new_ids[-2:-1]
    delayed = [clip.cpu() for clip in delayed]
    return Speech([undelay(clip, model.config) for clip in delayed], delayed, new_ids, stopped)


def generate_sharded(model: HiggsAudioModel, **arguments):
    """The official `generate()` of a model under FSDP. Collective: every rank has a prompt, not necessarily the same.

    `generate` is decorated with inference mode, in which FSDP cannot gather; without gradients is all it needs. A rank that
    has finished goes on with forward passes that count for nothing until all have, because every one gathers weights.
    """
    several = torch.distributed.get_world_size() > 1
    with torch.no_grad():
        return HiggsAudioModel.generate.__wrapped__(model, synced_gpus=several, **arguments)


def undelay(delayed: Tensor, config: HiggsAudioConfig) -> Tensor:
    """Generated ids [K, L] -> codes [K, T], as the official serve engine does; T is 0 for a clip cut off in its delay."""
    K, L = delayed.shape
    if config.use_delay_pattern:
        if L < K + 1:
            return delayed.new_zeros((K, 0))
        delayed = revert_delay_pattern(delayed)
    return delayed.clip(0, config.audio_codebook_size - 1)[:, 1:-1]


def join(clips: Sequence[Tensor], num_codebooks: int) -> Tensor:
    """Clips [K, T_i] one after the other: [K, T], with T = 0 for none."""
    return torch.cat([torch.zeros((num_codebooks, 0), dtype=torch.long), *clips], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


@dataclass(frozen=True)
class Score:
    """How well clips agree with what should have been said; add them with `+`."""

    num_clips: int = 0
    stopped: int = 0  # ended by themselves
    timely: int = 0  # ... at the right length
    exact: int = 0  # every code as it should be
    matching: int = 0  # codes that agree
    compared: int = 0  # codes of the longer of the two
    frames: int = 0
    target_frames: int = 0

    @classmethod
    def of(cls, codes: Tensor, stopped: bool, target: Tensor) -> Score:
        """codes, target: [K, T], of different T perhaps"""
        K, T = target.shape
        shared = min(codes.shape[1], T)
        matching = int((codes[:, :shared] == target[:, :shared]).sum())
        compared = max(codes.shape[1], T) * K
        timely = stopped and codes.shape[1] == T
        return cls(1, int(stopped), int(timely), int(matching == compared), matching, compared, codes.shape[1], T)

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    @property
    def code_match(self) -> float:
        """The share of codes that agree: near 1 only for a model that knows its clips; real speech has many right answers."""
        return self.matching / max(1, self.compared)

    def metrics(self) -> dict[str, float | int]:
        return {
            "num_samples": self.num_clips,
            "stop_rate": self.stopped / max(1, self.num_clips),
            "duration_ratio": self.frames / max(1, self.target_frames),
            "code_match": self.code_match,
            "exact_clips": self.exact,
        }

    def __str__(self) -> str:
        clips = f"exact clips {self.exact:2d}/{self.num_clips}   correct stops {self.timely:2d}/{self.num_clips}"
        return f"codes {self.code_match:6.1%}   {clips}"


# ---------------------------------------------------------------------------------------------------------------------
# Keeping


def decode(codec, codes: Tensor) -> np.ndarray:
    """Codes [K, T] -> mono float32 samples at `codec.sampling_rate`."""
    with torch.no_grad():
        return codec.decode(codes[None])[0, 0]


def write_clip(path: Path, codes: Tensor, codec=None) -> None:
    """Codes [K, T] as .npy, or decoded as whatever libsndfile writes for the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, codes.numpy().astype(np.int16))
    else:
        soundfile.write(path, decode(codec, codes), codec.sampling_rate)


def write_both(path: Path, codes: Tensor, codec=None) -> dict[str, str]:
    """`path`.npy, and with a codec `path`.wav; returns the names of the files, by kind."""
    kinds = {"codes": ".npy"} | ({"wav": ".wav"} if codec is not None and codes.shape[1] else {})
    files = {kind: path.name + suffix for kind, suffix in kinds.items()}
    for name in files.values():
        write_clip(path.parent / name, codes, codec)
    return files


def write_results(folder: Path, results: Sequence[dict]) -> None:
    """FOLDER/results.jsonl: one object per clip; files are named relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).write_text("".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))


def file_name(name: str) -> str:
    """A name that is safe as a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:80] or "clip"
