"""Runs that stand still say where, and end; ranks that the others wait for are named."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from pathlib import Path

import pytest
from conftest import run_ranks
from test_faults import arguments, launch, leaves_nothing_running
from test_resume import settings

import data
import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "what", "culprit"),
    [
        ("worker stopped", r"waiting for data for \d+ s; its loader worker 0 \(process \d+\) is stopped", "receive"),
        ("hang", r"computing for \d+ s", "faulty_train.py"),
    ],
)
def test_a_rank_that_stands_still_is_named(fault, what, culprit, toys, tmp_path):
    """A worker or a rank that stops for good: both ranks note their stacks, the launcher repeats who is waited for."""
    done = launch(fault, arguments(toys, tmp_path / "o", step_timeout=0.06))
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    stuck = tmp_path / "o" / "stuck"
    if fault == "worker stopped":  # the other rank waits for it, and knows it
        assert re.fullmatch(rf"RuntimeError: rank 1 stands still after step \d, {what}\. .* {stuck}/rank1.txt", last), last
        assert "rank 0 stands still" in done.stderr and "waiting for other ranks" in done.stderr
    assert re.search(what, (stuck / "rank1.txt").read_text())
    assert culprit in (stuck / "rank1.txt").read_text() and "in loop" in (stuck / "rank0.txt").read_text()
    collectives = [json.loads((stuck / f"rank{rank}.json").read_text())["entries"] for rank in (0, 1)]
    assert all("gloo:" in entry["profiling_name"] for entries in collectives for entry in entries) and all(map(len, collectives))
    assert json.loads((tmp_path / "o" / "heartbeat.json").read_text())["doing"]
    assert leaves_nothing_running(tmp_path / "o")


def run_with_a_slow_disk(dist, argv: list[str]) -> str:
    """A run in which rank 1 takes long to read; returns what rank 0 says."""
    if dist.rank == 1:
        read = data._MicroBatches.__getitem__
        data._MicroBatches.__getitem__ = lambda *args: (time.sleep(0.12), read(*args))[1]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train.train(train.parse_config(argv), dist)
    return said.getvalue()


@pytest.mark.slow
def test_a_straggler_is_named(toys, tmp_path):
    extra = {"batch_size": 1, "grad_accum": 1, "val_steps": 0, "val_manifest": "", "step_timeout": 0.5}
    said, _ = run_ranks(run_with_a_slow_disk, 2, settings(toys, tmp_path / "o", 2, **extra))
    assert re.search(r"step 20: rank 1 waits 0\.1\d s a step for its data, others 0\.0\d s, and all wait for it", said), said
    lines = [json.loads(line) for line in Path(tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    waits, steps = ([line[name] for line in lines if line["split"] == "train"] for name in ("data_wait_sec", "rank_step_time_sec"))
    assert all(fast < 0.1 < 0.12 <= slow for fast, slow in waits)
    assert steps[0] == [0.0, 0.0] and all(min(of_rank) > 0 for of_rank in steps[1:])
    beat = json.loads((tmp_path / "o" / "heartbeat.json").read_text())
    assert beat["step"] >= 0 and abs(beat["time"] - time.time()) < 100
    assert not (tmp_path / "o" / "stuck").exists()
