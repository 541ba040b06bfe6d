"""Builds the optimiser of a config, fused where torch has a fused kernel for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from torch import nn
from torch.optim import Optimizer

from ddptrain.optim.groups import Group, parameter_groups
from ddptrain.optim.schedules import ByEpoch, Schedule


def build_schedule(node: dict[str, Any], steps_per_epoch: int | None) -> Schedule:
    """Return the schedule that ``node`` describes; with ``steps_per_epoch`` it counts in epochs."""
    schedule: Schedule = instantiate(node)
    return schedule if steps_per_epoch is None else ByEpoch(schedule, steps_per_epoch)


def build_optimizer(
    node: dict[str, Any], module: nn.Module, grouping: dict[str, Any] | None = None
) -> Optimizer:
    """Return the optimiser that ``node`` (``_target_`` and its arguments) describes.

    ``grouping`` says which parameters it treats alike, as ``parameter_groups`` takes it; what is
    frozen by it does not require gradients any more. A fused kernel updates all parameters at once
    and can skip an update without the device having to tell the host, so it is taken unless the
    config chooses an implementation.
    """
    target = get_object(node["_target_"])
    accepted = inspect.signature(target).parameters
    lr = node.get("lr", accepted["lr"].default if "lr" in accepted else 1.0)
    groups = parameter_groups(module, lr, decays="weight_decay" in accepted, **(grouping or {}))
    # Dampening: see _begin_momentum.
    chosen = {"fused", "foreach", "capturable", "differentiable", "dampening"} & node.keys()
    fused = {"fused": True} if "fused" in accepted and not chosen and _fuses(target, groups) else {}
    params = _params(groups, getattr(target, "wants_names", False))
    make = instantiate({**node, "_partial_": True}, _convert_="all")
    try:
        optimizer: Optimizer = make(params=params, **fused)
    except Exception as error:  # whatever a user's own may raise
        raise InstantiationException(node["_target_"]) from error
    if isinstance(optimizer, torch.optim.SGD):
        _begin_momentum(optimizer)
    return optimizer


def _fuses(target: object, groups: list[Group]) -> bool:
    """Whether there is a fused kernel for all parameters; that of Adagrad is for the CPU."""
    parameters = [parameter for group in groups for _, parameter in group.members]
    on_gpu = any(parameter.is_cuda for parameter in parameters)
    is_floating = all(parameter.is_floating_point() for parameter in parameters)
    return is_floating and not (target is torch.optim.Adagrad and on_gpu)


def _params(groups: list[Group], with_names: bool) -> list[Any]:
    """As an optimiser takes them: a list of parameters, or of groups where there are several."""
    members = [
        group.members if with_names else [parameter for _, parameter in group.members]
        for group in groups
    ]
    if len(groups) == 1 and not groups[0].options and not with_names:
        return members[0]
    return [
        {"params": params, **group.options} for group, params in zip(groups, members, strict=True)
    ]


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Begin with momentum zero, which is what SGD does, but for fused SGD that skips a first step.

    It leaves the buffer as it was allocated then, and goes on from there. With dampening, which
    torch does not apply to the first step, zero would not be the same.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
