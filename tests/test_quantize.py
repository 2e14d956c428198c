"""A base of 4 bits: equal on any number of ranks, resumed to the bit, and as good as one of 16 for the demo's clones."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import run_ranks
from test_distributed import distance, train_a_little
from test_resume import run, settings
from torch import nn

import model_patch
from common import PatchError, UserError
from export.read import Adapter, Full, open_model
from generate.models import load_model
from layers import nf4
from train import parse_config

NF4 = ["--quantize", "nf4"]


@pytest.fixture(scope="module")
def nf4_run(toys, tmp_path_factory):
    """Four LoRA steps on two ranks, a checkpoint after every second; returns the output folder and the trained parameters."""
    out = tmp_path_factory.mktemp("nf4") / "run"
    parameters = run_ranks(run, 2, [*settings(toys, out, 4, max_steps=4, save_steps=2), *NF4])[0]
    return out, parameters


def test_quantised_weights_are_close(tokenizer_free_model):
    """Random normal weights: the error is 9.2 % of their norm, in 4.13 bits a weight."""
    model, weights = tokenizer_free_model
    for name, parameter in model.named_parameters():
        if not nf4.is_quantized(parameter):
            continue
        found = nf4.plain(parameter)
        assert torch.equal(found, parameter.get_original_weight())
        assert found.shape == weights[name].shape
        assert 0.05 < ((found - weights[name]).norm() / weights[name].norm()).item() < 0.11
        inner, _ = parameter.__tensor_flatten__()
        assert sum(getattr(parameter, part).nbytes for part in inner) * 8 / parameter.numel() < 4.7


@pytest.fixture()
def tokenizer_free_model():
    from tools import synthetic

    model = model_patch.build_on_meta(synthetic.make_config("mini")).requires_grad_(False)
    model.layers = model.layers[:1]
    nf4.quantize_layers(model, world_size=8)
    model_patch.materialize(model, torch.device("cpu"))
    weights = {name: torch.randn(p.shape) for name, p in model.named_parameters() if nf4.is_quantized(p)}
    assert len(weights) == 10 and not any("norm" in name for name in weights)
    for name, parameter in model.named_parameters():
        if name in weights:
            nf4.fill(parameter, weights[name])
    return model, weights


def test_two_ranks_equal_one(toys, checkpoint_dir):
    """Three steps, float32 computation. Measured: losses and norms equal, parameters within 6e-8 of the largest."""
    args = str(checkpoint_dir), str(toys / "train.jsonl"), 4
    (one,) = run_ranks(train_a_little, 1, *args, 4, 0.0, 2, NF4)
    for losses, norms, parameters in run_ranks(train_a_little, 2, *args, 2, 0.0, 2, NF4):
        assert losses == pytest.approx(one[0], rel=1e-5) and norms == pytest.approx(one[1], rel=1e-5)
        assert distance(parameters, one[2]) < 1e-5
    (plain,) = run_ranks(train_a_little, 1, *args, 4, 0.0, 2)
    assert plain[0] != pytest.approx(one[0], rel=1e-4)  # the base is another one


def test_the_adapter_merges_into_the_whole_base(nf4_run, toys):
    """W + scale * B @ A of the weights in 16 bits, and the adapter speaks on either base."""
    out, _ = nf4_run
    adapter, base = open_model(out / "final"), Full(toys / "checkpoint")
    assert isinstance(adapter, Adapter)
    where = str(out / "final"), str(toys / "checkpoint"), None, torch.float32, torch.device("cpu")
    unmerged, merged = (load_model(*where, merge_lora=merge)[0] for merge in (False, True))
    quantised, _ = load_model(*where, quantize=True)
    module = adapter.modules[0]
    expected = base.read(f"{module}.weight").float() + adapter.change(module)
    assert torch.equal(merged.get_submodule(module).weight, expected)
    layer = quantised.get_submodule(module)
    assert nf4.is_quantized(layer.base_layer.weight) and not nf4.is_quantized(unmerged.get_submodule(module).base_layer.weight)
    rows = torch.randn(7, layer.in_features)
    exact, found = (model.get_submodule(module)(rows) for model in (unmerged, quantised))
    assert 0.01 < ((found - exact).norm() / exact.norm()).item() < 0.15


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--lora_r", "0"], "only frozen weights can be quantised"),
        (["--cpu_offload"], "goes with neither --cpu_offload"),
        (["--replicate", "2"], "goes with neither --cpu_offload, --replicate"),
    ],
)
def test_what_it_does_not_go_with(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_config(["--train_manifest", "m", "--output_dir", "o", *NF4, *flags])


def one_layer() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(128, 128, bias=False).requires_grad_(False)])
    return model


def test_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"--quantize nf4: .*; bash launch.sh installs it, or: pip install -r requirements-nf4.txt"):
        nf4.quantize_layers(one_layer())


def test_ranks_that_cannot_divide_a_weight():
    model = one_layer()
    with pytest.raises(PatchError, match="3 ranks cannot divide a weight of \\(128, 128\\)"):
        nf4.quantize_layers(model, world_size=3)
    model.layers[0] = nn.Linear(3, 5, bias=False).requires_grad_(False)  # too small for any block
    nf4.quantize_layers(model)
    assert not nf4.is_quantized(model.layers[0].weight)
