"""Kinds of LoRA: rank-stabilised, DoRA, LoRA+. On any number of ranks, to the bit after a stop, and as PEFT reads them."""

from __future__ import annotations

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from conftest import run_ranks
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from test_distributed import distance, train_a_little
from test_resume import logged, run, run_and_stop, settings

import checkpoint
import model_patch
import train
from common import UserError
from config import to_argv
from export import merge, read
from export.__main__ import main as export_main

KINDS = {"use_rslora": True, "use_dora": True, "loraplus_lr_ratio": 4}


def train_each(dist, *args) -> list:
    grad_accum = 4 // dist.world_size
    return [
        train_a_little(dist, *args, grad_accum, 0.0, 2, to_argv({name: value})) for name, value in [*KINDS.items(), ("seed", 0)]
    ]


def test_two_ranks_equal_one(toys, checkpoint_dir):
    """Three steps, float32, within 1e-5; and each kind is another model than LoRA."""
    args = str(checkpoint_dir), str(toys / "train.jsonl"), 4
    (one,) = run_ranks(train_each, 1, *args)
    for found in run_ranks(train_each, 2, *args):
        for (losses, norms, parameters), expected in zip(found, one):
            assert losses == pytest.approx(expected[0], rel=1e-5) and norms == pytest.approx(expected[1], rel=1e-5)
            assert distance(parameters, expected[2]) < 1e-5
    *kinds, plain = (losses for losses, *_ in one)
    assert all(losses[0] == pytest.approx(plain[0], rel=1e-6) for losses in kinds), "B is zero: all start as the base"
    assert all(abs(losses[2] - plain[2]) > 1e-4 for losses in kinds)


@pytest.fixture(scope="module")
def all_kinds(toys, tmp_path_factory):
    """Four steps of all three together, in two parts: (output folder, whole run's folder, both runs' parameters)."""
    folder = tmp_path_factory.mktemp("kinds")
    argv = [settings(toys, folder / name, max_steps=4, save_steps=2, **KINDS) for name in ("whole", "parts")]

    return folder, *run_ranks(whole_and_parts, 1, *argv)[0]


def whole_and_parts(dist, whole: list[str], parts: list[str]) -> tuple[dict, dict]:
    expected = run(dist, whole)
    run_and_stop(dist, parts, 3)
    return expected, run(dist, [*parts, "--resume", "auto"])


def test_resume_is_exact(all_kinds, toys):
    folder, expected, resumed = all_kinds
    assert any("magnitude" in name for name in expected)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert logged(folder / "parts") == logged(folder / "whole")


def test_peft_reads_and_merges_the_same(all_kinds, toys, tmp_path, capsys):
    """DoRA with rank-stabilised scaling, in float32."""
    final = all_kinds[0] / "whole" / "final"
    assert export_main(["merge", str(final), str(tmp_path / "m")]) == 0
    assert "the adapter changes its layers by" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toys / "checkpoint"), final)
    theirs, mine = loaded.merge_and_unload().state_dict(), load_file(tmp_path / "m" / "model.safetensors")
    base = load_file(toys / "checkpoint" / "model.safetensors")
    assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 1e-6
    assert max((mine[name] - base[name]).abs().max().item() for name in mine) > 1e-3
    state = checkpoint.list_states(all_kinds[0] / "whole" / "checkpoints")[-1]
    adapters = [read.open_model(path) for path in (final, state)]
    assert adapters[0].shapes == adapters[1].shapes
    assert all(torch.equal(*(adapter.read(name) for adapter in adapters)) for name in adapters[0].shapes)


def test_training_measures_the_change_as_merging_does(all_kinds, toys, tmp_path):
    final = all_kinds[0] / "whole" / "final"
    report = merge.merge(read.open_model(final), read.Full(toys / "checkpoint"), tmp_path / "m")
    model = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toys / "checkpoint"), final).base_model.model
    found = merge.relative_changes(model)
    assert found.keys() == report.changes.keys() and min(found.values()) > 0
    assert all(found[name] == pytest.approx(report.changes[name], rel=1e-4) for name in found)


def test_rates_of_lora_plus(config):
    """The groups of PEFT's own optimizer."""
    model = model_patch.build_on_meta(config)
    model_patch.add_lora(model, 4, 8, 0.0)
    cfg = train.parse_config(["--train_manifest", "m", "--output_dir", "o", "--loraplus_lr_ratio", "16", "--lr", "1e-4"])
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in theirs.param_groups for p in group["params"]}
    mine = train.build_optimizer(model, cfg).param_groups
    assert {names[p]: cfg.peak_lr * group["lr_ratio"] for group in mine for p in group["params"]} == rates
    assert set(rates.values()) == {1e-4, 1.6e-3}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--use_dora", "--lora_r", "0"], "are kinds of LoRA: give --lora_r 16"),
        (["--use_dora", "--quantize", "nf4"], "leave --quantize nf4 out"),
        (["--loraplus_lr_ratio", "0"], "nothing would be learned"),
    ],
)
def test_what_does_not_go_together(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        train.parse_config(["--train_manifest", "m", "--output_dir", "o", *flags])


def test_an_adapter_of_another_kind_is_no_start(all_kinds, toys, tmp_path, capsys):
    argv = settings(toys, tmp_path / "o", max_steps=1, init_adapter=all_kinds[0] / "whole" / "final")
    assert train.main(argv) == 2
    assert "give --lora_r 4 --lora_alpha 32 --use_rslora --use_dora" in capsys.readouterr().err
