"""The share of padding in an epoch: plain shuffled batches of 8, a token budget, a packed token budget.

Two sets: the demo's training records, measured from their manifest, and 10,000 clones whose targets last 1 to 60 s with a long
tail (log-normal, median 6 s; 25 frames and about 4 text tokens per second).

    python benchmarks/padding.py [--max_tokens 8192]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from collate import create_collator
from data import Batching, round_up
from prepare.audio import AudioStore
from prepare.manifest import read_manifest
from tools import demo


def padding_ratio(lengths: np.ndarray, batching: Batching) -> tuple[float, float, int]:
    """(share of padding, fullest of 8 ranks relative to their mean, number of micro-batches) of the first epoch."""
    order, bounds = data.plan_micro_batches(data.epoch_order([len(lengths)], [1], 0, 0), batching, (0, 0))
    rows = [lengths[order[a:b]] for a, b in pairwise(bounds)]
    costs = [row.sum() if batching.packed else round_up(row.max()) * len(row) for row in rows]
    costs = np.array([round_up(cost) for cost in costs])
    steps = costs[: len(costs) // 8 * 8].reshape(-1, 8)
    return 1 - lengths.sum() / costs.sum(), float((steps.max(1) / steps.mean(1)).mean()), len(rows)


def demo_lengths() -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path, _ = demo.make_demo(Path(folder))
        tokenizer = demo.make_tokenizer()
        config = demo.tiny_config(tokenizer)
        store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, 25.0, Path(folder) / "codes")
        dataset = data.ChatMLDataset(read_manifest(path), tokenizer, store)
        lengths, problems = data.measure_lengths(dataset, create_collator(config), num_workers=2)
    assert not problems
    return lengths


def long_tailed_lengths() -> np.ndarray:
    seconds = np.clip(np.random.default_rng(0).lognormal(np.log(6), 0.8, 10_000), 1, 60)
    return (40 + 29 * seconds).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_tokens", type=int, default=8192)
    args = parser.parse_args()
    print("| set | micro-batches | padding | fullest of 8 ranks / their mean |\n| --- | --- | --- | --- |")
    for name, lengths in (("demo", demo_lengths()), ("1 to 60 s", long_tailed_lengths())):
        ways = {
            "8 samples, shuffled": Batching(8),
            f"--max_tokens {args.max_tokens}": Batching(max_tokens=args.max_tokens, lengths=lengths),
            f"--max_tokens {args.max_tokens}, packed": Batching(max_tokens=args.max_tokens, lengths=lengths, packed=True),
        }
        for way, batching in ways.items():
            padding, imbalance, count = padding_ratio(lengths, batching)
            print(f"| {name} ({len(lengths):,}) | {way}: {count} | {padding:.1%} | {imbalance:.2f} |")


if __name__ == "__main__":
    main()
