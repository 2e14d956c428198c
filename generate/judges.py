"""Models that judge samples: speech recognition and speaker verification, both of transformers."""

from __future__ import annotations

import functools
from typing import Any

import librosa
import numpy as np
import torch
from torch import Tensor

from common import ConfigError, reason

JUDGES_RATE_HZ = 16000  # what published speech recognition and speaker verification models take


class SpeakerSimilarity:
    """Cosine of two clips' speaker embeddings, by a model with an x-vector head (WavLM, ...)."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.extractor = _load("--sv_model", name, AutoFeatureExtractor.from_pretrained, trust_remote_code=False)
        self.model = _load("--sv_model", name, AutoModelForAudioXVector.from_pretrained, trust_remote_code=False)
        self.model = self.model.to(device).eval()

    def __call__(self, clip: np.ndarray, reference: np.ndarray, rate_hz: int) -> float:
        embeddings = [self._embed(_resample(samples, rate_hz)) for samples in (clip, reference)]
        return torch.nn.functional.cosine_similarity(*embeddings, dim=-1).item()

    @torch.no_grad()
    def _embed(self, clip: np.ndarray) -> Tensor:
        inputs = self.extractor(clip, sampling_rate=JUDGES_RATE_HZ, return_tensors="pt").to(self.model.device)
        return self.model(**inputs).embeddings[0]


class Transcriber:
    """A clip's transcript, by a speech recognition model (Whisper, or one with a CTC head)."""

    def __init__(self, name: str, device: torch.device):
        from transformers import pipeline

        make = functools.partial(pipeline, "automatic-speech-recognition", device=device)
        self.pipeline = _load("--asr_model", name, make, trust_remote_code=False)

    def __call__(self, clip: np.ndarray, rate_hz: int) -> str:
        return self.pipeline({"raw": _resample(clip, rate_hz), "sampling_rate": JUDGES_RATE_HZ})["text"]


def _load(flag: str, name: str, load: Any, **settings: Any) -> Any:
    try:
        return load(name, **settings)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the parser's own
        raise ConfigError(f"{flag} {name}: cannot be loaded: {reason(error)}") from None


def _resample(clip: np.ndarray, rate_hz: int) -> np.ndarray:
    """A clip at the judges' rate, padded with silence where it is too short for their convolutions."""
    clip = librosa.resample(clip.astype(np.float32), orig_sr=rate_hz, target_sr=JUDGES_RATE_HZ)
    return np.pad(clip, (0, max(0, JUDGES_RATE_HZ // 2 - len(clip))))
