"""torchrun as `bash launch.sh` uses it: plain exit statuses, the first cause last, and signals that let a run save.

    python -m tools.launch --nproc_per_node=2 train.py ...                      # arguments as for torchrun
    python -m tools.launch --nproc_per_node=8 --max_restarts=3 train.py ...     # a failed run is restarted and resumes

After a clear message about the user's input train.py exits with 2; so does this, where torchrun prints a traceback and exits
with 1. When a rank fails, the others are ended within 30 seconds, and the traceback of the first is printed last. On SIGTERM,
SIGUSR1 and SIGINT train.py finishes its step, saves and exits with 0; this passes the signals on and waits, where torchrun
kills the ranks after 30 seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

USER_ERROR = 2


def pass_on(number: int, frame) -> None:
    """Send a signal on to the ranks. Each is in a session of its own, so that not even a terminal's Ctrl-C reaches it."""
    for child in psutil.Process().children():
        child.send_signal(number)


def describe(rank: int, failure: ProcessFailure) -> str:
    """Why a rank ended: its traceback, its exit status, or the signal that killed it."""
    if failure.exitcode < 0:
        number = -failure.exitcode
        hint = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
        return f"rank {rank} failed first: ended by {signal.Signals(number).name}{hint}"
    if not isinstance(failure.message, dict):
        return f"rank {rank} ended with status {failure.exitcode}"
    traceback = failure.message["extraInfo"]["py_callstack"]
    return f"rank {rank} failed first (exit status {failure.exitcode}):\n{traceback.rstrip()}"


def main() -> int:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a restart needs a new one, without old addresses
    os.environ["LAUNCH_ID"] = uuid.uuid4().hex  # see distributed.launch_id
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        run(parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *sys.argv[1:]]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode != USER_ERROR:
            print(describe(rank, first), file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
