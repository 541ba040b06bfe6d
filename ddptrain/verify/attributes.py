"""Looks into a user's object for what breaks the law: generators of its own, state that moves."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddptrain.verify.trace import digest

DEPTH = 3
LARGEST = 1 << 20
"""Elements of the largest array that is looked at: a data set in memory is none of the state."""
HIDDEN = {
    nn.Module: frozenset(vars(nn.Module())) | {"training"},
    Optimizer: frozenset({"state", "param_groups", "defaults"}),
}
"""What torch keeps in its own objects, and a checkpoint holds."""
READS_THE_RANK = re.compile(r"get_rank\(|get_world_size\(|[\"'](?:LOCAL_)?(?:RANK|WORLD_SIZE)[\"']")


@dataclass
class Attributes:
    """What an object holds beside parameters and buffers, by where it holds it."""

    generators: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    reads_the_rank: bool = False


def observe(thing: object) -> Attributes:
    """What ``thing`` holds now."""
    found = Attributes(reads_the_rank=_reads_the_rank(type(thing)))
    for path, value in _attributes(thing, "", DEPTH):
        if (kind := _generator(value)) is not None:
            found.generators[f"attribute {path}"] = kind
        elif (told := _told(value)) is not None:
            found.values[path] = told
    for name, value in _globals(type(thing)):
        if (kind := _generator(value)) is not None:
            found.generators[f"module's global {name}"] = kind
    return found


def _attributes(thing: object, prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    """The attributes of an object and, in turn, of the user's objects among them."""
    hidden = [names for kind, names in HIDDEN.items() if isinstance(thing, kind)]
    for name, value in getattr(thing, "__dict__", {}).items():
        if any(name in names for names in hidden):
            continue
        path = f"{prefix}{name}"
        yield path, value
        members = enumerate(value) if isinstance(value, list | tuple) and len(value) < 64 else ()
        for inner_path, inner in ((path, value), *((f"{path}[{i}]", m) for i, m in members)):
            if inner is not value and _generator(inner) is not None:
                yield inner_path, inner
            if depth > 1 and _is_looked_into(inner):
                yield from _attributes(inner, f"{inner_path}.", depth - 1)


def _is_looked_into(value: object) -> bool:
    known = (nn.Module, Tensor, type, ModuleType, FunctionType, Enum, random.Random)
    return hasattr(value, "__dict__") and not isinstance(value, known)


def _generator(value: object) -> str | None:
    """What kind of generator a value is; the global ones are keyed and do not count."""
    if isinstance(value, random.Random):
        return None if value is getattr(random, "_inst", None) else "a random.Random"
    if isinstance(value, np.random.Generator):
        return "a numpy Generator"
    if isinstance(value, np.random.RandomState):
        return None if value is np.random.mtrand._rand else "a numpy RandomState"
    if isinstance(value, torch.Generator):
        return None if value is torch.default_generator else "a torch.Generator"
    return None


def _told(value: object) -> str | None:
    """A short text that is another one when the value is another."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80]
    if isinstance(value, list | tuple | dict | set):
        return f"of length {len(value)}"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return f"a tensor of bits {digest(value)}" if value.numel() <= LARGEST else None
    return None


def _globals(kind: type[Any]) -> list[tuple[str, object]]:
    """The globals of the user's module that defines a class; libraries hold what they like."""
    if kind.__module__.partition(".")[0] in ("torch", "ddptrain", "builtins", "numpy"):
        return []
    module = sys.modules.get(kind.__module__)
    return [(f"{kind.__module__}.{name}", value) for name, value in vars(module or kind).items()]


def _reads_the_rank(kind: type[Any]) -> bool:
    if kind.__module__.partition(".")[0] in ("torch", "ddptrain", "builtins"):
        return False
    try:
        return READS_THE_RANK.search(inspect.getsource(kind)) is not None
    except (OSError, TypeError):
        return False
