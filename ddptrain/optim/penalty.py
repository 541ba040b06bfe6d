"""True penalties on weights: L2 in the gradient, L1 by a proximal step, which makes zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddptrain.optim.groups import MATRIX


class Penalty:
    """Adds ``l1`` Σ|w| + ½ ``l2`` Σw² to the mean loss; with both it is the elastic net.

    It is over the ``optimizer``'s weights, without biases and the scales of norms unless
    ``of_all``. The step for ``l1`` is that of proximal gradient descent: after an update at rate η
    each weight comes η · l1 closer to zero, and stops there (Parikh and Boyd, *Proximal
    Algorithms*, 2014). Both work on sums over all ranks, alike on each of them.
    """

    def __init__(self, optimizer: Optimizer, l1: float, l2: float, of_all: bool = False) -> None:
        self.optimizer = optimizer
        self.l1 = l1
        self.l2 = l2
        self.of_all = of_all

    def add(self, count: Tensor) -> None:
        """Add the gradient of the L2 penalty, times ``count``, to sums of gradients."""
        if not self.l2:
            return
        weights = [weight for weight in self._weights() if weight.grad is not None]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        with torch.no_grad():
            torch._foreach_add_(gradients, list(torch._foreach_mul(weights, count * self.l2)))

    @torch.no_grad()
    def shrink(self, skip: Tensor) -> None:
        """Take the proximal step of the L1 penalty, or none if ``skip`` is 1."""
        if not self.l1:
            return
        for group in self.optimizer.param_groups:
            weights = self._of(group["params"])
            if weights:
                by = (1 - skip) * (group["lr"] * self.l1)
                signs = list(torch._foreach_sign(weights))
                sizes = list(torch._foreach_abs(weights))
                torch._foreach_sub_(sizes, by.to(weights[0].dtype))
                torch._foreach_clamp_min_(sizes, 0.0)
                torch._foreach_copy_(weights, list(torch._foreach_mul(signs, sizes)))

    @torch.no_grad()
    def value(self) -> Tensor:
        """What is added to the mean loss, a scalar."""
        weights = self._weights()
        absolute = torch.stack(torch._foreach_norm(weights, 1)).sum()
        squares = torch.stack(torch._foreach_norm(weights)).square().sum()
        return self.l1 * absolute + 0.5 * self.l2 * squares

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Its value, and the share of the penalised weights that are exactly zero."""
        weights = self._weights()
        zeros = torch.stack([(weight == 0).sum() for weight in weights]).sum()
        sparsity = zeros / sum(weight.numel() for weight in weights)
        return {"penalty": self.value().item(), "sparsity": sparsity.item()}

    def _weights(self) -> list[Tensor]:
        return [w for group in self.optimizer.param_groups for w in self._of(group["params"])]

    def _of(self, parameters: list[Tensor]) -> list[Tensor]:
        return [p for p in parameters if self.of_all or p.dim() >= MATRIX]
