"""Where an update may have left what is allowed, these give the nearest point that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Every number between ``low`` and ``high``; ``low: 0`` alone is what is not negative."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")

    def __call__(self, point: Tensor) -> Tensor:
        return point.clamp(self.low, self.high)


@dataclass(frozen=True)
class Ball:
    """All numbers together no further than ``radius`` from zero."""

    radius: float = 1.0

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius={self.radius}: expected a number above 0")

    def __call__(self, point: Tensor) -> Tensor:
        # Divided by the largest number first, whose square might overflow.
        largest = point.abs().amax().clamp(min=torch.finfo(point.dtype).tiny)
        norm = torch.linalg.vector_norm(point / largest) * largest
        return torch.where(norm > self.radius, point * (self.radius / norm), point)


@dataclass(frozen=True)
class Simplex:
    """Along the last dimension numbers that are not negative and add up to ``total``.

    All are lowered by one amount and cut off at zero; sorting finds the amount (Duchi et al.,
    *Efficient Projections onto the ℓ1-Ball for Learning in High Dimensions*, ICML 2008).
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not self.total > 0:
            raise ValueError(f"total={self.total}: expected a number above 0")

    def __call__(self, point: Tensor) -> Tensor:
        if point.dim() == 0:
            raise ValueError("one number is no point of a simplex; expected a list of numbers")
        # Lowering all of them changes nothing, and keeps the digits of ``total`` beside large ones.
        point = point - point.amax(dim=-1, keepdim=True)
        largest_first = point.sort(dim=-1, descending=True).values
        counts = torch.arange(1, point.shape[-1] + 1, device=point.device, dtype=point.dtype)
        amounts = (largest_first.cumsum(-1) - self.total) / counts
        left = (largest_first > amounts).sum(dim=-1, keepdim=True).clamp(min=1)  # 0 of a NaN
        return (point - amounts.gather(-1, left - 1)).clamp(min=0)
