"""What a run will need, before you have a GPU or weights: memory, communication and time of a step.

    bash launch.sh plan                                      # the published checkpoint, clones of 3 to 20 s
    bash launch.sh plan --train_manifest train.jsonl --base_ckpt FOLDER --max_tokens 8192 --epochs 3
    bash launch.sh plan --lora_r 64 --batch_size 16 --ranks 8 --mfu 0.45

Takes the flags of train.py (--train_manifest and --output_dir may be left out) and a few of its own. Every checkpointing
mode is planned for the given LoRA rank and for a full fine-tune.

Memory and communication are not formulas: train.py's own `train_step` runs on fake tensors (shapes without data) among
fake ranks, and every tensor and collective is counted. The micro-batch is the largest of the first epoch or, without a
manifest, as many clones as --batch_size or --max_tokens say. Not counted are the allocator's fragmentation, kernel
workspaces, the CUDA context and NCCL: `Estimate.needed` leaves room for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as torch_dist
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import checkpoint
import data
import loss
import metrics
import model_patch
import train
from collate import Batch, create_collator
from common import ConfigError
from config import BASE_CKPT, CHECKPOINTING_MODES, Config, parse_config
from distributed import Dist, make_mesh, says_errors
from prepare.audio import AudioStore, codec_frame_rate_hz
from prepare.manifest import report_problems
from tools import synthetic, toys
from tools.memory import LiveBytes
from train import build_optimizer

CARDS = [gpu for gpu in metrics.GPUS if gpu.name in ("RTX 4090", "L40S", "H100", "H200")]
FRAGMENTATION = 1.05
RESERVED = 1.5 * 2**30  # bytes: CUDA's context, NCCL's buffers, workspaces


# ---------------------------------------------------------------------------------------------------------------------
# One step on fake ranks


@dataclass(frozen=True)
class Estimate:
    """What one rank needs, in bytes; `sent` and `flops` per optimizer step."""

    weights: int
    optimizer: int
    peak: int  # on the GPU at the worst moment, weights and optimizer state included (unless --cpu_offload)
    sent: float  # to other ranks, by ring algorithms
    flops: float

    @property
    def needed(self) -> float:
        """Bytes a GPU should have."""
        return self.peak * FRAGMENTATION + RESERVED


class Counter(LiveBytes):
    """Counts live bytes and sent bytes; reading a number from a fake tensor gives 1.0."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if func.namespace == "c10d":
            self.sent += _ring_bytes(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _ring_bytes(func, args: tuple) -> float:
    """Bytes that each rank sends in a collective by a ring algorithm."""
    name = func.name()
    if "allgather_base" in name:
        (whole, _, group, *_), rounds = args, 1
    elif "reduce_scatter_base" in name:
        (_, whole, group, *_), rounds = args, 1
    elif "allreduce" in name:
        (tensors, group, *_), rounds = args, 2
        (whole,) = tensors
    else:
        raise NotImplementedError(f"no rule for the bytes that {name} sends")
    size = torch_dist.ProcessGroup.unbox(group).size()
    return rounds * whole.nbytes * (size - 1) / size


def estimate(cfg: Config, config: HiggsAudioConfig, batch: Batch, world_size: int, on_gpu: bool = True) -> Estimate:
    """Run `train.train_step` on `cfg.grad_accum` micro-batches like `batch`, as rank 0 of `world_size`.

    on_gpu: with a GPU's attention kernel and prefetching, else a CPU's
    raises: ConfigError, PatchError as train.py would
    """
    torch_dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    like_gpu = mock.patch.multiple(model_patch, has_varlen_kernel=lambda *_: on_gpu, can_prefetch=lambda *_: on_gpu)
    try:
        device = torch.device("cpu")  # so that neither CUDA nor streams are needed
        dist = Dist(0, 0, world_size, device, make_mesh("cpu", world_size, cfg.replicate))
        with like_gpu:
            model, _ = train.construct_model(cfg, dist, config)
        flops = metrics.Flops.of(model).total(*batch.packing.work())
        with like_gpu, FakeTensorMode(allow_non_fake_inputs=True), Counter() as live:
            model_patch.materialize(model, device)
            weights = live.now
            optimizer = build_optimizer(model, cfg)
            checkpoint.create_state(optimizer)
            state = live.now - weights
            model.train()
            objective, labels = train.build_objective(cfg, config), loss.LabelSpec.of(config)
            task = train.Task(model, optimizer, objective, labels, dist, cfg.grad_clip, cfg.seed)
            train.train_step(task, [batch] * cfg.grad_accum, step=0, lr=cfg.peak_lr)
        on_host = weights + state if cfg.cpu_offload else 0
        return Estimate(weights, state, live.peak - on_host, live.sent, flops * cfg.grad_accum)
    finally:
        torch_dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The data


@dataclass(frozen=True)
class Workload:
    """The data to plan for."""

    batch: Batch  # the largest micro-batch
    about: str  # printed above the table
    lengths: np.ndarray | None = None  # [records] positions; None without a manifest

    def steps(self, cfg: Config, world_size: int) -> int | None:
        """Optimizer steps of the run; None if unknown."""
        if cfg.max_steps or self.lengths is None:
            return cfg.max_steps or None
        order = np.arange(len(self.lengths))
        bounds = data.Batching(cfg.batch_size, cfg.max_tokens, self.lengths).bounds(order)
        return cfg.epochs * math.ceil((len(bounds) - 1) / (world_size * cfg.grad_accum))


def clones_of(config: HiggsAudioConfig, seconds: np.ndarray) -> Batch:
    """One micro-batch of clones, [records, 2] seconds of reference and target."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = synthetic.write_clones(Path(folder), seconds, config.audio_codebook_size)
        store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, synthetic.FRAME_RATE_HZ, Path(folder))
        dataset = data.ChatMLDataset(data.read_manifest(manifest), toys.make_tokenizer(), store)
        return create_collator(config)([dataset[i] for i in range(len(dataset))])


POSITIONS_PER_SEC = synthetic.FRAME_RATE_HZ + synthetic.TOKENS_PER_SEC


def read_workload(cfg: Config, config: HiggsAudioConfig) -> Workload:
    """The manifest's largest micro-batch, with one clip of equal length for each sample; or clones without a manifest."""
    if not cfg.train_manifest:
        seconds = synthetic.clone_durations(4096)
        positions = (seconds.sum(1) * POSITIONS_PER_SEC).cumsum()
        count = int((positions <= cfg.max_tokens).sum()) if cfg.max_tokens else cfg.batch_size
        return Workload(
            clones_of(config, seconds[: max(1, count)]), f"{count} clones, references of 3 to 10 s, targets of 2 to 20 s"
        )
    records, _, _ = data.open_records(cfg.train_manifest, cfg.missing_audio == "skip")
    tokenizer = checkpoint.load_tokenizer(checkpoint.find_base(cfg.base_ckpt, cfg.revision))
    with tempfile.TemporaryDirectory() as folder:
        rate = codec_frame_rate_hz(cfg.audio_tokenizer)
        codes_dir = Path(cfg.codes_dir or folder)
        store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, rate, codes_dir, cfg.codec)
        dataset = data.ChatMLDataset(records, tokenizer, store)
        collator = create_collator(config)
        lengths, problems = data.measure_lengths(dataset, collator, num_workers=cfg.num_workers)
    report_problems(problems)
    order = data.epoch_order([len(lengths)], [1.0], cfg.seed, 0)
    bounds = data.Batching(cfg.batch_size, cfg.max_tokens, lengths).bounds(order)
    largest = max((lengths[order[a:b]] for a, b in pairwise(bounds)), key=np.sum)
    seconds = np.stack([np.zeros(len(largest)), largest / POSITIONS_PER_SEC], axis=1)
    about = f"{len(lengths)} records, the largest micro-batch of the first epoch: {len(largest)} of them"
    return Workload(clones_of(config, seconds), about, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def plan(cfg: Config, config: HiggsAudioConfig, workload: Workload, ranks: Sequence[int], mfu: float) -> str:
    """A table of settings; progress goes to stderr, since each setting takes seconds."""
    packing = workload.batch.packing
    lines = [
        f"{workload.about}: {packing.num_positions:,} positions per micro-batch, {cfg.grad_accum} micro-batch(es) per step",
        "",
        "| training | checkpointing | ranks | weights | optimizer | peak | sent per step | "
        + " | ".join(f"{gpu.memory_gb} GB, {gpu.name}" for gpu in CARDS)
        + " |",
        "| --- " * (7 + len(CARDS)) + "|",
    ]
    for lora_r in dict.fromkeys((cfg.lora_r, 0)):
        for mode in CHECKPOINTING_MODES:
            for world_size in ranks:
                training = f"LoRA r {lora_r}" if lora_r else "full"
                print(f"{training}, {mode}, {world_size} rank(s)", file=sys.stderr)
                settings = dataclasses.replace(cfg, lora_r=lora_r, activation_checkpointing=mode)
                found = estimate(settings, config, workload.batch, world_size)
                steps = workload.steps(cfg, world_size)
                lines.append(f"| {training} | {mode} | {world_size} | {_row(found, steps, mfu)} |")
    lines += [
        "",
        f"GB are 2^30 bytes. A setting fits if {FRAGMENTATION} x peak + {RESERVED / 2**30:g} GB fit. "
        f"Times assume {mfu:.0%} of the GPU's peak, and that communication is hidden behind computation.",
    ]
    return "\n".join(lines)


def _row(found: Estimate, steps: int | None, mfu: float) -> str:
    sizes = [f"{size / 2**30:.1f} GB" for size in (found.weights, found.optimizer, found.peak, found.sent)]
    for gpu in CARDS:
        seconds = found.flops / (gpu.bf16_flops * mfu)
        total = f", {_duration(steps * seconds)} for {steps} steps" if steps else ""
        sizes.append(f"{_duration(seconds)} a step{total}" if found.needed <= gpu.memory_gib * 2**30 else "-")
    return " | ".join(sizes)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def read_config(cfg: Config) -> HiggsAudioConfig:
    """The checkpoint's config with the special ids of the toy tokenizer; the published one's without the Hub."""
    published = synthetic.make_config("real")
    if cfg.base_ckpt == BASE_CKPT:
        return published
    config = checkpoint.read_base_config(checkpoint.find_base(cfg.base_ckpt, cfg.revision))
    for name in ("audio_in_token_idx", "audio_out_token_idx", "pad_token_id"):
        setattr(config, name, getattr(published, name))
    return config


def read_ranks(value: str) -> list[int]:
    """raises: ConfigError"""
    numbers = [part.strip() for part in value.split(",")]
    if not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"--ranks {value}: expected numbers of GPUs, such as 1,8,64")
    return [int(number) for number in numbers]


@says_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bash launch.sh plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,8,64", help="numbers of GPUs to plan for (default: 1,8,64)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak to count on for times (default: 0.4)")
    args, flags = parser.parse_known_args(argv)
    cfg = parse_config(["--train_manifest", "-", "--output_dir", "-", *flags])
    cfg = dataclasses.replace(cfg, train_manifest=cfg.train_manifest.removeprefix("-"))
    ranks, config = read_ranks(args.ranks), read_config(cfg)
    if not config.skip_audio_tower:
        raise ConfigError(f"--base_ckpt {cfg.base_ckpt}: has an audio tower; only models without one can be planned")
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: must be above 0 and at most 1, such as 0.4")
    print(plan(cfg, config, read_workload(cfg, config), ranks, args.mfu))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
