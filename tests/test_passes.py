"""The memory traffic of a layer, and its adapters against PEFT's."""

from __future__ import annotations

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model_patch
from collate import Layout
from layers import packed
from tools import synthetic

FREE = ("mm", "addmm", "addmm_", "empty", "empty_like")  # matrix products are counted in FLOPs


class Traffic(TorchDispatchMode):
    """Counts the elements that operations read and write; views cost nothing, a gather reads what it writes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FREE:
            written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            read = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]  # not `out`
            if name == "index_select":
                read = written
            elif name == "index_copy_":
                written = read = [args[3]]
            self.elements += sum(t.numel() for t in (*read, *written))
        return result


class FusedNorm(torch.autograd.Function):
    """The traffic of CUDA's fused kernel, in place of what a CPU takes apart."""

    @staticmethod
    def forward(ctx, rows, weight):
        return rows + 0

    @staticmethod
    def backward(ctx, grad):
        return grad + grad, None


class FreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        ctx.shape = key.shape
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), torch.empty(ctx.shape), torch.empty(ctx.shape)


# Measured, forward and backward: 34.2 / 57.2 full, 34.6 / 57.7 LoRA, 51.6 / 91.7 with dropout. Written with autograd and PEFT's
# forward it was 49 / 87, 94 / 131 and 155 / 157. Five of those backward keep [T, FFN size] less in memory.
@pytest.mark.parametrize(("r", "dropout", "limits"), [(0, 0.0, (35, 58)), (16, 0.0, (35, 58)), (16, 0.1, (52, 92))])
def test_passes_over_the_hidden_states(r, dropout, limits, monkeypatch):
    """In the proportions of the published layer: heads, key heads, and FFN to width."""
    monkeypatch.setattr(packed, "_normed", lambda norm, rows: FusedNorm.apply(rows, norm.weight))
    monkeypatch.setattr(packed, "attend", lambda query, key, value, layout: FreeAttention.apply(query, key, value))
    monkeypatch.setitem(synthetic.SIZES, "shrunk", ((768, 2048, 1, 24, 8, 288), {}))
    model = model_patch.patch_for_training(HiggsAudioModel(synthetic.make_config("shrunk")))
    if r:
        model_patch.add_lora(model, r, 2 * r, dropout)
    T, D = 2048, 768
    order = torch.arange(T)
    layout = Layout(800, order, order, [T], torch.tensor([0, T]))
    tables = torch.randn(T, 32), torch.randn(T, 32)
    hidden = torch.randn(T, D, requires_grad=True)
    model.train()
    passes = []
    with Traffic() as traffic:
        result = model.layers[0](hidden, layout=layout, position_embeddings=tables)
        passes.append(traffic.elements / (T * D))
    with Traffic() as traffic:
        result.backward(torch.ones(T, D))
        passes.append(traffic.elements / (T * D))
    assert all(found <= limit for found, limit in zip(passes, limits)), passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_autograds_and_keeps_less(dtype):
    """To the bit; what is kept for the backward pass is its two inputs, instead of three tensors of that size."""
    torch.manual_seed(0)
    gate, up, weights = (torch.randn(40, 24, dtype=dtype, requires_grad=n < 2) for n in range(3))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        found = packed.SwiGLU.apply(gate, up)
    assert set(kept) == {gate.data_ptr(), up.data_ptr()}
    expected = nn.functional.silu(gate) * up
    gradients = [torch.autograd.grad((result * weights).sum(), (gate, up)) for result in (found, expected)]
    assert torch.equal(found, expected) and all(map(torch.equal, *gradients))


def adapted_layers(count: int = 2, dropout: float = 0.0) -> nn.ModuleDict:
    layers = nn.ModuleDict({f"l{i}": nn.Linear(24, 16 + 8 * i, bias=False) for i in range(count)})
    layers.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=list(layers), init_lora_weights=False)
    return inject_adapter_in_model(config, layers)


def results_and_gradients(results, rows: Tensor, layers: nn.Module) -> list[Tensor]:
    leaves = [rows, *(p for p in layers.parameters() if p.requires_grad)]
    return [*results, *torch.autograd.grad(sum((result * result.detach().cos()).sum() for result in results), leaves)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected)
    return max(((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, expected))


def test_adapters_compute_what_peft_does():
    """Results and the gradients of rows, A and B. Measured: 2.4e-7 of the largest; to the bit where PEFT's own forward is used."""
    torch.manual_seed(0)
    layers, rows = adapted_layers(), torch.randn(40, 24, requires_grad=True)
    modules = list(layers.values())
    expected = results_and_gradients([layer(rows) for layer in modules], rows, layers)
    assert 0 < distance(results_and_gradients(packed.project(rows, *modules), rows, layers), expected) < 1e-6
    for layer in modules:
        layer.enable_adapters(False)
        layer.requires_grad_(True)
    plain = packed.project(rows, *modules)
    assert all(torch.equal(found, layer.base_layer(rows)) for found, layer in zip(plain, modules))


def test_one_dropout_mask_for_layers_that_read_the_same():
    """Against the formula written out. Measured: 3.1e-7 of the largest."""
    torch.manual_seed(0)
    layers, rows = adapted_layers(dropout=0.3), torch.randn(40, 24, requires_grad=True)
    modules = list(layers.values())
    torch.manual_seed(1)
    found = results_and_gradients(packed.project(rows, *modules), rows, layers)
    torch.manual_seed(1)
    kept = torch.native_dropout(rows, 0.3, True)[0]
    expected = [layer.base_layer(rows) + 3 * layer.lora_B["default"](layer.lora_A["default"](kept)) for layer in modules]
    assert distance(found, results_and_gradients(expected, rows, layers)) < 1e-6
    layers.eval()
    assert distance(packed.project(rows, *modules), [layer(rows) for layer in modules]) < 1e-6
