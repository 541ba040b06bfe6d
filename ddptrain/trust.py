"""Refuses a config that names what is no part of a model: it came with a run, from anybody.

The rule (``permitted``) is put to the source before anything that a config names is imported, and
to the objects themselves before they are called, for source does not tell everything.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

from ddptrain.errors import Refused
from ddptrain.permitted import PYTHON, home_of, is_private, is_tool, objection
from ddptrain.sources import origins

MAX_DEPTH = 64
REMEDY = "write a function in a module of your own that does what you need, and name that"
Way = tuple[str, dict[Any, Any]]


def check_targets(plain: object) -> None:
    """Refuse a config that names anything that is no part of a model, wherever it stands.

    Nothing is imported. Raises ``Refused`` with the key, the target and what to do.
    """
    for key, node in _targets(plain, ""):
        target = node["_target_"]
        if not isinstance(target, str) or not _is_dotted(target):
            raise Refused(f"{key}: expected the dotted name of a class or function, got {target!r}")
        for name in _ways(key, target):
            _refuse(key, target, name, objection(name, node))


def _ways(key: str, target: str) -> list[str]:
    """The names by which to judge a target; those where it comes from first.

    The inside of a package is its own: ``torch.Tensor`` is ``torch._tensor.Tensor``.
    """
    try:
        names = origins(target)
    except RecursionError:
        raise Refused(
            f"{key}: {target!r} leads from import to import; name the module that defines it"
        ) from None
    public = {name.partition(".")[0] for name in names if not is_private(name)}
    if any(name.partition(".")[0] in PYTHON and not objection(name, {}) for name in names):
        # collections.OrderedDict is made in _collections, if that is there.
        names = {name for name in names if home_of(name.partition(".")[0]) != "python"}
    judged = [n for n in names if not is_private(n) or n.partition(".")[0] not in public]
    return sorted(judged, key=lambda name: (name == target, name))


def check_object(key: str, target: object) -> None:
    """Refuse what ``target`` turns out to be, now that it may be imported. Raises ``Refused``.

    What cannot be imported is left to the one who builds it, who has more to say about it.
    """
    if not isinstance(target, str) or (found := _walk(target)) is None:
        return
    name, home = found
    _refuse(key, target, name, objection(name, {}))
    if name.partition(".")[0] != home.partition(".")[0] or not is_private(home):
        _refuse(key, target, home, objection(home, {}))


def check_objects(path: str, node: object) -> None:
    """``check_object`` for every target below a config node, outermost first, as it is built."""
    for key, below in _targets(node, path):
        check_object(key, below["_target_"])


def _refuse(key: str, target: str, name: str, reason: str | None) -> None:
    if reason:
        which = repr(target) if name == target else f"{target!r} is {name}, which"
        raise Refused(f"{key}: {which} is no part of a model: {reason}; {REMEDY}")


def _targets(node: object, path: str, depth: int = 0) -> Iterator[Way]:
    """Every section with a ``_target_``, with the key of that; refuses what is no plain value."""
    if depth > MAX_DEPTH:
        raise Refused(f"{path[:80]}…: sections within sections, more than {MAX_DEPTH}; flatten it")
    if isinstance(node, dict):
        if "_target_" in node:
            yield f"{path}._target_".lstrip("."), node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}".lstrip("."), depth + 1)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _targets(value, f"{path}[{i}]", depth + 1)
    elif isinstance(node, str) and "${" in node:
        raise Refused(
            f"{path}: {node!r} would be another value when it is read; say the value itself"
        )


def _is_dotted(target: str) -> bool:
    return all(part.isidentifier() for part in target.split("."))


def _walk(target: str) -> tuple[str, str] | None:
    """The name of an object from the last module on its way, and from where it was defined."""
    first, *parts = target.split(".")
    try:
        thing: Any = importlib.import_module(first)
        name = first
        for part in parts:
            if not hasattr(thing, part) and isinstance(thing, ModuleType):
                importlib.import_module(f"{thing.__name__}.{part}")
            thing = getattr(thing, part)
            name = f"{name}.{part}"
            if isinstance(thing, ModuleType):
                name = thing.__name__
                if is_tool(name.partition(".")[0]):
                    break
    except Exception:
        return None
    return name, _defined_as(thing, name)


def _defined_as(thing: Any, otherwise: str) -> str:
    """``module.qualified.name`` of a callable; of an instance, that of its class."""
    while isinstance(thing, partial):
        thing = thing.func
    if isinstance(thing, ModuleType):
        return otherwise
    owner = getattr(thing, "__self__", None)
    module = getattr(thing, "__module__", None)
    name = getattr(thing, "__qualname__", None)
    if not isinstance(name, str):
        module, name = type(thing).__module__, type(thing).__qualname__
    elif not isinstance(module, str):
        kind = owner if isinstance(owner, type) else type(owner)
        module = otherwise.rpartition(".")[0] if owner is None else kind.__module__
    return re.sub(r"\.<locals>", "", f"{module}.{name}")
