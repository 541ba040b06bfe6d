"""What a step owes and tells: counts, losses and logged values, kept on the device until read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ddptrain.errors import TrainingError
from ddptrain.tasks.task import Batch, Loss, Task

RESERVED = frozenset(
    {"step", "split", "loss", "lr", "grad_norm", "samples", "samples_per_second", "epoch",
     "skipped_steps", "rewinds", "loss_scale", "penalty", "sparsity", "noise_scale"}
)  # fmt: skip


class Accounted(nn.Module):
    """A task whose account is a gradient: (count, sum of losses, logged values, wishes to stop).

    The account is a parameter that stays zero; its gradient is the micro-batch's account. So it
    is accumulated, bucketed and all-reduced with the gradients, without a collective of its own,
    and whatever factor they pick up on the way (1 / ranks, the loss scale), it picks up too:
    gradient ÷ count is the gradient of the mean loss over the global batch, whatever the factor.
    """

    def __init__(
        self, task: Task, window: Window, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.task = task
        self.window = window
        self.autocast = autocast
        is_double = any(p.dtype == torch.float64 for p in task.parameters())
        dtype = torch.float64 if is_double else torch.float32
        self.account = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.scalars: dict[float, Tensor] = {}
        self.wants_stop = False

    def forward(self, batch: Batch | None) -> Tensor:
        """Return the scalar to call ``backward`` on; None is a rank's part of a step too short."""
        if batch is None:
            used = [p for p in self.parameters() if p.requires_grad]
            nothing = torch.stack([(p * 0).sum().to(self.account) for p in used]).sum()
            return nothing + self.account[3] * self.scalar(self.wants_stop)
        with self.autocast():
            loss = self.task(batch)
        if not isinstance(loss, Loss):
            raise TypeError(
                f"{type(self.task).__name__}.forward returned {type(loss).__name__}, expected "
                "ddptrain.Loss(sum, count)"
            )
        if not _is_scalar(loss.sum) or not (_is_scalar(loss.count) or _is_number(loss.count)):
            raise TypeError(
                f"{type(self.task).__name__}.forward returned Loss(sum={_kind(loss.sum)}, count="
                f"{_kind(loss.count)}), expected a scalar tensor as sum, and as count a number or "
                "a scalar tensor"
            )
        total = loss.sum.to(self.account.dtype)
        told = self.window.add(loss) if loss.logs else 0
        entries = [self.scalar(loss.count), total.detach(), self.scalar(told)]
        entries.append(self.scalar(self.wants_stop))
        return total + torch.dot(self.account, torch.stack(entries))

    def scalar(self, value: Any) -> Tensor:
        """A scalar on the device; counts recur, so the same ones serve again."""
        if isinstance(value, Tensor):
            return _scalar(value, self.account.device, self.account.dtype)
        if value not in self.scalars:
            if len(self.scalars) > 1024:
                self.scalars.clear()
            self.scalars[value] = _scalar(value, self.account.device, self.account.dtype)
        return self.scalars[value]


def _scalar(value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A scalar on ``device``, made or moved there without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype, non_blocking=True)
    return torch.full((), float(value), dtype=dtype, device=device)


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _kind(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


Logs = dict[str, tuple[float, float]]


class Window:
    """Sums since the last log line: this rank's logged values by name, and the global account."""

    def __init__(self, device: torch.device) -> None:
        self.account = torch.zeros(3, device=device)
        self.sums: dict[str, Tensor] = {}
        self.of_this_step: dict[str, Tensor] = {}

    def add(self, loss: Loss) -> int:
        """Add a micro-batch's logged values; return how many. Raises ``TrainingError``."""
        for name, value in loss.logs.items():
            pair = value if isinstance(value, tuple) else (value, None)
            if name in RESERVED or len(pair) != 2:
                raise TrainingError(
                    f"Loss.logs[{name!r}]: "
                    + ("the trainer logs a value of that name; choose another"
                       if name in RESERVED
                       else "expected a scalar or a pair (sum, count)")
                )  # fmt: skip
            try:
                total, count = (
                    _scalar(v, self.account.device, torch.float64).reshape(())
                    for v in (pair[0], loss.count if pair[1] is None else pair[1])
                )
            except (RuntimeError, TypeError, ValueError) as error:
                raise TrainingError(f"Loss.logs[{name!r}]: not a scalar: {error}") from None
            entry = torch.stack([total * count if pair[1] is None else total, count])
            _add(self.of_this_step, name, entry)
        return len(loss.logs)

    def end_step(self, account: Tensor, bad: Tensor) -> None:
        """Add what a step recorded, unless it was ``bad``: a skipped step leaves no trace."""
        self.account += account.where(~bad, 0.0)
        for name, entry in self.of_this_step.items():
            _add(self.sums, name, entry.where(~bad, 0.0))
        self.of_this_step = {}

    def logs(self, finished: bool = False) -> Logs:
        """(sum, count) by name of what this rank logged; maybe only in steps that are finished."""
        for name in [] if finished else list(self.of_this_step):
            _add(self.sums, name, self.of_this_step.pop(name))
        pairs = {name: (pair[0].item(), pair[1].item()) for name, pair in self.sums.items()}
        return {name: pair for name, pair in pairs.items() if any(pair)}

    def clear(self) -> None:
        """Start a new window."""
        self.account.zero_()
        for entry in self.sums.values():
            entry.zero_()

    def load(self, account: list[float], logs: Logs) -> None:
        """Go on from a window in which this had been recorded."""
        self.account.copy_(self.account.new_tensor(account))
        device = self.account.device
        self.sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=device)
            for name, pair in logs.items()
        }


def _add(sums: dict[str, Tensor], name: str, entry: Tensor) -> None:
    """In place: where a GPU gets no further, there must still be what was there before."""
    if name in sums:
        sums[name] += entry
    else:
        sums[name] = entry


def add_logs(of_ranks: list[Logs]) -> Logs:
    """(sum, count) by name over ranks, whichever of them logged it, in any order."""
    names = sorted({name for logs in of_ranks for name in logs})
    added = {}
    for name in names:
        pairs = [logs[name] for logs in of_ranks if name in logs]
        added[name] = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return added


def means(logs: Logs) -> dict[str, float]:
    """The weighted mean by name."""
    return {name: total / count for name, (total, count) in logs.items() if count}
