"""Keeps an update within bounds: by the norm of all gradients, of each unit, or by value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from ddptrain.stacked import Stacked

SMALLEST_NORM = 1e-3
"""Of a unit's weights, so that those which are zero can grow."""


@dataclass(frozen=True)
class Clip:
    """What bounds gradients; None does not. Where several are given: in this order.

    ``max_norm`` is of all gradients together (Pascanu et al., ICML 2013); ``per_unit`` of each row
    of a matrix, filter of a convolution, or bias, as a fraction of the norm of its weights
    (*adaptive gradient clipping*, Brock et al., ICML 2021); ``max_value`` of each number.
    Of several models at once, ``max_norm`` is of each one's gradients.
    """

    max_norm: float | None = None
    per_unit: float | None = None
    max_value: float | None = None

    def __bool__(self) -> bool:
        return any(bound is not None for bound in (self.max_norm, self.per_unit, self.max_value))

    def __call__(
        self,
        parameters: Sequence[nn.Parameter],
        sums: list[Tensor],
        count: Tensor,
        norm: Tensor,
    ) -> None:
        """Turn ``sums`` of gradients into means over ``count``, and clip; ``norm`` is of sums."""
        if self.max_norm is not None and isinstance(parameters[0], Stacked):
            divisors = count.maximum(_norms_of_models(sums) / self.max_norm)
            for gradient in sums:
                gradient.div_(divisors.reshape(-1, *[1] * (gradient.dim() - 1)))
        else:
            # One factor does both: 1 / count, or max_norm / norm if that is smaller.
            divisor = count if self.max_norm is None else count.maximum(norm / self.max_norm)
            torch._foreach_mul_(sums, divisor.reciprocal())
        if self.per_unit is not None:
            unit_norms = vmap(_unit_norms) if isinstance(parameters[0], Stacked) else _unit_norms
            for parameter, gradient in zip(parameters, sums, strict=True):
                most = unit_norms(parameter).clamp_(min=SMALLEST_NORM) * self.per_unit
                gradient.mul_((most / unit_norms(gradient).clamp_(min=1e-6)).clamp_(max=1.0))
        if self.max_value is not None:
            torch._foreach_clamp_max_(sums, self.max_value)
            torch._foreach_clamp_min_(sums, -self.max_value)


def _norms_of_models(gradients: list[Tensor]) -> Tensor:
    """The norm of each model's gradients, of shape (models,)."""
    of_each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(of_each), dim=0)
    return norms


@torch.no_grad()
def _unit_norms(tensor: Tensor) -> Tensor:
    """The norm over all dimensions but the first, to be broadcast; of a vector, over its one."""
    over = tuple(range(min(1, tensor.dim() - 1), tensor.dim())) if tensor.dim() else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=over, keepdim=True)
    return norms
