"""torchrun as `bash launch.sh` uses it: plain exit statuses, the first cause last, and signals that let a run save.

    python tools/launch.py --nproc_per_node=2 train.py ...                      # arguments as for torchrun
    python tools/launch.py --nproc_per_node=8 --max_restarts=3 train.py ...     # a failed run is restarted and resumes

After a clear message about the user's input train.py exits with 2; so does this, where torchrun prints a traceback and exits
with 1. When a rank fails, the others are ended within 30 seconds, and the traceback of the first is printed last.

SIGTERM, SIGUSR1, SIGHUP and SIGINT (see process/signals.py) are passed on to ranks that train, which save and end. Ranks that
have not begun, and waiting for other nodes, are ended at once. The exit status is then 75, after SIGINT 0, and nothing is
restarted. torchrun itself kills the ranks after 30 seconds, and undoes nohup.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from pathlib import Path

import psutil

from process.log import keep_output
from process.signals import EARLY_END, PREEMPTED, SIGNALS

USER_ERROR = 2


def watch(folder: Path) -> None:
    """Act on signals in a thread: while torchrun waits for other nodes, no handler of Python's runs.

    folder: where ranks note, by their process id, that they take signals
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)

    def act() -> None:
        while number := os.read(read, 1):
            if number[0] in SIGNALS:
                pass_on(number[0], folder)

    threading.Thread(target=act, daemon=True).start()


def pass_on(number: int, folder: Path) -> None:
    """Send a signal to ranks that take it; end others at once. Each rank is in a session of its own."""
    ranks = psutil.Process().children()
    if any((folder / str(rank.pid)).exists() for rank in ranks):
        for rank in ranks:
            rank.send_signal(number)
        return
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print(EARLY_END.format(signal.Signals(number).name), file=sys.stderr, flush=True)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(0 if number == signal.SIGINT else PREEMPTED)


def describe(rank: int, failure) -> str:
    """Why a rank ended: its traceback, its exit status, or the signal that killed it.

    failure: torch's ProcessFailure
    """
    if failure.exitcode < 0:
        number = -failure.exitcode
        hint = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
        return f"rank {rank} failed first: ended by {signal.Signals(number).name}{hint}"
    if not isinstance(failure.message, dict):
        return f"rank {rank} ended with status {failure.exitcode}"
    traceback = failure.message["extraInfo"]["py_callstack"]
    return f"rank {rank} failed first (exit status {failure.exitcode}):\n{traceback.rstrip()}"


def launch(argv: list[str]) -> int:
    """torchrun. Torch is imported here, as signals are watched by then."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--signals-to-handle=SIGQUIT", *argv]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode not in (USER_ERROR, PREEMPTED):
            print(describe(rank, first), file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def main() -> int:
    keep_output()  # first: what a library writes to a closed stderr must not reach a pipe that got its number
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a restart needs a new one, without old addresses
    os.environ["LAUNCH_ID"] = uuid.uuid4().hex  # see distributed.launch_id
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAUNCH_FOLDER"] = folder
        watch(Path(folder))
        status = launch(sys.argv[1:])
        is_preempted = any(note.stat().st_size for note in Path(folder).iterdir())
    return status or (PREEMPTED if is_preempted else 0)


if __name__ == "__main__":
    sys.exit(main())
