"""The dual-FFN layer on packed positions, written for few passes over memory.

Beside its matrix products a layer costs what it reads and writes, in passes over [T, D]: here 34 forward and 57 backward, which
tests/test_passes.py counts. Autograd would take half as many again, with PEFT's forward more than twice as many.

Legend: T real positions in the batch, D width; sorted and packed order are those of `collate.Layout`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence

import torch
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from collate import Layout
from layers.nf4 import plain
from process.gpu import has_bf16


class TrainableDualFFNDecoderLayer(HiggsAudioDualFFNDecoderLayer):
    """The dual-FFN layer on real positions alone, text before audio, so that each norm and FFN has a slice to itself."""

    checkpointing = "none"
    compiled = False

    def forward(self, hidden_states, *args, layout: Layout | None = None, position_embeddings=None, **kwargs):
        """With a layout: hidden_states [T, D] and the result are sorted, position_embeddings, two [T, head_dim], packed."""
        if layout is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        run = functools.partial(self._forward_packed, layout=layout)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return run(hidden_states, *position_embeddings)
        calls = itertools.count()  # the second one recomputes what the backward pass reads, which the result is not

        def run_again(*states: Tensor) -> Tensor:
            return run(*states, is_needed=next(calls) == 0 or self.checkpointing == "selective")

        context = {"context_fn": _selective_contexts} if self.checkpointing == "selective" else {}
        return checkpoint(run_again, hidden_states, *position_embeddings, use_reentrant=False, **context)

    def _forward_packed(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout, is_needed: bool = True) -> Tensor:
        # Attention goes by the samples' lengths, which differ in every batch, so it stays outside of what is compiled.
        before, after = (_compiled(f) if self.compiled else f for f in (_before_attention, _after_attention))
        order = layout.num_text, layout.perm, layout.inverse_perm
        states = before(self, hidden, cos, sin, *order)
        return after(self, hidden, attend(*states, layout), *order, is_needed)


def _before_attention(
    layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, num_text: int, perm: Tensor, inverse_perm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, heads, head_dim], keys and values [T, key heads, head_dim], in packed order."""
    attention = layer.self_attn
    text, audio = hidden.split((num_text, len(hidden) - num_text))
    normed = Pack.apply(_normed(layer.input_layernorm, text), _normed(layer.audio_input_layernorm, audio), perm)
    states = project(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (rows.unflatten(1, (-1, attention.head_dim)) for rows in states)
    return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin), value


def _after_attention(
    layer: nn.Module, hidden: Tensor, attended: Tensor, num_text: int, perm: Tensor, inverse_perm: Tensor, is_needed: bool
) -> Tensor:
    """The rest of the layer, in sorted order; attended: [T, heads, head_dim] in packed order.

    is_needed: without it, the last matrix products are left out and the result is undefined
    """
    (attended,) = project(Permute.apply(attended.flatten(1), perm, inverse_perm), layer.self_attn.o_proj)
    hidden = hidden + attended.to(hidden.dtype)
    text, audio = hidden.split((num_text, len(hidden) - num_text))
    text = _ffn(layer.mlp, _normed(layer.post_attention_layernorm, text), is_needed)
    audio = _ffn(layer.audio_mlp, _normed(layer.audio_post_attention_layernorm, audio), is_needed)
    return AddPieces.apply(hidden, text, audio)


def _ffn(mlp: LlamaMLP, rows: Tensor, is_needed: bool) -> Tensor:
    gate, up = project(rows, mlp.gate_proj, mlp.up_proj)
    gated = SwiGLU.apply(gate, up) if isinstance(mlp.act_fn, nn.SiLU) else mlp.act_fn(gate) * up
    return project(gated, mlp.down_proj, is_needed=is_needed)[0]


def _normed(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """What `norm` computes, by the fused kernel where there is one."""
    if norm.weight.dtype != hidden.dtype:
        return norm(hidden)
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


# The layer's memory traffic, beside matrix products, is its passes over [T, D]. These functions take fewer than autograd would;
# tests/test_passes.py counts them.


class Pack(torch.autograd.Function):
    """Sorted text [num_text, D] and audio rows to packed order [T, D], without concatenating them first."""

    @staticmethod
    def forward(ctx, text: Tensor, audio: Tensor, perm: Tensor) -> Tensor:
        ctx.places = perm.split((len(text), len(audio)))
        packed = torch.empty((len(perm), text.shape[1]), dtype=text.dtype, device=text.device)
        for place, rows in zip(ctx.places, (text, audio)):
            packed.index_copy_(0, place, rows)
        return packed

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        text, audio = (grad.index_select(0, place) for place in ctx.places)
        return text, audio, None


class Permute(torch.autograd.Function):
    """Permute rows. The backward pass is a gather with the inverse permutation, cheaper than index_select's scatter-add."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Rotate(torch.autograd.Function):
    """Rotary embedding; the backward pass rotates back. states: [T, heads, head_dim]; cos, sin: [T, head_dim], equal halves"""

    @staticmethod
    def forward(ctx, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    rotated = states * cos[:, None]
    (first, second), (to_first, to_second) = states.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    sin = sin[:, None, : first.shape[-1]]
    to_first.addcmul_(second, sin, value=-direction)
    to_second.addcmul_(first, sin, value=direction)
    return rotated


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, all [n, FFN size]; the backward pass computes silu(gate) again, so that it need not be kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_up = functional.silu(gate).mul_(grad)
        to_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return to_gate, to_up


class AddPieces(torch.autograd.Function):
    """hidden [T, D] plus its text and audio pieces, in the dtype of hidden."""

    @staticmethod
    def forward(ctx, hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
        ctx.sizes, ctx.dtype = (len(text), len(audio)), text.dtype
        result = torch.empty_like(hidden)
        for piece, before, after in zip((text, audio), hidden.split(ctx.sizes), result.split(ctx.sizes)):
            torch.add(before, piece, out=after)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *grad.to(ctx.dtype).split(ctx.sizes)


def project(rows: Tensor, *linears: nn.Module, is_needed: bool = True) -> Sequence[Tensor]:
    """The results [n, out] of linear layers that read the same rows [n, in], with their LoRA adapters.

    One dropout mask serves the adapters of all of them. Where the results are not needed, they are undefined. What is more
    than a plain adapter (merged, switched off, DoRA, autocast) goes through the modules themselves.
    """
    found = [_weights(linear) for linear in linears]
    if None in found or torch.is_autocast_enabled(rows.device.type):
        return [linear(rows) for linear in linears]
    weights, factors, rates = zip(*found)
    A = torch.cat(scaled) if (scaled := [A for A in factors if A is not None]) else None
    adapted = torch.native_dropout(rows, rate, True)[0] if (rate := max(rates)) and linears[0].training else None
    return Project.apply(rows, adapted, A, is_needed, *(tensor for pair in weights for tensor in pair))


def _weights(linear: nn.Module) -> tuple[tuple[Tensor, Tensor | None], Tensor | None, float] | None:
    """((weight, LoRA's B or None), scaled A or None, dropout) of a layer that is no more than that."""
    base = linear.base_layer if isinstance(linear, LoraLayer) else linear
    if base.bias is not None:
        return None
    if base is linear:
        return (linear.weight, None), None, 0.0
    if linear.disable_adapters or linear.merged or linear.use_dora["default"]:
        return None
    A, B = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    return (base.weight, B), A * linear.scaling["default"], getattr(linear.lora_dropout["default"], "p", 0.0)


class Project(torch.autograd.Function):
    """Linear layers of the same rows: rows W' + adapted A' B'. Gradients of the rows add up inside matrix products.

    adapted:   the rows after dropout; None without
    A:         [sum of ranks, in], of all adapters together, so that the rows are read once; None without
    is_needed: False where activation checkpointing reads no more than what is saved
    weights:   W, and B or None, of each layer
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, adapted: Tensor | None, A: Tensor | None, is_needed: bool, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        inner = None if A is None else (rows if adapted is None else adapted) @ A.t()
        ctx.save_for_backward(rows, adapted, A, inner, *weights)
        if not is_needed:
            return tuple(rows.new_empty((len(rows), len(W))) for W in weights[::2])
        results = []
        for W, B, part in zip(weights[::2], weights[1::2], _parts(inner, weights[1::2])):
            result = rows @ plain(W).t()  # not in place below: selective checkpointing keeps it
            results.append(result if B is None else torch.addmm(result, part, B.t()))
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, adapted, A, inner, *weights = ctx.saved_tensors
        needs_rows, needs_adapted, _, _, *needs = ctx.needs_input_grad
        to_rows, to_adapted, to_A, to_inner, to_weights = None, None, None, [], []
        for grad, W, B, part, needs_weight in zip(grads, weights[::2], weights[1::2], _parts(inner, weights[1::2]), needs[::2]):
            if needs_rows:
                to_rows = _add_product(to_rows, grad, plain(W))
            to_weights += [grad.t() @ rows if needs_weight else None, None if B is None else grad.t() @ part]
            to_inner += [] if B is None else [grad @ B]
        if A is not None:
            to_inner = torch.cat(to_inner, dim=1)
            to_A = to_inner.t() @ (rows if adapted is None else adapted)
            if needs_adapted:
                to_adapted = to_inner @ A
            elif needs_rows:
                to_rows.addmm_(to_inner, A)
        return to_rows, to_adapted, to_A, None, *to_weights


def _parts(inner: Tensor | None, Bs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The columns of `inner` that belong to each adapter."""
    return [None] * len(Bs) if inner is None else inner.split([0 if B is None else B.shape[1] for B in Bs], dim=1)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if total is None else total.addmm_(left, right)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Causal attention of each sample to itself, in packed order.

    query: [T, heads, head_dim]; key, value: [T, key heads, head_dim]
    returns: [T, heads, head_dim]
    """
    if has_varlen_kernel(query.device, query.dtype):
        longest, ends = max(layout.lengths), layout.cu_seqlens
        options = _varlen_options(is_grouped=query.shape != key.shape)
        return varlen_attn(query, key, value, ends, ends, longest, longest, **options)
    if lacks_grouped_kernel(query.device):
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    sdpa = functools.partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    pieces = [  # [T, heads, head_dim] -> [samples][1, heads, length, head_dim]
        sdpa(*(piece.transpose(0, 1)[None] for piece in states))
        for states in zip(*(states.split(layout.lengths) for states in (query, key, value)))
    ]
    return torch.cat([piece[0].transpose(0, 1) for piece in pieces])


@functools.cache
def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn`, a flash attention, runs there: on the same GPUs as bfloat16."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_bf16(device)


def lacks_grouped_kernel(device: torch.device) -> bool:
    """Whether grouped keys would take [heads, L, L] floats: where `varlen_attn` does not run, CUDA has only the math for them."""
    return device.type == "cuda"


@functools.cache
def _varlen_options(is_grouped: bool) -> dict:
    """How this PyTorch's `varlen_attn` is asked for causal attention with grouped keys; the names have changed once."""
    names = inspect.signature(varlen_attn).parameters
    options: dict = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return options | ({"enable_gqa": True} if "enable_gqa" in names and is_grouped else {})


# ---------------------------------------------------------------------------------------------------------------------
# Selective activation checkpointing

_aten = torch.ops.aten
_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_KEPT_OPS = {_aten.mm.default, _aten.addmm.default, torch.ops.torch_attn._varlen_attn.default}
_KEPT_OPS |= {getattr(_aten, f"_scaled_dot_product_{kind}").default for kind in _ATTENTION}


def _selective_contexts():
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
