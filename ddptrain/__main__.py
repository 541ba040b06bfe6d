"""`ddptrain`, `python -m ddptrain` and `torchrun -m ddptrain`: a process that is a command."""

import atexit
import os
import signal
import sys

from ddptrain import garbage
from ddptrain.parent import end_with_parent, end_with_sweep

if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)  # until it can heed a gentler signal: imports take a second
    end_with_sweep()
    garbage.defer()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which prints no traceback of imports

from ddptrain.cli import main
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED
from ddptrain.resilience.failure import leave_now


def run_command() -> int | str | None:
    """Run the command of this process; return what it is to exit with.

    The process ends once all is done that was registered for its end, but without Python's taking
    down of every module: that takes torch most of a second, and what was completed must not fail
    because a thread of C++ does not survive it.
    """
    code: int | str | None = EXIT_FAILED
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    atexit.register(lambda: leave_now(code if isinstance(code, int) else EXIT_FAILED))
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result: int | str | None = main()
    except SystemExit as asked:  # of argparse
        result = asked.code or EXIT_COMPLETED
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        raise
    sys.stdout.flush()
    code = result
    return result


if __name__ == "__main__":
    sys.exit(run_command())
