"""A run that stands still says where, and ends; `bash launch.sh` starts it again with MAX_RESTARTS=N.

OUTPUT/stuck/rankN.txt gets the stacks of all threads of a rank, rankN.json the last collectives, which PyTorch's flight recorder
has noted, and their states. OUTPUT/heartbeat.json says every ten seconds what rank 0 does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from common import write_text
from distributed import WAITING, Dist

FIRST = 4  # times as long may the first step take, in which kernels are compiled


@contextlib.contextmanager
def watching(dist: Dist, folder: Path, timeout_min: float, find_faults: Callable[[], list[str]]) -> Iterator[None]:
    """Within this context the rank ends when it stands still for `timeout_min`; 0: never.

    A thread looks, because a rank usually stands still inside a call that never returns. Should such a call not let other
    threads run, faulthandler's timer writes the stacks a minute later.

    find_faults: what is wrong with the processes that this rank waits for
    """
    progress, ended = dist.progress, threading.Event()
    first = progress.step

    def watch() -> None:
        for second in itertools.count():
            if ended.wait(1):
                return
            quiet_sec = time.monotonic() - progress.since
            limit_sec = 60 * timeout_min * (1 if progress.step > first else FIRST)
            if limit_sec:
                faulthandler.dump_traceback_later(limit_sec + 60, exit=True, file=2)
            if dist.is_main and second % 10 == 0:
                beat = {"time": time.time(), "step": progress.step, "doing": progress.doing, "for_sec": round(quiet_sec, 1)}
                with contextlib.suppress(OSError):
                    write_text(folder / "heartbeat.json", json.dumps(beat))
            if 0 < limit_sec < quiet_sec:
                give_up(dist, folder / "stuck", quiet_sec, find_faults())

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        faulthandler.cancel_dump_traceback_later()


def give_up(dist: Dist, folder: Path, quiet_sec: float, faults: list[str]) -> None:
    """Note where this rank stands, and end it."""
    path, doing = folder / f"rank{dist.rank}.txt", dist.progress.doing
    where = f"rank {dist.rank} stands still after step {dist.progress.step}, {doing} for {quiet_sec:.0f} s"
    message = f"{'; '.join([where, *faults])}. The stacks of its threads are in {path}"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        with open(path, "w") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file)
    with contextlib.suppress(OSError, AttributeError, RuntimeError):  # NCCL keeps a record of its own
        c10d = torch._C._distributed_c10d
        dump = c10d._dump_nccl_trace_json if dist.device.type == "cuda" else c10d._dump_fr_trace_json
        path.with_suffix(".json").write_bytes(dump())
    time.sleep(3 * (doing == WAITING))  # the rank that the others wait for is to speak first
    print(message, file=sys.stderr, flush=True)
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        get_error_handler().record_exception(error)  # for the launcher, which repeats it last
    time.sleep(5)  # the other ranks note theirs
    for process in psutil.Process().children(recursive=True):  # a worker that is stopped would not notice the end
        process.kill()
    os._exit(1)
