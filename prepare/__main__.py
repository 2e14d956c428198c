"""What is done to a dataset before training: `bash launch.sh prepare COMMAND ...`; each command is a file of this folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from common import suggestion
from process.command import parser_of, says_errors

COMMANDS = {
    "cut": "long recordings -> a table of clips, cut at pauses",
    "transcribe": "write the missing transcripts, by a speech recognition model or from a script",
    "convert": "any known form of dataset -> ChatML",
    "check": "read everything; list what is there and what is wrong",
    "pair": "references for zero-shot cloning; train / val / test without leaks",
    "encode": "waveforms -> codes, once",
    "show": "one sample as the model reads it",
}


@says_errors
def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        width = max(map(len, COMMANDS))
        if argv and not argv[0].startswith("-"):
            print(f"error: prepare knows no {argv[0]!r}{suggestion(argv[0], COMMANDS)}", file=sys.stderr)
        print("usage: bash launch.sh prepare COMMAND ...\n", file=sys.stderr)
        for name, purpose in COMMANDS.items():
            print(f"  {name:{width}}  {purpose}", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    name, *rest = argv
    command = importlib.import_module(f"prepare.{name}")  # only this one: they need different packages
    parser = parser_of(f"prepare {name}", command.__doc__)
    command.add_arguments(parser)
    return command.run(parser.parse_args(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
