"""All that is seen of one step: hooks that torch offers, there for that step only."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddptrain.layers.activations import Activations, Outputs
from ddptrain.layers.counting import count_exponents, sums
from ddptrain.layers.noise import Noise, estimate
from ddptrain.observe.histograms import Histogram
from ddptrain.stacked import dimensions
from ddptrain.step import Step


@dataclass(frozen=True)
class MicroBatch:
    """Of one micro-batch: what its loss counts, its loss, and the squared norm of its gradient."""

    count: float
    loss: float
    squares: float


@dataclass
class Parameter:
    """Of one parameter: its gradient as the optimiser got it, and norms of weights and update."""

    gradient: Histogram
    is_weight: bool
    weights: float
    update: float

    @property
    def norm(self) -> float:
        return math.sqrt(self.gradient.squares)

    @property
    def ratio(self) -> float | None:
        """Norm of the update ÷ norm of the weights before it; None of weights that are zero."""
        return self.update / self.weights if self.weights else None


@dataclass
class Share:
    """What one rank saw, on the host."""

    micro_batches: dict[int, MicroBatch]
    outputs: dict[str, Outputs]


@dataclass
class Sight:
    """Watches one step of ``step``; ``whole`` ranks also look at what is alike on all of them.

    Nothing in it waits for the device before ``share``, which is called when the step is over.
    """

    step: Step
    whole: bool
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    accounts: dict[int, Tensor] = field(default_factory=dict)
    is_forward: bool = False
    is_over: bool = False  # what follows is the optimiser's: its search, if it makes one
    total: Tensor | None = None
    before: list[Tensor] = field(default_factory=list)
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    norms_before: Tensor | None = None
    changes: Tensor | None = None

    def __post_init__(self) -> None:
        scale = self.step.loss_scale
        self.loss_scale = None if scale is None else scale.value.clone()
        self.activations = Activations(self._forward_index)

    def register(self, hooks: ExitStack) -> None:
        """Register what is removed when ``hooks`` close."""
        step, module = self.step, self.step.module
        hooks.callback(self.activations.remove)
        self.activations.register(module.task)
        handles: list[Any] = [
            module.register_forward_pre_hook(partial(self._enter, True)),
            module.register_forward_hook(partial(self._enter, False)),
            *(_hooked(p, self._gradient) for p in step.parameters),
            _hooked(module.account, self._account),
            step.optimizer.register_step_pre_hook(self._before_update),
            step.optimizer.register_step_post_hook(self._after_update),
        ]
        for handle in handles:
            hooks.callback(handle.remove)
        step.sum_hooks.append(self._sum)
        hooks.callback(step.sum_hooks.remove, self._sum)

    def _index(self) -> int | None:
        current = self.step.current
        return None if self.is_over or current is None else current.index

    def _forward_index(self) -> int | None:
        """None in a backward, where checkpointed modules run again."""
        return self._index() if self.is_forward else None

    def _enter(self, is_forward: bool, *_: Any) -> None:
        self.is_forward = is_forward

    def _account(self, gradient: Tensor) -> None:
        if (index := self._index()) is not None:
            self.accounts[index] = gradient.detach().clone()

    @torch.no_grad()
    def _gradient(self, gradient: Tensor) -> None:
        if (index := self._index()) is not None:
            norm = torch.linalg.vector_norm(gradient.detach())
            self.norms.setdefault(index, []).append(norm)

    @torch.no_grad()
    def _sum(self, gradients: list[Tensor], _: Tensor) -> None:
        self.total = _squares(torch._foreach_norm(gradients))

    @torch.no_grad()
    def _before_update(self, *_: Any) -> None:
        self.is_over = True
        if self.whole:
            self.before = [parameter.detach().clone() for parameter in self.step.parameters]
            gradients = [p.grad for p in self.step.parameters if p.grad is not None]
            self.gradients = [(count_exponents(g), sums(g)) for g in gradients]
            self.norms_before = _norms(self.before)

    @torch.no_grad()
    def _after_update(self, *_: Any) -> None:
        if self.whole:
            now = [parameter.detach() for parameter in self.step.parameters]
            self.changes = _norms(torch._foreach_sub(now, self.before))
            self.before = []

    def share(self) -> Share:
        """What this rank saw of its own micro-batches; waits for the device."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.item()
        micro_batches = {}
        for index, account in self.accounts.items():
            count, loss, *_ = account.tolist()
            squares = _squares(self.norms.get(index, [])).item()
            micro_batches[index] = MicroBatch(count / scale, loss / scale, squares / scale**2)
        outputs = {name: seen.on_host() for name, seen in self.activations.seen.items()}
        return Share(micro_batches, outputs)

    def noise(self, micro_batches: dict[int, MicroBatch]) -> Noise | None:
        """The estimate from the micro-batches of all ranks."""
        if self.total is None:
            return None
        scale = 1.0 if self.loss_scale is None else self.loss_scale.item()
        known = [micro_batches[index] for index in sorted(micro_batches)]
        squares, counts = [m.squares for m in known], [m.count for m in known]
        return estimate(squares, counts, self.total.item() / scale**2)

    def parameters(self) -> dict[str, Parameter]:
        """By name; empty if there was no update. Only of a ``whole`` sight."""
        if self.norms_before is None or self.changes is None:
            return {}
        step = self.step
        of_each = zip(
            step.names,
            step.parameters,
            self.gradients,
            self.norms_before.tolist(),
            self.changes.tolist(),
            strict=True,
        )
        return {
            name: Parameter(
                Histogram(counts.tolist(), *both.tolist()), dimensions(weight) > 1, before, change
            )
            for name, weight, (counts, both), before, change in of_each
        }


def _hooked(tensor: Tensor, hook: Callable[[Tensor], None]) -> Any:
    return tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack([norm.double() for norm in torch._foreach_norm(list(tensors))])


def _squares(norms: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The sum of squares, float64, of ``norms`` that may have several dtypes."""
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in norms]).square().sum()
