"""Models that judge samples: speech recognition and speaker verification."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass
class Transcript:
    text: str
    language: str = ""
    confidence: float | None = None  # mean probability of its tokens; None: not known


class Recogniser:
    """Transcripts of clips by a speech recognition model of transformers: Whisper, or one with a CTC head.

    raises: ConfigError
    """

    def __init__(self, name: str, device: torch.device, language: str):
        pipeline = Transcriber(name, device, flag="--model").pipeline
        if pipeline.type not in ("seq2seq_whisper", "ctc", "ctc_with_lm") or not pipeline.tokenizer:
            found = type(pipeline.model).__name__
            raise ConfigError(f"--model {name}: expected Whisper, or a model with a CTC head and its tokenizer, found {found}")
        self.model, self.tokenizer, self.extractor = pipeline.model, pipeline.tokenizer, pipeline.feature_extractor
        self.is_whisper, self.language = pipeline.type == "seq2seq_whisper", language
        self.config = self.model.generation_config if self.is_whisper else None
        known = getattr(self.config, "lang_to_id", None) or {}
        self.languages = {number: token.strip("<|>") for token, number in known.items()}
        if known and language and language not in self.languages.values():
            raise ConfigError(f"--language {language}: expected one of {', '.join(sorted(self.languages.values()))}")
        asked = {"task": "transcribe"} | ({"language": language} if language else {})
        self.options = asked if known else {}  # a Whisper for English alone takes neither
        if self.is_whisper and device.type == "cuda":
            self.model.half()

    @torch.inference_mode()
    def __call__(self, clips: Sequence[np.ndarray]) -> list[Transcript]:
        """clips: mono float32 samples at JUDGES_RATE_HZ"""
        if self.is_whisper:
            return self._by_whisper(clips) if clips else []
        return [self._by_ctc(clip) for clip in clips]  # where a model knows no mask, padding would change what it finds

    def _by_whisper(self, clips: Sequence[np.ndarray]) -> list[Transcript]:
        settings = {"sampling_rate": JUDGES_RATE_HZ, "return_tensors": "pt", "return_attention_mask": True}
        inputs = self.extractor(list(clips), **settings).to(self.model.device)
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        tokens = self.model.generate(**inputs, **self.options)  # [B, S], the prompt before them
        logits = self.model(input_features=inputs["input_features"], decoder_input_ids=tokens[:, :-1]).logits
        logs = torch.nn.functional.pad(logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0], (1, 0))
        is_text = tokens < min(self.config.eos_token_id, self.config.decoder_start_token_id)
        languages = [[self.languages[token] for token in row if token in self.languages] for row in tokens.tolist()]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Transcript(text.strip(), (language or [self.language])[0], _mean_chance(log[kept]))
            for text, language, log, kept in zip(texts, languages, logs, is_text)
        ]

    def _by_ctc(self, clip: np.ndarray) -> Transcript:
        inputs = self.extractor(clip, sampling_rate=JUDGES_RATE_HZ, return_tensors="pt").to(self.model.device)
        logs, tokens = self.model(**inputs).logits[0].float().log_softmax(-1).max(-1)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Transcript(text.strip(), self.language, _mean_chance(logs[tokens != self.tokenizer.pad_token_id]))


def _mean_chance(logs: torch.Tensor) -> float | None:
    """The geometric mean of probabilities. logs: [S]"""
    return logs.mean().exp().item() if len(logs) else None


def _load(flag: str, name: str, load: Any, **settings: Any) -> Any:
    try:
        return load(name, **settings)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the parser's own
        raise ConfigError(f"{flag} {name}: cannot be loaded: {why_not(name) or reason(error)}") from None


def resample(clip: np.ndarray, rate_hz: int) -> np.ndarray:
    """A clip at the judges' rate, padded with silence where it is too short for their convolutions."""
    clip = librosa.resample(clip.astype(np.float32), orig_sr=rate_hz, target_sr=JUDGES_RATE_HZ)
    return np.pad(clip, (0, max(0, JUDGES_RATE_HZ // 2 - len(clip))))
