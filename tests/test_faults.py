"""Things going wrong on one rank, under the real launcher: all ranks end, the status says so, the first cause comes last."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from test_resume import settings

import checkpoint


def launch(fault: str, argv: list[str], *options: str, module: str = "tools.launch") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, "--standalone", "--nproc_per_node=2", *options, "tests/faulty_train.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault, "FAULTY_RUN": argv[argv.index("--output_dir") + 1]}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def arguments(toys: Path, output_dir: Path, **extra) -> list[str]:
    return settings(toys, output_dir, **{"save_steps": 2, "num_workers": 1, "grad_accum": 1, "max_steps": 6, **extra})


def leaves_nothing_running(output_dir: Path) -> bool:
    """Whether every process of a run has ended: launcher, ranks, and within seconds their workers, which look after them."""
    deadline = time.time() + 20
    while time.time() < deadline:
        environments = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
        if not any(environment.get("FAULTY_RUN") == str(output_dir) for environment in environments):
            return True
        time.sleep(0.5)
    return False


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param("saving", "RuntimeError: injected in saving", marks=slow),
        pytest.param("worker killed", "RuntimeError: (DataLoader worker .*|a loader worker has died; .*)", marks=slow),
        ("step", "RuntimeError: injected in a step"),
        pytest.param("validation", "RuntimeError: injected in validation", marks=slow),
        pytest.param("worker", "RuntimeError: injected in a worker", marks=slow),
        pytest.param(
            "rank killed", "rank 1 failed first: ended by SIGKILL; the system does so when memory runs out", marks=slow
        ),
    ],
)
def test_one_rank_brings_all_down_and_speaks_last(fault, cause, toys, tmp_path):
    """Within the 30 s that torchrun leaves ranks to end; what they say themselves comes before."""
    done = launch(fault, arguments(toys, tmp_path / "o", num_workers=int("worker" in fault)))
    assert done.returncode == (128 + signal.SIGKILL if fault == "rank killed" else 1)
    assert re.fullmatch(cause, done.stderr.rstrip().splitlines()[-1].strip()), done.stderr
    assert "rank 1 failed first" in done.stderr and "rank 0 failed first" not in done.stderr
    assert leaves_nothing_running(tmp_path / "o") and not (tmp_path / "o" / "final").exists()
    for folder in checkpoint.list_states(tmp_path / "o" / "checkpoints"):
        assert checkpoint.find_damage(folder) is None


@slow
def test_a_rank_that_hangs_is_given_up(toys, tmp_path):
    """The others wait for --dist_timeout, here 0.2 minutes."""
    done = launch("hang", arguments(toys, tmp_path / "o", dist_timeout=0.2))
    assert done.returncode == 1 and "Timed out" in done.stderr.rstrip().splitlines()[-1]
    assert leaves_nothing_running(tmp_path / "o")


@slow
def test_torchrun_restarts_a_run_that_failed(toys, tmp_path):
    """Bare torchrun, no --resume: the second attempt goes on from the checkpoint of the first and finishes."""
    options = ("--max_restarts=1",)
    done = launch("step", arguments(toys, tmp_path / "o"), *options, module="torch.distributed.run")
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: injected in a step" in done.stderr
    assert f"resumed from {tmp_path / 'o' / 'checkpoints' / 'step_2'}: 2 steps done" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "o" / "final" / "adapter_model.safetensors").is_file()
