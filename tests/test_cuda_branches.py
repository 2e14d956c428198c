"""What a GPU does otherwise, as far as a CPU can show it; docs/cuda.md says what is left for `pytest -m gpu`."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import case_samples, flat, make_model, run_ranks
from test_distributed import train_a_little
from torch import Tensor

import model_patch
import train
from collate import create_collator
from layers import packed
from loss import LabelSpec

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
    return flat(sums), [p.grad.clone() for p in model.parameters() if p.grad is not None]


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
