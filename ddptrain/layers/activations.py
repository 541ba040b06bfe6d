"""What the modules of a model give out in one step, as numbers that ranks can add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddptrain.layers.counting import count_exponents, sums
from ddptrain.observe.histograms import Histogram

CUTS_OFF = (nn.ReLU, nn.ReLU6)
"""Units of these can be dead: zero for whatever there is."""
CONVOLVES = 3
"""Of so many dimensions a weight is that of a convolution, whose units are in dimension 1."""


@dataclass
class Outputs:
    """Of one module, over micro-batches: counts, sums by micro-batch, and which units gave some.

    On the device, until ``on_host``.
    """

    counts: Tensor
    sums: dict[int, Tensor] = field(default_factory=dict)
    alive: Tensor | None = None
    values: int = 0  # of each unit

    def on_host(self) -> Outputs:
        sums = {index: each.cpu() for index, each in self.sums.items()}
        alive = None if self.alive is None else self.alive.cpu()
        return Outputs(self.counts.cpu(), sums, alive, self.values)

    def add(self, other: Outputs) -> None:
        """Add what the module gave in other micro-batches, or elsewhere in the same."""
        self.counts = self.counts + other.counts
        for index, each in other.sums.items():
            self.sums[index] = self.sums[index] + each if index in self.sums else each
        if other.alive is not None:
            self.alive = other.alive if self.alive is None else self.alive | other.alive
        self.values += other.values

    def histogram(self) -> Histogram:
        """Of all micro-batches, added in their order, so that it is the same on any ranks."""
        total = torch.stack([self.sums[index] for index in sorted(self.sums)]).sum(0).tolist()
        return Histogram(self.counts.tolist(), *total)

    @property
    def dead(self) -> float | None:
        """The share of units that gave zero for every sample; None of what has no such units."""
        return None if self.alive is None else 1 - self.alive.double().mean().item()


class Activations:
    """Hooks on the modules of a model, which note what they give out in the step's forwards."""

    def __init__(self, index: Callable[[], int | None]) -> None:
        """``index`` tells the micro-batch whose forward runs; None outside of one."""
        self.index = index
        self.seen: dict[str, Outputs] = {}  # in the order of their first forward
        self.convolves = False
        self.handles: list[RemovableHandle] = []

    def register(self, model: nn.Module) -> None:
        """Begin to look at modules without others in them, or with parameters of their own."""
        # What is compiled does not look at hooks again, or would be compiled anew with them.
        if any(map(_is_compiled, model.modules())):
            return
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if name and (own or not any(True for _ in module.children())):
                self.handles.append(module.register_forward_hook(partial(self._note, name)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _note(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        index = self.index()
        if index is None:
            return
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                self.convolves = parameter.dim() >= CONVOLVES
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if not _is_plain(output):
            return
        output = output.detach()
        found = Outputs(count_exponents(output), {index: sums(output)})
        if isinstance(module, CUTS_OFF) and output.dim() > 1 and output.numel():
            of_units = output.movedim(1 if self.convolves else -1, -1).flatten(0, -2)
            found.alive, found.values = (of_units != 0).any(0), len(of_units)
        if name not in self.seen:
            self.seen[name] = found
        elif _fits(self.seen[name].alive, found.alive):
            self.seen[name].add(found)


def _is_plain(output: object) -> bool:
    """Whether it is a tensor of real numbers in rows and columns, and no scalar such as a loss."""
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.dim() > 0
        and not output.is_nested
        and output.layout is torch.strided
    )


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _fits(alive: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are of the same units: a module may serve in several places."""
    return alive is None or other is None or alive.shape == other.shape


def together(of_ranks: list[dict[str, Outputs]]) -> dict[str, Outputs]:
    """What all ranks saw, by module, in the order of the first that saw it."""
    seen: dict[str, Outputs] = {}
    for of_rank in of_ranks:
        for name, outputs in of_rank.items():
            if name not in seen:
                seen[name] = outputs
            elif _fits(seen[name].alive, outputs.alive):
                seen[name].add(outputs)
    return seen
