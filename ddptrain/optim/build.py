"""Builds the optimiser of a config, fused where torch has a fused kernel for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from torch import nn
from torch.optim import Optimizer

from ddptrain.optim.schedules import ByEpoch, Schedule


def build_schedule(node: dict[str, Any], steps_per_epoch: int | None) -> Schedule:
    """Return the schedule that ``node`` describes; with ``steps_per_epoch`` it counts in epochs."""
    schedule: Schedule = instantiate(node)
    return schedule if steps_per_epoch is None else ByEpoch(schedule, steps_per_epoch)


def build_optimizer(node: dict[str, Any], module: nn.Module) -> Optimizer:
    """Return the optimiser that ``node`` (``_target_`` and its arguments) describes.

    A fused kernel updates all parameters at once and can skip an update without the device
    having to tell the host, so it is taken unless the config chooses an implementation.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Dampening: see _begin_momentum.
    chosen = {"fused", "foreach", "capturable", "differentiable", "dampening"} & node.keys()
    accepted = inspect.signature(get_object(node["_target_"])).parameters
    fused = (
        {"fused": True}
        if "fused" in accepted and not chosen and all(p.is_floating_point() for p in parameters)
        else {}
    )
    optimizer: Optimizer = instantiate(node, params=parameters, **fused, _convert_="all")
    if isinstance(optimizer, torch.optim.SGD):
        _begin_momentum(optimizer)
    return optimizer


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Begin with momentum zero, which is what SGD does, but for fused SGD that skips a first step.

    It leaves the buffer as it was allocated then, and goes on from there. With dampening, which
    torch does not apply to the first step, zero would not be the same.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
