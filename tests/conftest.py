"""What all tests need of the process that they are in."""

import signal

from hypothesis import settings

# Property tests give the same examples on every machine, so that a red run can be repeated.
settings.register_profile("ddptrain", deadline=None, derandomize=True, database=None)
settings.load_profile("ddptrain")

# A shell has what it starts in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
