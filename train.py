"""Fine-tune Higgs Audio v2, full or LoRA, under FSDP2 in bf16.

One process (CPU or one GPU):
    python train.py --train_manifest train.jsonl --output_dir runs/voice
Eight GPUs:
    torchrun --nproc_per_node=8 train.py --train_manifest train.jsonl --output_dir runs/voice --batch_size 4
Two nodes of eight (the same line on both, NODE_RANK 0 and 1):
    torchrun --nnodes=2 --node_rank=$NODE_RANK --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=$HOST:29500 \
        train.py --train_manifest train.jsonl --output_dir runs/voice

`bash launch.sh` does the same with less typing. What a run leaves behind is described in README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm

import checkpoint
import data
import loss
import metrics
import model_patch
from collate import ExtendedHiggsAudioBatchInput, Voices
from common import MAX_SHOWN, AlignmentError, ConfigError, DataError, DivergenceError, split_list, write_whole
from config import Config, parse_config
from data import build_loaders, check_agreement, read_records
from distributed import (
    Dist,
    Signals,
    bar_interval_sec,
    log,
    log_list,
    lost_others,
    own_rows,
    says_errors,
    setup_distributed,
    whole,
)
from export.final import write_final
from export.merge import describe_changes, relative_changes
from generate.samples import Sampler, describe
from loss import Objective
from metrics import Monitor
from prepare.audio import codec_frame_rate_hz

# ---------------------------------------------------------------------------------------------------------------------
# Model


def build_model(
    cfg: Config, dist: Dist, config: HiggsAudioConfig, folder: Path
) -> tuple[model_patch.TrainableHiggsAudioModel, LoraConfig | None]:
    """Construct and load. No rank ever holds a full copy: weights go from the files into each rank's own rows."""
    model, lora = construct_model(cfg, dist, config)
    model_patch.materialize(model, dist.device, cpu_offload=cfg.cpu_offload)
    unused = dist.together(lambda: checkpoint.check_base(model, folder))
    checkpoint.load_base(model, folder)
    if unused:
        log(dist, f"{len(unused)} tensors of the checkpoint are not part of the model, first {unused[0]}")
    model_patch.init_lora(model, cfg.seed)
    return model, lora


def construct_model(
    cfg: Config, dist: Dist, config: HiggsAudioConfig
) -> tuple[model_patch.TrainableHiggsAudioModel, LoraConfig | None]:
    """Construct on meta, patch, adapt, choose dtypes, checkpoint activations, shard: in this order. It has no storage yet."""
    compute_dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32
    model = model_patch.patch_for_training(model_patch.build_on_meta(config))
    lora = None
    if cfg.lora_r:
        lora = model_patch.add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_list)
        lora.base_model_name_or_path, lora.revision = cfg.base_ckpt, cfg.revision
    if cfg.freeze:
        model_patch.freeze(model, split_list(cfg.freeze))
    if cfg.consistency_loss_weight and not model.can_pack:
        raise ConfigError(
            "--consistency_loss_weight: this checkpoint's layers cannot be trained on packed batches, which it reads"
        )
    model_patch.set_training_dtypes(model, frozen_dtype=compute_dtype)
    model_patch.set_activation_checkpointing(model, cfg.activation_checkpointing)
    if cfg.compile:
        model_patch.compile_layers(model)
    model_patch.shard(model, dist.mesh, param_dtype=compute_dtype, cpu_offload=cfg.cpu_offload)
    return model, lora


# ---------------------------------------------------------------------------------------------------------------------
# Step


@dataclass(frozen=True)
class Alignment:
    """Where the labels of each stream stand; see loss.py."""

    text: loss.Alignment = "shift"
    audio: loss.Alignment = "shift"


@dataclass
class Totals:
    """Sums over micro-batches: the loss's, and what they were computed from."""

    losses: loss.LossSums
    num_tokens: float  # without padding
    num_positions: float  # that attention works on
    num_frames: float  # of audio, without delay columns
    num_unreadable: float  # samples that are missing
    num_pairs: float  # of a position and one that it attends to

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def sum_over(self, dist: Dist) -> Totals:
        """The same over all ranks, on the host: one all-reduce, one wait for the device. Collective."""
        counts = torch.tensor([float(getattr(self, f.name)) for f in dataclasses.fields(self)[1:]])
        packed = torch.cat([self.losses.pack(), counts.to(dist.device, non_blocking=True)])
        packed = dist.sum(packed).cpu()
        return Totals(loss.LossSums.unpack(packed[: -len(counts)]), *packed[-len(counts) :].tolist())


def forward(
    model,
    batch: ExtendedHiggsAudioBatchInput,
    ids: loss.AudioIds,
    alignment: Alignment,
    voice_sums: Callable | None = None,
) -> tuple[Tensor, Totals]:
    """One micro-batch through the model; the sums are part of the graph.

    voice_sums: of `compare_voices`; adds the voice term, and is collective
    returns: `loss.copy_counts` [2], zero while training; the totals
    """
    with_copies = not torch.is_grad_enabled()
    counts = batch.num_frames(), len(batch.unreadable)
    if batch.packing is not None and model.can_pack and alignment == Alignment():
        packing = batch.packing
        if voice_sums:
            voice_sums = functools.partial(voice_sums, voices=batch.voices)
        head_loss = functools.partial(
            loss.packed_sums, stream_eos=ids.stream_eos, with_copies=with_copies, voice_sums=voice_sums
        )
        sums, copies = model(**batch.model_inputs(), packing=packing, head_loss=head_loss)
        positions = packing.num_positions, packing.num_places
        return copies, Totals(loss.LossSums.unpack(sums), *positions, *counts, packing.num_pairs)
    assert voice_sums is None, "voices are compared in packed batches alone"
    output = model(**batch.model_inputs())  # logits everywhere; the device has to be asked where everything is
    scored = loss.score(output, batch, ids, alignment.text, alignment.audio)
    copies = loss.copy_counts(scored) if with_copies else torch.zeros(2, device=output.logits.device)
    lengths = output.attention_mask.sum(1).tolist()
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return copies, Totals(loss.loss_sums(scored, ids.stream_eos), sum(lengths), output.attention_mask.numel(), *counts, pairs)


def compare_voices(batches: Sequence[ExtendedHiggsAudioBatchInput], dist: Dist) -> tuple[list[Callable | None], int]:
    """What `forward` needs to compare voices in each micro-batch, None where they have none; and how many voices count in all.

    Ranks tell each other here who speaks, and their references when a micro-batch's forward pass comes to it. Collective.
    """
    if any(batch.voices is None for batch in batches):
        return [None] * len(batches), 0
    by_rank = dist.gather([batch.voices.speakers for batch in batches])
    functions, num_voices = [], 0
    for parts in zip(*by_rank):
        speakers, counts = list(itertools.chain.from_iterable(parts)), list(map(len, parts))
        functions.append(functools.partial(_voice_sums, speakers=speakers, counts=counts, dist=dist))
        num_voices += loss.num_comparable(speakers)
    return functions, num_voices


def _voice_sums(rows: Callable, voices: Voices, speakers: Sequence[str], counts: Sequence[int], dist: Dist) -> Tensor:
    """`loss.consistency_sums` of this rank's voices among all, `counts` of each rank. Collective."""
    spoken, heard = loss.pool_voices(rows, voices)
    return loss.consistency_sums(spoken, dist.gather_rows(heard, counts), speakers, first=sum(counts[: dist.rank]))


def build_objective(cfg: Config, config: HiggsAudioConfig) -> Objective:
    weights = cfg.codebook_weight_list
    if weights and len(weights) != config.audio_num_codebooks:
        raise ConfigError(
            f"--codebook_weights has {len(weights)} values, the checkpoint {config.audio_num_codebooks} codebooks"
        )
    return Objective(cfg.text_loss_weight, cfg.audio_loss_weight, tuple(weights) or None, cfg.consistency_loss_weight)


def train_step(
    model,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[ExtendedHiggsAudioBatchInput],
    objective: Objective,
    ids: loss.AudioIds,
    alignment: Alignment,
    dist: Dist,
    *,
    lr: float,
    grad_clip: float,
    seed: int,
    step: int,
) -> tuple[Totals, float, list[str]]:
    """One optimizer step over this rank's micro-batches.

    returns: the totals over all ranks, on the host; the global gradient norm; the samples that made it not finite (on any
             rank, normally none), in which case nothing was updated on any rank.

    Targets are counted over all micro-batches and ranks first. Each micro-batch then contributes its share of the one
    global loss, so its gradients are just summed: over micro-batches by accumulation, over ranks by FSDP, whose average
    the factor world_size turns back into a sum. Dropout is seeded by (seed, step, micro-batch), which makes a step
    independent of how its micro-batches are divided among ranks, and a resumed run equal to an uninterrupted one.

    The host waits for the device once, when everything but the update is queued: the gradient norm decides on it, and what is
    logged comes along. Meanwhile the update runs, the caller logs and prepares the next step.
    """
    counts = [torch.cat([text[None], audio]) for text, audio in (batch.num_targets() for batch in batches)]
    counts = dist.sum(torch.stack(counts).sum(0).to(dist.device, non_blocking=True)).float()
    num_text, num_audio = counts[0], counts[1:]
    voice_sums, num_voices = compare_voices(batches, dist)

    total, values = None, []
    for index, batch in enumerate(batches):
        batch = batch.to(dist.device, non_blocking=True)
        model.set_requires_gradient_sync(index == len(batches) - 1)
        torch.manual_seed(_micro_batch_seed(seed, step, index * dist.world_size + dist.rank))
        _, part = forward(model, batch, ids, alignment, voice_sums[index])
        value = objective(part.losses, num_text, num_audio, num_voices) * dist.world_size
        value.backward()
        values.append(value.detach())
        part.losses = part.losses.detach()
        total = part if total is None else total + part

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    total, grad_norm = total.sum_over(dist), whole(grad_norm).item()
    culprits: list[str] = []
    if math.isfinite(grad_norm):  # the same number on every rank, so all of them step or none does
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        bad = [source for value, batch in zip(values, batches) if not value.isfinite() for source in batch.sources]
        culprits = [source for part in dist.gather(bad) for source in part] or ["(every loss is finite, the gradient is not)"]
    optimizer.zero_grad()
    return total, grad_norm, culprits


def _micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    return ((seed * 1_000_003 + step) * 100_003 + micro_batch) % 2**63


def check_first_batch(
    model, batch: ExtendedHiggsAudioBatchInput, objective: Objective, ids: loss.AudioIds, dist: Dist
) -> Alignment:
    """Before the first step: log what goes in and both losses, find the labels' alignment, look for copy collapse."""
    batch = batch.to(dist.device)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            log(dist, f"  {name:30} {tuple(value.shape)!s:20} {value.dtype}")
    text = dist.together(lambda: loss.find_alignment(batch.label_ids, batch.input_ids, "text"))
    # Label audio of its own has no alignment to find; the collator makes it input-aligned.
    has_audio = batch.label_audio_ids.numel() > 0 and not batch.has_label_overrides
    audio = dist.together(
        lambda: loss.find_alignment(batch.label_audio_ids, batch.audio_out_ids, "audio") if has_audio else None
    )
    found = [(t or "shift", a or "shift") for t, a in dist.gather((text, audio)) if t or a] or [("shift", "shift")]
    if len(set(found)) > 1:
        raise AlignmentError(f"ranks found different label alignments: {found}")
    alignment = Alignment(*found[0])
    with evaluating(model):
        copies, total = forward(model, batch, ids, alignment)
    sums, copies = total.sum_over(dist).losses, loss.copy_share(dist.sum(copies))
    values = objective.metrics(sums)
    log(
        dist,
        f"  labels: text {alignment.text}, audio {alignment.audio}; text loss {values['text_loss']:.4f} over "
        f"{sums.num_text.item():.0f} targets, audio loss {values['audio_loss']:.4f} over {sums.num_audio.sum().item():.0f}; "
        f"copy share {copies:.1%}",
    )
    return alignment


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode without gradients; afterwards the model trains again and is sharded again.

    FSDP leaves some parameters whole after a forward without backward, where saving would find them.
    """
    model.eval()
    with torch.no_grad():
        yield
    model_patch.reshard(model)
    model.train()


def evaluate(model, loader: data.Loader, objective: Objective, ids: loss.AudioIds, alignment: Alignment, dist: Dist) -> dict:
    """Teacher-forced losses on the whole validation set, from sums and counts over all ranks. Collective."""
    total, copies, unreadable = None, torch.zeros(2, device=dist.device), []
    with evaluating(model):
        for (batch,), _ in dist.iterate(loader.epoch(data.Position(0, 0))):
            (voice_sums,), _ = compare_voices([batch], dist)
            copied, part = forward(model, batch.to(dist.device, non_blocking=True), ids, alignment, voice_sums)
            copies += copied
            total = part if total is None else total + part
            unreadable += batch.unreadable
    total = total.sum_over(dist)
    bad_samples = report_unreadable(unreadable, total, "validation", dist)
    return objective.metrics(total.losses) | {"bad_samples": bad_samples, "copy_share": loss.copy_share(dist.sum(copies))}


def report_unreadable(mine: Sequence[str], total: Totals, when: str, dist: Dist) -> int:
    """Name the samples that were left out, this rank's being `mine`; returns how many there are. Collective."""
    count = int(total.num_unreadable)
    if count:
        everyones = [problem for part in dist.gather(list(mine)) for problem in part]
        log_list(dist, f"{when}: {count} samples cannot be read and are left out", everyones)
    return count


def improves(values: dict, name: str, best: dict) -> bool:
    """Whether an evaluation is the best so far by metric `name`; one that lacks samples is not comparable."""
    value = values.get(name)
    if value is None or not math.isfinite(value) or values["bad_samples"]:
        return False
    return best.get("metric") != name or value < best["value"]


def build_sampler(cfg: Config, dist: Dist, config: HiggsAudioConfig, dataset: data.ChatMLDataset) -> Sampler:
    """What answers a few prompts every --sample_steps. Collective."""
    if config.encode_whisper_embed:
        raise ConfigError("--sample_steps: this checkpoint reads reference audio through Whisper, which sampling lacks")
    sampler = dist.together(lambda: Sampler.build(cfg, dataset, dist))
    log(dist, f"{len(sampler.prompts)} prompts are answered every {cfg.sample_steps} steps, into {sampler.folder}")
    return sampler


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that also keeps a moving average of the weights it trains, in float32, of each rank's own rows.

    After t steps it is the mean of the weights after each of them, weighted by decay ** (steps ago): the weights before
    training have no part in it. It is optimizer state like any other, saved and loaded with checkpoints.
    """

    def __init__(self, groups: list[dict], decay: float, **settings):
        super().__init__(groups, **settings)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure=None) -> None:
        super().step(closure)
        for parameter, state in self.state.items():
            if "ema" not in state:
                state["ema"] = torch.zeros_like(parameter)
            share = (1 - self.decay) / (1 - self.decay ** state["step"])  # 1 at the first step
            own_rows(state["ema"]).lerp_(own_rows(parameter), share)

    @contextlib.contextmanager
    def averaged(self):
        """While it lasts, the parameters hold their averages; the model has to be sharded at both ends."""
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, state in self.state.items():
            mine, average = own_rows(parameter), own_rows(state["ema"])
            before = mine.clone()
            mine.copy_(average)
            average.copy_(before)


def averaged(optimizer: torch.optim.Optimizer):
    """The context in which the model's weights are those to evaluate and export: with --ema their averages."""
    has_average = isinstance(optimizer, AveragingAdamW) and optimizer.state
    return optimizer.averaged() if has_average else contextlib.nullcontext()


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on matrices only. Create it after sharding."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": cfg.peak_lr, "betas": (0.9, cfg.beta2), "fused": True}
    return AveragingAdamW(groups, cfg.ema, **settings) if cfg.ema else torch.optim.AdamW(groups, **settings)


def lr_at(step: int, total_steps: int, cfg: Config) -> float:
    """Learning rate of optimizer step `step` (0 is the first): linear warm-up, then cosine to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return cfg.peak_lr * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.peak_lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def step_metrics(
    total: Totals, objective: Objective, step_time_sec: float, flops: metrics.Flops, frame_rate_hz: float, dist: Dist
) -> dict:
    """One line of metrics.jsonl, from global totals."""
    tokens = total.num_tokens
    losses, peak = total.losses, _peak_flops(dist.device)
    num_flops = flops.total(tokens, total.num_pairs, losses.num_text.item(), losses.num_audio.max().item())
    on_gpu = dist.device.type == "cuda"
    return objective.metrics(total.losses) | {
        "tokens": int(tokens),
        "padding_ratio": 1 - tokens / total.num_positions,
        "tokens_per_sec": tokens / step_time_sec,
        "audio_sec_per_sec": total.num_frames / frame_rate_hz / step_time_sec,
        "mfu": num_flops / step_time_sec / (peak * dist.world_size) if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(dist.device) if on_gpu else None,
        "step_time_sec": step_time_sec,
    }


def write_memory_snapshot(path: Path, dist: Dist) -> None:
    """What GPU memory holds and held, with the stack that asked for it, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
    log(dist, f"{path}: open it at https://pytorch.org/memory_viz")


def _peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak from the vendor's data sheets, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    return next((value for key, value in peaks.items() if key in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# Loop


def train(cfg: Config, dist: Dist) -> model_patch.TrainableHiggsAudioModel:
    """The whole run; returns the trained, sharded model."""
    held = dist.together(lambda: checkpoint.lock(Path(cfg.output_dir)) if dist.is_main else None)
    with Signals() as signals, held or contextlib.nullcontext():
        return run(cfg, dist, signals)


@dataclass
class Standing:
    """Where a run stands; a checkpoint keeps it beside the tensors."""

    step: int = 0  # optimizer steps done
    position: data.Position = field(default_factory=lambda: data.Position(0, 0))
    bad_steps: int = 0  # skipped because they were not finite
    bad_samples: int = 0  # left out because they could not be read, each time they were met
    spikes: int = 0
    losses: list[float] = field(default_factory=list)  # the last ones, to tell spikes by
    best: dict = field(default_factory=dict)  # among the evaluations: metric, value, step

    @classmethod
    def of(cls, state: dict) -> Standing:
        values = {f.name: state[f.name] for f in dataclasses.fields(cls)}
        return cls(**values | {"position": data.Position(*state["position"])})

    def add_loss(self, value: float, threshold: float) -> bool:
        """Count in the loss of a step; returns whether it is a spike among the last ones."""
        is_spike = metrics.is_spike(value, self.losses, threshold)
        self.spikes += is_spike
        if math.isfinite(value):
            self.losses = [*self.losses, value][-metrics.WINDOW :]
        return is_spike


def run(cfg: Config, dist: Dist, signals: Signals) -> model_patch.TrainableHiggsAudioModel:
    """Build everything, then the loop: evaluate, sample, save, stop, step, log, always in that order."""
    output_dir = Path(cfg.output_dir)
    resume_from = choose_resume(cfg, dist)
    records, val_records = read_records(cfg, dist)
    check_agreement(cfg, dist, records, val_records)
    folder = dist.main_first(lambda: checkpoint.find_base(cfg.base_ckpt, cfg.revision))
    config, tokenizer = dist.together(lambda: (checkpoint.read_base_config(folder), checkpoint.load_tokenizer(folder)))
    objective = dist.together(lambda: build_objective(cfg, config))
    loader, val_loader = build_loaders(cfg, dist, config, tokenizer, records, val_records)
    ids = loss.AudioIds.of(config)
    model, lora = dist.together(lambda: build_model(cfg, dist, config, folder))
    optimizer = build_optimizer(model, cfg)

    total_steps = cfg.max_steps or sum(loader.steps_in_epoch(epoch) for epoch in range(cfg.epochs))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(
        dist,
        f"{loader.num_samples} training samples, {total_steps} steps; {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {trainable:,} of them train; {dist.world_size} rank(s) on {dist.device.type}",
    )
    if cfg.dry_run:
        return model
    at = Standing()
    if resume_from:
        state = dist.together(lambda: checkpoint.check_state(resume_from, model, optimizer, same_run(cfg, loader)))
        checkpoint.load_state(resume_from, model, optimizer)
        at = Standing.of(state)
        log(dist, f"resumed from {resume_from}: {at.step} steps done")
    settings = write_run_config(output_dir, cfg, dist, training_samples=loader.num_samples)
    monitor = dist.together(lambda: Monitor(output_dir, settings, at.step, cfg.wandb, dist.is_main))
    sampler = build_sampler(cfg, dist, config, (val_loader or loader).dataset) if cfg.sample_steps else None
    saver = checkpoint.Saver(output_dir / "checkpoints", model, optimizer, cfg.keep_last)
    flops = metrics.Flops.of(model)
    frame_rate_hz = codec_frame_rate_hz(cfg.audio_tokenizer)
    progress = tqdm(
        total=total_steps,
        initial=at.step,
        disable=not dist.is_main,
        desc="train",
        unit="step",
        mininterval=bar_interval_sec(),
    )

    if cfg.memory_snapshot:
        torch.cuda.memory._record_memory_history()
    model.train()
    steps = dist.iterate(iter_steps(loader, at.position))
    alignment = failure = None
    evaluated = sampled = saved = at.step  # the step at which each was last done
    bad_in_a_row = 0
    while True:
        done = at.step >= total_steps
        if val_loader and at.step != evaluated and (done or (cfg.val_steps and at.step % cfg.val_steps == 0)):
            if alignment is None:
                (first, *_), _ = next(dist.iterate(val_loader.epoch(data.Position(0, 0))))
                alignment = check_first_batch(model, first, objective, ids, dist)
            with averaged(optimizer):
                values = evaluate(model, val_loader, objective, ids, alignment, dist)
                if lora and at.step and not evaluated:
                    log(dist, describe_changes(relative_changes(model)))
            evaluated = at.step
            monitor.write(split="val", step=at.step, epoch=at.position.epoch, **values)
            is_best = improves(values, cfg.best_by, at.best)
            if is_best:
                at.best = {"metric": cfg.best_by, "value": values[cfg.best_by], "step": at.step}
            log(
                dist,
                f"step {at.step}: validation loss {values['loss']:.4f} (text {values['text_loss']:.4f}, "
                f"audio {values['audio_loss']:.4f}){', the best so far' * is_best}",
            )

        if sampler and at.step != sampled and (done or at.step % cfg.sample_steps == 0):
            with averaged(optimizer), evaluating(model):
                values = sampler.sample(model, at.step, dist)
            sampled = at.step
            monitor.write(split="sample", step=at.step, epoch=at.position.epoch, **values)
            if dist.is_main:
                monitor.write_samples(at.step, sampler.folder / f"step_{at.step}")
            log(dist, f"step {at.step}: {describe(values)}")

        stop, is_writing = dist.each(signals.received is not None, saver.is_writing)  # either may be so on one rank alone
        if not is_writing:
            saver.commit()
        due = cfg.save_steps and (at.step % cfg.save_steps == 0 or done or at.best.get("step") == at.step)
        if at.step != saved and (due or stop or failure):
            saver.start(dataclasses.asdict(at) | {"run": same_run(cfg, loader)})
            saved = at.step
        if stop or failure or done:
            saver.commit()

        if failure:
            raise failure
        if done:
            break
        if stop:
            progress.close()
            received = next(s.name for s in dist.gather(signals.received) if s)
            log(dist, f"received {received}: stopped after step {at.step}; continue with --resume auto")
            return model

        epoch = at.position.epoch
        batches, at.position = next(steps)
        if alignment is None:
            log(dist, "first batch:")
            check_readable(batches, cfg.max_bad_samples, dist)
            alignment = check_first_batch(model, batches[0], objective, ids, dist)
        started = time.perf_counter()
        lr = lr_at(at.step, total_steps, cfg)
        total, grad_norm, culprits = train_step(
            model,
            optimizer,
            batches,
            objective,
            ids,
            alignment,
            dist,
            lr=lr,
            grad_clip=cfg.grad_clip,
            seed=cfg.seed,
            step=at.step,
        )
        values = step_metrics(total, objective, time.perf_counter() - started, flops, frame_rate_hz, dist)
        at.step += 1
        if at.step == cfg.memory_snapshot:
            write_memory_snapshot(output_dir / f"memory-rank{dist.rank}.pickle", dist)
        at.bad_steps += bool(culprits)
        bad_in_a_row = bad_in_a_row + 1 if culprits else 0
        unreadable = [problem for batch in batches for problem in batch.unreadable]
        num_unreadable = report_unreadable(unreadable, total, f"step {at.step}", dist)
        at.bad_samples += num_unreadable
        is_spike = at.add_loss(values["loss"], cfg.spike_threshold if at.step > cfg.warmup_steps else 0.0)

        counts = {"bad_steps": at.bad_steps, "bad_samples": at.bad_samples, "spikes": at.spikes}
        monitor.write(split="train", step=at.step, epoch=epoch, lr=lr, grad_norm=grad_norm, **counts, **values)
        if culprits:
            log(dist, f"step {at.step}: not finite, skipped; samples: {', '.join(culprits)}")
        if is_spike:
            log(dist, f"step {at.step}: loss {values['loss']:.4f} is far above the median of the last steps")
        if (culprits or is_spike) and at.bad_steps + at.spikes <= metrics.MAX_DUMPS:
            about = {
                "step": at.step,
                "loss": values["loss"],
                "grad_norm": grad_norm,
                "alignment": list(vars(alignment).values()),
            }
            dump(cfg, dist, about | {"resume": str(saver.newest or resume_from or "")}, batches)
        failure = find_failure(at, bad_in_a_row, num_unreadable, cfg)
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "text_loss", "audio_loss")}
        progress.set_postfix(shown | {"tok/s": f"{values['tokens_per_sec']:.0f}"}, refresh=False)
        progress.update()

    progress.close()
    with averaged(optimizer):
        if lora:
            log(dist, describe_changes(relative_changes(model)))
        merging = write_final(output_dir, model, config, tokenizer, lora, base=folder, merge_lora=cfg.merge_lora)
    if merging:
        log(dist, f"final/merged: {merging}")
    log(dist, f"finished: {output_dir / 'final'}")
    return model


def iter_steps(loader: data.Loader, position: data.Position):
    """The optimizer steps from `position` on, epoch after epoch, without end."""
    while True:
        for batches, after in loader.epoch(position):
            is_last = after.samples_done >= loader.num_samples
            yield batches, data.Position(after.epoch + 1, 0) if is_last else after
        position = data.Position(position.epoch + 1, 0)


def choose_resume(cfg: Config, dist: Dist) -> Path | None:
    """The checkpoint to continue from, if any. Collective.

    raises: CheckpointError, on all ranks, for a folder in use without --resume, or a checkpoint that cannot be used

    Started again by torchrun after a failure (--max_restarts), a run continues what it has itself begun, whatever --resume
    says; what it has begun it knows by its launcher, so that a first attempt refused is not let in at the second.
    """
    output_dir = Path(cfg.output_dir)
    is_restart = dist.is_restart_of(checkpoint.read_launchers(output_dir))
    if cfg.resume == "none" and not is_restart:
        dist.together(lambda: checkpoint.refuse_used(output_dir))
        return None
    found, passed_over = checkpoint.find_resume(output_dir, "auto" if is_restart else cfg.resume)
    for damage in passed_over:
        log(dist, f"passed over {damage}")
    if is_restart and not found and cfg.resume not in ("none", "auto"):
        found, _ = checkpoint.find_resume(output_dir, cfg.resume)
    return found


def check_readable(batches: Sequence[ExtendedHiggsAudioBatchInput], max_bad_samples: int, dist: Dist) -> None:
    """DataError, on all ranks, if the first step finds nothing to read or too much that is unreadable. Collective."""
    mine = [problem for batch in batches for problem in batch.unreadable]
    has_targets = any(sum(map(Tensor.sum, batch.num_targets())) > 0 for batch in batches)
    problems, readable = zip(*dist.gather((mine, has_targets)))
    problems = [problem for part in problems for problem in part]
    if len(problems) > max_bad_samples or not any(readable):
        raise DataError(
            "\n  ".join([f"{len(problems)} samples of the first step cannot be read:", *problems[: MAX_SHOWN]])
        )


def dump(cfg: Config, dist: Dist, about: dict, batches: Sequence[ExtendedHiggsAudioBatchInput]) -> None:
    """Keep a step's micro-batches for tools.replay; a disk that refuses them is no reason to stop."""
    about |= {"rank": dist.rank, "world_size": dist.world_size, "config": dataclasses.asdict(cfg)}
    folder = Path(cfg.output_dir) / "spikes"
    try:
        metrics.write_dump(folder, about, batches)
    except OSError as error:
        print(f"rank {dist.rank}: {folder}: the batches cannot be kept: {error}", file=sys.stderr, flush=True)
    log(dist, f"step {about['step']}: look again with python -m tools.replay {folder}/step_{about['step']}-rank0.safetensors")


def find_failure(at: Standing, bad_in_a_row: int, num_unreadable: int, cfg: Config) -> Exception | None:
    """Why the run has to end after this step, if it has to."""
    if 0 < cfg.max_bad_steps <= bad_in_a_row:
        return DivergenceError(
            f"{bad_in_a_row} steps in a row were not finite. Saved at step {at.step}; look at the samples named above, or lower --lr"
        )
    if num_unreadable and at.bad_samples > cfg.max_bad_samples:  # once all are mended, a resumed run goes on
        return DataError(
            f"{at.bad_samples} samples could not be read, more than --max_bad_samples {cfg.max_bad_samples}. Saved at step "
            f"{at.step}; mend what is named above, or allow for more, then continue with --resume auto"
        )
    return None


def same_run(cfg: Config, loader: data.Loader) -> dict:
    """What a resumed run has to have in common with the one it continues; batch size and ranks may differ."""
    names = ("seed", "lora_r", "lora_alpha", "lora_targets", "freeze", "max_tokens", "ema")
    return {name: getattr(cfg, name) for name in names} | {"training_samples": loader.num_samples}


def write_run_config(output_dir: Path, cfg: Config, dist: Dist, **facts: object) -> dict:
    """OUTPUT/config.json: the resolved settings and what they ran with, which are returned too. Collective."""
    from importlib.metadata import version

    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    packages = ("torch", "transformers", "peft", "boson-multimodal", "safetensors", "numpy")
    record = dataclasses.asdict(cfg) | {
        "lr": cfg.peak_lr,
        **facts,
        "world_size": dist.world_size,
        "device": dist.device.type,
        "git_commit": git.stdout.strip() or None,
        "versions": {name: version(name) for name in packages},
        "launchers": dist.launchers(),
    }
    if dist.is_main:
        content = json.dumps(record, indent=2) + "\n"
        write_whole(output_dir / "config.json", lambda file: file.write(content.encode()))
    return record


@says_errors
def main(argv: Sequence[str]) -> int:
    cfg = parse_config(argv, description=__doc__)
    train(cfg, setup_distributed(cfg.device, cfg.replicate, cfg.dist_timeout))
    return 0


def run_and_exit(argv: Sequence[str]) -> None:
    """`main` as a process of its own. Ranks that merely lost the others wait a moment: the one that failed speaks first."""
    try:
        status = main(argv)
    except Exception as error:
        if lost_others(error):
            time.sleep(10)
        get_error_handler().record_exception(error)  # for the launcher, who repeats it last
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the work is done or lost: taking process groups down in good order can hang (NCCL) or abort (gloo)


if __name__ == "__main__":
    run_and_exit(sys.argv[1:])
