"""The official `generate()`: one prompt at a time, with the official collator.

    as_prompt           a sample that ends with the user's turn -> a prompt
    generate_one        a prompt -> codes
    generate_each       requests -> answers
    undelay             generated ids -> codes

Legend: K codebooks, T frames, L delayed columns.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from torch import Tensor

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
STOP_STRINGS = ("<|end_of_text|>", "<|eot_id|>")


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn: the official serve engine's settings, with the official example's top_k."""

    temperature: float = 0.7  # 0: greedy
    top_k: int = 50  # 0: all codes
    top_p: float = 0.95
    ras_win_len: int = 7  # repetition-aware: a code that occurs so often ...
    ras_win_max_num_repeat: int = 2  # ... in the last so many frames is drawn again; 0 frames: off
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
class Request:
    """A prompt (see `as_prompt`) among others, and what is its own."""

    prompt: ChatMLDatasetSample
    seed: int = 0
    max_new_tokens: int = 2048
    key: Any = None  # the caller's


@dataclass
class Answer:
    """What the model generated for one prompt."""

    codes: list[Tensor]  # one [K, T] int64 per clip, as the codec takes them
    delayed: list[Tensor]  # the same as generated: [K, T + K + 1], with stream ids
    token_ids: list[int]  # text tokens after the prompt; a clip is one <|AUDIO_OUT|>
    stopped: bool  # ended by itself: <|audio_eos|>, then <|eot_id|> or <|end_of_text|>
    seconds: float = 0.0  # since the model was given the prompt


def as_prompt(sample: ChatMLDatasetSample, tokenizer, force_audio: bool = False) -> ChatMLDatasetSample:
    """A sample that ends with the user's turn, with the assistant's header after it.

    force_audio: add <|audio_out_bos|> as well, so that the answer is audio (an option of the serve engine)
    """
    header = ASSISTANT_HEADER + ("<|audio_out_bos|>" if force_audio else "")
    header = tokenizer.encode(header, add_special_tokens=False)
    input_ids = torch.cat([sample.input_ids, torch.tensor(header, dtype=torch.long)])
    return dataclasses.replace(sample, input_ids=input_ids, label_ids=None)


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


def generate_one(
    model: HiggsAudioModel,
    tokenizer,
    prompt: ChatMLDatasetSample,
    max_new_tokens: int = 2048,
    generate: Callable | None = None,
    **sampling,
) -> Answer:
    """The official `generate()` of a prompt (see `as_prompt`); greedy unless `sampling` says otherwise.

    generate: another way to call it, for instance a PEFT wrapper's
    sampling: arguments of the official `generate()`, see `Sampling.arguments`
    """
    started = time.perf_counter()
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
        # Upstream fails on an audio placeholder that the model generates, as an untrained one may.
        suppress_tokens=[model.config.audio_in_token_idx, model.config.audio_out_token_idx],
        **{"do_sample": False} | sampling,
    )
    new_ids = token_ids[0, len(prompt.input_ids) :].tolist()
    delayed = [clip.cpu() for clip in delayed]
    return make_answer(delayed, new_ids, tokenizer, model.config, started)


def make_answer(
    delayed: list[Tensor], new_ids: list[int], tokenizer, config: HiggsAudioConfig, started: float
) -> Answer:
    """started: time.perf_counter() when the model was given the prompt"""
    codes = [undelay(clip, config) for clip in delayed]
    return Answer(codes, delayed, new_ids, has_stopped(new_ids, tokenizer), time.perf_counter() - started)


def has_stopped(new_ids: Sequence[int], tokenizer) -> bool:
    """Whether an answer ended by itself after a clip."""
    ends = tokenizer.convert_tokens_to_ids(list(STOP_STRINGS))
    return new_ids[-1] in ends and tokenizer.convert_tokens_to_ids("<|audio_eos|>") in new_ids[-2:-1]


def generate_each(
    model: HiggsAudioModel, tokenizer, requests: deque[Request], sampling: Sampling
) -> Iterator[tuple[Request, Answer]]:
    """Answer the requests one after the other, as `batched.generate_many` answers them together."""
    while requests:
        request = requests.popleft()
        own = {"seed": request.seed, "max_new_tokens": request.max_new_tokens}
        yield request, generate_one(model, tokenizer, request.prompt, **sampling.arguments() | own)


def undelay(delayed: Tensor, config: HiggsAudioConfig) -> Tensor:
    """Generated ids [K, L] -> codes [K, T], as the serve engine does; T is 0 for a clip cut off in its delay."""
    K, L = delayed.shape
    if config.use_delay_pattern:
        if L < K + 1:
            return delayed.new_zeros((K, 0))
        delayed = revert_delay_pattern(delayed)
    return delayed.clip(0, config.audio_codebook_size - 1)[:, 1:-1]


def join(clips: Sequence[Tensor], num_codebooks: int) -> Tensor:
    """Clips [K, T_i] one after the other: [K, T], with T = 0 for none."""
    return torch.cat([torch.zeros((num_codebooks, 0), dtype=torch.long), *clips], dim=1)
