"""Averages of the weights over the steps, which are evaluated and exported in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddptrain.optim.schedules import steps_of

KEY = "average"
"""Under which the optimiser's state has it, to be saved, brought back and rewound with the rest."""


class Average:
    """A running average of an ``optimizer``'s parameters, from ``start`` on, after ``every`` step.

    ``start`` is a fraction of the run below 1, else steps. With ``decay`` it forgets exponentially
    (Polyak and Juditsky, 1992), at first faster, by (1 + n) / (10 + n) after n averages; without
    it weighs all alike (Izmailov et al., *Averaging Weights Leads to Wider Optima*, UAI 2018).
    How much a step counts depends on the step alone. Buffers are no part of it.
    """

    def __init__(
        self, optimizer: Optimizer, decay: float | None, start: float, every: int, total_steps: int
    ) -> None:
        self.optimizer = optimizer
        self.decay = decay
        self.start = steps_of(start, total_steps)
        self.every = every

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Take the weights in after ``step``, whose update is left out if ``skip`` is 1."""
        since = step - self.start
        if since < 0 or since % self.every:
            return
        parameters = self._parameters()
        states = [self.optimizer.state[parameter] for parameter in parameters]
        if KEY not in states[0]:
            for state, parameter in zip(states, parameters, strict=True):
                state[KEY] = parameter.detach().clone()
            return
        averages = [state[KEY] for state in states]
        differences = list(torch._foreach_sub(parameters, averages))
        torch._foreach_mul_(differences, (1 - skip) * self._weight(since // self.every))
        torch._foreach_add_(averages, differences)

    def _weight(self, before: int) -> float:
        """Of the newest weights, after so many averages ``before``."""
        if self.decay is None:
            return 1 / (before + 1)
        return 1 - min(self.decay, (1 + before) / (10 + before))

    @torch.no_grad()
    def put_into(self, module: nn.Module, other: nn.Module) -> bool:
        """Give ``other`` the averages, and the buffers, of ``module``; False if there are none."""
        if not any(KEY in self.optimizer.state.get(p, {}) for p in self._parameters()):
            return False
        other.load_state_dict(module.state_dict())
        theirs = dict(other.named_parameters())
        for name, parameter in module.named_parameters():
            theirs[name].copy_(self.optimizer.state.get(parameter, {}).get(KEY, parameter))
        return True

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def put_averages(module: nn.Module, optimizer_tensors: dict[str, Tensor]) -> None:
    """Give ``module`` the averages among an optimiser's tensors, as a checkpoint names them."""
    for name, parameter in module.named_parameters():
        if (average := optimizer_tensors.get(f"{name}/{KEY}")) is not None:
            parameter.copy_(average)
