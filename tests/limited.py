"""A rank of `ddptrain batch-find` that may have so many MiB more than it begins with."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from ddptrain.compose import compose
from ddptrain.errors import TrainingError
from ddptrain.launch.batch_find import batch_find
from ddptrain.place import Place

BY_HEADROOM = 0.9


def limit(mebibytes: int) -> None:
    """Limit the address space so that this is left besides what is to stay free."""
    torch.zeros(64, 64).requires_grad_().matmul(torch.ones(64, 64)).sum().backward()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    whole = int((size + (mebibytes << 20)) / BY_HEADROOM)
    resource.setrlimit(resource.RLIMIT_AS, (whole, whole))


if __name__ == "__main__":
    place = Place.from_environment()
    of_ranks = sys.argv[1].split(",")
    config = compose(sys.argv[2:])
    if allowed := int(of_ranks[place.rank]):
        limit(allowed)
    try:
        sys.exit(batch_find(config, place))
    except TrainingError as error:
        print(f"ddptrain: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
