"""The processes of a DataLoader: forked from a server, deaf to signals, and ended with the process that reads from them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TypeVar

import psutil
from torch.utils.data import DataLoader

from process.signals import SIGNALS

T = TypeVar("T")


def receive(batches: Iterator[T]) -> T:
    """The next item from a loader's workers; one that was killed shows as a broken connection, which is put into words."""
    try:
        return next(batches)
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a loader worker has died; the system kills processes when memory runs out") from error


def settings(num_workers: int) -> dict:
    """A DataLoader's arguments for so many processes, forked from a server instead of from this process.

    This process has threads (gloo, NCCL, saving). A child that is forked while one of them holds a lock may wait for it
    forever: seen in CPython 3.11 right after a collective. The server imports what the workers need, once.
    """
    if not num_workers:
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "data"])
    # The server and the tracker of semaphores inherit this: they survive signals, and the tracker removes what it finds
    # after a process that ended at once without a warning.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    here = os.getcwd()
    os.chdir(Path(__file__).parent.parent)  # the server and the tracker import modules from the current folder first
    forkserver.ensure_running()
    os.chdir(here)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _live_with_parent}


def _live_with_parent(worker: int) -> None:
    """A worker ends when the process that reads from it ends, and not before: signals are ignored.

    PyTorch gives it a handler for SIGTERM, and lets it check only that its server is alive, which lives as long as workers do.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def find_faults(loader: DataLoader) -> list[str]:
    """Its worker processes that neither run nor wait to."""
    found = []
    for number, worker in enumerate(getattr(loader._iterator, "_workers", [])):
        with contextlib.suppress(psutil.Error):
            status = psutil.Process(worker.pid).status() if psutil.pid_exists(worker.pid) else "gone"
            if status not in (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING, psutil.STATUS_IDLE):
                found.append(f"its loader worker {number} (process {worker.pid}) is {status}")
    return found
