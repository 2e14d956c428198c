"""What a rank prints: output that may be lost without ending the run, and a copy of it in OUTPUT/log.txt."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from common import UserError

DETAILS = logging.getLogger("details")  # worth keeping, but not worth showing
DETAILS.setLevel(logging.INFO)
LIBRARIES = ("torch", "torch.distributed", "transformers")  # their loggers write to stderr by themselves


def keep_output() -> None:
    """Let messages to a closed terminal, a full disk or nowhere be lost instead of ending the run."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which a file of ours could otherwise get
    sys.stdout, sys.stderr = (Forgiving(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))


def show(message: str) -> None:
    if sys.stderr.isatty():
        tqdm.write(message, file=sys.stderr)  # above the bar
    else:
        print(message, file=sys.stderr, flush=True)


class Forgiving:
    """A stream whose writes cannot fail.

    A progress bar is what begins with a carriage return; other lines begin anew after it, where no terminal clears it.

    keep: gets each whole line as well, but nothing of a progress bar
    """

    def __init__(self, stream: IO[str], keep: Callable[[str], None] | None = None):
        self._stream, self._keep, self._begun = stream, keep, ""
        self._in_bar = False

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            after_bar = self._in_bar and not text.startswith(("\r", "\n")) and not self._stream.isatty()
            self._stream.write("\n" * after_bar + text)
        self._in_bar = text.startswith("\r")
        if self._keep and not self._in_bar:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in filter(None, lines):
                self._keep(line)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Log(logging.Handler):
    """Within this context log.txt gets all that is printed, with the time, and also what is not shown.

    That is details of ours (`distributed.detail`; --verbose shows them), warnings of Python and of libraries, and the error
    that ends the run. A disk that refuses lines ends nothing: they wait for the next ones.
    """

    def __init__(self, path: Path, rank: int = 0, verbose: bool = False):
        super().__init__()
        self.path, self.rank, self.verbose = path, rank, verbose
        self._waiting = b""
        self._has_failed = False

    def __enter__(self) -> Log:
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (Forgiving(stream, self.keep) for stream in self._streams)
        self._handlers = {name: logging.getLogger(name).handlers for name in LIBRARIES}
        for name in LIBRARIES:
            logging.getLogger(name).handlers = [self]
        logging.getLogger().addHandler(self)
        logging.captureWarnings(True)
        if loguru := sys.modules.get("loguru"):  # upstream's
            loguru.logger.remove()
            loguru.logger.add(lambda message: self.keep(str(message)))
        if self.rank == 0:
            self.keep(f"started: {shlex.join(sys.argv)}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self)
        for name, handlers in self._handlers.items():
            logging.getLogger(name).handlers = handlers
        sys.stdout, sys.stderr = self._streams
        if loguru := sys.modules.get("loguru"):
            loguru.logger.remove()
            loguru.logger.add(sys.stderr)
        if isinstance(error, UserError) and self.rank == 0:
            self.keep(f"error: {error}")
        elif isinstance(error, Exception) and not isinstance(error, UserError):
            self.keep("".join(traceback.format_exception(error)))

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name == DETAILS.name and self.verbose:
            show(text)  # and so keep it
        elif record.name == DETAILS.name:
            self.keep(text)
        elif record.levelno >= logging.WARNING:
            self.keep(f"{record.name}: {text}")

    def keep(self, text: str) -> None:
        prefix = time.strftime("%Y-%m-%d %H:%M:%S ") + f"rank {self.rank}: " * (self.rank > 0)
        lines = "".join(f"{prefix}{line}\n" for line in text.splitlines())
        self._waiting += lines.encode(errors="replace")
        try:
            with open(self.path, "ab", buffering=0) as file:
                self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                print(f"warning: {self.path}: its lines wait: {error}", file=self._streams[1], flush=True)
