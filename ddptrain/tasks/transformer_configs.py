"""Finds what a user misspelt in a config of transformers, which keeps any name, read or not."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from typing import Any

from ddptrain.errors import Refused
from ddptrain.nearest import suggest

OWN = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
"""Keys of a section that are no arguments."""


def check_entries(path: str, node: object) -> None:
    """Refuse entries that a config class of transformers would keep and nobody read.

    ``node`` is what a user wrote at the config key ``path``, once it is built. A config that is
    read from a folder is none of the user's writing, and often has entries of other versions; so
    is one that a model has filled in. Raises ``Refused``.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    if isinstance(node, list | tuple):
        for number, below in enumerate(node):
            check_entries(f"{path}[{number}]", below)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        kind = pkgutil.resolve_name(node["_target_"])
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedConfig):
            _check_names(path, kind, [name for name in node if name not in OWN])
    for key, below in node.items():
        check_entries(f"{path}.{key}", below)


def _check_names(path: str, kind: type[Any], names: list[str]) -> None:
    known = {*inspect.signature(kind).parameters, *kind.attribute_map, "num_labels"}
    strange = sorted(name for name in names if name not in known and not hasattr(kind, name))
    try:
        usual, made = kind(), kind(**dict.fromkeys(strange))
    except Exception:  # some cannot be made without configs of their parts
        return
    for name in strange:
        if name in vars(made).keys() - vars(usual).keys():  # others are read, and not kept
            hint = suggest(name, sorted(known | vars(usual).keys()))
            hint = hint if "did you mean" in hint else ""
            raise Refused(f"unknown key {path}.{name}: {kind.__name__} has no such entry{hint}")
