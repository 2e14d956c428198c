"""Waveforms -> codes, once: all clips of the manifests, into a cache that any number of runs read (`--codes_dir DIR`).

    bash launch.sh prepare encode train.jsonl val.jsonl --out codes

It uses every GPU of this machine. It can be killed and started again, and several can fill one cache: clips in the cache are
not encoded again. Ranks share the audio by its duration. The codec gets one clip at a time (see `AudioStore.encode`); a GPU
that is idle then can take several ranks (NPROC=16). Clips that cannot be encoded are named at the end, with exit status 2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import DataError
from config import Config
from distributed import Dist, log, progress_bar, setup_distributed
from prepare import forms
from prepare.audio import AudioStore, duration_sec, find_codec, load_codec
from prepare.forms import open_manifest
from prepare.manifest import AudioPart, Mixture, Record, check, report_problems
from process.gpu import on_gpu

Clip = tuple[AudioPart, str]
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass
class Clips(Sequence[Clip]):
    """Clips by their places, which ranks tell each other (see `AudioStore.missing_places`): clips may be in the records."""

    records: Sequence[Record]
    places: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Clip:
        number, clip = self.places[index]
        record = self.records[number]
        return record.clips()[clip], record.source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", nargs="+", type=Path, help="datasets in any known form (docs/datasets.md)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the cache, made if need be")
    parser.add_argument("--audio_tokenizer", default=Config.audio_tokenizer, metavar="X", help="codec: a folder, or on the Hub")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the codec runs")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="threads per rank that read and decode audio")


def run(args: argparse.Namespace) -> int:
    dist = setup_distributed("cpu", timeout_min=60_000)  # gloo: ranks only divide the clips, and wait at the end
    problems = encode(args, dist)
    remedy = "repair the files or take out the records; all other clips are in the cache"
    report_problems(problems, f"clips cannot be encoded ({remedy})")
    return 0


def encode(args: argparse.Namespace, dist: Dist) -> list[str]:
    """Encode the clips that are not in the cache; returns what is wrong with clips. Collective."""
    if args.num_workers < 1:
        raise DataError(f"--num_workers {args.num_workers}: must be at least 1")
    info = dist.main_first(lambda: find_codec(args.audio_tokenizer, args.out))
    store = AudioStore(info.num_codebooks, info.codebook_size, info.frame_rate_hz, args.out, args.audio_tokenizer)
    records = dist.together(lambda: Mixture([check(open_manifest(path)[0])[0] for path in args.manifest]))
    clips = Clips(records, dist.from_main(dist.together(lambda: store.missing_places(records) if dist.is_main else [])))
    if not clips:
        log(dist, f"nothing to encode: {args.out} holds the codes of all clips")
        return []
    device = choose_device(args.device, dist.local_rank)
    return encode_clips(store, clips, dist, device, args.num_workers)


def encode_missing(dist: Dist, store: AudioStore, mixtures: Sequence[Mixture]) -> None:
    """Encode the waveforms that have no codes yet, divided among the ranks. Collective."""
    parts = [part for mixture in mixtures for part in mixture.parts]
    for part in parts:
        if len(part) > forms.CHECKED_AT_START:
            remedy = f"bash launch.sh prepare check {part.path} reads them before"
            log(dist, f"{part.path}: {len(part)} records are checked as they are read; {remedy}")
    small = Mixture([part for part in parts if len(part) <= forms.CHECKED_AT_START])
    mine = dist.main_first(lambda: store.missing_places(small))
    places = dist.from_main(mine)  # one list for all: codes appear while ranks look
    if not dist.any(bool(mine)):
        return
    if places:
        problems = encode_clips(store, Clips(small, places), dist, dist.device)
        report_problems(problems, "audio clips cannot be encoded")
    store.refresh()  # with what other ranks have added
    lacking = dist.gather(dist.local_rank == 0 and len(store.missing_places(small)))
    if any(lacking):
        where = f"--codes_dir {store.cache_dir}: rank {lacking.index(max(lacking))} does not see {max(lacking)} clips there"
        raise DataError(f"{where} that other ranks have encoded; name a folder that all nodes share")


def encode_clips(store: AudioStore, clips: Sequence[Clip], dist: Dist, device: torch.device, num_threads: int = 4) -> list[str]:
    """Encode clips, divided among the ranks by their duration; returns what is wrong with clips. Collective."""
    seconds = measure(clips, dist, num_threads)
    log(
        dist,
        f"{len(clips)} clips of {seconds.sum() / 60:.1f} minutes to encode with {store.codec}, on {dist.world_size} rank(s)",
    )
    started = time.perf_counter()
    mine = np.flatnonzero(split(seconds, dist.world_size) == dist.rank)
    outcomes = store.encode(lambda: load_codec(store.codec, device), (clips[i] for i in mine), num_threads)
    problems = dist.together(lambda: collect(outcomes, seconds[mine], dist))
    problems = [problem for share in dist.gather(problems) for problem in share]
    elapsed = time.perf_counter() - started
    speed = seconds.sum() / elapsed
    log(dist, f"{len(clips) - len(problems)} clips in {elapsed:.1f} s: {speed:.1f} seconds of audio per second")
    return problems


def collect(outcomes: Iterable[str | None], seconds: np.ndarray, dist: Dist) -> list[str]:
    """Go through this rank's clips under a progress bar; returns what is wrong with them."""
    problems = []
    name = "encode" + f", 1 of {dist.world_size} ranks" * (dist.world_size > 1)
    total = seconds.cumsum()[-1] if len(seconds) else 0.0  # added up as the bar does, to end at exactly 100 %
    with progress_bar(dist, desc=name, total=total, bar_format=BAR) as bar:
        for problem, sec in zip(outcomes, seconds.tolist(), strict=True):
            problems += [problem] if problem else []
            bar.update(sec)
    return problems


def measure(clips: Sequence[Clip], dist: Dist, num_threads: int) -> np.ndarray:
    """[clips] seconds of each clip, 0 if it cannot be read; each rank opens a part of the files. Collective."""
    seconds, mine = np.zeros(len(clips)), range(dist.rank, len(clips), dist.world_size)
    with ThreadPoolExecutor(num_threads) as pool:
        seconds[mine] = list(pool.map(lambda index: duration_sec(clips[index][0]), mine))
    return sum(dist.gather(seconds))


def split(seconds: np.ndarray, world_size: int) -> np.ndarray:
    """[clips] the rank of each clip: consecutive ones, which often share a file, of about equal duration per rank."""
    middles = np.cumsum(seconds) - seconds / 2
    return np.minimum(middles * world_size / max(seconds.sum(), 1e-9), world_size - 1).astype(int)


def choose_device(choice: str, local_rank: int) -> torch.device:
    """A rank's GPU, which it may share with other ranks; or the CPU."""
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu(choice) else torch.device("cpu")
