"""True penalties on weights: L2 in the gradient, and L1 so that weights become exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddptrain.optim.groups import MATRIX
from ddptrain.stacked import dimensions


class Penalty:
    """Adds ``l1`` Σ|w| + ½ ``l2`` Σw² to the mean loss; with both it is the elastic net.

    It is over the ``optimizer``'s weights, without biases and the scales of norms unless
    ``of_all``. For L1 a step is orthant-wise (Andrew and Gao, ICML 2007): a weight that is zero
    has a gradient only where the loss pulls harder than the penalty, and one that an update would
    take past zero stays there. Of plain descent that is the proximal step, up to where zero is
    crossed; with momentum, or rates of each weight's own as in Adam, its end is still the minimum,
    which that of a proximal step is not. All of it works on what is alike on all ranks.
    """

    def __init__(self, optimizer: Optimizer, l1: float, l2: float, of_all: bool = False) -> None:
        self.optimizer = optimizer
        self.l1 = l1
        self.l2 = l2
        self.of_all = of_all
        self.signs: list[Tensor] = []

    @torch.no_grad()
    def add(self, count: Tensor) -> None:
        """Add the penalty's gradient, times ``count``, to sums of gradients."""
        weights = self.weights()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if self.l2:
            torch._foreach_add_(gradients, list(torch._foreach_mul(weights, count * self.l2)))
        if self.l1:
            pull = count * self.l1
            self.signs = [
                _orthant(weight, gradient, pull)
                for weight, gradient in zip(weights, gradients, strict=True)
            ]

    @torch.no_grad()
    def hold(self) -> None:
        """Leave at zero, after an update, what it has taken past zero."""
        if self.l1:
            for weight, sign in zip(self.weights(), self.signs, strict=True):
                weight.masked_fill_(weight * sign <= 0, 0.0)

    @torch.no_grad()
    def value(self) -> Tensor:
        """What is added to the mean loss, a scalar."""
        weights = self.weights()
        absolute = torch.stack(torch._foreach_norm(weights, 1)).sum()
        squares = torch.stack(torch._foreach_norm(weights)).square().sum()
        return self.l1 * absolute + 0.5 * self.l2 * squares

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Its value, and the share of the penalised weights that are exactly zero."""
        weights = self.weights()
        zeros = torch.stack([(weight == 0).sum() for weight in weights]).sum()
        sparsity = zeros / sum(weight.numel() for weight in weights)
        return {"penalty": self.value().item(), "sparsity": sparsity.item()}

    def weights(self) -> list[Tensor]:
        """The penalised parameters."""
        return [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if self.of_all or dimensions(parameter) >= MATRIX
        ]


def _orthant(weight: Tensor, gradient: Tensor, pull: Tensor) -> Tensor:
    """Add the L1 penalty's ``pull`` to a gradient; return on which side of zero weights may be."""
    side = weight.sign()
    at_zero = gradient.sign() * (gradient.abs() - pull).clamp_(min=0)
    gradient.copy_(torch.where(side == 0, at_zero, gradient + pull * side))
    return torch.where(side == 0, -gradient.sign(), side)
