"""`python -m ddptrain` and `torchrun -m ddptrain`: overrides alone train as one rank."""

import sys

from ddptrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
