"""Counts numbers by sign and exponent: whole counts, which any ranks add up to the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ddptrain.observe.histograms import BINS, MANTISSA


@torch.no_grad()
def count_exponents(values: Tensor) -> Tensor:
    """How many of ``values`` have each sign and exponent, int64, shape (512,), on their device.

    The host does not wait for it. What is beyond float32's range counts as infinite.
    """
    bits = values.detach().float().contiguous().view(torch.int32).flatten()
    places = (bits >> MANTISSA) & (BINS - 1)
    if not places.is_cuda:
        return torch.bincount(places, minlength=BINS)
    # There ``bincount`` waits to know the largest, and a scattered sum has no fixed order.
    edges = torch.arange(BINS + 1, device=places.device, dtype=places.dtype)
    return torch.searchsorted(places.sort().values, edges).diff()


@torch.no_grad()
def sums(values: Tensor) -> Tensor:
    """The sum of ``values`` and of their squares, float64, shape (2,), on their device."""
    values = values.detach()
    squares = torch.linalg.vector_norm(values, dtype=torch.float64).square()
    return torch.stack([values.sum(dtype=torch.float64), squares])
