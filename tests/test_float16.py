"""--mixed_precision fp16, for GPUs without bfloat16: the loss scale, on ranks and through a resume, and what overflows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import case_samples, make_model, run_ranks
from test_distributed import distance
from test_resume import logged, run, run_and_stop, settings

import model_patch
import process.gpu
import train
from collate import create_collator
from distributed import own_rows
from layers import packed
from layers.optimizer import LossScale
from loss import LabelSpec

FLAGS = {"mixed_precision": "fp16", "val_manifest": "", "val_steps": 0, "lora_dropout": 0.0, "max_steps": 5, "lr": 2e-3}
BLOWN = 1  # the step, counted from 0, whose gradient overflows


class Blow(torch.autograd.Function):
    """The identity, whose gradient is far too large."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e9


def blown_run(dist, argv: list[str], go) -> dict[str, torch.Tensor]:
    """`go`, in which the gradient of the last rank overflows in step BLOWN, the loss of all being finite."""
    forward, step, steps = train.forward, train.train_step, []

    def blow(model, batch, labels):
        total, voices = forward(model, batch, labels)
        if steps and steps[-1] == BLOWN and dist.rank == dist.world_size - 1 and torch.is_grad_enabled():
            total.losses.audio.nats = Blow.apply(total.losses.audio.nats)
        return total, voices

    def count(task, batches, number, *rest):
        steps.append(number)
        return step(task, batches, number, *rest)

    train.forward, train.train_step = blow, count
    try:
        return go(dist, argv)
    finally:
        train.forward, train.train_step = forward, step


def stop_after_4(dist, argv: list[str]) -> None:
    run_and_stop(dist, argv, 4)


def float16_runs(dist, toys: Path, folder: Path):
    """A run with an overflow; the same, stopped after it and resumed. Returns the parameters of both and what was logged."""
    whole, parts = (settings(toys, folder / name, save_steps=3, **FLAGS) for name in ("whole", "parts"))
    messages, log = [], train.log
    train.log = lambda dist, message: messages.append(message)
    expected = blown_run(dist, whole, run)
    train.log = log
    blown_run(dist, parts, stop_after_4)
    return expected, run(dist, [*parts, "--resume", "auto"]), messages


def test_ranks_overflows_and_a_resume(toys, tmp_path):
    """Two ranks: one's overflow skips the step on both and halves the scale; it is named and is no bad step. Stopped and resumed
    gives every bit. One rank instead of two: measured, losses within 1.2e-7 relative, gradient norms within 1.5e-5.
    """
    for expected, resumed, messages in run_ranks(float16_runs, 2, toys, tmp_path):
        assert all(torch.equal(resumed[name], parameter) for name, parameter in expected.items())
        (said,) = [message for message in messages if "too large for float16" in message]
        assert f"step {BLOWN + 1}: " in said and said.endswith("skipped, the scale is 32768 now")
        assert not any("samples:" in message for message in messages)
    lines = logged(tmp_path / "whole")
    assert lines == logged(tmp_path / "parts")
    assert [line["loss_scale"] for line in lines] == [2.0**16] * BLOWN + [2.0**15] * (5 - BLOWN)
    assert [line["overflows"] for line in lines] == [0] * BLOWN + [1] * (5 - BLOWN)
    assert lines[BLOWN]["grad_norm"] is None and all(line["bad_steps"] == 0 and line["loss"] > 0 for line in lines)

    dist = train.setup_distributed("cpu")
    alone = blown_run(dist, settings(toys, tmp_path / "alone", grad_accum=4, **FLAGS), run)
    others = logged(tmp_path / "alone")
    assert [line["loss_scale"] for line in others] == [line["loss_scale"] for line in lines]
    for name, error in (("loss", 1e-5), ("grad_norm", 1e-3)):
        found, values = ([line[name] or 0.0 for line in each] for each in (others, lines))
        assert found == pytest.approx(values, rel=error), name
    assert distance(alone, expected) < 1e-2


def test_training_follows_float32(toys, tmp_path):
    """A full fine-tune of eight steps, in which the loss falls from 9.7 to 5.2. Measured: losses within 1.2e-4 relative."""
    dist, losses = train.setup_distributed("cpu"), {}
    for precision in ("no", "fp16"):
        extra = FLAGS | {"mixed_precision": precision, "max_steps": 8, "batch_size": 8, "grad_accum": 1, "epochs": 4}
        run(dist, settings(toys, tmp_path / precision, 0, **extra))
        losses[precision] = [line["loss"] for line in logged(tmp_path / precision)]
    assert losses["no"][-1] < 0.6 * losses["no"][0]
    assert losses["fp16"] == pytest.approx(losses["no"], rel=1e-3)


def test_a_skipped_step_moves_no_weight(toys, tmp_path):
    """Nor the moments, nor the count of AdamW's steps; the average of --ema stays too."""
    states = {}
    step = train.train_step

    def watch(task, batches, number, *rest):
        def state():
            kept = [value for state in task.optimizer.state.values() for value in state.values()]
            kept += [parameter for parameter in task.model.parameters() if parameter.requires_grad]
            return [own_rows(tensor).clone() for tensor in kept]

        before = state()
        result = step(task, batches, number, *rest)
        states[number] = result.overflow, len(before) > 0 and all(map(torch.equal, before, state()))
        return result

    train.train_step = watch
    try:
        blown_run(train.setup_distributed("cpu"), settings(toys, tmp_path / "o", ema=0.9, **FLAGS | {"max_steps": 3}), run)
    finally:
        train.train_step = step
    assert {number: found for number, found in states.items() if number} == {1: (True, True), 2: (False, False)}


def test_the_scale():
    """Grows after 2,000 good steps, shrinks to 1 and not below: then it is not the scale; kept as numbers."""
    scale = LossScale()
    for _ in range(1999):
        scale.grow()
    again = LossScale(*json.loads(json.dumps(scale.kept())))
    scale.grow(), again.grow()
    assert scale.value == again.value == 2.0**17 and scale.good_steps == 0
    assert [scale.shrink() for _ in range(18)] == [True] * 17 + [False]
    assert (scale.value, scale.overflows) == (1.0, 17)


@pytest.mark.parametrize("size", [1, 60000])
def test_what_overflows(size, config, tokenizer):
    """A model in float16 with hidden states of up to 60,000 (float16 ends at 65,504): norms, logits,
    cross-entropy and their gradients are computed in float32 where they have to be.

    Measured: the loss within 6e-7 of float32's, the gradient within 8e-4 of its norm.
    """
    batch, labels = create_collator(config)(case_samples("multi-segment", tokenizer)), LabelSpec.of(config)
    found = []
    for dtype in (torch.float32, torch.float16):
        model = make_model(config)
        with torch.no_grad():
            model.embed_tokens.weight[:, 7] = size
            model.audio_codebook_embeddings.weight[:, 7] = size / config.audio_num_codebooks
        model = model_patch.patch_for_training(model).to(dtype).train()
        sums = train.forward(model, batch, labels)[0].losses
        value = sums.text.nats.sum() + sums.audio.nats.sum()
        value.backward()
        found.append((value.item(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (value, others) = found
    assert value == pytest.approx(expected, rel=1e-5)
    assert distance(others, gradients) < 5e-3


def test_gpus_without_bf16_are_chosen_for(toys, tmp_path, monkeypatch, capsys):
    """By compute capability, not by what PyTorch emulates; elsewhere auto is bf16."""
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert process.gpu.has_bf16(torch.device("cuda")) == expected
    assert process.gpu.has_bf16(torch.device("cpu"))
    for name, lacks in (("a", True), ("b", False)):
        monkeypatch.setattr(train, "has_bf16", lambda device, lacks=lacks: not lacks)
        argv = settings(toys, tmp_path / name, **FLAGS | {"mixed_precision": "auto", "max_steps": 1})
        assert train.main(argv) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["mixed_precision"] == ("fp16" if lacks else "bf16")
        assert ("does not compute in bfloat16: --mixed_precision fp16" in capsys.readouterr().err) == lacks
        assert ("loss_scale" in logged(tmp_path / name)[0]) == lacks


def test_keys_are_expanded_where_grouped_ones_have_no_kernel(monkeypatch):
    """CUDA's memory-efficient kernel wants as many keys as queries; values and gradients are those of grouped keys (measured 0)."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(15, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    layout = type("Layout", (), {"lengths": [5, 1, 9]})
    expected = packed.attend(*states, layout)
    sdpa, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def strict(query, key, value, **options):
        shapes.append((query.shape, key.shape, value.shape))
        return sdpa(query, key, value, **options)

    assert not packed.lacks_grouped_kernel(torch.device("cpu")) and packed.lacks_grouped_kernel(torch.device("cuda"))
    monkeypatch.setattr(packed, "lacks_grouped_kernel", lambda device: True)
    monkeypatch.setattr(packed.functional, "scaled_dot_product_attention", strict)
    found = packed.attend(*states, layout)
    assert len(shapes) == 3 and all(len(set(three)) == 1 for three in shapes)
    pairs = zip(*(torch.autograd.grad(result.square().sum(), states) for result in (found, expected)))
    assert max((found - expected).abs().max(), *((a - b).abs().max() for a, b in pairs)) < 1e-6
