"""What every command does: its flags begin alike; at its end one message instead of a traceback, and an exit status."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch.distributed as torch_dist

from common import UserError


def parser_of(name: str, doc: str | None, **settings: Any) -> argparse.ArgumentParser:
    """The parser of `bash launch.sh NAME`. doc: of its file, which --help shows as it stands"""
    settings |= {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(prog=f"bash launch.sh {name}", **settings)


def says_errors(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command that says in one message what its user can mend, and returns 2; after Ctrl-C 130, as shells do."""

    @functools.wraps(main)
    def command(argv: Sequence[str]) -> int:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by start.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main(argv)
        except UserError as error:
            _say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            _say("stopped by Ctrl-C; what was written whole is kept")
            return 128 + signal.SIGINT
        except Exception as error:
            if not (what := full_disk(error)):
                raise
            _say(f"error: {what}; make room and try again; what was written whole is kept")
            return 2

    return command


def leave(status: int) -> NoReturn:
    """End the process at once: taking process groups down in good order can hang (NCCL) or abort (gloo)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def full_disk(error: Exception) -> str:
    """What an error says of a disk, or a quota, that is full; "" if it is another error. Libraries raise errors of their own."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {error.filename}" if error.filename else "no space left on the disk"
    return "no space left on the disk" if f"os error {errno.ENOSPC}" in str(error) else ""


def _say(message: str) -> None:
    """Print it once: by rank 0, or by each node's first rank where the ranks have not met yet.

    The other ranks wait for the launcher to end them: a rank that exits sooner would cut off the message.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if rank == 0 or (local_rank == 0 and not torch_dist.is_initialized()):
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)
