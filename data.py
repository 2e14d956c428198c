"""Records -> samples -> micro-batches, and what a run trains on.

    ChatMLDataset   a record -> the official `prepare_chatml_sample` -> `ChatMLDatasetSample`
    Loader          micro-batches of a number of samples or of a token budget; a function of (seed, epoch), divided among
                    the ranks, and resumable at any step
    build_loaders   from the settings of a run: read, checked, encoded, measured

prepare/ reads and checks the records and turns their clips into codes.

Legend: K codebooks, T frames.

    python data.py MANIFEST BASE_CKPT      # what the manifest holds, record by record
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from collate import Batch, ExtendedHiggsAudioSampleCollator, create_collator
from common import CollateError, ConfigError, DataError, listing, write_whole
from config import Config
from distributed import Dist, log, log_list
from export import pretrained
from loss import IGNORE_INDEX
from prepare.audio import AudioStore, read_lengths, read_waveform, starts
from prepare.encode import encode_missing
from prepare.forms import open_records
from prepare.manifest import Mixture, Record, read_manifest, report_problems, share_held_out
from process import workers

# ---------------------------------------------------------------------------------------------------------------------
# Records -> samples


@dataclass
class Sample(ChatMLDatasetSample):
    """The official sample, where it came from, who speaks in its clips, and the frames of the last at which that changes."""

    source: str = ""
    speakers: Sequence[str | None] = ()
    changes: Sequence[int] = ()


@dataclass(eq=False)
class ChatMLDataset(Dataset):
    """Map-style: `dataset[i]` is record i as the official `prepare_chatml_sample` reads it, with its codes.

    tokenizer:      of the checkpoint
    store:          where clips become codes
    with_waveforms: add the waveforms of input audio, for a checkpoint with Whisper
    num_turns:      records of which only so many turns are used
    """

    records: Sequence[Record]
    tokenizer: Any
    store: AudioStore
    with_waveforms: bool = False
    num_turns: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        return self.sample(record.cropped(self.num_turns[index]) if index in self.num_turns else record)

    def sample(self, record: Record) -> Sample:
        input_ids, label_ids = self.ids(record)
        codes = [self.store.codes(part, record.source) for part in record.audio]
        waveforms, rates = self._waveforms(record) if self.with_waveforms else ([], [])
        K = self.store.num_codebooks
        return Sample(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            label_ids=torch.tensor(label_ids, dtype=torch.long),
            audio_ids_concat=torch.cat(codes, dim=1) if codes else torch.zeros((K, 0), dtype=torch.long),
            audio_ids_start=starts(codes),
            audio_label_ids_concat=self._label_codes(record, codes),
            audio_waveforms_concat=torch.cat(waveforms) if waveforms else torch.zeros(0),
            audio_waveforms_start=starts(waveforms),
            audio_sample_rate=torch.tensor(rates, dtype=torch.float32),
            audio_speaker_indices=torch.zeros(0, dtype=torch.long),
            source=record.source,
            speakers=record.speakers(),
            changes=[round(sec * self.store.frame_rate_hz) for sec in record.changes_sec()],
        )

    def length(self, record: Record, collator: ExtendedHiggsAudioSampleCollator) -> int:
        """Positions the record takes in the model, without reading its codes."""
        clips = [(self.store.num_frames(part, record.source), part.is_output) for part in record.audio]
        return collator.num_positions(len(self.ids(record)[0]), clips)

    def ids(self, record: Record) -> tuple[list[int], list[int]]:
        """(input_ids, label_ids) of the official `prepare_chatml_sample`."""
        try:
            input_ids, label_ids, audio_contents, _ = prepare_chatml_sample(record.chatml, self.tokenizer)
        except TypeError as error:  # upstream fails while it reports an error: half a surrogate pair in a text
            raise DataError(f"{record.source}: its text cannot be tokenized: {error.__context__ or error}") from None
        if input_ids is None:
            raise DataError(f"{record.source}: the official prepare_chatml_sample refuses this record")
        assert len(audio_contents) == len(record.audio)
        before = record.chatml.messages[: record.chatml.start_index or 0]
        if any(turn.recipient for turn in before):  # upstream labels a recipient even where its turn does not train
            count = len(prepare_chatml_sample(dataclasses.replace(record.chatml, messages=before), self.tokenizer)[0])
            label_ids = [IGNORE_INDEX] * count + label_ids[count:]
        return input_ids, label_ids

    def _label_codes(self, record: Record, codes: list[Tensor]) -> Tensor | None:
        """Label audio [K, T] of all clips, their own codes where none is given; None where none is given at all."""
        if not any(part.label_path for part in record.audio):
            return None
        labels = []
        for part, own in zip(record.audio, codes):
            label = self.store.codes(part.label, record.source) if part.label else own
            if label.shape != own.shape:
                found = f"audio_label_url has {label.shape[1]} frames, audio_url {own.shape[1]}"
                raise DataError(f"{record.source}: {part.field}: {found}; label audio stands frame by frame beside the input")
            labels.append(label)
        return torch.cat(labels, dim=1)

    def _waveforms(self, record: Record) -> tuple[list[Tensor], list[int]]:
        """Waveforms of the input clips, and their rates in Hz."""
        inputs = [part for part in record.audio if not part.is_output]
        for part in inputs:
            if part.holds_codes:
                problem = "holds codes, but this checkpoint reads input audio through Whisper; give the waveform"
                raise DataError(f"{record.source}: {part.field}: {part.path} {problem}")
        found = [read_waveform(part, record.source) for part in inputs]
        return [torch.from_numpy(samples) for samples, _ in found], [rate for _, rate in found]


# ---------------------------------------------------------------------------------------------------------------------
# Lengths


@dataclass(eq=False)
class _Lengths(Dataset):
    """The length of each record, or what is wrong with it, measured where a worker can."""

    dataset: ChatMLDataset
    collator: ExtendedHiggsAudioSampleCollator

    def __getitem__(self, index: int) -> int | str:
        try:
            return self.dataset.length(self.dataset.records[index], self.collator)
        except DataError as error:
            return str(error)


def measure_lengths(
    dataset: ChatMLDataset,
    collator: ExtendedHiggsAudioSampleCollator,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """Positions each record takes in the model, text and audio columns, without reading codes.

    returns: [records] int32, 0 for the other ranks' share of the records, and what is wrong with records
    """
    lengths, problems = np.zeros(len(dataset), np.int32), []
    mine = range(rank, len(dataset), world_size)
    settings = {"batch_size": 256, "collate_fn": list, **workers.settings(num_workers)}
    settings["generator"] = torch.Generator()  # not the global one: this must not change the run
    loader = DataLoader(_Lengths(dataset, collator), sampler=mine, **settings)
    for index, found in zip(mine, itertools.chain.from_iterable(loader)):
        if isinstance(found, str):
            problems.append(found)
        else:
            lengths[index] = found
    return lengths, problems


def fit_lengths(
    dataset: ChatMLDataset, collator: ExtendedHiggsAudioSampleCollator, lengths: np.ndarray, max_tokens: int, long: str
) -> tuple[ChatMLDataset, np.ndarray, list[str]]:
    """Treat the records that are longer than `max_tokens` as `long` says: "error", "skip" or "crop".

    Cropping leaves out whole turns from the end, so that text and audio still belong together, and keeps at least one turn
    that trains; a record for which that is not enough is left out.

    returns: the dataset without the records left out, its lengths, and what was done to which record
    raises:  DataError for "error", and where nothing is left
    """
    changes, num_turns, lengths = [], {}, lengths.copy()
    kept = np.ones(len(lengths), bool)
    for index in np.flatnonzero(lengths > max_tokens).tolist():
        record = dataset.records[index]
        name = f"{record.source} ({lengths[index]} tokens)"
        cropped = _crop(dataset, collator, record, max_tokens) if long == "crop" else None
        kept[index] = cropped is not None
        if cropped:
            num_turns[index], lengths[index] = cropped
            name += f": cropped to its first {cropped[0]} turns, {cropped[1]} tokens"
        changes.append(name if cropped or long == "error" else f"{name}: left out")
    if long == "error" and changes:
        problem = f"{len(changes)} records are longer than --max_tokens {max_tokens}"
        raise DataError(listing(f"{problem}; raise it, or choose --long skip or --long crop. First:", changes))
    if not kept.any():
        raise DataError(f"every record is longer than --max_tokens {max_tokens}")
    if not changes:
        return dataset, lengths, changes
    renumbered = np.cumsum(kept) - 1
    turns = {int(renumbered[index]): count for index, count in num_turns.items()}
    fitted = dataclasses.replace(dataset, records=dataset.records.subset(kept), num_turns=turns)
    return fitted, lengths[kept], changes


def _crop(
    dataset: ChatMLDataset, collator: ExtendedHiggsAudioSampleCollator, record: Record, max_tokens: int
) -> tuple[int, int] | None:
    """(turns, length) of the longest beginning that fits and ends with a turn that trains, or None."""
    turns = record.chatml.messages
    for count in range(len(turns) - 1, record.chatml.start_index or 0, -1):
        if turns[count - 1].role == "assistant":
            length = dataset.length(record.cropped(count), collator)
            if length <= max_tokens:
                return count, length
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Samples -> micro-batches


class Position(NamedTuple):
    """Where training stands in its data: so many samples of this epoch are done. Independent of the world size."""

    epoch: int
    samples_done: int


@dataclass(frozen=True)
class Batching:
    """How an epoch is cut into micro-batches.

    batch_size: samples of each; or, where `max_tokens` is set,
    max_tokens: positions of each
    lengths:    [records] int32, positions of each record, for `max_tokens`
    """

    batch_size: int = 1
    max_tokens: int = 0
    lengths: np.ndarray | None = None

    def bounds(self, order: np.ndarray) -> np.ndarray:
        """Where an order of records is cut, from 0 to its end: micro-batch i is `order[bounds[i] : bounds[i + 1]]`."""
        if not self.max_tokens:
            return np.append(np.arange(0, len(order), self.batch_size), len(order))
        bounds, total = [0], 0
        for index, length in enumerate(self.lengths[order].tolist()):
            total += length
            if total > self.max_tokens and index > bounds[-1]:
                bounds.append(index)
                total = length
        return np.array([*bounds, len(order)])


def _permutation(size: int, *key: Any) -> np.ndarray:
    """[size] int64: an order that is a function of the key alone."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") % 2**63
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The records an epoch uses, in order: a function of (seed, epoch) alone.

    sizes, weights: of the manifests that are mixed. Each is gone through in shuffled passes, of which an epoch takes
    `weight` of one: with weight 1 every record occurs exactly once.
    """
    if not shuffle:
        return np.arange(sum(sizes))
    pieces, offset = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights)):
        count = samples_per_epoch(size, weight)
        first_pass, skip = divmod(epoch * count, size)
        num_passes = math.ceil((skip + count) / size)
        stream = np.concatenate([_permutation(size, seed, number, first_pass + i) for i in range(num_passes)])
        pieces.append(stream[skip : skip + count] + offset)
        offset += size
    order = np.concatenate(pieces)
    return order if len(pieces) == 1 else order[_permutation(len(order), seed, "mixture", epoch)]


def samples_per_epoch(size: int, weight: float) -> int:
    return max(1, round(size * weight))


def plan_steps(order: np.ndarray, bounds: np.ndarray, world_size: int, grad_accum: int) -> Iterator[list[list[int]]]:
    """The optimizer steps of an epoch, each of up to world_size * grad_accum micro-batches of sample indices.

    A short last step is filled up with empty micro-batches: every rank takes part equally often, and nothing counts twice.
    """
    per_step = world_size * grad_accum
    for first in range(0, len(bounds) - 1, per_step):
        limits = bounds[first : first + per_step + 1].tolist()
        step = [order[start:stop].tolist() for start, stop in pairwise(limits)]
        while len(step) % world_size:
            step.append([])
        yield step


# One token from which nothing is learned; absent audio is the collator's to fill in.
FILLER = Sample(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE_INDEX), *[None] * 6, source="(filler)")


@dataclass(eq=False)
class _MicroBatches(Dataset):
    """Collated micro-batches by sample indices; a CollateError is returned, so that it reaches the user without the
    traceback of a worker process.

    Samples that cannot be read are left out and noted in the batch. Where none is left the filler is collated, because every
    rank has to take part in every step.
    """

    dataset: ChatMLDataset
    collator: ExtendedHiggsAudioSampleCollator

    def __getitem__(self, indices: list[int]) -> Batch | Exception:
        samples, unreadable = [], []
        for index in indices:
            try:
                samples.append(self.dataset[index])
            except DataError as error:
                unreadable.append(str(error))
        try:
            batch = self.collator(samples or [FILLER])
        except CollateError as error:
            return DataError(str(error))
        return dataclasses.replace(batch, unreadable=unreadable)


class _EpochSampler(Sampler):
    """The index lists of this rank, set anew for each epoch so that workers outlive an epoch."""

    def __init__(self):
        self.steps: Iterable[list[list[int]]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (indices for step in self.steps for indices in step)


@dataclass(eq=False)
class Loader:
    """Micro-batches of this rank, grouped by optimizer step.

    `for step in loader.epoch(position)` yields `(micro_batches, position_after)`. Which samples stand together depends on
    (seed, epoch) and `batching`, how many micro-batches make a step on the world size; with weight 1 every sample is used
    exactly once per epoch.
    """

    dataset: ChatMLDataset
    collator: ExtendedHiggsAudioSampleCollator
    batching: Batching
    rank: int = 0
    world_size: int = 1
    grad_accum: int = 1
    seed: int = 0
    shuffle: bool = True
    num_workers: int = 0
    pin_memory: bool = False

    def __post_init__(self):
        records = self.dataset.records
        is_mixture = isinstance(records, Mixture) and self.shuffle
        self.sizes, self.weights = (records.sizes, records.weights) if is_mixture else ([len(records)], [1.0])
        self.num_samples = sum(map(samples_per_epoch, self.sizes, self.weights))
        self._sampler = _EpochSampler()
        self._loader = DataLoader(
            _MicroBatches(self.dataset, self.collator),
            sampler=self._sampler,
            batch_size=None,  # the sampler yields whole micro-batches
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=4 if self.num_workers else None,
            generator=torch.Generator().manual_seed(self.seed),  # not the global one: workers must not change the run
            **workers.settings(self.num_workers),
        )

    def plan(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """(order, bounds) of the micro-batches from `position` on; see `Batching.bounds`.

        raises: DataError for a position inside a micro-batch of a token budget
        """
        order = epoch_order(self.sizes, self.weights, self.seed, position.epoch, self.shuffle)
        done = position.samples_done
        if not self.batching.max_tokens:
            return order[done:], self.batching.bounds(order[done:])
        bounds = self.batching.bounds(order)
        if done not in bounds:
            raise DataError(f"{done} samples of the epoch are no whole number of micro-batches; --max_tokens must not change")
        return order[done:], bounds[bounds >= done] - done

    def num_steps(self, first: Position, epochs: int) -> int:
        """Optimizer steps from a position to the end of so many epochs."""
        positions = [first, *(Position(epoch, 0) for epoch in range(first.epoch + 1, epochs))][: max(0, epochs - first.epoch)]
        num_batches = (len(self.plan(position)[1]) - 1 for position in positions)
        return sum(math.ceil(count / (self.world_size * self.grad_accum)) for count in num_batches)

    def find_faults(self) -> list[str]:
        """Its worker processes that neither run nor wait to."""
        return workers.find_faults(self._loader)

    def epoch(self, position: Position) -> Iterator[tuple[list[Batch], Position]]:
        """The optimizer steps of an epoch from `position` on; raises DataError for samples that make no batch."""
        order, bounds = self.plan(position)
        rank, world_size = self.rank, self.world_size
        # Planned twice, step by step: the workers are ahead of the training.
        self._sampler.steps = (step[rank::world_size] for step in plan_steps(order, bounds, world_size, self.grad_accum))
        batches = iter(self._loader)
        done = position.samples_done
        for step in plan_steps(order, bounds, world_size, self.grad_accum):
            micro_batches = [workers.receive(batches) for _ in step[rank::world_size]]
            for micro_batch in micro_batches:
                if isinstance(micro_batch, Exception):
                    raise micro_batch
            done += sum(map(len, step))
            yield micro_batches, Position(position.epoch, done)


# ---------------------------------------------------------------------------------------------------------------------
# What a run trains on


FEWEST = 10  # records, of which some are held out although nobody asks for it


def hold_out(records: Mixture, share: float, seed: int) -> tuple[Mixture, Mixture]:
    """(the rest, the held-out part): at least one record each, chosen by the seed, both in the manifest's order."""
    num_held = min(len(records) - 1, max(1, round(share * len(records))))
    held = np.zeros(len(records), bool)
    held[_permutation(len(records), seed, "held out")[:num_held]] = True
    return records.subset(~held), records.subset(held)


def read_records(cfg: Config, dist: Dist) -> tuple[Mixture, Mixture | None]:
    """The records to train on and those to evaluate on, if any. Collective."""

    def read(spec: str) -> Mixture:
        records, skipped, conversions = dist.together(lambda: open_records(spec, cfg.missing_audio == "skip"))
        for found in conversions:
            repairs = [f"{count} x {repair}" for repair, count in found.repairs.most_common()]
            log(dist, f"{found.form}, read as ChatML: {found.num_records} records")
            log_list(dist, "repaired on the way:", repairs)
        log_list(dist, f"{len(skipped)} records without their audio are skipped (--missing_audio skip)", skipped)
        return records

    records = read(cfg.train_manifest)
    if cfg.val_manifest:
        return records, read(cfg.val_manifest)
    if cfg.val_steps == 0 or not cfg.val_share:
        return records, None
    if len(records) < (2 if cfg.val_steps else FEWEST):
        log(dist, f"{len(records)} records are too few to hold any out: nothing is evaluated; --val_manifest names others")
        return records, None
    share = cfg.val_share if cfg.val_steps else share_held_out(cfg.val_share, len(records))
    records, held_out = hold_out(records, share, cfg.seed)
    log(dist, f"no --val_manifest: {len(held_out)} training records are held out to evaluate on, {len(records)} train")
    return records, held_out


def check_agreement(cfg: Config, dist: Dist, records: Mixture, val_records: Mixture | None) -> None:
    """ConfigError, on all ranks, unless all of them have the same settings, manifests and code. Collective."""
    root = Path(__file__).parent
    folders = (".", "layers", "process", "prepare", "generate", "export")
    code = b"".join(path.read_bytes() for folder in folders for path in sorted((root / folder).glob("*.py")))
    mine = {f"--{name}": value for name, value in dataclasses.asdict(cfg).items()} | {
        f"the content of {cfg.train_manifest}": records.digest,
        f"the content of {cfg.val_manifest}": val_records and val_records.digest,
        "the training code": hashlib.sha256(code).hexdigest(),
    }
    first, *others = dist.gather(mine)
    for rank, other in enumerate(others, start=1):
        different = [name for name, value in first.items() if other.get(name) != value]
        if different:
            raise ConfigError(f"rank {rank} disagrees with rank 0 about {', '.join(different)}; start all nodes alike")


def open_store(cfg: Config, config: HiggsAudioConfig) -> AudioStore:
    return AudioStore.of(config, Path(cfg.codes_dir or Path(cfg.output_dir) / "codes"), cfg.audio_tokenizer)


def build_loaders(
    cfg: Config, dist: Dist, config: HiggsAudioConfig, tokenizer, records: Mixture, val_records: Mixture | None
) -> tuple[Loader, Loader | None]:
    """The training loader and the evaluation loader, if any; encodes waveforms that need it first. Collective."""
    store = open_store(cfg, config)
    with_voices = cfg.consistency_loss_weight > 0
    collator = dist.together(lambda: create_collator(config, strict=cfg.strict_audio, with_voices=with_voices))
    if with_voices:
        dist.together(lambda: check_voices(records))
    if cfg.max_tokens and not collator.has_packing:
        raise ConfigError("--max_tokens: this checkpoint's batches are padded rows; use --batch_size")
    encode_missing(dist, store, [part for part in (records, val_records) if part])

    def build(records: Mixture, grad_accum: int, shuffle: bool) -> Loader:
        dataset = ChatMLDataset(records, tokenizer, store, with_waveforms=collator.feature_extractor is not None)
        lengths = None
        if cfg.max_tokens:
            dataset, lengths = fit_to_budget(cfg, dist, dataset, collator)
        batching = Batching(cfg.samples, cfg.max_tokens, lengths)
        settings = {"num_workers": cfg.num_workers, "pin_memory": dist.device.type == "cuda"}
        ranks = dist.rank, dist.world_size
        return Loader(dataset, collator, batching, *ranks, grad_accum, cfg.seed, shuffle, **settings)

    val_loader = build(val_records, grad_accum=1, shuffle=False) if val_records else None
    return build(records, cfg.grad_accum, shuffle=True), val_loader


def check_voices(records: Mixture) -> None:
    """DataError unless some record has a reference of its own speaker, which the consistency loss compares with."""
    for record in itertools.chain.from_iterable(records.parts):
        names = [name for name in record.speakers() if name]
        if len(names) > len(set(names)):
            return
    raise DataError(
        "--consistency_loss_weight: no record to train on has both a `speaker` and a reference clip of that speaker before "
        "its last one; name speakers and let bash launch.sh prepare pair add references, or leave the weight at 0"
    )


def measure_records(cfg: Config, dist: Dist, config: HiggsAudioConfig, tokenizer, records: Mixture) -> np.ndarray | None:
    """Positions of each record, which is encoded first; None where batches are padded rows. Collective."""
    store, collator = open_store(cfg, config), dist.together(lambda: create_collator(config))
    if not collator.has_packing:
        return None
    encode_missing(dist, store, [records])
    return measure_once(ChatMLDataset(records, tokenizer, store), collator, dist, cfg.num_workers)


def measure_once(dataset: ChatMLDataset, collator, dist: Dist, num_workers: int) -> np.ndarray:
    """`measure_lengths` on all ranks, kept beside the codes. Collective."""
    store = dataset.store
    frames = f"{store.num_codebooks} {store.codebook_size} {store.frame_rate_hz} {store.codec}"
    key = hashlib.sha256(f"{dataset.records.digest} {frames} {dataset.tokenizer.backend_tokenizer.to_str()}".encode())
    path = store.cache_dir / f"lengths-{key.hexdigest()[:16]}.npy"
    lengths = dist.from_main(dist.together(lambda: read_lengths(path, len(dataset)) if dist.is_main else None))
    if lengths is None:
        log(dist, f"measuring {len(dataset)} records")
        lengths, problems = dist.together(lambda: measure_lengths(dataset, collator, dist.rank, dist.world_size, num_workers))
        report_problems([problem for part in dist.gather(problems) for problem in part])
        lengths = sum(dist.gather(lengths))
        if dist.is_main:
            try:
                write_whole(path, lambda file: np.save(file, lengths))
            except OSError as error:  # a cache that others have filled and that is read-only here
                log(dist, f"note: the lengths cannot be kept, and are measured anew each time: {error}")
    return lengths


def fit_to_budget(cfg: Config, dist: Dist, dataset: ChatMLDataset, collator) -> tuple[ChatMLDataset, np.ndarray]:
    """The dataset without what exceeds --max_tokens, and its lengths. Collective."""
    lengths = measure_once(dataset, collator, dist, cfg.num_workers)
    dataset, lengths, changes = dist.together(lambda: fit_lengths(dataset, collator, lengths, cfg.max_tokens, cfg.long))
    log_list(dist, f"{len(changes)} records are longer than --max_tokens (--long {cfg.long})", changes)
    return dataset, lengths


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise SystemExit("usage: python data.py MANIFEST BASE_CKPT")
    manifest, folder = map(Path, argv)
    config, tokenizer = pretrained.read_base_config(folder), pretrained.load_tokenizer(folder)
    store = AudioStore.of(config, manifest.parent / "codes", "none")
    dataset = ChatMLDataset(read_manifest(manifest), tokenizer, store, config.encode_whisper_embed)
    for sample in itertools.islice(dataset, 5):
        labels, codes = (sample.label_ids != IGNORE_INDEX).sum().item(), tuple(sample.audio_ids_concat.shape)
        print(f"{sample.source}: {len(sample.input_ids)} tokens, {labels} of them labels, codes {codes}")
        print(f"{tokenizer.decode(sample.input_ids)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
