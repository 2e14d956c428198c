"""Lines -> codes: prompts are built chunk by chunk and answered together, or one by one by the official call.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import Tensor

from common import DataError
from data import ChatMLDataset
from generate.batched import generate_many, rows_that_fit
from generate.lines import Line
from generate.official import Answer, Request, Sampling, as_prompt, generate_each, join
from prepare.audio import AudioStore
from prepare.manifest import Record


@dataclass(eq=False)
class Job:
    """A line, and what has been generated of it."""

    line: Line
    seed: int
    clips: list[Tensor] = field(default_factory=list)  # [K, T] of each chunk so far
    history: list[dict] = field(default_factory=list)  # the chunks so far as turns
    stopped: bool = True  # every answer ended by itself
    seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        return len(self.clips) == len(self.line.chunks)

    @property
    def codes(self) -> Tensor:
        """[K, T] of all chunks, one after the other."""
        return torch.cat(self.clips, dim=1)


@dataclass
class Engine:
    """A model and what it takes to generate lines with it.

    codec:      None where there are only codes
    context:    earlier chunks of a long text that stay in the prompt
    scratch:    for clips that are encoded, and chunks that are generated, on the way
    batch_size: prompts that are generated together; 0: as many as fit
    official:   one at a time by the official call instead
    """

    model: HiggsAudioModel
    tokenizer: Any
    codec: Any
    sampling: Sampling
    store: AudioStore
    scratch: Path
    force_audio: bool = False
    context: int = 2
    batch_size: int = 0
    official: bool = False

    def generate(self, lines: Sequence[Line]) -> Iterator[Job]:
        """The lines in the order in which they are done; raises DataError before the first for what cannot be read."""
        jobs = [Job(line, self.sampling.seed if line.seed is None else line.seed) for line in lines]
        requests = deque(self._request(job) for job in jobs)
        if self.official:
            generate = generate_each
        else:
            size = self.batch_size or rows_that_fit(self.model, self.sampling.max_new_tokens)
            generate = functools.partial(generate_many, batch_size=min(size, max(1, len(jobs))))
        for request, answer in generate(self.model, self.tokenizer, requests, self.sampling):
            job = request.key
            self._add(job, answer)
            if job.is_done:
                yield job
            else:
                requests.appendleft(self._request(job))

    def target(self, line: Line) -> Tensor | None:
        """The right answer, [K, T]."""
        if not line.target:
            return None
        self._encode(Record(None, line.target, line.source))
        return join([self.store.codes(part, line.source) for part in line.target], self.store.num_codebooks)

    def _request(self, job: Job) -> Request:
        """The prompt of the job's next chunk; raises DataError."""
        history = job.history[-2 * self.context :] if self.context else []
        record = job.line.record(history, job.line.chunks[len(job.clips)])
        self._encode(record)
        sample = ChatMLDataset([record], self.tokenizer, self.store)[0]
        prompt = as_prompt(sample, self.tokenizer, self.force_audio)
        return Request(prompt, job.seed, self.sampling.max_new_tokens, job)

    def _add(self, job: Job, answer: Answer) -> None:
        """Take the answer to the job's next chunk."""
        number, codes = len(job.clips), join(answer.codes, self.store.num_codebooks)
        job.clips.append(codes)
        job.stopped = job.stopped and answer.stopped
        job.seconds += answer.seconds
        if codes.shape[1] and not job.is_done:  # an empty chunk is no example for the next
            clip = self.scratch / f"{job.line.name}.{number}.npy"
            np.save(clip, codes.numpy())
            part = {"type": "audio", "audio_url": str(clip.resolve())}
            job.history += [{"role": "user", "content": job.line.chunks[number]}, {"role": "assistant", "content": part}]

    def _encode(self, record: Record) -> None:
        """Encode the record's waveforms where that is not done yet; raises DataError for what is no audio."""
        if missing := self.store.missing([record]):
            for problem in filter(None, self.store.encode(lambda: self.codec, missing)):
                raise DataError(problem)
