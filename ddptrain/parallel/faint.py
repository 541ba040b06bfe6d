"""Warns, once for each parameter, of gradients that are too small for an exact sum."""

from __future__ import annotations

import logging

from torch import nn

from ddptrain.parallel.reduction import Reduction

logger = logging.getLogger(__name__)


class Faint:
    """Names the parameters whose gradients a ``reduction`` found too small, as it has told of."""

    def __init__(self, reduction: Reduction, names: list[str], parameters: list[nn.Parameter]):
        self.reduction = reduction
        self.named = list(zip(names, parameters, strict=True))
        self.told: set[str] = set()

    def tell(self) -> None:
        faint = {id(parameter) for parameter in self.reduction.take_faint()}
        for name, parameter in self.named:
            if id(parameter) in faint and name not in self.told:
                self.told.add(name)
                logger.warning(
                    "the gradient of %s was so small in a step that its sum over micro-batches "
                    "kept fewer digits than float32 has, or none (exact sums keep what is above "
                    "2**-68): multiply the loss's sum and its count by 2**20, or more if this is "
                    "said again, which leaves their ratio, or use parallel.reduction=mean",
                    name,
                )
