"""train.py with something going wrong in it, started by test_faults.py: FAULT=KIND, on rank 1, in the first attempt only."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import data
import train


def fail(where: str) -> None:
    raise RuntimeError(f"injected in {where}")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def later(module, name: str, call: int, fault) -> None:
    """Let a function of a module do `fault` before its call of that number, counted from 1."""
    original, calls = getattr(module, name), [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            fault()
        return original(*args, **kwargs)

    setattr(module, name, function)


FAULTS = {
    "step": lambda: later(train, "train_step", 4, lambda: fail("a step")),
    "validation": lambda: later(train, "evaluate", 1, lambda: fail("validation")),
    "worker": lambda: later(data._MicroBatches, "__getitem__", 3, lambda: fail("a worker")),
    "worker killed": lambda: later(data._MicroBatches, "__getitem__", 3, kill),
    "worker hangs": lambda: later(data._MicroBatches, "__getitem__", 7, lambda: time.sleep(1000)),
    "worker stopped": lambda: later(data._MicroBatches, "__getitem__", 7, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "saving": lambda: later(checkpoint, "_write_rows", 2, lambda: fail("saving")),
    "rank killed": lambda: later(train, "train_step", 4, kill),
    "hang": lambda: later(train, "train_step", 4, lambda: time.sleep(1000)),
    "slow saving": lambda: later(checkpoint, "_write_rows", 1, lambda: time.sleep(3)),
}

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":  # in its workers, too
    FAULTS[os.environ["FAULT"]]()
if __name__ == "__main__":
    train.run_and_exit(sys.argv[1:])
