"""Start a command of ours, so that Ctrl-C ends it without a traceback while Python still imports; see command.says_errors.

    python process/start.py FILE [ARGUMENT ...]
"""

import runpy
import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and the like ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
