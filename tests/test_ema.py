"""--ema: the average of a plain loop, on any number of ranks, through a resume, evaluated and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from test_export import command, same, settings, weights
from test_resume import run_and_stop

import train
from config import parse_config
from distributed import whole
from export import pretrained

DECAY = 0.7


def run(dist, argv: list[str]) -> dict[str, torch.Tensor]:
    """A run; returns the average of every weight that trained, whole."""
    built, build = [], train.build_optimizer
    train.build_optimizer = lambda *args: built.append(build(*args)) or built[-1]
    try:
        model = train.train(parse_config(argv), dist)
    finally:
        train.build_optimizer = build
    (optimizer,) = built
    return {n: whole(optimizer.state[p]["ema"]) for n, p in model.named_parameters() if p.requires_grad}


def arguments(toys: Path, output: Path, **extra) -> list[str]:
    return settings(toys, output, **({"ema": DECAY, "save_steps": 1, "keep_last": 0} | extra))


@pytest.fixture(scope="module")
def averaged(toys, tmp_path_factory) -> tuple[Path, dict]:
    """A LoRA run of four steps with every state kept, and its average."""
    output = tmp_path_factory.mktemp("ema") / "o"
    extra = {"lora_r": 4, "val_manifest": toys / "val.jsonl", "val_steps": 4}
    return output, run(train.setup_distributed("cpu"), arguments(toys, output, **extra))


def test_it_is_the_weighted_mean_of_the_steps(averaged):
    output, average = averaged
    states = [pretrained.Stored(output / "checkpoints" / f"step_{step}") for step in (1, 2, 3, 4)]
    shares = torch.tensor([DECAY**3, DECAY**2, DECAY, 1.0], dtype=torch.float64)
    shares /= shares.sum()
    for name, mine in average.items():
        visited = [state.read(f"model.{name}").double() for state in states]
        expected = sum(share * weight for share, weight in zip(shares, visited))
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-7)  # measured 7e-9
        assert torch.equal(states[0].read(f"optimizer.{name}.ema"), states[0].read(f"model.{name}"))


def test_it_is_what_is_exported_and_evaluated(averaged, toys, tmp_path, capsys):
    """final/ holds the average, a state is finished the same way, and the validation line is about those weights."""
    output, average = averaged
    final = weights(output / "final")
    for name, mine in average.items():
        assert torch.equal(final["base_model.model." + name.replace(".default", "")], mine)
    command(capsys, "export", output / "checkpoints" / "step_4", tmp_path / "again")
    assert same(weights(tmp_path / "again"), final)
    assert f"| weights | moving average, decay {DECAY} per step |" in (output / "final" / "README.md").read_text()

    command(capsys, "merge", output / "final", toys / "checkpoint", tmp_path / "merged")
    argv = settings(toys, tmp_path / "o", base_ckpt=tmp_path / "merged", lora_r=0, lr=1e-30, max_steps=1, save_steps=0)
    assert train.main([*argv, "--val_manifest", str(toys / "val.jsonl")]) == 0
    mine, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
        for folder in (output, tmp_path / "o")
    )
    assert mine["split"] == theirs["split"] == "val"
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # measured 1e-7


def test_two_ranks_and_a_resume_change_nothing(averaged, toys, tmp_path):
    """2 ranks give the average of 1 (measured 6e-6 apart in norm); stopped after two steps and resumed, to the bit."""
    _, expected = averaged
    extra = {"lora_r": 4, "batch_size": 4, "save_steps": 2}
    whole = run_ranks(run, 2, arguments(toys, tmp_path / "whole", **extra))[0]
    apart, size = (sum(t.square().sum() for t in ts) ** 0.5 for ts in ([whole[n] - expected[n] for n in whole], whole.values()))
    assert apart / size < 1e-4
    run_ranks(run_and_stop, 2, arguments(toys, tmp_path / "parts", **extra), 2)
    parts = run_ranks(run, 2, arguments(toys, tmp_path / "parts", **extra, resume="auto"))[0]
    assert all(torch.equal(parts[name], mine) for name, mine in whole.items())


def test_mistakes(averaged, toys, capsys):
    output, _ = averaged
    argv = arguments(toys, output, lora_r=4, ema=0, resume="auto", max_steps=5)
    assert train.main(argv) == 2 and "ema was 0.7 and is 0.0" in capsys.readouterr().err
    assert train.main(arguments(toys, output, ema=1)) == 2 and "--ema 1.0: must be below 1" in capsys.readouterr().err
