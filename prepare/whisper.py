"""Input audio for a checkpoint that reads it through Whisper: long clips in chunks, and the features of each chunk.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import librosa
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from torch import Tensor
from transformers import WhisperFeatureExtractor

from common import CollateError
from prepare.audio import starts


def feature_extractor(config: HiggsAudioConfig) -> WhisperFeatureExtractor:
    """The extractor the tower was built for: whisper-large-v3's settings, the window from `max_source_positions`.

    The tower halves the mel frames once before its positions, so a window has 2 * max_source_positions frames of 10 ms.
    """
    encoder = config.audio_encoder_config
    chunk_sec = 2 * encoder.max_source_positions * 160 / 16000
    if chunk_sec != int(chunk_sec):
        raise CollateError(f"max_source_positions={encoder.max_source_positions} is not a whole number of seconds")
    return WhisperFeatureExtractor(feature_size=encoder.num_mel_bins, chunk_length=int(chunk_sec))


def features(
    samples: Sequence[ChatMLDatasetSample], extractor: WhisperFeatureExtractor | None, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Features [chunks, *shape] and attention mask of every chunk, in the order of the `<|AUDIO|>` placeholders.

    Without any they are empty tensors, not None: the audio tower takes part in every step on every rank.
    """
    waveforms = [s.get_wv(i)[0].numpy() for s in samples for i in range(len(s.audio_waveforms_start))] if extractor else []
    if not waveforms:
        return torch.zeros((0, *shape)), torch.zeros((0, shape[1]), dtype=torch.int32)
    settings = {"return_attention_mask": True, "padding": "max_length", "return_tensors": "pt"}
    found = extractor(waveforms, sampling_rate=extractor.sampling_rate, **settings)
    return found["input_features"], found["attention_mask"]


def cut_long_audio(
    sample: ChatMLDatasetSample, placeholders: dict[int, bool], extractor: WhisperFeatureExtractor
) -> ChatMLDatasetSample:
    """Give each chunk of a long audio-in clip its own `<|audio_bos|><|AUDIO|><|audio_eos|>`, codes and waveform.

    Waveforms are resampled to the extractor's rate. Codes are cut in proportion to the waveform.

    placeholders: position -> whether it is audio-out, in order
    """
    rate, chunk = extractor.sampling_rate, extractor.n_samples
    spans, waveforms, codes, code_labels = [], [], [], []  # spans: of the ids that are kept, in order
    done, num_codes = 0, len(sample.audio_ids_start)
    for index, (position, is_out) in enumerate(placeholders.items()):
        clips = (sample.get_audio_codes(index), sample.get_audio_codes_labels(index)) if index < num_codes else (None, None)
        cuts = [1.0]
        if not is_out:
            waveform = _resampled(sample, sum(not out for out in list(placeholders.values())[:index]), rate)
            num_chunks = max(1, math.ceil(len(waveform) / chunk))
            cuts = [i * chunk / len(waveform) for i in range(1, num_chunks)] + [1.0]
            waveforms += [waveform[i * chunk : (i + 1) * chunk] for i in range(num_chunks)]
            spans += [(done, position - 1), *[(position - 1, position + 2)] * num_chunks]
            done = position + 2
        for clip, pieces in zip(clips, (codes, code_labels)):
            pieces += [] if clip is None else _cut_codes(clip, cuts)
    spans.append((done, len(sample.input_ids)))

    def kept(ids: Tensor | None) -> Tensor | None:
        return None if ids is None else torch.cat([ids[a:b] for a, b in spans])

    return dataclasses.replace(
        sample,
        input_ids=kept(sample.input_ids),
        label_ids=kept(sample.label_ids),
        audio_ids_concat=torch.cat(codes, dim=1) if codes else sample.audio_ids_concat,
        audio_ids_start=starts(codes),
        audio_label_ids_concat=torch.cat(code_labels, dim=1) if code_labels else None,
        audio_waveforms_concat=torch.cat(waveforms) if waveforms else sample.audio_waveforms_concat,
        audio_waveforms_start=starts(waveforms),
        audio_sample_rate=torch.full((len(waveforms),), float(rate)),
    )


def _resampled(sample: ChatMLDatasetSample, index: int, rate_hz: int) -> Tensor:
    waveform, own_rate_hz = sample.get_wv(index)
    if int(own_rate_hz) == rate_hz:
        return waveform
    return torch.from_numpy(librosa.resample(waveform.numpy(), orig_sr=int(own_rate_hz), target_sr=rate_hz))


def _cut_codes(codes: Tensor, cuts: Sequence[float]) -> list[Tensor]:
    """Codes [K, T] in pieces that end at these shares of T; every frame is in exactly one piece."""
    T = codes.shape[1]
    return [codes[:, a:b] for a, b in pairwise([0, *(min(T, round(T * cut)) for cut in cuts)])]
