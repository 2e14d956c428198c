"""What a GPU does otherwise, as far as a CPU can show it; docs/cuda.md says what is left for `pytest -m gpu`."""

from __future__ import annotations

import contextlib
import functools
import re
import sys

import pytest
import torch
from conftest import case_samples, make_model, run_ranks
from test_consistency import clones
from test_distributed import train_a_little
from test_packing import CountSyncs
from torch import Tensor
from torch.overrides import TorchFunctionMode

import distributed
import model_patch
import train
from collate import create_collator
from config import parse_config
from distributed import Dist
from layers import packed
from layers.optimizer import LossScale
from loss import LabelSpec, Objective

NAMES = ["single", "padded", "multi-segment", "reference and target"]


@functools.wraps(packed.varlen_attn)  # layers/packed.py asks for its parameters
def strict_varlen(query: Tensor, key: Tensor, value: Tensor, ends_q, ends_k, max_q, max_k, **options) -> Tensor:
    """What the kernel demands of its arguments, checked; then each sample by itself in float32."""
    assert {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}, "half precision only"
    assert all(states.stride(-1) == 1 and states.shape[-1] % 8 == 0 for states in (query, key, value))
    assert ends_q is ends_k and ends_q.dtype == torch.int32 and ends_q.is_contiguous() and ends_q.device == query.device
    lengths = ends_q.diff().tolist()
    assert ends_q[0] == 0 and ends_q[-1] == len(query) == len(key) == len(value) and min(lengths) > 0
    assert type(max_q) is int and max_q == max_k == max(lengths)
    is_grouped = query.shape[1] != key.shape[1]
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
    assert options == {"window_size": (-1, 0)} | ({"enable_gqa": True} if is_grouped else {})
    pieces = []
    for q, k, v in zip(*(states.float().split(lengths) for states in (query, key, value))):
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        piece = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        pieces.append(piece[0].transpose(0, 1))
    return torch.cat(pieces).to(query.dtype)


def trainable(config, mode: str):
    model = model_patch.patch_for_training(make_model(config)).train()
    model_patch.set_activation_checkpointing(model, mode)
    return model


def losses_and_gradients(model, batch, labels) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    sums = train.forward(model, batch, labels)[0].losses
    (sums.text.nats + sums.audio.nats.sum()).backward()
    return torch.cat([sums.text.nats, sums.audio.nats]).detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_kernel_is_asked_for_what_it_can(name, mode, config, tokenizer, monkeypatch):
    """bf16 through a strict stand-in of the varlen kernel and through the CPU's attention: the same up to bf16.

    Measured: losses within 1e-4, gradients within 5.7e-3 of their norm.
    """
    batch, labels = create_collator(config)(case_samples(name, tokenizer)), LabelSpec.of(config)
    model = trainable(config, mode).to(torch.bfloat16)
    losses, gradients = losses_and_gradients(model, batch, labels)
    calls = []
    monkeypatch.setattr(packed, "has_varlen_kernel", lambda device, dtype: dtype == torch.bfloat16)
    counted = functools.wraps(strict_varlen)(lambda *args, **options: calls.append(1) or strict_varlen(*args, **options))
    monkeypatch.setattr(packed, "varlen_attn", counted)
    found, others = losses_and_gradients(model, batch, labels)
    assert len(calls) == config.text_config.num_hidden_layers * (2 if mode == "full" else 1)
    torch.testing.assert_close(found, losses, rtol=1e-3, atol=1e-3)
    distance = sum((a - b).float().square().sum() for a, b in zip(others, gradients)).sqrt()
    assert distance < 0.02 * sum(g.float().square().sum() for g in gradients).sqrt()


def train_with_prefetch(dist, *args):
    model_patch.can_prefetch = lambda mesh: True
    return train_a_little(dist, *args)


def test_prefetching_changes_nothing(toys, checkpoint_dir):
    """Two ranks: weights that are gathered early, as on GPUs, give every bit of the same losses, norms and parameters."""
    args = str(checkpoint_dir), str(toys / "train.jsonl"), 0, 2, 0.0, 2
    (losses, norms, parameters), _ = run_ranks(train_a_little, 2, *args)
    for found in run_ranks(train_with_prefetch, 2, *args):
        assert found[:2] == (losses, norms)
        assert all(torch.equal(found[2][name], parameter) for name, parameter in parameters.items())


class NewTensors(TorchFunctionMode):
    """Notes tensors that are made from Python numbers on the device, which are copied there and waited for."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
            self.found.append("to the device")
        return result


class Waits(CountSyncs):
    """What the host would wait for if meta tensors were a GPU's, in order, with the optimizer's updates among it.

    Copies to the device without non_blocking, numbers made into tensors there, all copies to the host, and what asks the device.
    What arrives on the host is 0.
    """

    def __enter__(self):
        self._numbers = NewTensors(self.found)
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else kwargs.get("device", source.device)
            if source.is_meta and target.type == "cpu":
                self.found.append("to the host")
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if target.type == "meta" and not source.is_meta and not (kwargs.get("non_blocking") or True in args[2:]):
                self.found.append("to the device")
        elif name == "_fused_adamw_":
            self.found.append("update")
        elif name == "_local_scalar_dense":
            if not args[0].is_meta:
                return function(*args, **kwargs)
            self.found.append("item")
            return 1.0
        return super().__torch_dispatch__(function, types, args, kwargs)


def alone_on(device: str, monkeypatch) -> Dist:
    """One rank whose collectives change nothing."""
    monkeypatch.setattr(distributed.torch_dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed.torch_dist, "all_gather", lambda parts, tensor: None)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    return Dist(0, 0, 1, torch.device(device), None)


def step_on_meta(config, tokenizer, monkeypatch, *flags: str) -> tuple[Waits, train.StepResult]:
    """A step of two micro-batches with the voice term and codebook weights, and the flags that ranks exchange between steps."""
    monkeypatch.setattr(packed, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # which meta tensors do not have
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    dist = alone_on("meta", monkeypatch)
    model = model_patch.patch_for_training(make_model(config)).to("meta").train()
    model.set_requires_gradient_sync = lambda flag: None
    cfg = parse_config(["--train_manifest", "m", "--output_dir", "o", "--lora_r", "0", *flags])
    objective = Objective(codebook_weights=tuple(range(1, 9)), consistency_weight=0.5)
    task = train.Task(model, train.build_optimizer(model, cfg), objective, LabelSpec.of(config), dist)
    task.scale = LossScale.of(cfg.mixed_precision)
    collate = create_collator(config, with_voices=True)
    batches = [collate(list(clones(tokenizer, *names))) for names in (("ann", "bob"), ("cid", "ann"))]
    with Waits() as waits:
        result = train.train_step(task, batches, step=0, lr=1e-3)
        assert dist.each(True, False) == [True, False] and dist.together(lambda: 1) == 1
    assert waits.num_ops > 1000
    return waits, result


@pytest.mark.parametrize("flags", [[], ["--ema", "0.9"], ["--mixed_precision", "fp16"]])
def test_a_step_waits_once_for_the_device(flags, config, tokenizer, monkeypatch):
    """The one wait is for the figures, after all updates: so the time of a step holds all its work."""
    waits, result = step_on_meta(config, tokenizer, monkeypatch, *flags)
    assert waits.found == ["update", "update", "to the host"], "matrices, vectors, figures"
    found: list = []
    result.total.map(found.append)
    assert {value.device.type for value in found if isinstance(value, Tensor)} == {"cpu"}


# What `torch.use_deterministic_algorithms` names as impossible on a GPU; its NLLLoss is that of pictures, cumsum that of floats,
# and of EmbeddingBag it is the mode max: sums are sorted first.
RANDOM = "avg_pool|max_pool|max_unpool|upsample|reflection_pad|nll_loss2d|ctc_loss|histc|bincount|median"
RANDOM += "|grid_sampler|cumsum|scatter_reduce|kthvalue|^put_$"


def test_a_step_has_deterministic_operators_alone(config, tokenizer, monkeypatch):
    waits, _ = step_on_meta(config, tokenizer, monkeypatch, "--ema", "0.9")
    assert {"embedding_dense_backward", "nll_loss_forward", "_varlen_attn_backward"} <= waits.names
    assert not [name for name in waits.names if re.search(RANDOM, name)]


def test_what_would_wait_is_noticed():
    """Each kind of wait, in words of PyTorch."""
    there, here = torch.zeros(3, device="meta"), torch.zeros(3)
    with Waits() as waits:
        here.to("meta", non_blocking=True), there.new_full((), 3), torch.full((2,), 1.0, device="meta"), here[0].item()
        there.copy_(here, non_blocking=True)
        assert not waits.found
        here.to("meta"), torch.tensor([1.0], device="meta"), there.new_tensor(3.0), there.copy_(here)
        assert waits.found == ["to the device"] * 4
        there.cpu(), there.tolist(), there[0].item(), bool(there[0] > 0)
        assert waits.found[4:] == ["to the host", "to the host", "item", "item"]
