"""SIGKILL at random moments, saving included: the run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_resume import logged, settings


def start(argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.launch", "--standalone", "--nproc_per_node=2", "train.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    """The launcher, the ranks and their workers, at once."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=10)


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 20])
def test_killed_again_and_again(num_kills, toys, tmp_path):
    """Two ranks that save after every step are killed within a second of their next step; the finished model equals an
    uninterrupted run's to the bit, and no step is logged twice or not at all."""
    chance = random.Random(num_kills)
    extra = {"lora_r": 0, "epochs": 3 * num_kills, "save_steps": 1, "num_workers": 1, "val_steps": 0, "val_manifest": ""}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(settings(toys, whole, **extra))
    assert process.wait(timeout=300) == 0, process.stderr.read()
    argv = settings(toys, parts, **extra, resume="auto")
    for _ in range(num_kills):
        before, process = num_lines(parts / "metrics.jsonl"), start(argv)
        while num_lines(parts / "metrics.jsonl") <= before and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
        time.sleep(chance.random())
        kill(process)
    process = start(argv)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    expected, found = (load_file(folder / "final" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert logged(parts) == logged(whole)
