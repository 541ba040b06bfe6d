"""The Python standard library that is running, as data: its files, and the functions in them."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from ddptrain.data.splits import split_indices
from ddptrain.errors import Refused

PACKAGES = (
    "argparse", "asyncio", "collections", "email", "http", "importlib", "inspect", "ipaddress",
    "logging", "mailbox", "multiprocessing", "optparse", "pathlib", "pickle", "tarfile", "typing",
    "unittest", "urllib", "xml", "zipfile",
)  # fmt: skip
"""Of modules and packages that every installation has, those with the most functions."""
SHORTEST = 100
"""Bytes of a function below which it hardly says where it is from."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


class StandardLibraryFunctions(TensorDataset):
    """(bytes, label): the first ``length`` bytes of a function, int64, shape (length,), and which
    of ``PACKAGES`` it is from.

    Functions of modules and methods of classes, without those inside others, without tests and
    without what is shorter than ``SHORTEST``. The names of ``PACKAGES`` are blotted out, wherever
    a function says them. Of functions that differ by name, docstring, comments or layout alone one
    is left, and none if they are of several packages, so that no split has what another has. A
    shorter text is filled up with 0. Raises ``Refused`` if a package has no source here.
    """

    class_names = PACKAGES

    def __init__(self, split: str, length: int) -> None:
        if length < 1:
            raise Refused(f"length: expected a number of bytes above 0, got {length}")
        functions = library_functions()
        missing = sorted(set(PACKAGES) - {package for package, _ in functions})
        if missing:
            raise Refused(f"this Python has no source of {', '.join(missing)} to train on")
        mine = [functions[index] for index in split_indices(len(functions), split)]
        texts = bytearray().join(text.encode()[:length].ljust(length, b"\0") for _, text in mine)
        inputs = torch.frombuffer(texts, dtype=torch.uint8).view(len(mine), length).long()
        super().__init__(inputs, torch.tensor([PACKAGES.index(package) for package, _ in mine]))


@cache
def library_functions() -> tuple[tuple[str, str], ...]:
    """Each function once, as (package, text), in the order of files and lines."""
    names = re.compile(rf"\b({'|'.join(PACKAGES)})\b")
    found: dict[str, list[tuple[str, str]]] = {}
    for name, source in library_sources():
        package = name.split("/")[0].removesuffix(".py")
        if package not in PACKAGES:
            continue
        for function in _outer_functions(ast.parse(source)):
            text = textwrap.dedent(_lines_of(source, function))
            if len(text.encode()) >= SHORTEST:
                kinds = found.setdefault(names.sub("_", _without_names(function)), [])
                kinds.append((package, names.sub("_", text)))
    alike = (kinds for kinds in found.values() if len({package for package, _ in kinds}) == 1)
    return tuple(kinds[0] for kinds in alike)


def _outer_functions(tree: ast.Module) -> Iterator[Function]:
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, Function):
                yield inner


def _lines_of(source: str, function: Function) -> str:
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
    return "".join(source.splitlines(keepends=True)[first - 1 : function.end_lineno])


def _without_names(function: Function) -> str:
    """What a function does, whatever it is called and says of itself."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return ast.dump(function.args) + "".join(map(ast.dump, body))


def library_sources() -> Iterator[tuple[str, str]]:
    """(path below the library, text) of its files in name order, without those of tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in source_files(root):
        if not {"test", "tests", "idle_test"} & set(name.split("/")):
            yield name, (root / name).read_text(encoding="utf-8", errors="replace")


def source_files(root: Path) -> list[str]:
    """Python files below ``root`` in name order, without those of installed packages."""
    names = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "__pycache__")]
        here = Path(folder).relative_to(root)
        names += [(here / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)
