"""Lines -> codes: prompts are built chunk by chunk and answered together, or one by one by the official call.

A chunk whose answer is empty, got stuck or did not end can be tried again with other seeds, before the next chunk is begun.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import Tensor
from tqdm import tqdm

from common import DataError
from data import ChatMLDataset
from generate.batched import generate_many, rows_that_fit
from generate.lines import Line
from generate.official import Answer, Request, Sampling, as_prompt, generate_each, join
from generate.scores import find_runaway
from prepare.audio import AudioStore
from prepare.manifest import Record

RETRY_STRIDE = 1_000_003  # between the seeds of a chunk's tries, far from those of takes and of usual seeds


@dataclass
class Try:
    """An answer to a chunk."""

    codes: Tensor  # [K, T]
    stopped: bool
    runaway: str | None  # see `find_runaway`

    @property
    def faults(self) -> int:
        return (not self.stopped) + (self.runaway is not None) + 3 * (not self.codes.shape[1])


@dataclass(eq=False)
class Job:
    """A line, and what has been generated of it."""

    line: Line
    seed: int
    clips: list[Tensor] = field(default_factory=list)  # [K, T] of each chunk so far
    history: list[tuple[list[dict], int]] = field(default_factory=list)  # the chunks so far: their turns, frames
    tries: list[Try] = field(default_factory=list)  # at the next chunk
    retries: int = 0  # tries after a chunk's first, of all chunks
    stopped: bool = True  # every answer ended by itself
    runaway: str | None = None  # what the first chunk that got stuck is stuck in
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

    codec:          None where there are only codes
    scratch:        for clips that are encoded, and chunks that are generated, on the way
    context:        earlier chunks of a long text that stay in the prompt ...
    context_frames: ... as far as they have no more frames together
    batch_size:     prompts that are generated together; 0: as many as fit
    official:       one at a time by the official call instead
    compiled:       by `torch.compile`
    retries:        other seeds for a chunk whose answer is empty, got stuck or did not end
    show_progress:  a progress bar, on a terminal
    """

    model: HiggsAudioModel
    tokenizer: Any
    codec: Any
    sampling: Sampling
    store: AudioStore
    scratch: Path
    force_audio: bool = False
    context: float = 2
    context_frames: float = math.inf
    batch_size: int = 0
    official: bool = False
    compiled: bool = False
    retries: int = 0
    show_progress: bool = False

    def generate(self, lines: Sequence[Line]) -> Iterator[Job]:
        """The lines in the order in which they are done; raises DataError before the first for what cannot be read.

        After Ctrl-C, the lines of which some chunks are done, then KeyboardInterrupt.
        """
        jobs = [Job(line, self.sampling.seed if line.seed is None else line.seed) for line in lines]
        requests = deque(self._request(job) for job in jobs)
        try:
            yield from self._answer(requests)
        except KeyboardInterrupt:
            for job in jobs:
                if job.clips and not job.is_done:
                    job.stopped = False
                    yield job
            raise

    def _answer(self, requests: deque[Request]) -> Iterator[Job]:
        """The requests' jobs, once their last chunk is done."""
        chunks = sum(len(request.key.line.chunks) for request in requests)
        seconds = 0.0
        with tqdm(total=chunks, unit="chunk", miniters=0, disable=None if self.show_progress else True) as bar:

            def count(frames: int) -> None:
                nonlocal seconds
                seconds += frames / self.store.frame_rate_hz
                bar.set_postfix_str(f"{seconds:.0f} s of speech", refresh=False)
                bar.update(0)

            for request, answer in self._generate(requests, count):
                job = request.key
                if self._add(job, answer):
                    bar.update()
                if job.is_done:
                    yield job
                else:
                    requests.appendleft(self._request(job))

    def _generate(self, requests: deque[Request], count: Callable[[int], None]) -> Iterator[tuple[Request, Answer]]:
        arguments = self.model, self.tokenizer, requests, self.sampling
        if self.official:
            for request, answer in generate_each(*arguments):
                count(sum(clip.shape[1] for clip in answer.codes))
                yield request, answer
        else:
            size = self.batch_size or rows_that_fit(self.model, self.sampling.max_new_tokens, self.compiled)
            size = min(size, max(1, len(requests)))
            yield from generate_many(*arguments, size, on_step=count, compiled=self.compiled)

    def target(self, line: Line) -> Tensor | None:
        """The right answer, [K, T]."""
        if not line.target:
            return None
        self._encode(Record(None, line.target, line.source))
        return join([self.store.codes(part, line.source) for part in line.target], self.store.num_codebooks)

    def _request(self, job: Job) -> Request:
        """The prompt of the job's next chunk; raises DataError."""
        record = job.line.record(self._history(job), job.line.chunks[len(job.clips)])
        self._encode(record)
        sample = ChatMLDataset([record], self.tokenizer, self.store)[0]
        prompt = as_prompt(sample, self.tokenizer, self.force_audio)
        seed = (job.seed + len(job.tries) * RETRY_STRIDE) % 2**63
        return Request(prompt, seed, self.sampling.max_new_tokens, job)

    def _history(self, job: Job) -> list[dict]:
        """The latest chunks, as many as may stay in the prompt, as turns."""
        history: list[dict] = []
        frames = 0
        for number, (turns, length) in enumerate(reversed(job.history)):
            frames += length
            if number == self.context or frames > self.context_frames:
                break
            history = turns + history
        return history

    def _add(self, job: Job, answer: Answer) -> bool:
        """Take an answer to the job's next chunk; returns whether the chunk is done, not to be tried again."""
        codes = join(answer.codes, self.store.num_codebooks)
        job.seconds += answer.seconds
        job.tries.append(Try(codes, answer.stopped, find_runaway(codes)))
        if job.tries[-1].faults and len(job.tries) <= self.retries:
            return False
        best = min(job.tries, key=lambda each: each.faults)  # the first of equally good ones
        job.retries += len(job.tries) - 1
        job.tries = []
        number, codes = len(job.clips), best.codes
        job.clips.append(codes)
        job.stopped = job.stopped and best.stopped
        job.runaway = job.runaway or best.runaway
        if codes.shape[1] and not job.is_done:  # an empty chunk is no example for the next
            clip = self.scratch / f"{job.line.name}.{number}.npy"
            np.save(clip, codes.numpy())
            part = {"type": "audio", "audio_url": str(clip.resolve())}
            turns = [{"role": "user", "content": job.line.chunks[number]}, {"role": "assistant", "content": part}]
            job.history.append((turns, codes.shape[1]))
        return True

    def _encode(self, record: Record) -> None:
        """Encode the record's waveforms where that is not done yet; raises DataError for what is no audio."""
        if missing := self.store.missing([record]):
            for problem in filter(None, self.store.encode(lambda: self.codec, missing)):
                raise DataError(problem)
