"""Signals that ask a run to save and end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Interrupted

if TYPE_CHECKING:
    from distributed import Dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)  # of schedulers, shells and closed terminals
PREEMPTED = os.EX_TEMPFAIL  # exit status, 75, of a run that a signal ended: start it again
EARLY_END = "received {}: ended before a first step; what was written whole is kept"


class Signals:
    """SIGTERM, SIGUSR1 (schedulers announce preemption so), SIGHUP (a closed terminal) and SIGINT.

    Before the first step there is nothing to save: they end the process at once. From then on they ask the run to save and
    end after its step; evaluation, samples and waiting for data are cut short. A second SIGINT ends it at once. A signal that
    is ignored from the start, as nohup ignores SIGHUP, stays ignored.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.obeyed: signal.Signals | None = None  # the one that ended the run, on this rank or another
        self._has_begun = self._may_interrupt = False

    def __enter__(self) -> Signals:
        self.__init__()
        watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in watched}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self, dist: Dist) -> None:
        """From now on signals are noted; says so to tools/launch.py once every rank does. Collective."""
        self._has_begun = True
        dist.any(False)
        if note := _launch_note():
            note.touch()

    def _handle(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if not self._has_begun:
            if _launch_note() is None:
                print(EARLY_END.format(name), file=sys.stderr, flush=True)
            os._exit(0 if number == signal.SIGINT else PREEMPTED)
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._may_interrupt:
            raise Interrupted(name)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this context a signal, also one received before, raises Interrupted."""
        self._may_interrupt = True
        try:
            if self.received:
                raise Interrupted(self.received.name)
            yield
        finally:
            self._may_interrupt = False

    def status(self) -> int:
        """The exit status: 0 for a finished run and after Ctrl-C, PREEMPTED after other signals.

        torchrun would restart a rank that ends with PREEMPTED: under it the rank ends with 0, and tools/launch.py is told.
        """
        if self.obeyed in (None, signal.SIGINT):
            return 0
        if note := _launch_note():
            note.write_text("preempted")
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else PREEMPTED


def _launch_note() -> Path | None:
    """The file in which this rank tells tools/launch.py that it takes signals, and whether one has ended it."""
    return Path(os.environ["LAUNCH_FOLDER"]) / str(os.getpid()) if "LAUNCH_FOLDER" in os.environ else None
