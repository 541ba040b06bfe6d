"""Where a task looks up the vectors of the tokens that are explained, to put other ones there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddptrain.errors import Refused
from ddptrain.tasks.task import Task


@dataclass
class Lookup:
    """The call of an embedding that looks up the tokens: the ``number``-th of a forward, from 0.

    The same layer may look up other tokens in other calls, which are left alone.
    """

    layer: nn.Embedding
    number: int

    @classmethod
    def of(cls, task: Task, batch: Any, tokens: Tensor) -> Lookup:
        """Find it in a forward of ``batch``. Raises ``Refused`` if it is not one alone.

        Positions and types of tokens, which are looked up as well, may happen to be the same
        numbers; but they do not lie in the same memory.
        """
        calls: dict[nn.Embedding, int] = {}
        found: list[tuple[bool, Lookup]] = []

        def note(layer: nn.Module, given: tuple[Any, ...], _: Any) -> None:
            assert isinstance(layer, nn.Embedding)
            number = calls[layer] = calls.get(layer, -1) + 1
            if isinstance(given[0], Tensor) and torch.equal(given[0], tokens):
                same_memory = given[0].data_ptr() == tokens.data_ptr()
                found.append((same_memory, cls(layer, number)))

        with ExitStack() as hooks:
            for module in task.modules():
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_hook(note).remove)
            with torch.no_grad():
                task.explained_of(batch)
        themselves = [lookup for is_same, lookup in found if is_same]
        themselves = themselves or [lookup for _, lookup in found]
        if len(themselves) != 1:
            raise Refused(
                "task: tokens are explained where one torch.nn.Embedding looks them up once, and "
                f"{type(task).__name__} does so {len(themselves) or 'no'} times"
            )
        return themselves[0]

    @contextmanager
    def giving(self, vectors: Tensor) -> Iterator[None]:
        """Let that call of a forward give ``vectors``, (B, T, width), instead."""
        calls: list[None] = []

        def give(layer: nn.Module, given: tuple[Any, ...], own: Tensor) -> Tensor:
            calls.append(None)
            return vectors if len(calls) == self.number + 1 else own

        hook = self.layer.register_forward_hook(give)
        try:
            yield
        finally:
            hook.remove()
