"""What a run trains on: its datasets, read and agreed upon by all ranks, encoded, measured, and made into loaders.

A module of its own so that train.py stays a file one can read in a sitting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from tqdm import tqdm

import checkpoint
import collate
import data
from audio import AudioStore, codec_frame_rate_hz, load_codec
from config import Config, ConfigError
from distributed import Dist, bar_interval_sec, log, log_list
from manifest import DataError, Mixture, report_problems


def read_records(cfg: Config, dist: Dist) -> tuple[Mixture, Mixture | None]:
    """The records to train on and those to evaluate on, if any. Collective."""

    def read(spec: str) -> Mixture:
        records, skipped, conversions = dist.together(lambda: data.open_records(spec, cfg.missing_audio == "skip"))
        for found in conversions:
            repairs = [f"{count} x {repair}" for repair, count in found.repairs.most_common()]
            log(dist, f"{found.form}, read as ChatML: {found.num_records} records")
            log_list(dist, "repaired on the way:", repairs)
        log_list(dist, f"{len(skipped)} records without their audio are skipped (--missing_audio skip)", skipped)
        return records

    records = read(cfg.train_manifest)
    if cfg.val_manifest:
        return records, read(cfg.val_manifest)
    if not cfg.val_steps or not cfg.val_share or len(records) == 1:
        return records, None
    records, held_out = data.hold_out(records, cfg.val_share, cfg.seed)
    log(dist, f"no --val_manifest: {len(held_out)} training records are held out to evaluate on, {len(records)} train")
    return records, held_out


def check_agreement(cfg: Config, dist: Dist, records: Mixture, val_records: Mixture | None) -> None:
    """ConfigError, on all ranks, unless all of them have the same settings, manifests and code. Collective."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
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


def build_loaders(
    cfg: Config, dist: Dist, config: HiggsAudioConfig, tokenizer, records: Mixture, val_records: Mixture | None
) -> tuple[data.Loader, data.Loader | None]:
    """The training loader and the evaluation loader, if any; encodes waveforms that need it first. Collective."""
    store = AudioStore(
        config.audio_num_codebooks,
        config.audio_codebook_size,
        codec_frame_rate_hz(cfg.audio_tokenizer),
        cache_dir=Path(cfg.codes_dir or Path(cfg.output_dir) / "codes"),
        codec=cfg.codec,
    )
    with_voices = cfg.consistency_loss_weight > 0
    collator = dist.together(lambda: collate.create_collator(config, strict=True, pack=cfg.pack, with_voices=with_voices))
    if with_voices:
        dist.together(lambda: check_voices(records))
    encode_missing(cfg, dist, store, [part for part in (records, val_records) if part])

    def build(records: Mixture, grad_accum: int, shuffle: bool) -> data.Loader:
        dataset = data.ChatMLDataset(records, tokenizer, store, with_waveforms=collator.feature_extractor is not None)
        lengths = None
        if cfg.max_tokens:
            dataset, lengths = fit_to_budget(cfg, dist, dataset, collator)
        return data.Loader(
            dataset,
            collator,
            data.Batching(cfg.batch_size, cfg.max_tokens, lengths, packed=collator.pack),
            dist.rank,
            dist.world_size,
            grad_accum,
            cfg.seed,
            shuffle=shuffle,
            num_workers=cfg.num_workers,
            pin_memory=dist.device.type == "cuda",
        )

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
        "its last one; name speakers and let python -m tools.prepare pair add references, or leave the weight at 0"
    )


def fit_to_budget(cfg: Config, dist: Dist, dataset: data.ChatMLDataset, collator) -> tuple[data.ChatMLDataset, np.ndarray]:
    """The dataset without what exceeds --max_tokens, and its lengths, measured once and kept. Collective."""
    key = hashlib.sha256(f"{dataset.records.digest} {len(dataset)} {dataset.tokenizer.backend_tokenizer.to_str()}".encode())
    path = dataset.store.cache_dir / f"lengths-{key.hexdigest()[:16]}.npy"
    lengths = dist.from_main(np.load(path) if dist.is_main and path.is_file() else None)
    if lengths is None:
        log(dist, f"measuring {len(dataset)} records for --max_tokens")
        lengths, problems = dist.together(
            lambda: data.measure_lengths(dataset, collator, dist.rank, dist.world_size, cfg.num_workers)
        )
        report_problems([problem for part in dist.gather(problems) for problem in part])
        lengths = sum(dist.gather(lengths))
        if dist.is_main:
            checkpoint.write_whole(path, lambda file: np.save(file, lengths))
    dataset, lengths, changes = dist.together(lambda: data.fit_lengths(dataset, collator, lengths, cfg.max_tokens, cfg.long))
    log_list(dist, f"{len(changes)} records are longer than --max_tokens (--long {cfg.long})", changes)
    return dataset, lengths


def encode_missing(cfg: Config, dist: Dist, store: AudioStore, mixtures: Sequence[Mixture]) -> None:
    """Encode the waveforms that have no codes yet, divided among the ranks. Collective."""
    parts = [part for mixture in mixtures for part in mixture.parts]
    for part in parts:
        if len(part) > data.CHECKED_AT_START:
            log(
                dist,
                f"{part.path}: {len(part)} records are checked as they are read; python -m tools.prepare reads them before",
            )
    small = itertools.chain.from_iterable(part for part in parts if len(part) <= data.CHECKED_AT_START)
    clips = dist.main_first(lambda: store.missing(small))
    clips = dist.from_main(clips)  # one list for all: codes appear while ranks look
    if not clips:
        return
    log(dist, f"encoding {len(clips)} audio clips with {cfg.audio_tokenizer}")
    share = clips[dist.rank :: dist.world_size]
    outcomes = store.encode(lambda: load_codec(cfg.audio_tokenizer, dist.device), share)
    outcomes = tqdm(outcomes, "encode", len(share), unit="clip", mininterval=bar_interval_sec(), disable=not dist.is_main)
    problems = dist.together(lambda: [problem for problem in outcomes if problem])
    problems = [problem for part in dist.gather(problems) for problem in part]
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} audio clips cannot be encoded:", *problems[: data.MAX_SHOWN]]))
    store.refresh()  # with what other ranks have added
