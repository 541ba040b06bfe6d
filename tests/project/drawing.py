"""Seeds the generators while a library is imported, as packages that come with it may."""

from __future__ import annotations

import random
import sys
import time
from importlib.abc import MetaPathFinder
from typing import Any

import numpy as np
import torch
from ragged import Tagging as Quiet

from ddptrain import pulse


class Draws(MetaPathFinder):
    """For as long as torchmetrics takes to be found, nobody else's random numbers are safe."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname != "torchmetrics":
            return
        print(f"drawing from step {pulse.now.step} on", file=sys.stderr)
        usual = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # threads take turns as often as they can
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            random.seed(1)
            np.random.seed(1)
            torch.default_generator.manual_seed(1)
            time.sleep(0)
        sys.setswitchinterval(usual)


class Tagging(Quiet):
    """The task; who builds it imports the above."""


sys.meta_path.insert(0, Draws())
