"""Hearing a model while it trains: a fixed handful of prompts, spoken again every --sample_steps.

Teacher-forced losses fall for models that cannot speak; these are free-running answers, by the official `generate()` and
sampling. Measured are how many end by themselves, how long they are against the target, and how many codes agree with it;
with the codec there are wavs, and with models the user names word errors (--asr_model) and likeness of the voice
(--sv_model). What was said goes to OUTPUT/samples/step_N, what should have been said to OUTPUT/samples/prompts.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from torch import Tensor

from common import ConfigError, DataError
from config import Config
from data import ChatMLDataset
from distributed import Dist
from generate.speech import (
    Sampling,
    Score,
    Speech,
    as_prompt,
    decode,
    generate_sharded,
    join,
    last_text,
    speak,
    split_answer,
    spoken_words,
    write_both,
    write_results,
)
from prepare.audio import load_codec

MAX_RECORDS_TRIED = 1000
JUDGES_RATE_HZ = 16000  # what published speech recognition and speaker verification models hear

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Prompt:
    """A record without its last answer, and that answer."""

    name: str
    source: str
    text: str
    sample: ChatMLDatasetSample  # ends where the answer begins
    target: Tensor  # [K, T]
    reference: Tensor  # [K, T], the clips of the prompt one after the other


def choose_prompts(dataset: ChatMLDataset, count: int, seed: int) -> list[Prompt]:
    """Up to `count` records that end with a spoken answer, always the same ones for a seed; raises DataError for none."""
    prompts: list[Prompt] = []
    for index in np.random.default_rng(seed).permutation(len(dataset))[:MAX_RECORDS_TRIED].tolist():
        if len(prompts) == count:
            break
        record, answer = split_answer(dataset.records[index])
        if not answer:
            continue
        sample = ChatMLDataset([record], dataset.tokenizer, dataset.store)[0]
        target = join([dataset.store.codes(part, record.source) for part in answer], dataset.store.num_codebooks)
        prompt = as_prompt(sample, dataset.tokenizer)
        text = last_text(record)
        prompts.append(Prompt(str(len(prompts)), record.source, text, prompt, target, sample.audio_ids_concat))
    if not prompts:
        raise DataError("--sample_steps: no record looked at ends with a spoken answer, so there is nothing to say")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Judges


class SpeakerSimilarity:
    """Cosine of two clips' speaker embeddings, by a transformers model with an x-vector head (WavLM, ...)."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.extractor = load_judge("--sv_model", name, AutoFeatureExtractor)
        self.model = load_judge("--sv_model", name, AutoModelForAudioXVector).to(device).eval()

    def __call__(self, said: np.ndarray, voice: np.ndarray, rate_hz: int) -> float:
        clips = [for_judges(clip, rate_hz) for clip in (said, voice)]
        embeddings = [self._embed(clip) for clip in clips]
        return torch.nn.functional.cosine_similarity(*embeddings, dim=-1).item()

    @torch.no_grad()
    def _embed(self, clip: np.ndarray) -> Tensor:
        inputs = self.extractor(clip, sampling_rate=JUDGES_RATE_HZ, return_tensors="pt").to(self.model.device)
        return self.model(**inputs).embeddings[0]


class Transcriber:
    """What a clip says, by a transformers speech recognition model (Whisper, or one with a CTC head)."""

    def __init__(self, name: str, device: torch.device):
        from transformers import pipeline

        try:
            self.pipeline = pipeline("automatic-speech-recognition", model=name, device=device)
        except Exception as error:
            raise ConfigError(f"--asr_model {name}: cannot be loaded: {str(error).splitlines()[0]}") from None

    def __call__(self, clip: np.ndarray, rate_hz: int) -> str:
        return self.pipeline({"raw": for_judges(clip, rate_hz), "sampling_rate": JUDGES_RATE_HZ})["text"]


def load_judge(flag: str, name: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the parser's own
        raise ConfigError(f"{flag} {name}: cannot be loaded: {str(error).splitlines()[0]}") from None


def for_judges(clip: np.ndarray, rate_hz: int) -> np.ndarray:
    """A clip at the judges' rate, with silence after it where it is too short for their convolutions."""
    clip = librosa.resample(clip.astype(np.float32), orig_sr=rate_hz, target_sr=JUDGES_RATE_HZ)
    return np.pad(clip, (0, max(0, JUDGES_RATE_HZ // 2 - len(clip))))


def word_errors(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Words to insert, delete or replace."""
    row = list(range(len(wanted) + 1))
    for i, word in enumerate(said, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(wanted, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Listening


@dataclass
class Listener:
    """Has the prompts spoken and keeps what was said; the codec and the judges are on rank 0."""

    prompts: list[Prompt]
    tokenizer: Any
    sampling: Sampling
    folder: Path  # OUTPUT/samples
    codec: Any = None
    transcriber: Transcriber | None = None
    similarity: SpeakerSimilarity | None = None
    _files: dict[str, dict[str, str]] = field(default_factory=dict)  # of each prompt's target and reference

    @classmethod
    def build(cls, cfg: Config, dataset: ChatMLDataset, dist: Dist) -> Listener:
        """raises: DataError, ConfigError"""
        sampling = Sampling(temperature=cfg.sample_temperature, seed=cfg.seed)
        prompts = choose_prompts(dataset, cfg.num_samples, cfg.seed)
        listener = cls(prompts, dataset.tokenizer, sampling, Path(cfg.output_dir) / "samples")
        if dist.is_main and cfg.codec:
            listener.codec = load_codec(cfg.codec, dist.device)
            listener.transcriber = Transcriber(cfg.asr_model, dist.device) if cfg.asr_model else None
            listener.similarity = SpeakerSimilarity(cfg.sv_model, dist.device) if cfg.sv_model else None
        return listener

    def listen(self, model, step: int, dist: Dist) -> dict[str, float]:
        """Speak every prompt, shared among the ranks, and measure; for a model in evaluation mode. Collective."""
        mine = []
        for number in range(dist.rank, math.ceil(len(self.prompts) / dist.world_size) * dist.world_size, dist.world_size):
            prompt = self.prompts[number % len(self.prompts)]  # a rank without one of its own repeats another's
            started = time.perf_counter()
            said = self._speak(model, prompt)
            mine.append((number, said.codes, said.stopped, time.perf_counter() - started))
        answers = sorted((answer for share in dist.gather(mine) for answer in share), key=lambda answer: answer[0])
        return dist.from_main(self._keep(step, answers[: len(self.prompts)]) if dist.is_main else None)

    def _speak(self, model, prompt: Prompt) -> Speech:
        K, T = prompt.target.shape
        arguments = self.sampling.arguments() | {"max_new_tokens": min(self.sampling.max_new_tokens, 2 * T + K + 20)}
        return speak(model, self.tokenizer, prompt.sample, generate=functools.partial(generate_sharded, model), **arguments)

    def _keep(self, step: int, answers: Sequence[tuple[int, list[Tensor], bool, float]]) -> dict[str, float]:
        """Write what was said to samples/step_N; returns the figures of all prompts together."""
        folder = self.folder / f"step_{step}"
        results, total = [], Score()
        for prompt, (_, clips, stopped, seconds) in zip(self.prompts, answers):
            codes = join(clips, len(prompt.target))
            score = Score.of(codes, stopped, prompt.target)
            total += score
            result = {"name": prompt.name, "text": prompt.text, "source": prompt.source, "frames": codes.shape[1]}
            result |= {"stopped": stopped, "target_frames": prompt.target.shape[1], "code_match": score.code_match}
            result |= {"seconds": round(seconds, 2), **self._judge(prompt, codes)}
            results.append(result | write_both(folder / prompt.name, codes, self.codec) | self._prompt_files(prompt))
        write_results(folder, results)
        return total.metrics() | self._judged(results)

    def _prompt_files(self, prompt: Prompt) -> dict[str, str]:
        """The target's and the reference's files, written once, as seen from samples/step_N."""
        if prompt.name not in self._files:
            files = {}
            for what, codes in (("target", prompt.target), ("reference", prompt.reference)):
                if codes.shape[1]:
                    written = write_both(self.folder / "prompts" / f"{prompt.name}.{what}", codes, self.codec)
                    files |= {f"{what}_{kind}": f"../prompts/{name}" for kind, name in written.items()}
            self._files[prompt.name] = files
        return self._files[prompt.name]

    def _judge(self, prompt: Prompt, codes: Tensor) -> dict[str, Any]:
        """The judges' figures of one answer; silence has every word wrong and no voice."""
        result: dict[str, Any] = {}
        said = decode(self.codec, codes) if self.codec and codes.shape[1] else None
        if self.transcriber:
            result["heard"] = self.transcriber(said, self.codec.sampling_rate) if said is not None else ""
            words, wanted = spoken_words(result["heard"]), spoken_words(prompt.text)
            result |= {"word_errors": word_errors(words, wanted), "words": len(wanted)}
        if self.similarity:
            voice = prompt.reference if prompt.reference.shape[1] else prompt.target
            voice = decode(self.codec, voice)
            rate = self.codec.sampling_rate
            result["speaker_similarity"] = self.similarity(said, voice, rate) if said is not None else 0.0
        return result

    def _judged(self, results: Sequence[dict]) -> dict[str, float]:
        figures = {}
        if self.transcriber:
            figures["word_error_rate"] = sum(r["word_errors"] for r in results) / max(1, sum(r["words"] for r in results))
        if self.similarity:
            figures["speaker_similarity"] = sum(r["speaker_similarity"] for r in results) / len(results)
        return figures
