"""Builds the optimiser of a config, fused where torch has a fused kernel for it."""

from __future__ import annotations

import inspect
from typing import Any

from hydra.utils import get_class, instantiate
from torch import nn
from torch.optim import Optimizer


def build_optimizer(node: dict[str, Any], module: nn.Module) -> Optimizer:
    """Return the optimiser that ``node`` (``_target_`` and its arguments) describes.

    A fused kernel updates all parameters at once and can skip an update without the device
    having to tell the host, so it is taken unless the config chooses an implementation.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    chosen = {"fused", "foreach", "capturable", "differentiable"} & node.keys()
    accepted = inspect.signature(get_class(node["_target_"])).parameters
    fused = (
        {"fused": True}
        if "fused" in accepted and not chosen and all(p.is_floating_point() for p in parameters)
        else {}
    )
    optimizer: Optimizer = instantiate(node, params=parameters, **fused, _convert_="all")
    return optimizer
