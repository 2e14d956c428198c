"""torchrun, except that it ends with the failing rank's exit status and, where that is 2, without a traceback.

    python -m tools.launch --nproc_per_node=2 train.py ...      # arguments as for torchrun

train.py exits with 2 after a clear message about the user's input; torchrun itself would turn that into its own traceback
and status 1.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

USER_ERROR = 2


def main() -> int:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != USER_ERROR:
            print(error, file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
