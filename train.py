"""Fine-tune Higgs Audio v2, full or LoRA, under FSDP2 in bf16.

    python train.py --train_manifest train.jsonl --output_dir runs/voice                                # CPU or one GPU
    torchrun --nproc_per_node=8 train.py --train_manifest train.jsonl --output_dir runs/voice           # eight GPUs

`bash launch.sh` does the same with less typing, on several nodes too. docs/training.md says what a run leaves behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import checkpoint
import data
import distributed
import loss
import metrics
import model_patch
from collate import Batch
from common import (
    AlignmentError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    Interrupted,
    listing,
    split_list,
)
from config import OPEN, Config, parse_config
from data import build_loaders, check_agreement, measure_records, read_records
from distributed import Dist, detail, log, log_list, progress_bar, setup_distributed
from export import pretrained
from export.final import write_final
from export.merge import describe_changes, relative_changes
from generate import best
from generate.drift import FILE as DRIFT_FILE
from generate.drift import Drift
from generate.models import start_from
from generate.pictures import media
from generate.samples import Sampler, build_sampler, describe
from layers import nf4
from layers.adapters import init_lora
from layers.optimizer import AveragingAdamW, LossScale, RowsAdamW, averaged, update
from loss import LabelSpec, LossSums, Objective, Tally
from metrics import Totals
from process import fit, lineage
from process.command import leave, says_errors
from process.gpu import DTYPES, has_bf16, repeat_to_the_bit
from process.log import Log, keep_output
from process.monitor import Monitor
from process.watchdog import watching

# ---------------------------------------------------------------------------------------------------------------------
# Model


Built = tuple[model_patch.TrainableHiggsAudioModel, LoraConfig | None]


def build_model(cfg: Config, dist: Dist, config: HiggsAudioConfig, folder: Path) -> Built:
    """Construct and load. No rank ever holds a full copy: weights go from the files into each rank's own rows."""
    model, lora = construct_model(cfg, dist, config)
    model_patch.materialize(model, dist.device, cpu_offload=cfg.cpu_offload)
    unused = dist.together(lambda: pretrained.check_base(model, folder))
    pretrained.load_base(model, folder)
    if unused:
        log(dist, f"{len(unused)} tensors of the checkpoint are not part of the model, first {unused[0]}")
    init_lora(model, cfg.seed)
    if cfg.quantize != "none":
        linears = (m for m in model.layers.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad)
        kinds = [nf4.is_quantized(linear.weight) for linear in linears]
        log(dist, f"{sum(kinds)} weights of the layers are NF4, {len(kinds) - sum(kinds)} are too small for its blocks")
    return model, lora


def construct_model(cfg: Config, dist: Dist, config: HiggsAudioConfig) -> Built:
    """Construct on meta, patch, adapt, choose dtypes, checkpoint activations, shard: in this order. It has no storage yet."""
    compute_dtype = DTYPES[cfg.mixed_precision]
    model = model_patch.patch_for_training(model_patch.build_on_meta(config))
    lora = None
    if cfg.lora_r:
        lora = model_patch.add_lora(model, **cfg.lora_settings)
        lora.base_model_name_or_path, lora.revision = cfg.base_ckpt, cfg.revision
    if cfg.freeze:
        model_patch.freeze(model, split_list(cfg.freeze))
    if cfg.consistency_loss_weight and not model.can_pack:
        raise ConfigError("--consistency_loss_weight: needs packed batches, which this checkpoint's layers cannot take")
    model_patch.set_training_dtypes(model, frozen_dtype=compute_dtype)
    if cfg.quantize != "none":
        nf4.quantize_layers(model, dist.world_size)
    model_patch.set_activation_checkpointing(model, cfg.activation_checkpointing or "none")
    if cfg.compile:
        model_patch.compile_layers(model)
    model_patch.shard(model, dist.mesh, param_dtype=compute_dtype, cpu_offload=cfg.cpu_offload)
    return model, lora


# ---------------------------------------------------------------------------------------------------------------------
# Step


@dataclass
class Task:
    """What a step works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    labels: LabelSpec
    dist: Dist
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    seed: int = 0
    scale: LossScale | None = None  # of float16


@dataclass
class StepResult:
    """Of one optimizer step, over all ranks and on the host."""

    total: Totals
    culprits: list[str]  # samples that made the loss not finite; if there are any, nothing was updated on any rank
    has_targets: bool = True  # without any, nothing was updated either
    overflow: bool = False  # of the scaled gradient in float16: nothing was updated, and the scale is halved


def forward(model, batch: Batch, labels: LabelSpec) -> tuple[Totals, tuple[Tensor, Tensor] | None]:
    """One micro-batch through the model; the sums are part of the graph.

    returns: the totals, and what the voice term compares (`loss.pool_voices`), None without voices
    """
    inputs, packing = batch.model_inputs(), batch.packing
    counts = {"num_frames": batch.num_frames, "num_unreadable": len(batch.unreadable), "num_clamped": len(batch.clamped)}
    if packing is not None and model.can_pack and labels.is_upstream:
        output = model(**inputs, packing=packing, voices=batch.voices)
        sums = LossSums.of(packing.text, output.text, packing.audio, output.audio, labels.stream_eos)
        num_positions = packing.num_positions
        return Totals(sums, num_positions, num_positions, packing.num_pairs, **counts), output.voices
    output = model(**inputs)  # padded rows, logits everywhere; the device has to be asked where everything is
    lengths = output.attention_mask.sum(1).tolist()
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    sums = loss.dense_sums(output, batch, labels)
    return Totals(sums, sum(lengths), output.attention_mask.numel(), pairs, **counts), None


class Speakers(NamedTuple):
    """Of the pairs in the micro-batches that all ranks work on at the same time."""

    names: list[str]  # rank by rank
    counts: list[int]  # pairs of each rank


def gather_speakers(batches: Sequence[Batch], dist: Dist) -> list[Speakers]:
    """For each micro-batch, the speakers of all ranks. Collective unless the batches have no voices."""
    if any(batch.voices is None for batch in batches):
        return [Speakers([], [])] * len(batches)
    by_rank = dist.gather([batch.voices.speakers for batch in batches])
    return [Speakers(list(itertools.chain.from_iterable(parts)), list(map(len, parts))) for parts in zip(*by_rank)]


def compare_voices(voices: tuple[Tensor, Tensor], speakers: Speakers, dist: Dist) -> Tally:
    """The consistency sums of this rank's pairs among those of all ranks. Collective."""
    trained, reference = voices
    references = dist.gather_rows(reference, speakers.counts)
    return loss.consistency_tally(trained, references, speakers.names, first=sum(speakers.counts[: dist.rank]))


def train_step(task: Task, batches: Sequence[Batch], step: int, lr: float) -> StepResult:
    """One optimizer step over this rank's micro-batches. Collective.

    Targets are counted over all micro-batches and ranks first. Each micro-batch then contributes its share of the one
    global loss, so gradients are summed: over micro-batches by accumulation, over ranks by FSDP, whose average the factor
    world_size turns back into a sum. Dropout is seeded by (seed, step, micro-batch), so a step does not depend on how its
    micro-batches are divided among ranks, and a resumed run equals an uninterrupted one.

    The host waits for the device once, for the logged figures, when everything is queued, the update too: the time of a step
    is that of all its work. So the device decides whether there is an update; see `update`.
    """
    model, dist = task.model, task.dist
    num_text, num_audio = count_targets(batches, dist)
    speakers = gather_speakers(batches, dist)
    num_voices = sum(loss.num_comparable(s.names) for s in speakers)

    total, values = None, []
    for index, batch in enumerate(batches):
        batch = batch.to(dist.device, non_blocking=True)
        model.set_requires_gradient_sync(index == len(batches) - 1)
        torch.manual_seed(_micro_batch_seed(task.seed, step, index * dist.world_size + dist.rank))
        part, voices = forward(model, batch, task.labels)
        if voices is not None:
            part.losses.consistency = compare_voices(voices, speakers[index], dist)
        value = task.objective(part.losses, num_text, num_audio, num_voices) * dist.world_size
        (value * task.scale.value if task.scale else value).backward()
        values.append(value.detach())
        total = part.detach() if total is None else total + part.detach()

    has_targets = num_text + num_audio.sum() + num_voices > 0
    norm = update(task.optimizer, lr, task.grad_clip, has_targets, task.scale)
    total.grad_norm = (norm if dist.is_main else torch.zeros_like(norm)).to(dist.device, non_blocking=True)
    total.pace = dist.pace()
    total = total.sum_over(dist)
    grad_norm = total.grad_norm = total.grad_norm.item()
    has_targets = total.losses.text.targets.sum() + total.losses.audio.targets.sum() + num_voices > 0
    if math.isfinite(grad_norm) or not has_targets:
        if task.scale:
            task.scale.grow()
        return StepResult(total, [], bool(has_targets))
    bad = [source for value, batch in zip(values, batches) if not value.isfinite() for source in batch.sources]
    culprits = [source for part in dist.gather(bad) for source in part]
    overflow = not culprits and task.scale is not None and task.scale.shrink()
    if not culprits and not overflow:
        culprits = ["(every loss is finite, the gradient is not)"]
    return StepResult(total, culprits, overflow=overflow)


def count_targets(batches: Sequence[Batch], dist: Dist) -> tuple[Tensor, Tensor]:
    """Text [] and audio [K] targets of all micro-batches and ranks, float32 on the device. Collective."""
    counts = [torch.cat([text[None], audio]) for text, audio in (batch.num_targets() for batch in batches)]
    counts = dist.sum(torch.stack(counts).sum(0).to(dist.device, non_blocking=True)).float()
    return counts[0], counts[1:]


def _micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    return ((seed * 1_000_003 + step) * 100_003 + micro_batch) % 2**63


def build_objective(cfg: Config, config: HiggsAudioConfig) -> Objective:
    weights, K = cfg.codebook_weight_list, config.audio_num_codebooks
    if weights and len(weights) != K:
        raise ConfigError(f"--codebook_weights has {len(weights)} values, the checkpoint {K} codebooks")
    return Objective(cfg.text_loss_weight, cfg.audio_loss_weight, tuple(weights) or None, cfg.consistency_loss_weight)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on matrices only, LoRA+'s rate on B alone. Create it after sharding."""
    groups: dict[tuple[bool, float], dict] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix, ratio = p.ndim >= 2, cfg.loraplus_lr_ratio if ".lora_B." in name else 1.0
            settings = {"params": [], "weight_decay": cfg.weight_decay * is_matrix, "lr_ratio": ratio}
            groups.setdefault((is_matrix, ratio), settings)["params"].append(p)
    groups = list(groups.values())
    settings = {"lr": cfg.peak_lr, "betas": (0.9, cfg.beta2), "fused": True}
    return AveragingAdamW(groups, cfg.ema, **settings) if cfg.ema else RowsAdamW(groups, **settings)


def lr_at(done: float, warmup: float, decayed: float, cfg: Config) -> float:
    """Learning rate of an optimizer step: linear warm-up, then cosine to min_lr_ratio.

    done, warmup: what is done of the run after this step, and how much of it is warm-up; see `Run.warm_up`
    decayed:      the share of the decay that is done before; below 0 where warm-up ends within the step, above 1 at the end
    """
    if done <= warmup:
        return cfg.peak_lr * done / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, decayed))))
    return cfg.peak_lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode without gradients; afterwards the model trains again and is sharded again.

    FSDP leaves some parameters whole after a forward without backward, where saving would find them.
    """
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model_patch.reshard(model)
        model.train()


def evaluate(task: Task, loader: data.Loader) -> dict:
    """Teacher-forced losses on the whole validation set, from sums and counts over all ranks. Collective."""
    dist, total, unreadable, clamped = task.dist, None, [], []
    with evaluating(task.model):
        for (batch,), _ in dist.iterate(loader.epoch(data.Position(0, 0))):
            (speakers,) = gather_speakers([batch], dist)
            part, voices = forward(task.model, batch.to(dist.device, non_blocking=True), task.labels)
            if voices is not None:
                part.losses.consistency = compare_voices(voices, speakers, dist)
            total = part if total is None else total + part
            unreadable += batch.unreadable
            clamped += batch.clamped
    total = total.sum_over(dist)
    gather_problems(unreadable, clamped, total, "validation", dist)
    bad_samples = int(total.num_unreadable + total.num_clamped)
    return task.objective.metrics(total.losses) | {"bad_samples": bad_samples, "copy_share": total.losses.copy_share()}


def gather_problems(unreadable: list[str], clamped: list[str], total: Totals, when: str, dist: Dist) -> list[list[str]]:
    """Name the samples that are left out or do not train; returns [unreadable, clamped] ones of all ranks. Collective."""
    count = int(total.num_unreadable + total.num_clamped)
    if not count:
        return [[], []]
    everyones = [list(itertools.chain.from_iterable(parts)) for parts in zip(*dist.gather((unreadable, clamped)))]
    log_list(dist, f"{when}: {count} sample{'s' * (count > 1)} left out of the loss", list(itertools.chain(*everyones)))
    return everyones


def check_first_batch(task: Task, batch: Batch) -> None:
    """Before the first step: log shapes and both losses, set the labels' alignment, look for copy collapse. Collective."""
    dist = task.dist
    batch = batch.to(dist.device)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            detail(dist, f"  {name:30} {tuple(value.shape)!s:20} {value.dtype}")
    task.labels = find_labels(task.labels, batch, dist)
    with evaluating(task.model):
        part, _ = forward(task.model, batch, task.labels)
    sums = part.sum_over(dist).losses
    values, copies = task.objective.metrics(sums), sums.copy_share()
    losses = (
        f"{name} loss {values[f'{name}_loss']:.4f} over {values[f'{name}_targets']} targets" for name in ("text", "audio")
    )
    detail(dist, f"  labels: text {task.labels.text}, audio {task.labels.audio}; {', '.join(losses)}; copy share {copies:.1%}")
    if not math.isfinite(values["loss"]):
        raise CheckpointError(
            "the loss is not finite before anything was trained: the weights that training starts from are damaged; look at "
            "--base_ckpt, or at the checkpoint that was resumed"
            + "; or they need more than float16: --mixed_precision no" * (task.scale is not None)
        )


def find_labels(labels: LabelSpec, batch: Batch, dist: Dist) -> LabelSpec:
    """The alignment of the labels that all ranks see in their batches; raises AlignmentError. Collective."""
    text = dist.together(lambda: loss.find_alignment(batch.label_ids, batch.input_ids, "text"))
    # Label audio of its own has no alignment to find; the collator makes it input-aligned.
    streams = batch.label_audio_ids, batch.audio_out_ids, "audio"
    has_audio = batch.label_audio_ids.numel() > 0 and not batch.has_label_overrides
    audio = dist.together(lambda: loss.find_alignment(*streams) if has_audio else None)
    found = {(t or "shift", a or "shift") for t, a in dist.gather((text, audio)) if t or a} or {("shift", "shift")}
    if len(found) > 1:
        raise AlignmentError(f"ranks found different label alignments: {sorted(found)}")
    ((text, audio),) = found
    return dataclasses.replace(labels, text=text, audio=audio)


# ---------------------------------------------------------------------------------------------------------------------
# Set up


@dataclass
class TrainState:
    """What the loop knows. A checkpoint keeps the first part of it beside the tensors."""

    step: int = 0  # optimizer steps done
    position: data.Position = field(default_factory=lambda: data.Position(0, 0))
    warm: float = 0.0  # epochs of data consumed when the learning rate began to decay
    bad_steps: int = 0  # skipped because they were not finite
    bad_samples: int = 0  # unreadable ones, left out
    clamped: int = 0  # samples with more audio placeholders than clips, left untrained
    broken: list[str] = field(default_factory=list)  # the sources of both
    spikes: int = 0
    losses: list[float] = field(default_factory=list)  # the last ones, to find spikes
    best: dict = field(default_factory=dict)  # among the evaluations: metric, value, step
    samples: dict = field(default_factory=dict)  # their best figures; see `best.contradictions`
    evaluated: int = 0  # the step of the last evaluation
    sampled: int = -1  # the base is sampled too
    scale: list[float] = field(default_factory=list)  # of `LossScale.kept`
    val_loss: float | None = None  # of that evaluation

    # Not kept.
    saved: int = 0
    bad_in_a_row: int = 0

    @classmethod
    def of(cls, kept: dict) -> TrainState:
        """From what `kept` gave; a checkpoint of an earlier version has no `clamped`."""
        fresh = cls()
        values = {name: kept[name] for name in fresh.kept() if name in kept}
        kinds = {list: list, data.Position: list, dict: dict, type(None): (float, type(None))}
        for name, value in values.items():
            if not isinstance(value, kinds.get(type(getattr(fresh, name)), (int, float))):
                raise CheckpointError(f"{checkpoint.STATE_FILE} of the checkpoint to resume from: {name} is {value!r}")
        done = dict.fromkeys(("evaluated", "sampled", "saved"), kept["step"])
        return cls(**done | values | {"position": data.Position(*kept["position"])})

    def kept(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("saved", "bad_in_a_row")}

    def add_loss(self, value: float, threshold: float) -> bool:
        """Note the loss of a step; returns whether it is a spike among the last ones."""
        is_spike = metrics.is_spike(value, self.losses, threshold)
        self.spikes += is_spike
        if math.isfinite(value):
            self.losses = [*self.losses, value][-metrics.WINDOW :]
        return is_spike


WARM_UP = 0.03  # of the run, without --warmup_steps


@dataclass
class Run:
    """What stays the same during the loop."""

    cfg: Config
    task: Task
    lora: LoraConfig | None
    loader: data.Loader
    val_loader: data.Loader | None
    config: HiggsAudioConfig
    tokenizer: Any
    base: Path  # folder of the base checkpoint
    resumed_from: Path | None = None
    monitor: Monitor | None = None
    sampler: Sampler | None = None
    drift: Drift | None = None
    saver: checkpoint.Saver | None = None
    num_steps: int = 0  # of the whole run
    began: float = field(default_factory=time.perf_counter)
    sampling_sec: float = 0.0

    def __post_init__(self):
        self.output_dir = Path(self.cfg.output_dir)

    @property
    def max_bad_samples(self) -> float:
        """How many broken samples the run puts up with."""
        limit = self.cfg.max_bad_samples
        return limit if limit >= 1 else limit * self.loader.num_samples

    def best_checkpoint(self, state: TrainState) -> Path | None:
        """The best step's checkpoint, unless that is the last step."""
        is_other = state.best.get("step", state.step) != state.step
        return self.output_dir / "checkpoints" / f"step_{state.best['step']}" if is_other else None

    def find_faults(self) -> list[str]:
        loaders = [loader for loader in (self.loader, self.val_loader) if loader]
        return [fault for loader in loaders for fault in loader.find_faults()]

    def epochs_done(self, state: TrainState) -> float:
        """How much of the data is consumed, on whatever number of ranks."""
        return state.position.epoch + state.position.samples_done / self.loader.num_samples

    def is_due(self, every: int | None, state: TrainState) -> bool:
        """Every so many steps; None: at the end of each epoch, which begins the next."""
        return state.position.samples_done == 0 if every is None else every > 0 and state.step % every == 0

    def done(self, state: TrainState) -> float:
        """How much of the run is done, in epochs, or in steps with --max_steps."""
        return state.step if self.cfg.max_steps else self.epochs_done(state)

    def warm_up(self, state: TrainState) -> tuple[float, float]:
        """(how much of the run is done, how much of it is warm-up), in the same unit."""
        if self.cfg.warmup_steps is None:
            return self.done(state), WARM_UP * (self.cfg.max_steps or self.cfg.epochs)
        return state.step, self.cfg.warmup_steps

    def progress(self, state: TrainState) -> tuple[float, float]:
        """(share of the run that is done, share of the learning rate's decay): by the data, or by steps with --max_steps."""
        done, end = self.done(state), self.cfg.max_steps or self.cfg.epochs
        is_counted = self.cfg.warmup_steps is not None and not self.cfg.max_steps  # in steps, but the run is in epochs
        warm = state.warm if is_counted else self.warm_up(state)[1]
        return done / end, (done - warm) / (end - warm) if end > warm else 1.0


def train(cfg: Config, dist: Dist) -> model_patch.TrainableHiggsAudioModel:
    """The whole run; returns the trained, sharded model."""
    folder = Path(cfg.output_dir)
    with dist.signals, lineage.locked(folder, dist), Log(folder / "log.txt", dist.rank, cfg.verbose):
        run = build_run(cfg, dist)
        state = TrainState() if cfg.dry_run else start(run)
        announce(run, state)
        if cfg.dry_run:
            return run.task.model
        dist.signals.begin(dist)
        dist.progress.at("starting", state.step)
        with watching(dist, run.output_dir, cfg.step_timeout, run.find_faults):
            is_done = loop(run, state)
        if is_done:
            finish(run, state)
        return run.task.model


def build_run(cfg: Config, dist: Dist) -> Run:
    """Data and model, agreed upon by all ranks. Collective."""
    resumed_from = lineage.choose_resume(cfg, dist)
    given, cfg = cfg, dist.together(lambda: lineage.inherit(cfg, resumed_from))
    if kept := [f"--{name} {getattr(cfg, name)}" for name in OPEN if getattr(cfg, name) != getattr(given, name)]:
        log(dist, f"as in the run that is continued: {' '.join(kept)}")
    cfg = choose_precision(cfg, dist)
    records, val_records = read_records(cfg, dist)
    check_agreement(cfg, dist, records, val_records)
    base = dist.main_first(lambda: pretrained.find_base(cfg.base_ckpt, cfg.revision))
    read = pretrained.read_base_config, pretrained.weight_files, pretrained.load_tokenizer
    config, _, tokenizer = dist.together(lambda: [function(base) for function in read])
    objective = dist.together(lambda: build_objective(cfg, config))
    cfg = fit.choose(cfg, dist, lambda: measure_records(cfg, dist, config, tokenizer, records))
    loader, val_loader = build_loaders(cfg, dist, config, tokenizer, records, val_records)
    model, lora = dist.together(lambda: build_model(cfg, dist, config, base))
    labels, scale = LabelSpec.of(config), LossScale.of(cfg.mixed_precision)
    task = Task(model, build_optimizer(model, cfg), objective, labels, dist, cfg.grad_clip, cfg.seed, scale)
    return Run(cfg, task, lora, loader, val_loader, config, tokenizer, base, resumed_from)


def choose_precision(cfg: Config, dist: Dist) -> Config:
    """The settings with --mixed_precision auto replaced: fp16 if a rank's GPU does not compute in bfloat16. Collective."""
    if cfg.mixed_precision != "auto":
        return cfg
    if lacks_bf16 := dist.any(not has_bf16(dist.device)):
        log(dist, "this GPU does not compute in bfloat16: --mixed_precision fp16, and attention with a copy of each key per head")
    return dataclasses.replace(cfg, mixed_precision="fp16" if lacks_bf16 else "bf16")


def start(run: Run) -> TrainState:
    """Resume, and open what the loop writes to. Collective."""
    cfg, task, dist, kept = run.cfg, run.task, run.task.dist, {}
    identity = lineage.identify(cfg, run.loader, run.val_loader, run.base, dist)
    if run.resumed_from:
        kept = resume(run, identity)
    state = TrainState.of(kept) if kept else TrainState()
    if task.scale and state.scale:
        task.scale = LossScale(*state.scale)
    if "warm" not in kept and state.step > (cfg.warmup_steps or 0):  # of an earlier version
        state.warm = run.epochs_done(state) * (cfg.warmup_steps or 0) / state.step
    identity |= lineage.ancestry(run.resumed_from, kept, run.output_dir) | {"started_from": kept.get("started_from")}
    if cfg.init_adapter and not run.resumed_from:
        identity["started_from"] = dist.main_first(lambda: start_from(task.model, run.lora, cfg.init_adapter))
        log(dist, "the adapter starts from {folder}, which was trained on {base}".format(**identity["started_from"]))
    dist.together(lambda: lineage.prepare_folder(run.output_dir, run.base) if dist.is_main else None)
    settings = lineage.write_config(cfg, dist, training_samples=run.loader.num_samples, run_id=identity["run_id"])
    redo = [split for split, last in (("val", state.evaluated), ("sample", state.sampled)) if last < state.step]
    run.monitor = dist.together(lambda: Monitor(run.output_dir, settings, state.step, cfg.wandb, dist.is_main, redo))
    if cfg.sample_steps != 0:
        run.sampler = build_sampler(cfg, run.config, (run.val_loader or run.loader).dataset, dist)
    if cfg.drift_manifest:
        run.drift = Drift.build(cfg, run.loader, task.labels, dist)
        if not run.lora:
            with evaluating(task.model):
                run.drift.remember(task.model, run.output_dir / DRIFT_FILE, state.step, dist)
    identity["settings"] = settings
    run.saver = checkpoint.Saver(run.output_dir / "checkpoints", task.model, task.optimizer, cfg.keep_last, identity)
    if cfg.memory_snapshot:
        torch.cuda.memory._record_memory_history()
    task.model.train()
    return state


def announce(run: Run, state: TrainState) -> None:
    """Say what the run has before it, and what of that cannot happen; keep fewer checkpoints than fit on the disk. Collective."""
    cfg, dist, model = run.cfg, run.task.dist, run.task.model
    run.num_steps = cfg.max_steps or state.step + run.loader.num_steps(state.position, cfg.epochs)
    total, trainable = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    where = f"{dist.world_size} rank(s) on {dist.device.type}; {trainable:,} of {total:,} parameters train"
    log(dist, f"{run.loader.num_samples} training samples, {run.num_steps} steps, {where}")
    never = {
        "warmup_steps": "the learning rate never reaches its peak",
        "val_steps": "it is evaluated at the end only",
        "sample_steps": "samples are of the base and of the last step only",
        "save_steps": "only the last step is saved",
    }
    for name, what in never.items():
        if (steps := getattr(cfg, name) or 0) > run.num_steps:
            log(dist, f"warning: --{name} {steps}: the run has {run.num_steps} steps: {what}")
    if run.saver and cfg.save_steps != 0:
        size = 4 * trainable * (4 if cfg.ema else 3)  # masters and moments in float32
        kept = f"the newest {cfg.keep_last} and the best are kept" if cfg.keep_last else "all are kept"
        old = len(checkpoint.list_states(run.saver.folder))
        free = dist.from_main(shutil.disk_usage(run.output_dir).free + size * old)
        log(dist, f"each checkpoint has {size / 1e9:.3g} GB, {kept}; {free / 1e9:.3g} GB are free")
        fitting = max(1, free // size - 2)  # beside the best, and the one that is being written
        if fitting < cfg.keep_last:
            run.saver.keep_last = fitting
            log(dist, f"warning: room for {free // size} checkpoints: --keep_last is {fitting} instead of {cfg.keep_last}")


def resume(run: Run, identity: dict) -> dict:
    """Load the checkpoint to continue from, if it belongs to this run; returns its state. Collective."""
    folder, task, dist = run.resumed_from, run.task, run.task.dist
    kept, notes = dist.together(lambda: lineage.compare(folder, identity, run.cfg.resume_changed))
    dist.together(lambda: checkpoint.check_state(folder, task.model, task.optimizer))
    checkpoint.load_state(folder, task.model, task.optimizer)
    log(dist, f"resumed from {folder}: {kept['step']} steps done")
    for note in notes:
        log(dist, f"note: {note}")
    aside = dist.together(lambda: lineage.set_aside(run.output_dir, kept["step"]) if dist.is_main else [])
    log_list(dist, f"{len(aside)} later checkpoints are set aside, for you to remove", list(map(str, aside)))
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Loop


def loop(run: Run, state: TrainState) -> bool:
    """Evaluate, sample, save, stop, step, log, always in that order; returns whether the run came to its end. Collective."""
    cfg, task, dist = run.cfg, run.task, run.task.dist
    flops, frame_rate_hz = metrics.Flops.of(task.model), run.loader.dataset.store.frame_rate_hz
    bar = progress_bar(dist, desc="train", unit="step", total=run.num_steps, initial=state.step)
    steps = dist.iterate(iter_steps(run.loader, state.position))
    checked, failure, stragglers = False, None, metrics.Stragglers()
    while True:
        if state.step <= (cfg.warmup_steps or 0):
            state.warm = run.epochs_done(state)
        progress, decayed = run.progress(state)
        done = progress >= 1 or 0 < cfg.patience <= state.best.get("waited", 0)

        # At the end, first save what the last evaluation, the samples and final/ could lose.
        if done and state.saved != state.step:
            save_last(run, state)

        # Evaluate and generate samples, every so many steps and at the end. What a signal cuts short is done after the resume.
        with contextlib.suppress(Interrupted):
            if run.val_loader and state.evaluated != state.step and (done or run.is_due(cfg.val_steps, state)):
                if not checked:
                    (first, *_), _ = next(dist.iterate(run.val_loader.epoch(data.Position(0, 0))))
                    check_first_batch(task, first)
                    checked = True
                validate(run, state)
            if run.sampler and state.sampled != state.step and (done or run.is_due(cfg.sample_steps, state)):
                sample(run, state)

        # Save beside training, every --save_steps and at the end, and what a stop or failure leaves.
        stop, is_writing = dist.each(dist.signals.received is not None, run.saver.is_writing)  # on any rank
        if not is_writing:
            commit(run)
        is_best = state.best.get("step") == state.step
        due = cfg.save_steps != 0 and not done and (run.is_due(cfg.save_steps, state) or is_best)
        if state.saved != state.step and (due or stop or failure):
            save(run, state, must=bool(stop or failure))
        elif done and state.saved == state.step:
            run.saver.amend(state.kept())  # by what the last evaluation and samples were
        dist.progress.at("saving")
        if stop or failure or done:
            commit(run, must=bool(stop or failure))
            bar.close()

        # Stop.
        if failure:
            raise failure
        if stop:
            dist.signals.obeyed = next(filter(None, dist.gather(dist.signals.received)))
            name, saved = dist.signals.obeyed.name, run.saver.newest or run.resumed_from or "no checkpoint"
            log(dist, f"received {name}: stopped after step {state.step}, saved in {saved}; continue with --resume auto")
            return False
        if done:
            return True

        # Read; look at the first batch before it trains.
        epoch = state.position.epoch
        try:
            batches, state.position = next(steps)
        except Interrupted:
            continue  # to the stop above
        if not checked:
            detail(dist, "first batch:")
            check_readable(batches, run.max_bad_samples, dist)
            check_first_batch(task, batches[0])
            checked = True

        # One timed step.
        started = time.perf_counter()
        lr = lr_at(*run.warm_up(dataclasses.replace(state, step=state.step + 1)), decayed, cfg)
        result = train_step(task, batches, state.step, lr)
        seconds = dist.progress.step_sec = time.perf_counter() - started
        values = metrics.step_metrics(result.total, task.objective, seconds, flops, frame_rate_hz, dist)
        state.step += 1
        dist.progress.at("logging", state.step)

        # Log it, and keep what went wrong.
        mine = ([problem for batch in batches for problem in getattr(batch, kind)] for kind in ("unreadable", "clamped"))
        problems = gather_problems(*mine, result.total, f"step {state.step}", dist)
        is_spike = note(run, state, result, values, problems)
        counts = {name: getattr(state, name) for name in ("bad_steps", "bad_samples", "clamped", "spikes")}
        about = {"split": "train", "step": state.step, "epoch": epoch, "lr": lr, "grad_norm": result.total.grad_norm}
        scaling = {"loss_scale": task.scale.value, "overflows": task.scale.overflows} if task.scale else {}
        run.monitor.write(**about, **counts, **values, **scaling)
        if straggler := stragglers.add(values["data_wait_sec"], seconds):
            log(dist, f"step {state.step}: {straggler}")
        if result.culprits or is_spike:
            keep_batches(run, state, result, values["loss"], batches)
        if state.step == cfg.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(run.output_dir / f"memory-rank{dist.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            log(dist, f"{run.output_dir}/memory-rank*.pickle: open it at pytorch.org/memory_viz")
        failure = find_failure(run, state, any(problems))
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "text_loss", "audio_loss")}
        bar.set_postfix(shown | {"tok/s": f"{values['tokens_per_sec']:.0f}"}, refresh=False)
        bar.update()


def save(run: Run, state: TrainState, must: bool = False) -> None:
    """Begin a checkpoint. Collective.

    must: the run ends here, so that without this checkpoint its work would be lost
    """
    commit(run, must)
    with forgiving(run, must):
        run.saver.start(state.kept())
        state.saved = state.step


def commit(run: Run, must: bool = False) -> None:
    """Finish the checkpoint that was begun, if any. Collective."""
    with forgiving(run, must):
        if (saved := run.saver.commit()) and run.cfg.save_steps != 0:
            log(run.task.dist, f"saved {saved}")


@contextlib.contextmanager
def forgiving(run: Run, must: bool):
    """A checkpoint that nobody asked for is saved only if the disk has room for it."""
    try:
        yield
    except CheckpointError as error:
        if run.cfg.save_steps or must:
            raise
        run.saver.newest = next(reversed(checkpoint.list_states(run.saver.folder)), None)
        log(run.task.dist, f"warning: {error}")


def save_last(run: Run, state: TrainState) -> None:
    """Save a checkpoint at the end, with --save_steps 0 too. Collective."""
    if run.cfg.save_steps == 0:
        run.saver.keep_last = 0  # it will be discarded, and must not drive out others
    save(run, state)
    commit(run)


def iter_steps(loader: data.Loader, position: data.Position):
    """The optimizer steps from `position` on, epoch after epoch, without end."""
    while True:
        for batches, after in loader.epoch(position):
            is_last = after.samples_done >= loader.num_samples
            yield batches, data.Position(after.epoch + 1, 0) if is_last else after
        position = data.Position(position.epoch + 1, 0)


def validate(run: Run, state: TrainState) -> None:
    """Evaluate, log, and note whether it is the best so far. Collective."""
    task, dist = run.task, run.task.dist
    with averaged(task.optimizer):
        values = evaluate(task, run.val_loader)
        if run.drift:
            with evaluating(task.model):
                values |= run.drift.measure(task.model)
        if run.lora and state.step and not state.evaluated:
            log(dist, describe_changes(relative_changes(task.model)))
    state.evaluated = state.step
    run.monitor.write(split="val", step=state.step, epoch=state.position.epoch, **values)
    state.val_loss = values["loss"]
    losses = f"validation loss {values['loss']:.4f} (text {values['text_loss']:.4f}, audio {values['audio_loss']:.4f})"
    losses += "".join(f", {name} {values[name]:.3f}" for name in ("eos_accuracy", "copy_share"))
    log(dist, f"step {state.step}: {losses}{note_best(run, state, values)}")


def note_best(run: Run, state: TrainState, values: dict) -> str:
    """Note an evaluation, or a round of samples; what is to be said about it."""
    cfg, before = run.cfg, state.best
    state.best = best.note(before, cfg.best_by, values, state.step)
    if state.best.get("step") != before.get("step"):
        return ", the best so far"
    waited = state.best.get("waited", 0)
    is_over = cfg.patience and waited == cfg.patience > before.get("waited", 0)
    return f"; {cfg.best_by} has not improved {waited} times: the run ends (--patience)" if is_over else ""


def sample(run: Run, state: TrainState) -> None:
    """Generate the samples, log and keep them. Collective."""
    dist = run.task.dist
    dist.progress.at("generating samples")
    started = time.perf_counter()
    with averaged(run.task.optimizer), evaluating(run.task.model):
        values = run.sampler.sample(run.task.model, state.step, dist)
    state.sampled = state.step
    run.sampling_sec += (now := time.perf_counter()) - started
    if state.step and run.sampling_sec > 0.1 * (now - run.began):
        share = f"{run.sampling_sec / (now - run.began):.0%}".replace("%", " %")
        log(dist, f"samples take {share} of the time; --num_samples, or --sample_steps with a number of steps, makes that less")
        run.sampling_sec = -math.inf  # said once
    if values is None:
        return
    run.monitor.write(split="sample", step=state.step, epoch=state.position.epoch, **values)
    if dist.is_main:
        run.monitor.write_samples(state.step, media(run.sampler.folder / f"step_{state.step}"))
    log(dist, f"step {state.step}: {describe(values)}{note_best(run, state, values)}")
    state.samples, found = best.contradictions(state.samples, state.val_loss, values, state.step)
    for contradiction in found:
        log(dist, f"warning: {contradiction}")


def check_readable(batches: Sequence[Batch], max_bad_samples: float, dist: Dist) -> None:
    """DataError, on all ranks, if the first step finds nothing to read or too much that is unreadable. Collective."""
    mine = [problem for batch in batches for problem in (*batch.unreadable, *batch.clamped)]
    has_targets = any(sum(map(Tensor.sum, batch.num_targets())) > 0 for batch in batches)
    problems, readable = zip(*dist.gather((mine, has_targets)))
    problems = [problem for part in problems for problem in part]
    if len(problems) > max_bad_samples or not any(readable):
        raise DataError(listing(f"{len(problems)} samples of the first step cannot be used:", problems))


def note(run: Run, state: TrainState, result: StepResult, values: dict, problems: Sequence[Sequence[str]]) -> bool:
    """Count what went wrong in a step, each broken sample once; returns whether the loss is a spike."""
    if scale := run.task.scale:
        state.scale = scale.kept()
    if result.overflow:
        problem = f"the gradient times the loss scale {2 * scale.value:g} is too large for float16"
        log(run.task.dist, f"step {state.step}: {problem}; skipped, the scale is {scale.value:g} now")
    is_bad = bool(result.culprits) or not result.has_targets
    state.bad_steps += is_bad
    state.bad_in_a_row = state.bad_in_a_row + 1 if is_bad else 0
    unreadable, clamped = ({problem.split(": ")[0] for problem in kind} - {*state.broken} for kind in problems)
    state.bad_samples += len(unreadable)
    state.clamped += len(clamped)
    state.broken += sorted(unreadable | clamped)
    if not result.has_targets:
        log(run.task.dist, f"step {state.step}: no target on any rank, so nothing was learned")
        return False
    done, warm_up = run.warm_up(state)
    return state.add_loss(values["loss"], run.cfg.spike_threshold if done > warm_up else 0.0)


def keep_batches(run: Run, state: TrainState, result: StepResult, value: float, batches: Sequence[Batch]) -> None:
    """Say what went wrong, and keep the step's micro-batches for `replay`; a full disk is no reason to stop."""
    cfg, labels, dist = run.cfg, run.task.labels, run.task.dist
    if result.culprits:
        log(dist, f"step {state.step}: not finite, skipped; samples: {', '.join(result.culprits)}")
    else:
        log(dist, f"step {state.step}: loss {value:.4f} is far above the median of the last steps")
    if state.bad_steps + state.spikes > metrics.MAX_DUMPS:
        return
    about = {"step": state.step, "loss": value, "grad_norm": result.total.grad_norm, "alignment": [labels.text, labels.audio]}
    about |= {"resume": str(run.saver.newest or run.resumed_from or ""), "config": dataclasses.asdict(cfg)}
    about |= {"rank": dist.rank, "world_size": dist.world_size}
    folder = run.output_dir / "spikes"
    try:
        metrics.write_dump(folder, about, batches)
    except OSError as error:
        print(f"rank {dist.rank}: {folder}: the batches cannot be kept: {error}", file=sys.stderr, flush=True)
    log(dist, f"step {state.step}: look again with bash launch.sh replay {folder}/step_{state.step}-rank0.safetensors")


def find_failure(run: Run, state: TrainState, has_problems: bool) -> Exception | None:
    """Why the run has to end after this step, if it has to; a resumed run goes on once all samples are mended."""
    cfg, count = run.cfg, state.bad_samples + state.clamped
    if has_problems and count > run.max_bad_samples:
        return DataError(
            f"{count} samples could not be read or used, more than --max_bad_samples {cfg.max_bad_samples:g}. Saved at step "
            f"{state.step}; mend what is named above, or allow for more, then continue with --resume auto"
        )
    if 0 < cfg.max_bad_steps <= state.bad_in_a_row:
        problem = f"{state.bad_in_a_row} steps in a row were not finite, or without targets. Saved at step {state.step}"
        return DivergenceError(f"{problem}; look at the samples named above, or lower --lr")
    return None


def finish(run: Run, state: TrainState) -> None:
    """Write OUTPUT/final; with --save_steps 0 the checkpoint of the last step goes then. Collective."""
    task, dist = run.task, run.task.dist
    if chosen := run.cfg.final == "best" and run.best_checkpoint(state):
        dist.together(lambda: checkpoint.check_state(chosen, task.model, task.optimizer))
        checkpoint.load_state(chosen, task.model, task.optimizer)
        log(dist, f"final/ is the best step by {run.cfg.best_by}, {state.best['step']} of {state.step}")
    with averaged(task.optimizer):
        if run.lora:
            log(dist, describe_changes(relative_changes(task.model)))
        model = task.model, run.config, run.tokenizer, run.lora
        try:
            merging = write_final(run.output_dir, *model, base=run.base, merge_lora=run.cfg.merge_lora)
        except CheckpointError as error:
            kept = f"; {run.saver.newest} is whole: mend this, then continue with --resume auto" if run.saver.newest else ""
            raise CheckpointError(f"{error}{kept}") from None
    if run.cfg.save_steps == 0:
        run.saver.discard()
    if merging:
        log(dist, f"final/merged: {merging}")
    log(dist, f"finished: {run.output_dir / 'final'}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@says_errors
def main(argv: Sequence[str]) -> int:
    cfg = parse_config(argv, description=__doc__)
    if cfg.deterministic:
        repeat_to_the_bit()
    dist = setup_distributed(cfg.device, cfg.replicate, cfg.dist_timeout)
    train(cfg, dist)
    return dist.signals.status()


def run_and_exit(argv: Sequence[str]) -> None:
    """`main` as a process of its own. Ranks that merely lost the others wait a moment: the one that failed prints first."""
    keep_output()
    try:
        status = main(argv)
    except Exception as error:
        if distributed.lost_others(error):
            time.sleep(10)
        get_error_handler().record_exception(error)  # for the launcher, which repeats it last
        traceback.print_exc()
        status = 1
    leave(status)


if __name__ == "__main__":
    run_and_exit(sys.argv[1:])
