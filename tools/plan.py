"""Will it run on my card? Memory, flags and time of training, before you have a GPU or weights.

    bash launch.sh plan                                      # the published checkpoint, four clones of 5 to 30 s at a time
    bash launch.sh plan --train_manifest train.jsonl --base_ckpt FOLDER --max_tokens 8192 --epochs 3
    bash launch.sh plan --lora_r 64 --batch_size 16 --ranks 1,8 --mfu 0.45 --json plan.json

Takes the flags of train.py (--train_manifest and --output_dir may be left out) and a few of its own. For cards of 8 to 141 GB
and the GPU that is here, LoRA and a full fine-tune: the flags to add, the memory to spare, the time. Then what each setting
needs. The micro-batch is the largest of the first epoch or, without a manifest, as many clones as --batch_size or
--max_tokens say. Memory is found by tools/estimate.py, which runs the real step on tensors without data.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig

import data
from collate import Batch, create_collator
from common import ConfigError, write_text
from config import BASE_NAMES, CHECKPOINTING_MODES, SAMPLES, Config, parse_config
from export import pretrained
from layers import nf4
from prepare.audio import AudioStore
from prepare.manifest import report_problems
from process.command import parser_of, says_errors
from process.gpu import GPUS, Gpu, find_gpu
from tools import synthetic
from tools.estimate import FRAGMENTATION, RESERVED, Estimate, clones_of, estimate

EXAMPLES = {gpu.memory_gb: gpu for gpu in reversed(GPUS) if gpu.memory_gb <= 141}  # the first of each size
CARDS = [EXAMPLES[size] for size in sorted(EXAMPLES)]
# By checkpointing mode, the fastest first.
FLAGS = {"none": "", "selective": "--activation_checkpointing selective", "full": "--use_gradient_checkpointing"}
POSITIONS_PER_SEC = synthetic.FRAME_RATE_HZ + synthetic.TOKENS_PER_SEC
CLONE_OVERHEAD = 43  # positions of a clone that its length does not change: turn headers, delay columns
FEWEST_TOKENS = 300  # per micro-batch: one short clone
ENOUGH_TOKENS = 8192  # per micro-batch: more make a GPU no faster, so layers are not recomputed for their sake
FEWEST_STEPS = 50  # of an epoch: fewer leave the learning rate no time
MOST_TOKENS = 32768  # per micro-batch; larger ones are not planned for

# ---------------------------------------------------------------------------------------------------------------------
# The data


@dataclass(frozen=True)
class Workload:
    """The data to plan for."""

    batch: Batch  # the largest micro-batch
    about: str
    lengths: np.ndarray | None = None  # [records] positions; None without a manifest

    @property
    def tokens(self) -> int:
        """Positions of the micro-batch."""
        return self.batch.packing.num_positions

    @property
    def clips(self) -> float:
        """Samples of average length that make such a micro-batch."""
        return len(self.batch) if self.lengths is None else self.tokens / self.lengths.mean()

    def steps(self, cfg: Config, world_size: int) -> int | None:
        """Optimizer steps of the run; None if unknown."""
        if cfg.max_steps or self.lengths is None:
            return cfg.max_steps or None
        order = np.arange(len(self.lengths))
        bounds = data.Batching(cfg.samples, cfg.max_tokens, self.lengths).bounds(order)
        return cfg.epochs * math.ceil((len(bounds) - 1) / (world_size * cfg.grad_accum))


def clones_within(tokens: int) -> np.ndarray:
    """[clones, 2] seconds of reference and target; at least one clone, all made longer or shorter to fill the positions."""
    seconds = synthetic.clone_durations(4096)
    positions = (seconds.sum(1) * POSITIONS_PER_SEC + CLONE_OVERHEAD).cumsum()
    count = max(1, int((positions <= tokens).sum()))
    fixed = count * CLONE_OVERHEAD
    return seconds[:count] * (tokens - fixed) / (positions[count - 1] - fixed)


def read_workload(cfg: Config, config: HiggsAudioConfig) -> Workload:
    """The manifest's largest micro-batch, with one clip of equal length for each sample; or clones without a manifest."""
    if not cfg.train_manifest:
        seconds = clones_within(cfg.max_tokens) if cfg.max_tokens else synthetic.clone_durations(4096)[: cfg.samples]
        return Workload(clones_of(config, seconds), f"{len(seconds)} clones, references of 3 to 10 s, targets of 2 to 20 s")
    records, _, _ = data.open_records(cfg.train_manifest, cfg.missing_audio == "skip")
    tokenizer = pretrained.load_tokenizer(pretrained.find_base(cfg.base_ckpt, cfg.revision))
    with tempfile.TemporaryDirectory() as folder:
        store = AudioStore.of(config, Path(cfg.codes_dir or folder), cfg.audio_tokenizer)
        dataset = data.ChatMLDataset(records, tokenizer, store)
        lengths, problems = data.measure_lengths(dataset, create_collator(config), num_workers=cfg.num_workers)
    report_problems(problems)
    order = data.epoch_order([len(lengths)], [1.0], cfg.seed, 0)
    bounds = data.Batching(cfg.samples, cfg.max_tokens, lengths).bounds(order)
    largest = max((lengths[order[a:b]] for a, b in pairwise(bounds)), key=np.sum)
    seconds = np.stack([np.zeros(len(largest)), largest / POSITIONS_PER_SEC], axis=1)
    about = f"{len(lengths)} records, the largest micro-batch of the first epoch: {len(largest)} of them"
    return Workload(clones_of(config, seconds), about, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to train


class Training(NamedTuple):
    """LoRA, on a base of 16 or 4 bits, or a full fine-tune (0)."""

    lora_r: int
    quantize: str = "none"

    def __str__(self) -> str:
        return f"LoRA r {self.lora_r}{' NF4' * (self.quantize == 'nf4')}" if self.lora_r else "full"

    @property
    def flags(self) -> str:
        return f"--lora_r {self.lora_r}{' --quantize nf4' * (self.quantize == 'nf4')}"


def trainings(cfg: Config, ranks: int) -> list[Training]:
    """What is planned for; NF4 where its package is installed and these ranks can divide its blocks."""
    can_quantize = (
        importlib.util.find_spec("torchao")
        and cfg.lora_r
        and not cfg.cpu_offload
        and cfg.replicate == 1
        and not cfg.use_dora
        and nf4.SHARDS % ranks == 0
    )
    return list(dict.fromkeys((Training(cfg.lora_r), *[Training(cfg.lora_r, "nf4")] * bool(can_quantize), Training(0))))


@dataclass(frozen=True)
class Option:
    """A way to train, and what it needs."""

    training: Training
    checkpointing: str
    ranks: int
    tokens: int  # positions of a micro-batch
    found: Estimate

    def spare(self, gpu: Gpu) -> float:
        """Bytes; negative if it does not fit."""
        return gpu.memory_gib * 2**30 - self.found.needed


class Planner:
    """Options for one workload, each estimated once; progress goes to stderr, since each takes seconds."""

    def __init__(self, cfg: Config, config: HiggsAudioConfig, workload: Workload):
        self.cfg, self.config, self.workload = cfg, config, workload
        self.option = functools.cache(self._option)

    def _option(self, training: Training, checkpointing: str, ranks: int, tokens: int | None = None) -> Option:
        """tokens: positions of a micro-batch of clones instead of the workload's"""
        batch = clones_of(self.config, clones_within(tokens)) if tokens else self.workload.batch
        tokens = batch.packing.num_positions
        settings = dataclasses.replace(self.cfg, **training._asdict(), activation_checkpointing=checkpointing)
        option = Option(training, checkpointing, ranks, tokens, estimate(settings, self.config, batch, ranks))
        print(f"{option.training}, {checkpointing}, {ranks} GPU(s), {tokens:,} positions", file=sys.stderr)
        return option

    def options(self, training: Training, ranks: int) -> list[Option]:
        """The workload's micro-batch in every checkpointing mode."""
        return [self.option(training, mode, ranks) for mode in CHECKPOINTING_MODES]

    def most_tokens(self, gpu: Gpu, training: Training, ranks: int, mode: str = "full") -> int:
        """The largest micro-batch that fits with this checkpointing, in hundreds of positions; 0 if not even a clip does.

        What is needed is a maximum over moments of the step, each linear in the positions: convex. Between two sizes it
        lies below their chord, so the answer errs towards fewer positions.
        """
        fits = self.option(training, mode, ranks).spare(gpu) >= 0
        sizes = (None, MOST_TOKENS) if fits else (FEWEST_TOKENS, None)
        low, high = (self.option(training, mode, ranks, size) for size in sizes)
        if low.spare(gpu) < 0:
            return 0
        if high.spare(gpu) >= 0:
            return MOST_TOKENS
        share = low.spare(gpu) / (low.spare(gpu) - high.spare(gpu))
        return int(low.tokens + share * (high.tokens - low.tokens)) // 100 * 100

    def best(self, gpu: Gpu, training: Training, ranks: int) -> tuple[Option, str]:
        """The fastest option that fits and the flags that choose it; else the one that needs least, and why it does not."""
        modes = [mode for mode in CHECKPOINTING_MODES if mode != "selective" or not training.lora_r]  # LoRA gains nothing by it
        options = [self.option(training, mode, ranks) for mode in sorted(modes, key=list(FLAGS).index)]
        for option in options:
            if option.spare(gpu) >= 0:
                return option, FLAGS[option.checkpointing] or "none needed"
        if tokens := self.most_tokens(gpu, training, ranks):
            return self.option(training, "full", ranks, tokens), f"--max_tokens {tokens} {FLAGS['full']}"
        least = min(options, key=lambda option: option.found.needed)
        return least, f"no: {_gb(least.found.needed)} needed"

    def seconds(self, option: Option, gpu: Gpu, share: float, steps: int | None) -> float:
        """Of the run's steps, or of 1,000 clips."""
        per_clip = option.found.step_sec(gpu, share) / (option.ranks * self.cfg.grad_accum * option.tokens)
        per_clip *= self.workload.tokens / self.workload.clips
        clips = steps * option.ranks * self.cfg.grad_accum * self.workload.clips if steps else 1000
        return per_clip * clips


def cards() -> list[Gpu]:
    """An example of each size, and the GPU that is here."""
    found = list(CARDS)
    if torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        like = find_gpu(name) or Gpu(name, round(total / 1e9), 0, math.nan, math.nan, math.nan)
        found.append(dataclasses.replace(like, name=f"here: {like.name}"[:20], memory_gib=total / 2**30))
    return found


def choose(cfg: Config, config: HiggsAudioConfig, gpu: Gpu, lengths: np.ndarray, ranks: int) -> dict:
    """The micro-batch of a run that was given none: its settings, and the reason. See process/fit.py.

    The largest token budget that fits and leaves FEWEST_STEPS steps an epoch; four samples, where that would be less.
    Layers are recomputed only where ENOUGH_TOKENS do not fit otherwise. lengths: positions of each training record
    """
    of_data, longest = int(lengths.sum()) // (FEWEST_STEPS * ranks * cfg.grad_accum), int(lengths.max())
    is_small = of_data < max(SAMPLES * lengths.mean(), longest)
    wanted = int(np.sort(lengths)[-SAMPLES:].sum()) if is_small else max(longest, min(of_data, ENOUGH_TOKENS))
    planner = Planner(cfg, config, Workload(clones_of(config, clones_within(wanted)), ""))
    training, modes = Training(cfg.lora_r, cfg.quantize), [cfg.activation_checkpointing or "none"]
    modes += ["full"] * (cfg.activation_checkpointing is None)
    for mode in modes:
        option = planner.option(training, mode, ranks)
        if option.spare(gpu) >= 0:
            break
    tokens, found = wanted, {"activation_checkpointing": mode}
    needed = f"{_gb(option.found.needed)} needed for {option.tokens:,} positions"
    reason = f"{needed} on each of {ranks} GPU(s), {_gb(gpu.memory_gib * 2**30)} free"
    if option.spare(gpu) < 0:
        tokens = planner.most_tokens(gpu, training, ranks, mode)
        if not tokens:
            return found | {"batch_size": 1, "reason": f"{reason}: it will hardly fit; bash launch.sh plan says what does"}
    elif is_small:
        return found | {"batch_size": SAMPLES, "reason": f"more would leave fewer than {FEWEST_STEPS} steps an epoch; {reason}"}
    elif of_data > wanted and mode == modes[0]:
        tokens = max(wanted, min(of_data, planner.most_tokens(gpu, training, ranks, mode)))
    return found | {"max_tokens": tokens, "reason": reason}


# ---------------------------------------------------------------------------------------------------------------------
# Output


def plan(planner: Planner, ranks: Sequence[int], share: float) -> str:
    """Will it run on which card, then what each way to train needs."""
    cfg, workload = planner.cfg, planner.workload
    lines = [
        f"{workload.about}: {workload.tokens:,} positions per micro-batch,",
        f"{cfg.grad_accum} micro-batch(es) per step",
    ]
    for world_size in ranks:
        for training in trainings(cfg, world_size):
            lines += ["", *_card_table(planner, training, world_size, share)]
    lines += [
        "",
        f"spare: memory left beside {FRAGMENTATION} x peak (fragmentation) + {_gb(RESERVED)} (CUDA context, NCCL, workspaces)",
        f"tokens: the largest --max_tokens that fits with {FLAGS['full']}, up to {MOST_TOKENS:,}",
        f"time: matrix products, recomputed ones too, at {share:.0%} of the card's peak (--mfu), communication",
        "hidden behind them where it is shorter, the optimizer at the memory's rate; data-sheet figures",
        "no: more GPUs need less each (--ranks 8), LoRA needs less than a full fine-tune",
        "",
        "| training | checkpointing | GPUs | weights | optimizer | peak | needed | sent per step |",
        "| --- " * 8 + "|",
    ]
    for option in all_options(planner, ranks):
        found = option.found
        sizes = map(_gb, (found.weights, found.optimizer, found.peak, found.needed, found.sent))
        lines.append(f"| {option.training} | {option.checkpointing} | {option.ranks} | {' | '.join(sizes)} |")
    return "\n".join([*lines, "", "GB are 2^30 bytes, except in the names of cards."])


def all_options(planner: Planner, ranks: Sequence[int]) -> list[Option]:
    return [option for n in ranks for training in trainings(planner.cfg, n) for option in planner.options(training, n)]


def _card_table(planner: Planner, training: Training, ranks: int, share: float) -> list[str]:
    steps = planner.workload.steps(planner.cfg, ranks)
    where = "one GPU" if ranks == 1 else f"each of {ranks} GPUs"
    title = f"{training if training.lora_r else 'Full fine-tune'} ({training.flags}) on {where}"
    rows = [("card", "flags to add", "spare", "tokens", f"time for {steps} steps" if steps else "time for 1,000 clips")]
    for gpu in cards():
        option, flags = planner.best(gpu, training, ranks)
        row = ["-"] * 3
        if option.spare(gpu) >= 0:
            row = [_gb(option.spare(gpu)), f"{planner.most_tokens(gpu, training, ranks):,}"]
            row.append(_duration(planner.seconds(option, gpu, share, steps)))
        rows.append((f"{gpu.memory_gb} GB {gpu.name}", flags, *row))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return [title, "", f"| {lines[0]} |", "| --- " * 5 + "|", *(f"| {line} |" for line in lines[1:])]


def as_json(planner: Planner, ranks: Sequence[int], share: float) -> str:
    """A row for each way to train; `fits` and `hours_per_1000_clips` by the GB of the card."""
    rows = []
    for option in all_options(planner, ranks):
        fitting = [gpu for gpu in CARDS if option.spare(gpu) >= 0]
        found = option.found
        gib = {f"{name}_gib": getattr(found, name) / 2**30 for name in ("weights", "optimizer", "peak", "needed", "sent")}
        lora_r, base = option.training.lora_r, "nf4" if option.training.quantize == "nf4" else "bf16"
        row = {"training": "lora" if lora_r else "full", "lora_r": lora_r, "base": base}
        row |= {"checkpointing": option.checkpointing, "ranks": option.ranks, "tokens": option.tokens, **gib}
        row |= {"flops": found.flops, "fits": [gpu.memory_gb for gpu in fitting]}
        hours = {str(gpu.memory_gb): planner.seconds(option, gpu, share, None) / 3600 for gpu in fitting}
        rows.append(row | {"hours_per_1000_clips": hours})
    return json.dumps(rows, indent=2) + "\n"


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f} GB"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return "?" if math.isnan(seconds) else f"{seconds:.2g} s"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def read_config(cfg: Config) -> HiggsAudioConfig:
    """The checkpoint's config with the special ids of the toy tokenizer; the published one's without the Hub."""
    published = synthetic.make_config("real")
    if cfg.base_ckpt in BASE_NAMES:
        return published
    config = pretrained.read_base_config(pretrained.find_base(cfg.base_ckpt, cfg.revision))
    for name in ("audio_in_token_idx", "audio_out_token_idx", "pad_token_id"):
        setattr(config, name, getattr(published, name))
    if not config.skip_audio_tower:
        raise ConfigError(f"--base_ckpt {cfg.base_ckpt}: has an audio tower; only models without one can be planned")
    return config


def read_ranks(value: str) -> list[int]:
    """raises: ConfigError"""
    numbers = [part.strip() for part in value.split(",")]
    if not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"--ranks {value}: expected numbers of GPUs, such as 1,8,64")
    return [int(number) for number in numbers]


@says_errors
def main(argv: Sequence[str]) -> int:
    parser = parser_of("plan", __doc__)
    parser.add_argument("--ranks", default="1", help="numbers of GPUs to plan for, such as 1,8,64 (default: 1)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak that a card reaches (default: 0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a row for each way to train there, too")
    # Of process/fit.py: `choose` alone, for records of these lengths and GPUs with so many bytes free.
    parser.add_argument("--lengths", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=int, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args(argv)
    cfg = parse_config(flags, train_manifest="-", output_dir="-")
    cfg = dataclasses.replace(cfg, train_manifest=cfg.train_manifest.removeprefix("-"))
    ranks, config = read_ranks(args.ranks), read_config(cfg)
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: must be above 0 and at most 1, such as 0.4")
    if args.lengths:
        gpu = Gpu("here", 0, args.room / 2**30, math.nan, math.nan, math.nan)
        write_text(args.json, json.dumps(choose(cfg, config, gpu, np.load(args.lengths), *ranks)))
        return 0
    planner = Planner(cfg, config, read_workload(cfg, config))
    print(plan(planner, ranks, args.mfu))
    if args.json:
        write_text(args.json, as_json(planner, ranks, args.mfu))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
