"""Speech from a model, by the official `generate()` and the official collator.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from torch import Tensor

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
STOP_STRINGS = ("<|end_of_text|>", "<|eot_id|>")


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


def as_prompt(sample: ChatMLDatasetSample, tokenizer, force_audio: bool = False) -> ChatMLDatasetSample:
    """A sample whose last turn is the user's, with the assistant's header after it: the model continues from there.

    force_audio: the answer begins with <|audio_out_bos|>, so that the model has to speak (the serve engine's option)
    """
    header = ASSISTANT_HEADER + ("<|audio_out_bos|>" if force_audio else "")
    header = tokenizer.encode(header, add_special_tokens=False)
    input_ids = torch.cat([sample.input_ids, torch.tensor(header, dtype=torch.long)])
    return dataclasses.replace(sample, input_ids=input_ids, label_ids=None)


def speak(
    model: HiggsAudioModel, tokenizer, prompt: ChatMLDatasetSample, max_new_tokens: int = 2048, generate=None, **sampling
) -> Speech:
    """Generate from a prompt (see `as_prompt`); greedy unless `sampling` says otherwise.

    generate: another way to call the model's `generate`, for instance a PEFT wrapper's
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


def undelay(delayed: Tensor, config: HiggsAudioConfig) -> Tensor:
    """Generated ids [K, L] -> codes [K, T], as the official serve engine does; T is 0 for a clip cut off in its delay."""
    K, L = delayed.shape
    if config.use_delay_pattern:
        if L < K + 1:
            return delayed.new_zeros((K, 0))
        delayed = revert_delay_pattern(delayed)
    return delayed.clip(0, config.audio_codebook_size - 1)[:, 1:-1]
