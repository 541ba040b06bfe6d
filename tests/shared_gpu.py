"""Runs under torchrun in place of ``-m ddptrain``: its ranks share one GPU, over gloo.

NCCL wants a GPU for each rank; so on a machine with one, this is how several ranks train on it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from ddptrain.cli import main
from ddptrain.launch import worker

form_group = dist.init_process_group


def over_gloo(backend: str, *, device_id: torch.device, **more: Any) -> None:
    form_group("gloo", **more)


if __name__ == "__main__":
    dist.init_process_group = over_gloo
    worker.choose_device = lambda wanted, place: torch.device("cuda", 0)
    sys.exit(main())
