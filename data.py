"""What training reads: records -> samples -> micro-batches.

    ChatMLDataset   a record -> the official `prepare_chatml_sample` -> `ChatMLDatasetSample`
    Loader          seeded, rank-sharded, epoch-aware micro-batches; its position is saved and restored

manifest.py reads and checks the records, codes.py turns their clips into codes.

Legend: K codebooks, T frames.

    python data.py MANIFEST BASE_CKPT      # what the manifest holds, record by record
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from audio import FRAME_RATE_HZ, AudioStore, read_waveform
from collate import IGNORE_INDEX, CollateError, ExtendedHiggsAudioBatchInput, ExtendedHiggsAudioSampleCollator, starts
from manifest import DataError, Record, read_manifest

# ---------------------------------------------------------------------------------------------------------------------
# Records -> samples


@dataclass
class Sample(ChatMLDatasetSample):
    """The official sample, and where it came from."""

    source: str = ""


class ChatMLDataset(Dataset):
    """Map-style: `dataset[i]` is record i as the official `prepare_chatml_sample` reads it, with its codes.

    tokenizer:      of the checkpoint
    store:          where clips become codes
    with_waveforms: add the waveforms of input audio, for a checkpoint with Whisper
    """

    def __init__(self, records: Sequence[Record], tokenizer, store: AudioStore, with_waveforms: bool = False):
        self.records = records
        self.tokenizer = tokenizer
        self.store = store
        self.with_waveforms = with_waveforms

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        input_ids, label_ids, audio_contents, _ = prepare_chatml_sample(record.chatml, self.tokenizer)
        if input_ids is None:
            raise DataError(f"{record.source}: the official prepare_chatml_sample refuses this record")
        assert len(audio_contents) == len(record.audio)
        codes = [self.store.codes(part, record.source) for part in record.audio]
        labels = self._label_codes(record, codes)
        waveforms, rates = self._waveforms(record) if self.with_waveforms else ([], [])
        K = self.store.num_codebooks
        return Sample(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            label_ids=torch.tensor(label_ids, dtype=torch.long),
            audio_ids_concat=torch.cat(codes, dim=1) if codes else torch.zeros((K, 0), dtype=torch.long),
            audio_ids_start=starts(codes),
            audio_label_ids_concat=labels,
            audio_waveforms_concat=torch.cat(waveforms) if waveforms else torch.zeros(0),
            audio_waveforms_start=starts(waveforms),
            audio_sample_rate=torch.tensor(rates, dtype=torch.float32),
            audio_speaker_indices=torch.zeros(0, dtype=torch.long),
            source=record.source,
        )

    def _label_codes(self, record: Record, codes: list[Tensor]) -> Tensor | None:
        """Label audio [K, T] of all clips, their own codes where none is given; None where none is given at all."""
        if not any(part.label_path for part in record.audio):
            return None
        labels = []
        for part, own in zip(record.audio, codes):
            label = self.store.codes(part.label, record.source) if part.label else own
            if label.shape != own.shape:
                raise DataError(
                    f"{record.source}: {part.field}: audio_label_url has {label.shape[1]} frames, audio_url {own.shape[1]}; "
                    "label audio stands frame by frame beside the input"
                )
            labels.append(label)
        return torch.cat(labels, dim=1)

    def _waveforms(self, record: Record) -> tuple[list[Tensor], list[int]]:
        waveforms, rates = [], []
        for part in record.audio:
            if part.is_output:
                continue
            if part.holds_codes:
                raise DataError(
                    f"{record.source}: {part.field}: {part.path} holds codes, but this checkpoint hears input audio through "
                    "Whisper; give the waveform"
                )
            samples, rate = read_waveform(part, record.source)
            waveforms.append(torch.from_numpy(samples))
            rates.append(rate)
        return waveforms, rates


# ---------------------------------------------------------------------------------------------------------------------
# Samples -> micro-batches


def hold_out(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(the rest, the held-out part): at least one record each, chosen by the seed, both in the manifest's order."""
    num_held = min(len(records) - 1, max(1, round(share * len(records))))
    held = set(epoch_order(len(records), seed, epoch=-1)[:num_held])
    return [r for i, r in enumerate(records) if i not in held], [r for i, r in enumerate(records) if i in held]


class Position(NamedTuple):
    """Where training stands in its data: so many samples of this epoch are done. Independent of the world size."""

    epoch: int
    samples_done: int


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order of an epoch: a function of (seed, epoch) alone."""
    if not shuffle:
        return list(range(num_samples))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()


def plan_steps(order: Sequence[int], batch_size: int, world_size: int, grad_accum: int) -> list[list[list[int]]]:
    """Cut an epoch into optimizer steps of up to world_size * grad_accum micro-batches of sample indices.

    Every sample appears exactly once. A short last step is filled up with micro-batches of one sample, written as
    -1 - index, whose labels are masked: every rank takes part equally often, and nothing counts twice.
    """
    micro_batches = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    per_step = world_size * grad_accum
    steps = [micro_batches[i : i + per_step] for i in range(0, len(micro_batches), per_step)]
    for step in steps:
        while len(step) % world_size:
            step.append([-1 - step[0][0]])
    return steps


class _MicroBatches(Dataset):
    """Collated micro-batches by sample indices; a DataError is returned, so that it reaches the user without the
    traceback of a worker process."""

    def __init__(self, dataset: ChatMLDataset, collator: ExtendedHiggsAudioSampleCollator):
        self.dataset = dataset
        self.collator = collator

    def __getitem__(self, indices: list[int]) -> ExtendedHiggsAudioBatchInput | Exception:
        try:
            return self.collator([self._sample(index) for index in indices])
        except (DataError, CollateError) as error:
            return DataError(str(error))

    def _sample(self, index: int) -> Sample:
        if index >= 0:
            return self.dataset[index]
        sample = self.dataset[-1 - index]
        sample.label_ids = torch.full_like(sample.label_ids, IGNORE_INDEX)
        return sample


class _EpochSampler(Sampler):
    """The index lists of this rank, set anew for each epoch so that workers outlive an epoch."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Micro-batches of this rank, grouped by optimizer step.

    `for step in loader.epoch(position)` yields `(micro_batches, position_after)`; the order depends on (seed, epoch), the
    grouping also on the world size, and every sample is used exactly once per epoch.
    """

    def __init__(
        self,
        dataset: ChatMLDataset,
        collator: ExtendedHiggsAudioSampleCollator,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.num_samples = len(dataset)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.grad_accum = grad_accum
        self.seed = seed
        self.shuffle = shuffle
        self._sampler = _EpochSampler()
        self._loader = DataLoader(
            _MicroBatches(dataset, collator),
            sampler=self._sampler,
            batch_size=None,  # the sampler yields whole micro-batches
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers else None,
            generator=torch.Generator().manual_seed(seed),  # not the global one: workers must not change the run
        )

    def steps_in_epoch(self) -> int:
        return math.ceil(math.ceil(self.num_samples / self.batch_size) / (self.world_size * self.grad_accum))

    def epoch(self, position: Position) -> Iterator[tuple[list[ExtendedHiggsAudioBatchInput], Position]]:
        """The optimizer steps of an epoch from `position` on; raises DataError for a sample that cannot be read."""
        order = epoch_order(self.num_samples, self.seed, position.epoch, self.shuffle)[position.samples_done :]
        steps = plan_steps(order, self.batch_size, self.world_size, self.grad_accum)
        mine = [step[self.rank :: self.world_size] for step in steps]
        self._sampler.batches = [indices for step in mine for indices in step]
        batches = iter(self._loader)
        done = position.samples_done
        for step, own in zip(steps, mine):
            micro_batches = [next(batches) for _ in own]
            for micro_batch in micro_batches:
                if isinstance(micro_batch, Exception):
                    raise micro_batch
            done += sum(index >= 0 for indices in step for index in indices)
            yield micro_batches, Position(position.epoch, done)


def open_demo_or_manifest(argv: Sequence[str]) -> tuple[ChatMLDataset, Any]:
    """The dataset and model config for `python data.py` and `python collate.py`: MANIFEST BASE_CKPT, or the demo's."""
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig
    from transformers import AutoTokenizer

    if not argv:
        from tools.demo import make_demo  # an offline example; only this command needs it

        manifest, checkpoint = make_demo(Path("runs/demo-data"))
    elif len(argv) == 2:
        manifest, checkpoint = argv
    else:
        raise SystemExit("usage: MANIFEST BASE_CKPT, or nothing for the demo's data")
    config = HiggsAudioConfig.from_pretrained(checkpoint)
    store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, FRAME_RATE_HZ, Path("runs/codes"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return ChatMLDataset(read_manifest(manifest), tokenizer, store, config.encode_whisper_embed), config


def main(argv: Sequence[str]) -> None:
    dataset, _ = open_demo_or_manifest(argv)
    print(f"{len(dataset)} records")
    for index in range(min(5, len(dataset))):
        sample = dataset[index]
        supervised = (sample.label_ids != IGNORE_INDEX).sum().item()
        print(
            f"\n{sample.source}: {len(sample.input_ids)} tokens, {supervised} of them labels, codes {tuple(sample.audio_ids_concat.shape)}"
        )
        print(dataset.tokenizer.decode(sample.input_ids))


if __name__ == "__main__":
    main(sys.argv[1:])
