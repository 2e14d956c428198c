"""Models that judge samples: speech recognition and speaker verification."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from torch import Tensor

from common import ConfigError, reason
from generate.ecapa import load_ecapa
from prepare.hub import why_not

JUDGES_RATE_HZ = 16000  # what published speech recognition and speaker verification models take


class SpeakerSimilarity:
    """Cosine of two clips' speaker embeddings.

    name: of a model of transformers with an x-vector head (WavLM, ...), or the path of wavlm_large_finetune.pth,
          WavLM-large with an ECAPA-TDNN head, which published tables use
    """

    def __init__(self, name: str, device: torch.device):
        self.device = device
        if Path(name).suffix in (".pth", ".pt"):
            self.model = _load("--sv_model", name, lambda name: load_ecapa(Path(name))).to(device).eval()
            return
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        extractor = _load("--sv_model", name, AutoFeatureExtractor.from_pretrained, trust_remote_code=False)
        model = _load("--sv_model", name, AutoModelForAudioXVector.from_pretrained, trust_remote_code=False)
        model = model.to(device).eval()
        prepare = lambda clip: extractor(clip, sampling_rate=JUDGES_RATE_HZ, return_tensors="pt").to(device)  # noqa: E731
        self.model = lambda clip: model(**prepare(clip[0].cpu().numpy())).embeddings

    def __call__(self, clip: np.ndarray, reference: np.ndarray, rate_hz: int) -> float:
        return self.compare(self.embed(clip, rate_hz), self.embed(reference, rate_hz))

    @staticmethod
    def compare(one: Tensor, other: Tensor) -> float:
        """Of two embeddings."""
        return torch.nn.functional.cosine_similarity(one, other, dim=-1).item()

    @torch.no_grad()
    def embed(self, clip: np.ndarray, rate_hz: int) -> Tensor:
        """The speaker embedding [D] of mono samples."""
        return self.model(torch.from_numpy(resample(clip, rate_hz))[None].to(self.device))[0]


class Transcriber:
    """A clip's transcript, by a speech recognition model (Whisper, or one with a CTC head).

    language: that Whisper is told, as in "english"; "" lets it guess. flag: by which the model was named, for messages
    """

    def __init__(self, name: str, device: torch.device, language: str = "", flag: str = "--asr_model"):
        from transformers import pipeline

        make = functools.partial(pipeline, "automatic-speech-recognition", device=device)
        self.pipeline = _load(flag, name, make, trust_remote_code=False)
        self.options: dict[str, Any] = {}
        if self.pipeline.type == "seq2seq_whisper":
            asked = {"language": language, "task": "transcribe"} if language else {}
            self.options = {"return_timestamps": True, "generate_kwargs": asked}  # without time stamps it takes 30 s at most

    def __call__(self, clip: np.ndarray, rate_hz: int) -> str:
        clip = {"raw": resample(clip, rate_hz), "sampling_rate": JUDGES_RATE_HZ}
        return self.pipeline(clip, **self.options)["text"]


def _load(flag: str, name: str, load: Any, **settings: Any) -> Any:
    try:
        return load(name, **settings)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the parser's own
        raise ConfigError(f"{flag} {name}: cannot be loaded: {why_not(name) or reason(error)}") from None


def resample(clip: np.ndarray, rate_hz: int) -> np.ndarray:
    """A clip at the judges' rate, padded with silence where it is too short for their convolutions."""
    clip = librosa.resample(clip.astype(np.float32), orig_sr=rate_hz, target_sr=JUDGES_RATE_HZ)
    return np.pad(clip, (0, max(0, JUDGES_RATE_HZ // 2 - len(clip))))
