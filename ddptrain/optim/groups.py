"""Which parameters an optimiser treats alike: by pattern of their names, by layer, by shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ddptrain.stacked import dimensions

Named = tuple[str, nn.Parameter]
MATRIX = 2
"""Dimensions from which on a parameter is decayed; below are biases and the scales of norms."""


@dataclass
class Group:
    """Parameters with the same ``options``, which are those of a group of torch's."""

    options: dict[str, Any]
    members: list[Named] = field(default_factory=list)


def parameter_groups(
    module: nn.Module,
    lr: float,
    *,
    groups: Sequence[dict[str, Any]] = (),
    decay: str = "weights",
    layer_decay: float | None = None,
    decays: bool = True,
) -> list[Group]:
    """Sort the parameters of ``module`` that are trained into groups, the plain one first.

    Each of ``groups`` has a ``match``, a pattern of names such as ``*.head.*``, or several, and
    what is to be different: ``frozen: true``, or options of the optimiser, such as ``lr``. A
    parameter is in the first that it matches. With ``decay`` "weights" biases and norms are not
    decayed (if the optimiser ``decays`` at all), unless their group says so. With ``layer_decay``
    each layer's rate is that times the rate of the layer above it (Clark et al., *ELECTRA*, ICLR
    2020), times ``lr`` or what the group says.
    Raises ``ValueError`` if a pattern matches nothing, or nothing is left to train.
    """
    if decay not in ("weights", "all"):
        raise ValueError(f"decay={decay}: expected weights or all")
    rules = [_Rule.of(number, group) for number, group in enumerate(groups)]
    depth = _depths(module) if layer_decay is not None else {}
    found: dict[tuple[Any, ...], Group] = {(): Group({})}
    for name, parameter in module.named_parameters():
        rule = next((rule for rule in rules if rule.takes(name)), None)
        if rule is not None and rule.frozen:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        options = dict(rule.options) if rule is not None else {}
        if decays and decay == "weights" and dimensions(parameter) < MATRIX:
            options.setdefault("weight_decay", 0.0)
        if layer_decay is not None:
            options["lr"] = options.get("lr", lr) * layer_decay ** depth[name]
        key = tuple(sorted((k, repr(v)) for k, v in options.items()))
        found.setdefault(key, Group(options)).members.append((name, parameter))
    _refuse_idle(rules, [name for name, _ in module.named_parameters()])
    kept = [group for group in found.values() if group.members]
    if not kept:
        raise ValueError("groups: every parameter is frozen, so there is nothing to train")
    return kept


@dataclass
class _Rule:
    number: int
    patterns: list[str]
    frozen: bool
    options: dict[str, Any]

    @staticmethod
    def of(number: int, group: dict[str, Any]) -> _Rule:
        options = dict(group)
        match = options.pop("match", None)
        if not match:
            raise ValueError(f"groups[{number}]: expected a match, a pattern of parameters' names")
        frozen = bool(options.pop("frozen", False))
        return _Rule(number, [match] if isinstance(match, str) else list(match), frozen, options)

    def takes(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


def _refuse_idle(rules: list[_Rule], names: list[str]) -> None:
    for rule in rules:
        for pattern in rule.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, 1, 0.3) or names[:1]
                raise ValueError(
                    f"groups[{rule.number}].match={pattern}: no parameter has such a name; there "
                    f"is {near[0]}, for one"
                )


def _depths(module: nn.Module) -> dict[str, int]:
    """How many layers are above that of each parameter, in the order in which they are listed.

    A layer is what is below the first number in a name, such as ``model.blocks.3``, or a module
    that holds parameters and is in no such list.
    """
    names = [name for name, _ in module.named_parameters()]
    layers = {name: _layer(name) for name in names}
    order = list(dict.fromkeys(layers.values()))
    return {name: len(order) - 1 - order.index(layer) for name, layer in layers.items()}


def _layer(name: str) -> str:
    numbered = re.match(r"(.*?\.\d+)(?:\.|$)", name)
    return numbered[1] if numbered else name.rpartition(".")[0]
