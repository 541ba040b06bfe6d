"""`python -m ddptrain` and `torchrun -m ddptrain`: overrides alone train as one rank."""

import os
import signal
import sys

from ddptrain.parent import end_with_parent

if __name__ == "__main__" and "TORCHELASTIC_RUN_ID" in os.environ:
    end_with_parent(signal.SIGKILL)  # until it can heed a gentler signal: imports take a second

from ddptrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
