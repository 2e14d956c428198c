"""Signals at any time: within seconds, one line on what was kept and what to type, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from test_faults import leaves_nothing_running
from test_resume import logged, run, settings

import checkpoint
import train
from generate.batched import Batch
from process.signals import PREEMPTED

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
EARLY = "ended before a first step; what was written whole is kept"


def start(output_dir: Path, *words: str, **kwargs) -> subprocess.Popen:
    environment = ENVIRONMENT | {"FAULTY_RUN": str(output_dir)} | kwargs.pop("env", {})
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **kwargs)


def launch(output_dir: Path, argv: list[str], *options: str, file: str = "train.py", **kwargs) -> subprocess.Popen:
    return start(output_dir, ROOT / "tools" / "launch.py", "--standalone", "--nproc_per_node=1", *options, file, *argv, **kwargs)


def wait_for_steps(output_dir: Path, process: subprocess.Popen, count: int) -> None:
    deadline, path = time.time() + 200, output_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count('"train"') < count:
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.05)


def end(process: subprocess.Popen, number: int, within_sec: float) -> str:
    """Send the signal; returns what was written to stderr."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=within_sec)[1]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                member.kill()


def endless(toys: Path, output_dir: Path, **extra) -> list[str]:
    return settings(toys, output_dir, **{"epochs": 1000, "num_workers": 0, "val_steps": 0, "val_manifest": "", **extra})


# ---- before the first step


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether a process has a handler for the signal by now."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("who", ["launcher", "rank"])
def test_while_importing(who, toys, tmp_path):
    """The launcher, as soon as it can, and its rank."""
    process = launch(tmp_path, endless(toys, tmp_path / "o"), "--max_restarts=2")
    while not (catches(process, signal.SIGTERM) if who == "launcher" else psutil.Process(process.pid).children()):
        assert process.poll() is None
        time.sleep(0.01)
    error = end(process, signal.SIGTERM, within_sec=20)
    assert process.returncode == PREEMPTED and error == f"received SIGTERM: {EARLY}\n", error
    assert leaves_nothing_running(tmp_path)


@pytest.mark.parametrize("is_host", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_while_waiting_for_other_nodes(is_host, tmp_path):
    """The first node waits for the second in Python, the second for the first in C++, where no handler of Python's runs."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=x")
    process = start(tmp_path, ROOT / "tools" / "launch.py", *options, f"--rdzv_conf=is_host={str(is_host).lower()}", "train.py")
    time.sleep(12)
    assert process.poll() is None
    error = end(process, signal.SIGUSR1, within_sec=5)
    assert process.returncode == PREEMPTED and f"received SIGUSR1: {EARLY}" in error


def test_without_a_launcher(toys, tmp_path):
    """python train.py by itself: the same line early on, and the same status once it trains."""
    argv = endless(toys, tmp_path / "o")
    process = start(tmp_path, "train.py", *argv)
    while not (tmp_path / "o" / ".lock").exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert EARLY in end(process, signal.SIGHUP, within_sec=20) and process.returncode == PREEMPTED
    process = start(tmp_path, "train.py", *argv)
    wait_for_steps(tmp_path / "o", process, 2)
    error = end(process, signal.SIGHUP, within_sec=30)
    assert process.returncode == PREEMPTED and "saved in" in error and "continue with --resume auto" in error


# ---- while training


def test_a_closed_terminal_saves(toys, tmp_path):
    """SIGHUP, and nobody reads the messages any more: the run ends as after SIGTERM, and torchrun does not restart it."""
    control, terminal = os.openpty()
    argv = endless(toys, tmp_path / "o")
    command = [sys.executable, ROOT / "tools" / "launch.py", "--standalone", "--nproc_per_node=1", "--max_restarts=2", "train.py"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen([*command, *argv], cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **streams)
    os.close(terminal)
    path = tmp_path / "o" / "metrics.jsonl"
    deadline = time.time() + 200
    while not path.exists() or path.read_text().count('"train"') < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(control, False)
            os.read(control, 1 << 16)
    os.close(control)  # the terminal is gone: writes fail
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == PREEMPTED
    (newest,) = checkpoint.list_states(tmp_path / "o" / "checkpoints")
    assert checkpoint.find_damage(newest) is None


def test_nohup_is_obeyed(toys, tmp_path):
    """SIGHUP that is ignored from the start reaches nobody, neither launcher nor rank."""
    argv = endless(toys, tmp_path / "o", max_steps=6)
    process = launch(tmp_path, argv, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_steps(tmp_path / "o", process, 1)
    for member in (process, *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert (tmp_path / "o" / "final").is_dir() and "received" not in error


@pytest.mark.slow
def test_a_stuck_loader_worker_does_not_hold_the_run(toys, tmp_path):
    """Rank 1 waits for a worker that sleeps: both ranks save within seconds, and the launcher does not restart them."""
    argv = endless(toys, tmp_path / "o", num_workers=1)
    options = ("--nproc_per_node=2", "--max_restarts=2")
    process = launch(tmp_path, argv, *options, file="tests/faulty_train.py", env={"FAULT": "worker hangs"})
    wait_for_steps(tmp_path / "o", process, 2)
    time.sleep(3)
    error = end(process, signal.SIGUSR1, within_sec=30)
    assert process.returncode == PREEMPTED and error.count("stopped after step") == 1, error
    assert checkpoint.list_states(tmp_path / "o" / "checkpoints")


def interrupted_in(dist, argv: list[str], module, name: str, call: int) -> None:
    """A run that gets SIGTERM in a call of that number of a function."""
    original, calls = getattr(module, name), [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(module, name, function)
    try:
        train.train(train.parse_config(argv), dist)
    finally:
        setattr(module, name, original)
    assert dist.signals.status() == PREEMPTED


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (train, "evaluate", 1),  # before its first batch
        (train, "forward", 3 * 2 + 3),  # in the second batch of the first evaluation: a look at the first batch, two steps
        (Batch, "step", 3),  # while samples of the base are generated
        pytest.param(train, "sample", 2, marks=pytest.mark.slow),  # ... of step 2
        (train, "evaluate", 3),  # at the end
    ],
)
def test_while_evaluating_and_sampling(module, name, call, toys, tmp_path):
    """What was cut short is done after the resume: the log is that of an uninterrupted run, and so is every bit."""
    extra = {"max_steps": 5, "val_steps": 2, "sample_steps": 2, "num_samples": 2, "audio_tokenizer": "none", "ema": 0.5}
    whole, parts = (settings(toys, tmp_path / folder, 4, **extra) for folder in ("whole", "parts"))
    dist = train.setup_distributed("cpu")
    expected = run(dist, whole)
    interrupted_in(dist, parts, module, name, call)
    assert not (tmp_path / "parts" / "final").exists()
    found = run(dist, [*parts, "--resume", "auto"])
    assert all(torch.equal(found[n], p) for n, p in expected.items())
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


# ---- SLURM


@pytest.mark.parametrize(("status", "is_requeued"), [(PREEMPTED, True), (0, False), (2, False)])
def test_the_slurm_script_requeues_what_was_preempted(status, is_requeued, tmp_path):
    """With stand-ins for srun, which ends with that status, and scontrol."""
    for name, body in {
        "srun": f'echo "$@" >{tmp_path}/srun; echo $NNODES $MASTER_ADDR $MASTER_PORT >>{tmp_path}/srun; exit {status}',
        "scontrol": f'echo "$@" >>{tmp_path}/scontrol; echo node0; echo node1',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    command = ["bash", ROOT / "docs" / "slurm.sh", "--output_dir", "runs/a b"]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == status
    started, variables = (tmp_path / "srun").read_text().splitlines()
    assert started.endswith("launch --resume auto --output_dir runs/a b") and variables == "2 node0 20007"
    assert ("requeue 7" in (tmp_path / "scontrol").read_text()) is is_requeued
