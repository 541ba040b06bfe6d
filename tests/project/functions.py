"""What a user would write to minimise functions of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ddptrain import Loss


def distance(point: Tensor, goal: list[float]) -> Tensor:
    """Squared distance, so that the minimum over a set is the goal's nearest point in it."""
    return (point - point.new_tensor(goal)).square().sum()


def entropy(point: Tensor, costs: list[float]) -> Tensor:
    """Of weights that add up to one: minimal at softmax(−costs)."""
    return (point * (point.log() + point.new_tensor(costs))).sum()


def crowded(point: Tensor) -> Tensor:
    """No scalar."""
    return point.square()


def mean_of(batch: tuple[Tensor, Tensor], centre: Tensor) -> Tensor:
    """What takes data and returns no ``Loss``."""
    return (batch[0] - centre).square().mean()


def spread(batch: tuple[Tensor, Tensor], centre: Tensor, scale: Tensor) -> Loss:
    """A Gaussian's negative logarithm: minimal at mean and deviation of the data."""
    features = batch[0][:, 0]
    losses = ((features - centre) / scale).square() / 2 + scale.log()
    return Loss(losses.sum(), len(features), logs={"largest": (features.abs().max(), 1)})


def wild(x: Tensor, y: Tensor) -> Tensor:
    """Not finite in a part of the plane."""
    return torch.log(x) ** 2 + y.square()
