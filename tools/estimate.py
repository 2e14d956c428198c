"""What a training step needs, without a GPU or weights: train.py's own step on tensors without data, among fake ranks.

Nothing is a formula: every tensor, collective and matrix product of `train.train_step` is counted. Not counted are the
allocator's fragmentation, kernel workspaces, the CUDA context and NCCL; `Estimate.needed` leaves room for them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as torch_dist
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import flop_registry

import checkpoint
import data
import loss
import model_patch
import train
from collate import Batch, create_collator
from config import Config
from distributed import Dist, make_mesh, own_rows
from layers import packed
from prepare.audio import AudioStore
from process.gpu import Gpu
from tools import synthetic, toys
from tools.memory import LiveBytes

FRAGMENTATION = 1.05
RESERVED = 1.5 * 2**30  # bytes: the CUDA context, NCCL's buffers, workspaces
# Of AdamW per parameter: reads the gradient twice and writes it once to clip it; reads gradient, weight and two moments,
# writes weight and moments. All are float32.
OPTIMIZER_BYTES = 40
MATMULS = {getattr(torch.ops.aten, name): flop_registry[getattr(torch.ops.aten, name)] for name in ("mm", "addmm", "bmm")}
MATMULS[torch.ops.aten.addmm_] = MATMULS[torch.ops.aten.addmm]


@dataclass(frozen=True)
class Estimate:
    """What one rank needs, in bytes; `sent` and `flops` per optimizer step."""

    weights: int
    optimizer: int
    peak: int  # on the GPU at the worst moment, weights and optimizer state included (unless --cpu_offload)
    sent: float  # to other ranks, by ring algorithms
    flops: float  # of all matrix products that run, recomputed ones included
    trained: int  # parameters that this rank updates

    @property
    def needed(self) -> float:
        """Bytes a GPU should have."""
        return self.peak * FRAGMENTATION + RESERVED

    def step_sec(self, gpu: Gpu, share: float) -> float:
        """Seconds of an optimizer step, by a roofline: matrix products at `share` of the GPU's peak or, if that takes
        longer, communication at the link's rate; then the optimizer at the memory's rate."""
        busy = max(self.flops / (gpu.bf16_flops * share), self.sent / gpu.link_rate)
        return busy + self.trained * OPTIMIZER_BYTES / gpu.memory_rate


class Counter(LiveBytes):
    """Counts bytes that live, bytes that are sent and FLOPs; reading a number from a fake tensor gives 1.0."""

    def __init__(self, attention_flops: float) -> None:
        """attention_flops: of the two products of one layer's attention, forward"""
        super().__init__()
        self.sent = 0.0
        self.flops = 0.0
        self._attention_flops = attention_flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if func.namespace == "c10d":
            self.sent += _ring_bytes(func, args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in MATMULS:
            self.flops += MATMULS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        if "varlen_attn" in func.name():  # backward: the scores again and two gradients of each product
            self.flops += self._attention_flops * (2.5 if "backward" in func.name() else 1)
        return result


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

    on_gpu: with a GPU's attention kernel and prefetching; else a CPU's, whose attention is not in `flops`
    raises: ConfigError, PatchError as train.py would
    """
    torch_dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        device = torch.device("cpu")  # so that neither CUDA nor streams are needed
        dist = Dist(0, 0, world_size, device, make_mesh("cpu", world_size, cfg.replicate))
        with like_device(on_gpu):
            model, _ = train.construct_model(cfg, dist, config)
        pairs = 4 * batch.packing.num_pairs * config.text_config.hidden_size
        with like_device(on_gpu), FakeTensorMode(allow_non_fake_inputs=True), Counter(pairs) as live:
            model_patch.materialize(model, device)
            weights = live.now
            optimizer = train.build_optimizer(model, cfg)
            checkpoint.create_state(optimizer)
            state = live.now - weights
            trained = sum(own_rows(p).numel() for group in optimizer.param_groups for p in group["params"])
            model.train()
            objective, labels = train.build_objective(cfg, config), loss.LabelSpec.of(config)
            task = train.Task(model, optimizer, objective, labels, dist, cfg.grad_clip, cfg.seed)
            train.train_step(task, [batch] * cfg.grad_accum, step=0, lr=cfg.peak_lr)
        on_host = weights + state if cfg.cpu_offload else 0
        return Estimate(weights, state, live.peak - on_host, live.sent, live.flops, trained)
    finally:
        torch_dist.destroy_process_group()


@contextlib.contextmanager
def like_device(on_gpu: bool) -> Iterator[None]:
    """The attention kernel, prefetching and pieces of logits of a GPU, or of a CPU."""
    num_logits = loss.max_logits(torch.device("cuda" if on_gpu else "cpu"))
    kernel = mock.patch.object(packed, "has_varlen_kernel", lambda *_: on_gpu)
    prefetch = mock.patch.object(model_patch, "can_prefetch", lambda *_: on_gpu)
    with kernel, prefetch, mock.patch.object(loss, "max_logits", lambda _: num_logits):
        yield


def clones_of(config: HiggsAudioConfig, seconds: np.ndarray) -> Batch:
    """One micro-batch of clones, [records, 2] seconds of reference and target."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = synthetic.write_clones(Path(folder), seconds, config.audio_codebook_size)
        store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, synthetic.FRAME_RATE_HZ, Path(folder))
        dataset = data.ChatMLDataset(data.read_manifest(manifest), toys.make_tokenizer(), store)
        return create_collator(config)([dataset[i] for i in range(len(dataset))])
