"""Parameters that hold several models' weights at once: their first dimension is the model."""

from __future__ import annotations

from torch import Tensor, nn


class Stacked(nn.Parameter):
    """The same parameter of several models, of shape (models, …)."""


def dimensions(parameter: Tensor) -> int:
    """Of a parameter, as one model has it."""
    return parameter.dim() - isinstance(parameter, Stacked)
