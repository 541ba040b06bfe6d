"""Looks into a user's object for what breaks the law: generators of its own, state that moves."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType, FunctionType, ModuleType
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
RANK = "reads the rank, or how many there are"
WHAT_CODE_DOES = {
    RANK: re.compile(r"get_rank\(|get_world_size\(|[\"'](?:LOCAL_)?(?:RANK|WORLD_SIZE)[\"']"),
    "asks which loading worker runs it": re.compile(r"get_worker_info\("),
    "draws from a generator that is seeded by chance": re.compile(
        r"default_rng\(\)|RandomState\(\)|\bRandom\(\)|SystemRandom|urandom\(|\buuid[14]\(|secrets\."
    ),
    "reads the process or the clock": re.compile(
        r"getpid\(|get_ident\(|perf_counter|monotonic\(|time_ns\(|\btime\.time\(|\bnow\(\)"
    ),
}
"""What makes the same code do something else the next time, by how it looks."""
LIBRARIES = ("torch", "ddptrain", "builtins", "numpy")


@dataclass
class Attributes:
    """What an object holds beside parameters and buffers, by where it holds it."""

    generators: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)
    """What of ``WHAT_CODE_DOES`` is seen in the object's class."""


def observe(thing: object) -> Attributes:
    """What ``thing`` holds now."""
    found = Attributes(code=_what_code_does(type(thing)))
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
    """The globals that a user's class names, in its own code or in functions that it calls."""
    named: dict[str, object] = {}
    for owner in kind.__mro__:
        module = sys.modules.get(owner.__module__)
        if _is_users(owner) and module is not None:
            codes = [f.__code__ for f in map(_function, vars(owner).values()) if f is not None]
            named |= {
                f"{owner.__module__}.{name}": value
                for name, value in _named_by(codes, vars(module)).items()
            }
    return list(named.items())


def _named_by(codes: list[CodeType], module: Mapping[str, object]) -> dict[str, object]:
    """What of a module's globals is named by ``codes``, and by its functions that they name."""
    named: dict[str, object] = {}
    for code in codes:  # which grows
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        for name in code.co_names:
            if name in module and name not in named:
                named[name] = module[name]
                function = _function(module[name])
                codes += [] if function is None else [function.__code__]
    return named


def _function(value: object) -> FunctionType | None:
    """The function in what a class or module holds: a method, property, or plain function."""
    for name in ("fget", "__func__", "__wrapped__"):
        value = getattr(value, name, None) or value
    return value if isinstance(value, FunctionType) else None


def _is_users(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] not in LIBRARIES


def _what_code_does(kind: type[Any]) -> list[str]:
    if not _is_users(kind):
        return []
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return []
    return [what for what, pattern in WHAT_CODE_DOES.items() if pattern.search(source)]
