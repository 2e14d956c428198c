"""Samples while training: the same few prompts are answered by the base, and again every --sample_steps.

Losses are teacher-forced, samples free-running; where they disagree, trust the samples. They are
generated together (see batched.py). Measured: how many end by themselves, how long they are
against the target, how many codes agree with it, how many got stuck in a loop or in silence. With
the codec there are wavs, and with --asr_model and --sv_model word errors and speaker similarity.
Samples go to OUTPUT/samples/step_N, targets and reference clips to OUTPUT/samples/prompts.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from torch import Tensor

from common import ConfigError, DataError, UserError, reason
from config import OF_SAMPLES, Config
from data import ChatMLDataset
from distributed import Dist, log
from generate.batched import check, generate_many, rows_that_fit
from generate.files import decode, write_both, write_results
from generate.judges import SpeakerSimilarity, Transcriber
from generate.lines import Chunking, last_text, line_of_request, read_lines, split_answer
from generate.official import Request, Sampling, as_prompt, join
from generate.scores import Score, find_runaway, word_errors
from generate.voices import read_text
from prepare.audio import load_codec
from prepare.manifest import AudioPart, Record

MAX_RECORDS_TRIED = 1000
MOST_FRAMES_PER_LETTER = 10  # of a text without a target; slow speech has 3, and 6 for a Chinese character


@dataclass(frozen=True)
class Prompt:
    """A record without its last answer, and that answer."""

    name: str
    source: str
    text: str
    sample: ChatMLDatasetSample  # ends where the answer begins
    target: Tensor  # [K, T]; T is 0 for a text of the user's own
    reference: Tensor  # [K, T], the clips of the prompt one after the other

    @classmethod
    def of(cls, name: str, record: Record, text: str, answer: Sequence[AudioPart], dataset: ChatMLDataset) -> Prompt:
        """answer: clips of the target, if there is one"""
        store, sample = dataset.store, dataset.sample(record)
        target = join([store.codes(part, record.source) for part in answer], store.num_codebooks)
        return cls(name, record.source, text, as_prompt(sample, dataset.tokenizer), target, sample.audio_ids_concat)


def choose_prompts(dataset: ChatMLDataset, count: int, seed: int) -> list[Prompt]:
    """Up to `count` records that end with an audio answer, the same ones for a seed; DataError if there is none."""
    prompts: list[Prompt] = []
    for index in np.random.default_rng(seed).permutation(len(dataset))[:MAX_RECORDS_TRIED].tolist():
        if len(prompts) == count:
            break
        record, answer = split_answer(dataset.records[index])
        if answer:
            prompts.append(Prompt.of(str(len(prompts)), record, last_text(record), answer, dataset))
    if not prompts:
        raise DataError("--sample_steps: no record looked at ends with an audio answer, so there is nothing to generate")
    return prompts


def own_prompts(path: Path, dataset: ChatMLDataset) -> list[Prompt]:
    """Prompts of texts of the user's own: a text per line, or JSON as for `generate --lines`; raises DataError."""
    if path.suffix in (".json", ".jsonl"):
        lines = read_lines(path, Chunking())
    else:
        texts = list(filter(None, map(str.strip, read_text(path, "--sample_texts").splitlines())))
        lines = [
            line_of_request({"text": t}, str(n), path.parent, f"{path} text {n + 1}", Chunking()) for n, t in enumerate(texts)
        ]
    if not lines:
        raise DataError(f"--sample_texts {path}: holds no text")
    records = [line.record([], line.chunks[0]) for line in lines]
    if missing := dataset.store.missing(records):
        part, source = missing[0]
        raise DataError(f"{source}: {part.path}: references of --sample_texts have to be codes, or clips of the training data")
    return [Prompt.of(f"text-{i}", records[i], line.text, [], dataset) for i, line in enumerate(lines)]


@dataclass
class Sampler:
    """Answers the prompts and keeps the samples; codec and judges are on rank 0."""

    prompts: list[Prompt]
    tokenizer: Any
    sampling: Sampling
    folder: Path  # OUTPUT/samples
    codec: Any = None
    transcriber: Transcriber | None = None
    similarity: SpeakerSimilarity | None = None
    _files: dict[str, dict[str, str]] = field(default_factory=dict)  # of each prompt's target and reference

    @classmethod
    def build(cls, cfg: Config, dataset: ChatMLDataset, dist: Dist) -> Sampler:
        """raises: DataError, ConfigError"""
        if dataset.with_waveforms:
            raise ConfigError("--sample_steps: this checkpoint reads reference audio through Whisper, which sampling lacks")
        sampling = Sampling(temperature=cfg.sample_temperature, seed=cfg.seed)
        prompts = choose_prompts(dataset, cfg.num_samples, cfg.seed)
        prompts += own_prompts(Path(cfg.sample_texts), dataset) if cfg.sample_texts else []
        sampler = cls(prompts, dataset.tokenizer, sampling, Path(cfg.output_dir) / "samples")
        if dist.is_main and cfg.codec:
            sampler.codec = load_codec(cfg.codec, dist.device)
            sampler.transcriber = Transcriber(cfg.asr_model, dist.device) if cfg.asr_model else None
            sampler.similarity = SpeakerSimilarity(cfg.sv_model, dist.device) if cfg.sv_model else None
        return sampler

    def sample(self, model, step: int, dist: Dist) -> dict[str, float] | None:
        """Answer every prompt, shared among the ranks, and measure; for a model in evaluation mode. Collective.

        returns: the figures, None if the disk refuses the samples
        raises:  Interrupted, on all ranks, if one of them receives a signal
        """

        def any_rank(is_busy: bool) -> bool:
            """A sharded model's ranks have to take part in each other's forward passes."""
            dist.check_signals()
            return dist.any(is_busy)

        mine = deque(self._request(number) for number in range(dist.rank, len(self.prompts), dist.world_size))
        rows = max(1, min(len(mine), rows_that_fit(model, self.sampling.max_new_tokens)))
        made = generate_many(model, self.tokenizer, mine, self.sampling, rows, any_rank)
        made = {request.key: (answer.codes, answer.stopped, answer.seconds) for request, answer in made}
        answers = {number: answer for share in dist.gather(made) for number, answer in share.items()}
        answers = [answers[number] for number in range(len(self.prompts))]
        return dist.from_main(self._try_keep(step, answers) if dist.is_main else None)

    def _try_keep(self, step: int, answers: Sequence[tuple[list[Tensor], bool, float]]) -> dict[str, float] | None:
        """`_keep`; a disk that refuses the samples ends no run."""
        try:
            return self._keep(step, answers)
        except OSError as error:
            print(f"warning: samples of step {step} cannot be written: {error}", file=sys.stderr, flush=True)
            return None

    def _request(self, number: int) -> Request:
        prompt = self.prompts[number]
        K, T = prompt.target.shape
        longest = 2 * T + K + 20 if T else MOST_FRAMES_PER_LETTER * len(prompt.text) + K + 20
        return Request(prompt.sample, self.sampling.seed, min(self.sampling.max_new_tokens, longest), number)

    def _keep(self, step: int, answers: Sequence[tuple[list[Tensor], bool, float]]) -> dict[str, float]:
        """Write the samples to samples/step_N; returns the figures of all prompts together."""
        folder = self.folder / f"step_{step}"
        results, total = [], Score()
        for prompt, (clips, stopped, seconds) in zip(self.prompts, answers):
            codes = join(clips, len(prompt.target))
            score = Score.of(codes, stopped, prompt.target)
            total += score
            result = {"name": prompt.name, "text": prompt.text, "source": prompt.source, "frames": codes.shape[1]}
            result["stopped"] = stopped
            if score.target_frames:
                result |= {"target_frames": score.target_frames, "code_match": score.code_match}
            result |= {"runaway": find_runaway(codes), "seconds": round(seconds, 2), **self._judge(prompt, codes)}
            results.append(result | write_both(folder / prompt.name, codes, self.codec) | self._prompt_files(prompt))
        write_results(folder, results)
        return total.metrics() | self._judged(results)

    def _prompt_files(self, prompt: Prompt) -> dict[str, str]:
        """The target's and the reference's files, written once, relative to samples/step_N."""
        if prompt.name not in self._files:
            files = {}
            for what, codes in (("target", prompt.target), ("reference", prompt.reference)):
                if codes.shape[1]:
                    written = write_both(self.folder / "prompts" / f"{prompt.name}.{what}", codes, self.codec)
                    files |= {f"{what}_{kind}": f"../prompts/{name}" for kind, name in written.items()}
            self._files[prompt.name] = files
        return self._files[prompt.name]

    def _judge(self, prompt: Prompt, codes: Tensor) -> dict[str, Any]:
        """The judges' figures of one sample; an empty one has every word wrong and similarity 0."""
        result: dict[str, Any] = {}
        clip = decode(self.codec, codes) if self.codec and codes.shape[1] else None
        if self.transcriber:
            result["heard"] = self.transcriber(clip, self.codec.sampling_rate) if clip is not None else ""
            result["word_errors"], result["words"] = word_errors(result["heard"], prompt.text)
        voice = prompt.reference if prompt.reference.shape[1] else prompt.target
        if self.similarity and voice.shape[1]:
            reference = decode(self.codec, voice)
            rate = self.codec.sampling_rate
            result["speaker_similarity"] = self.similarity(clip, reference, rate) if clip is not None else 0.0
        return result

    def _judged(self, results: Sequence[dict]) -> dict[str, float]:
        figures = {}
        if self.transcriber:
            figures["word_error_rate"] = sum(r["word_errors"] for r in results) / max(1, sum(r["words"] for r in results))
        if found := [r["speaker_similarity"] for r in results if "speaker_similarity" in r]:
            figures["speaker_similarity"] = sum(found) / len(found)
        return figures


def build_sampler(cfg: Config, config: HiggsAudioConfig, dataset: ChatMLDataset, dist: Dist) -> Sampler | None:
    """The sampler of a run. Where nobody asked for samples, they are made without sound, or not at all: a line says why.

    raises: ConfigError, DataError, on all ranks, where they were asked for
    """
    is_asked = cfg.sample_steps or cfg.sample_texts or cfg.asr_model or cfg.sv_model or cfg.best_by in OF_SAMPLES
    every = f"every {cfg.sample_steps} steps" if cfg.sample_steps else "once per epoch"
    problem = ""
    for settings in (cfg,) if is_asked else (cfg, dataclasses.replace(cfg, audio_tokenizer="none")):
        try:
            check(config)
            sampler = dist.together(lambda settings=settings: Sampler.build(settings, dataset, dist))
        except UserError as error:
            if is_asked:
                raise
            problem = reason(error)
        else:
            silent = f", without sound: {problem}" * bool(problem)
            log(dist, f"{len(sampler.prompts)} samples {every}, into {sampler.folder}{silent}")
            return sampler
    log(dist, f"no samples: {problem}")
    return None


def describe(figures: Mapping[str, float]) -> str:
    """One line about a round of samples: "1 sample: 0 ended by itself, 29 % of the target's length, ..."."""
    count = int(figures["num_samples"])
    ended = round(figures["stop_rate"] * count)
    parts = [
        f"{count} sample{'s' * (count != 1)}: {ended} ended by {'itself' if count == 1 else 'themselves'}",
        f"{figures['duration_ratio']:.0%} of the target's length",
        f"{figures['code_match']:.1%} of the codes right",
    ]
    if figures.get("runaway_rate"):
        parts.append(f"{round(figures['runaway_rate'] * count)} got stuck in a loop or in silence")
    if "word_error_rate" in figures:
        parts.append(f"{figures['word_error_rate']:.1%} of the words wrong")
    if "speaker_similarity" in figures:
        parts.append(f"speaker similarity {figures['speaker_similarity']:.2f}")
    return ", ".join(parts).replace("%", " %")
