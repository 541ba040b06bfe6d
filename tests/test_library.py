"""Functions of the standard library: no split has what another has, or says where it is from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import train_here

from ddptrain.data import library
from ddptrain.data.library import PACKAGES, StandardLibraryFunctions, library_functions
from ddptrain.data.splits import SPLITS
from ddptrain.errors import Refused

SOURCE = '''
import functools

@functools.cache
def first(values, most):
    """The first of some values."""
    found = [value for value in values if value < most]
    return found[0] if found else email.nothing(most, values, "none of all these values")

class Box:
    def again(self, values, most):
        return "a method that is long enough to be there, and that is in json as well as in email"

    def second(values, most):
        # It is called otherwise, and says other things.
        found = [value for value in values if value < most]
        return found[0] if found else email.nothing(most, values, "none of all these values")

    async def outer(self):
        def inner(values):
            return "an inner function, which is a part of the outer one, and is no other sample"
        return [inner(value) for value in self.values]

    def short(self): return 1
'''
OTHER = """
def shared(self, values, most):
    return "a method that is long enough to be there, and that is in json as well as in email"
"""


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    files = [("email/box.py", SOURCE), ("http/__init__.py", OTHER), ("json/box.py", SOURCE)]
    monkeypatch.setattr(library, "library_sources", lambda: iter(files))
    library_functions.cache_clear()
    yield
    library_functions.cache_clear()


@pytest.mark.usefixtures("_few")
def test_a_function_is_there_once_whatever_it_is_called() -> None:
    found = library_functions()
    assert [package for package, _ in found] == ["email", "email"]
    first, outer = (text for _, text in found)
    assert first.startswith('@functools.cache\ndef first(values, most):\n    """The first of')
    assert "_.nothing" in first
    assert outer.startswith("async def outer(self):\n    def inner(values):\n        return")
    with pytest.raises(Refused, match="this Python has no source of argparse, asyncio, collec"):
        StandardLibraryFunctions("train", 10)


@pytest.mark.usefixtures("_few")
def test_a_length_that_is_none() -> None:
    with pytest.raises(Refused, match="length: expected a number of bytes above 0, got 0"):
        StandardLibraryFunctions("train", 0)


def body_of(text: str) -> str | None:
    """A function's arguments and statements as Python writes them, without docstring and comments;
    None if it is no Python any more, for two arguments have the name of packages."""
    try:
        function: Any = ast.parse(text).body[0]
    except SyntaxError:
        return None
    if ast.get_docstring(function) is not None:
        function.body[0] = ast.Pass()
    return "\n".join(map(ast.unparse, [function.args, *function.body]))


def test_functions_of_the_standard_library() -> None:
    found = library_functions()
    names = re.compile(rf"\b({'|'.join(PACKAGES)})\b")
    assert not [text for _, text in found if names.search(text)]
    bodies = [body for _, text in found[::3] if (body := body_of(text)) is not None]
    assert len(bodies) > len(found) / 4
    assert len({*bodies}) == len(bodies)
    parts = [StandardLibraryFunctions(split, 64).tensors for split in SPLITS]
    assert sum(len(labels) for _, labels in parts) == len(found)
    for inputs, labels in parts:
        assert (inputs.shape[1:], inputs.dtype, labels.dtype) == ((64,), torch.int64, torch.int64)
        assert {*labels.tolist()} == {*range(len(PACKAGES))}
    package, text = found[0]
    row = next(i for split in parts for i in split[0] if bytes(i.tolist()) == text.encode()[:64])
    assert row is not None
    assert package == "argparse"


def test_a_short_run_knows_more_than_which_is_the_most_frequent(tmp_path: Path) -> None:
    short = [
        *("experiment=stdlib_modules", "train.max_epochs=3", "eval.every_steps=null"),
        *("checkpoint.keep_best=0", "data.train.length=128", "data.val=null", "model.width=32"),
    ]
    metrics = train_here(tmp_path, *short)
    assert metrics["accuracy"] > 0.23  # always to say the most frequent one gives 0.16, and F1 0.01
    assert metrics["f1"] > 0.06
