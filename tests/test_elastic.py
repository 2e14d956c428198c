"""The end of a run and its learning rate follow the data consumed, on whatever number of ranks and with whatever batch."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_ranks
from test_resume import settings

import checkpoint
import train

NUM_SAMPLES = 31


def run(dist, argv: list[str], last: int = 0) -> list[list[str]]:
    """The samples of each step, of all ranks; `last`: the step in which a signal comes, after which the run ends."""
    original, steps = train.train_step, []

    def step(task, batches, number, lr):
        mine = [source for batch in batches for source in batch.sources if source != "(filler)"]
        steps.append([source for share in dist.gather(mine) for source in share])
        if len(steps) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(task, batches, number, lr)

    train.train_step = step
    try:
        train.train(train.parse_config(argv), dist)
    finally:
        train.train_step = original
    return steps


def rates(output_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["lr"] for line in lines if line["split"] == "train"]


def cosine(share: float, peak: float = 1e-3) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def test_every_sample_twice_on_one_two_and_one_ranks(toys, tmp_path):
    """Two epochs in three pieces, each with another global batch: nothing is lost or doubled, the rate stays on its curve,
    and the run ends where an uninterrupted one ends."""
    warmup = 3
    common = {"warmup_steps": warmup, "val_steps": 0, "save_steps": 100, "resume": "auto"}
    pieces = [(1, 5, {"batch_size": 2, "grad_accum": 2}), (2, 6, {"batch_size": 3, "grad_accum": 1}), (1, 0, {"batch_size": 4})]
    steps = []
    for ranks, last, batch in pieces:
        steps += run_ranks(run, ranks, settings(toys, tmp_path / "o", 4, **common, **batch), last)[0]
    assert set(Counter(source for step in steps for source in step).values()) == {2}
    assert len(steps) > 11 and all(len({*step}) == len(step) for step in steps)
    epochs = [sum(len(step) for step in steps[:index]) / NUM_SAMPLES for index in range(len(steps))]
    expected = [1e-3 * (i + 1) / warmup for i in range(warmup)]
    expected += [cosine((done - epochs[warmup]) / (2 - epochs[warmup])) for done in epochs[warmup:]]
    assert rates(tmp_path / "o") == pytest.approx(expected, rel=1e-9)
    state = checkpoint.read_state(checkpoint.list_states(tmp_path / "o" / "checkpoints")[-1])
    assert state["position"] == [2, 0] and state["step"] == len(steps)
    assert (tmp_path / "o" / "final").is_dir()


def test_more_ranks_for_the_rest(toys, tmp_path):
    """One rank to half of the data, then the same flags on two: they train the other half, and decay to the end."""
    argv = settings(toys, tmp_path / "o", 4, epochs=1, warmup_steps=0, grad_accum=1, val_steps=0, resume="auto")
    steps = run_ranks(run, 1, argv, 8)[0] + run_ranks(run, 2, argv)[0]
    assert sorted(Counter(source for step in steps for source in step).values()) == [1] * NUM_SAMPLES
    assert rates(tmp_path / "o")[-1] < 0.03e-3
    assert (tmp_path / "o" / "final").is_dir()


def test_the_length_may_change(toys, tmp_path):
    """A finished run goes on with more epochs, or to a number of steps, with another learning rate."""
    argv = settings(toys, tmp_path / "o", 4, epochs=1, warmup_steps=0, val_steps=0, save_steps=100, resume="auto")
    dist = train.setup_distributed("cpu")
    first = run(dist, argv)
    assert sum(map(len, first)) == NUM_SAMPLES
    second = run(dist, [*argv, "--epochs", "2", "--lr", "5e-4"])
    assert sum(map(len, second)) == NUM_SAMPLES
    assert rates(tmp_path / "o")[len(first)] == pytest.approx(cosine(0.5, 5e-4))
    total = len(first) + len(second)
    assert len(run(dist, [*argv, "--max_steps", str(total + 3)])) == 3
    assert rates(tmp_path / "o")[-1] == pytest.approx(cosine((total + 2) / (total + 3)))
    assert not run(dist, [*argv, "--max_steps", "2"]), "it is longer than that already"


def test_steps_set_end_and_schedule_if_they_are_given(toys, tmp_path):
    """On two ranks as on one: --max_steps counts optimizer steps."""
    for ranks in (1, 2):
        argv = settings(toys, tmp_path / str(ranks), 4, max_steps=5, warmup_steps=1, val_steps=0)
        assert len(run_ranks(run, ranks, argv)[0]) == 5
        expected = [1e-3, *(cosine((step - 1) / 4) for step in range(1, 5))]
        assert rates(tmp_path / str(ranks)) == pytest.approx(expected)


def test_a_token_budget_keeps_its_micro_batches(toys, tmp_path):
    """With --max_tokens micro-batches are the same on any number of ranks: every sample once all the same."""
    argv = settings(toys, tmp_path / "o", 4, epochs=1, max_tokens=300, grad_accum=1, val_steps=0, resume="auto")
    steps = run_ranks(run, 1, argv, 4)[0] + run_ranks(run, 2, argv)[0]
    assert sorted(Counter(source for step in steps for source in step).values()) == [1] * NUM_SAMPLES
