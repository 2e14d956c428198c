"""benchmarks/step.py: both contenders do the same work, what counts as useful is what is computed, and every size is what
it says."""

from __future__ import annotations

import functools
import gc
import json
import re
import sys

import pytest
import torch
from conftest import ROOT, case_samples, make_model
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import metrics
import model_patch
import train
from collate import create_collator
from distributed import setup_distributed
from loss import LabelSpec, Objective
from tools import synthetic
from tools.memory import LiveBytes

sys.path.insert(0, str(ROOT / "benchmarks"))
import step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("step")


def counted_flops(model, batch, config) -> dict[str, int]:
    """Those of a forward and backward pass, by operator."""
    text, audio = (count.float() for count in batch.num_targets())
    in_place = functools.partial(flop_registry[torch.ops.aten.addmm])
    in_place._get_raw = True  # it takes tensors, not shapes
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        total, _ = train.forward(model, batch, LabelSpec.of(config))
        Objective()(total.losses, text, audio).backward()
    return {op.__name__: count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("lora_r", [0, 4])
def test_useful_flops_are_those_of_a_packed_step(lora_r, config, tokenizer):
    """PyTorch's own counter on the real step. Its matrix products are exactly the weights' part of ours in a full fine-tune;
    with LoRA the first layer's inputs need no gradient, which we do not deduct. Measured: 0.96."""
    model = model_patch.patch_for_training(make_model(config)).train()
    if lora_r:
        model_patch.add_lora(model, lora_r, 8, 0.0)
    flops = metrics.Flops.of(model)
    batch = create_collator(config)(case_samples("reference and target", tokenizer))
    counts = counted_flops(model, batch, config)
    found = sum(count for name, count in counts.items() if name.startswith(("mm", "addmm")))
    positions, pairs, text_targets, audio_rows = batch.packing.work()
    expected = flops.total(positions, 0, text_targets, audio_rows)
    assert found == expected if not lora_r else 0.93 < found / expected < 1
    assert pairs == sum(n * (n + 1) // 2 for n in batch.packing.layout.lengths)
    assert flops.total(0, pairs, 0, 0) == 12 * pairs * config.text_config.hidden_size * config.text_config.num_hidden_layers


def test_sizes():
    """`real` is the published architecture; `mini` has about 100 M parameters and shares FLOPs alike between heads and body.
    Measured: 101 M, text head 13.9 % against 14.0 %."""
    models = {size: model_patch.build_on_meta(synthetic.make_config(size)) for size in synthetic.SIZES}
    num_weights = {size: sum(p.numel() for p in model.parameters()) for size, model in models.items()}
    assert num_weights["real"] == 5_771_283_456 and len(models["real"].state_dict()) == 397
    assert 90e6 < num_weights["mini"] < 110e6
    assert models["vocab"].embed_tokens.num_embeddings == 128_256
    shares = {size: metrics.Flops.of(models[size]) for size in ("mini", "real")}
    for part in ("per_text_target", "per_audio_row"):
        mini, real = (getattr(flops, part) / flops.per_position for flops in (shares["mini"], shares["real"]))
        assert mini == pytest.approx(real, rel=0.1), part


def test_contenders_take_the_same_step(folder):
    """The first loss is one before, the second one after an update: equal weights, samples and loss on both sides, padded or not.
    Measured: 2e-7 relative at the first, 2e-7 at the second."""
    cfg = step.prepare(folder, "tiny", ["--batch_size", "3"], 6, stretch=0.1)
    dist = setup_distributed("cpu")
    config = synthetic.make_config("tiny")
    ours, reference = (kind(cfg, dist, config) for kind in (step.Ours, step.Reference))
    for micro in step.Samples(cfg, dist, config).shuffled(2):
        assert len(micro.ours) == 3 and micro.padded.input_ids.shape[0] == 3
        assert ours.step(micro) == pytest.approx(reference.step(micro), rel=5e-6)


def test_random_checkpoint_is_whole(folder):
    """Written layer by layer: the official class loads every tensor of it, and nothing is left at its initial value."""
    from boson_multimodal.model.higgs_audio import HiggsAudioModel

    config = synthetic.make_config("tiny")
    synthetic.make_checkpoint(folder / "whole", config, torch.bfloat16)
    model, found = HiggsAudioModel.from_pretrained(folder / "whole", torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not any(found.values())
    stds = [p.float().std().item() for p in model.parameters() if p.ndim == 2]
    assert all(0.018 < std < 0.022 for std in stds) and len(list((folder / "whole").glob("*.safetensors"))) == 4


def test_command_reports_both(folder, capsys):
    """The whole command on the tiny size: all contenders, positive figures, ours without padding in less memory, and the same
    figures as JSON."""
    out_file = folder / "step.json"
    argv = ["--size", "tiny", "--steps", "1", "--samples", "2", "--folder", str(folder), "--batch_size", "2"]
    step.main([*argv, "--json", str(out_file)])
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (ours|reference|bucketed) \| (.*) \|$", out, re.MULTILINE))
    assert rows.keys() == {"ours", "reference", "bucketed"} and "commit" in out and "--size tiny" in out
    figures = [[float(x) for x in re.findall(r"[\d.]+", row.replace(",", ""))] for row in rows.values()]
    assert all(value > 0 for row in figures for value in row)
    assert figures[0][-1] < figures[1][-1]
    values = json.loads(out_file.read_text())
    sec = {name: found["step_sec"] for name, found in values["contenders"].items()}
    assert sec.keys() == rows.keys()
    assert values["ratio"] == sec["reference"][0] / sec["ours"][0]
    assert values["ratio_bucketed"] == sec["bucketed"][0] / sec["ours"][0]
    assert f"{values['ratio']:.2f} times the reference's, {values['ratio_bucketed']:.2f} times" in out


def test_ratios():
    """The median over pairs of steps on the same samples; over all steps where only all samples together are the same."""
    seconds = {"ours": [1.0, 2.0, 4.0], "reference": [2.0, 6.0, 40.0], "bucketed": [1.0, 3.0, 10.0]}
    figures = {name: step.Figures(step_sec=values) for name, values in seconds.items()}
    assert step.ratios(figures) == {"ratio": 3.0, "ratio_bucketed": 2.0}
    assert step.ratios({"ours": figures["ours"]}) == {"ratio": None, "ratio_bucketed": None}


def test_buckets_hold_the_same_samples_sorted(folder):
    """Less padding than in the shuffled micro-batches, over the same samples."""
    cfg = step.prepare(folder, "tiny", ["--batch_size", "3"], 6, stretch=0.1)
    samples = step.Samples(cfg, setup_distributed("cpu"), synthetic.make_config("tiny"))
    shuffled = samples.shuffled(2)
    bucketed = samples.bucketed(shuffled)
    assert [len(micro.indices) for micro in bucketed] == [3, 3]
    indices, sorted_indices = ([i for micro in micros for i in micro.indices] for micros in (shuffled, bucketed))
    assert sorted(indices) == sorted(sorted_indices) == list(range(6))
    lengths = [length for micro in bucketed for length in micro.ours.packing.layout.lengths]
    assert lengths == sorted(lengths)
    sizes, sorted_sizes = ([micro.padded.audio_out_ids.shape[1] for micro in micros] for micros in (shuffled, bucketed))
    assert sum(sizes) == sum(sorted_sizes), "the official collator has the same audio"
    assert sum(map(step.largest, bucketed)) < sum(map(step.largest, shuffled))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be used")
def test_real_is_not_measured_without_a_gpu(capsys):
    step.main(["--size", "real", "--device", "cuda"])
    assert "ot measured" in capsys.readouterr().out


def test_loss_part_memory(folder):
    """The reference has dense float32 logits, their log-probabilities and a gradient alive at once; ours has neither."""
    cfg = step.prepare(folder, "tiny", ["--batch_size", "3"], 6, stretch=0.1)
    config = synthetic.make_config("tiny")
    (micro,) = step.Samples(cfg, setup_distributed("cpu"), config).shuffled(1)
    found = step.loss_part_memory(config, micro)
    dense = len(micro.ours) * max(micro.ours.packing.layout.lengths) * config.text_config.vocab_size * 4
    assert 3 * dense < found["reference"] and found["ours"] < found["reference"] / 2


def test_live_bytes():
    """Storages once each, views for nothing, and back to zero when all is freed."""
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a.view(10, 100).T
        assert live.now == live.peak == 4000
        c = a * 2
        assert live.now == 8000
        del a, b
        gc.collect()
        assert live.now == 4000
        del c
    assert live.now == 0 and live.peak == 8000


def test_batched_compares_equal_work(folder, tmp_path, capsys, monkeypatch):
    """The table has every contender; codes that differ from the official call's end it."""
    import batched

    argv = ["--size", "tiny", "--frames", "20", "--rounds", "1", "--rows", "3", "--folder", str(folder / "batched")]
    assert batched.main([*argv, "--json", str(tmp_path / "table.json")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert rows.keys() == {"official", "3 together"} and rows["official"]["ratio"] == 1
    assert all(row["clips_per_sec"] > 0 and row["cpu_sec_per_clip"] > 0 and row["peak_bytes"] >= 0 for row in rows.values())
    assert "3 together" in capsys.readouterr().out
    together = batched.generate_many
    seeds = lambda requests: type(requests)(batched.Request(r.prompt, r.seed + 1, r.max_new_tokens, r.key) for r in requests)  # noqa: E731
    monkeypatch.setattr(batched, "generate_many", lambda m, t, requests, *rest: together(m, t, seeds(requests), *rest))
    assert batched.main(argv) == 1 and "gave other codes" in capsys.readouterr().err
