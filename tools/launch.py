"""torchrun for train.py: its exit status, the first cause last, no traceback for the user's own mistakes, and signals that
let it save.

    python -m tools.launch --nproc_per_node=2 train.py ...                      # arguments as for torchrun
    python -m tools.launch --nproc_per_node=8 --max_restarts=3 train.py ...     # a failed run goes on by itself

train.py exits with 2 after a clear message about the user's input; torchrun itself would turn that into its own traceback
and status 1. When a rank crashes the others are ended within 30 seconds, and what the first one said is repeated below
whatever they said. On SIGTERM, SIGUSR1 and SIGINT train.py finishes its step, saves and exits with 0; torchrun would kill
it after 30 seconds, so here the signals are only passed on.
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
    """Hand a signal to the ranks; torchrun starts each in a session of its own, so that not even a terminal's Ctrl-C
    reaches them otherwise."""
    for child in psutil.Process().children():
        child.send_signal(number)


def describe(rank: int, failure: ProcessFailure) -> str:
    """What a rank died of: its traceback, or the signal that ended it."""
    if failure.exitcode < 0:
        number = -failure.exitcode
        hint = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
        return f"rank {rank} failed first: ended by {signal.Signals(number).name}{hint}"
    told = failure.message["extraInfo"]["py_callstack"] if isinstance(failure.message, dict) else "it left no traceback"
    return f"rank {rank} failed first (exit status {failure.exitcode}):\n{told.rstrip()}"


def main() -> int:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restarted run is sent to addresses of the one before
    os.environ["LAUNCH_ID"] = uuid.uuid4().hex  # by which a restarted run is known; see distributed.launch_id
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
