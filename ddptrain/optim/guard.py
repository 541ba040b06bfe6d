"""Judges a step before its update: whether its numbers are finite, and its loss no spike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FINE, NONFINITE, SPIKE = 0, 1, 2
"""What a step may be found to be."""
IN_A_ROW = 20
"""So many faults one after another are no bad batches but a model that is lost."""
MAD_TO_DEVIATION = 1.4826
"""The median deviation of a normal distribution, times this, is its standard deviation."""
SMALLEST_DEVIATION = 0.02
"""Of the median loss: where losses hardly vary, a little more is no spike."""


@dataclass(frozen=True)
class Verdict:
    """What the host hears of a step, the same on every rank.

    ``kind`` is one of the above, ``limit`` the loss above which it is a spike (NaN: none yet), and
    ``in_a_row`` how many steps at fault there have been one after another.
    """

    step: int
    wants_stop: bool
    kind: int
    loss: float
    limit: float
    in_a_row: int


class Spikes:
    """The losses of the last steps that counted, and what is far above them.

    Median and median deviation do not move with a few wild losses, as mean and variance do. Until
    half of ``window`` losses are known there are no spikes.
    """

    def __init__(self, device: torch.device, deviations: float, window: int, halts: bool) -> None:
        self.deviations = deviations
        self.halts = halts
        self.places = torch.arange(window, device=device)
        self.losses = torch.full((window,), torch.nan, device=device)
        self.counted = torch.zeros((), dtype=torch.int64, device=device)

    def limit(self) -> Tensor:
        """The loss above which a step is a spike; NaN while too few are known."""
        known = self.counted.clamp(max=len(self.losses))
        median = _median(self.losses, known)
        deviation = _median((self.losses - median).abs(), known) * MAD_TO_DEVIATION
        deviation = deviation.maximum(SMALLEST_DEVIATION * median.abs())
        limit = median + self.deviations * deviation
        return limit.where(2 * known >= len(self.losses), torch.nan)

    def note(self, loss: Tensor, counts: Tensor) -> None:
        """Remember the loss of a step, if it ``counts``."""
        here = (self.places == self.counted % len(self.losses)) & counts
        self.losses.copy_(torch.where(here, loss.to(self.losses), self.losses))
        self.counted += counts

    def numbers(self) -> dict[str, Any]:
        counted = int(self.counted.item())
        return {"losses": self.losses.tolist()[:counted], "counted": counted}

    def load(self, numbers: dict[str, Any]) -> None:
        losses = numbers["losses"]
        self.losses.fill_(torch.nan)
        self.losses[: len(losses)] = self.losses.new_tensor(losses)
        self.counted.fill_(numbers["counted"])


def _median(values: Tensor, known: Tensor) -> Tensor:
    """The lower median of the ``known`` values that are no NaN, which a sort puts last."""
    middle = ((known - 1) // 2).clamp(min=0)
    return values.sort().values.gather(0, middle.view(1)).squeeze(0)


class Guard:
    """Decides on the device, alike on every rank, whether a step may change the weights.

    A step at fault is passed over; or it *halts*: neither it nor a later one changes anything any
    more, so that the host may notice as late as it likes, and does what is to be done then.
    """

    def __init__(
        self, device: torch.device, *, halts: bool, stops: bool, spikes: Spikes | None = None
    ) -> None:
        """``halts``: non-finite numbers do; ``stops``: and they end the run, as spikes do."""
        self.halts = halts
        self.spikes = spikes
        self.counts_rows = not stops
        self.skipped = torch.zeros((), device=device)
        self.halted = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.kind = torch.zeros((), device=device)
        self.limit = torch.full((), torch.nan, device=device)

    def judge(self, loss: Tensor, bad: Tensor, fault: Tensor) -> Tensor:
        """Return whether the weights are to be left alone in this step, on the device.

        ``bad`` says that its numbers are not finite, ``fault`` that this is no matter of the loss
        scale. Raises nothing and waits for nothing.
        """
        was_halted = self.halted > 0
        self.kind = fault.float()
        skip, halts = bad, was_halted
        if self.halts:
            halts = halts | fault
        if self.spikes is not None:
            self.limit = self.spikes.limit()
            spike = (loss > self.limit) & ~bad
            self.kind = self.kind.where(~spike, float(SPIKE))
            skip = skip | spike
            if self.spikes.halts:
                halts = halts | spike
        self.kind = self.kind.masked_fill(was_halted, float(FINE))
        if self.counts_rows:
            at_fault = self.kind > 0
            row = self.in_a_row.where(was_halted | bad, 0.0)
            self.in_a_row.copy_(torch.where(at_fault, self.in_a_row + 1, row))
            halts = halts | (self.in_a_row >= IN_A_ROW)
            self.skipped += at_fault & ~halts
        self.halted += halts
        skip = skip | halts
        if self.spikes is not None:
            self.spikes.note(loss, ~skip)
        return skip

    def numbers(self) -> dict[str, Any]:
        """What the next steps are judged by."""
        numbers = {"skipped_steps": self.skipped.item(), "in_a_row": self.in_a_row.item()}
        return numbers | ({"spikes": self.spikes.numbers()} if self.spikes is not None else {})

    def load(self, numbers: dict[str, Any]) -> None:
        """Put back what ``numbers`` returned."""
        self.halted.zero_()
        self.skipped.fill_(numbers["skipped_steps"])
        self.in_a_row.fill_(numbers["in_a_row"])
        if self.spikes is not None and "spikes" in numbers:
            self.spikes.load(numbers["spikes"])


@torch.no_grad()
def change_unless(skip: Tensor, parameters: Sequence[Tensor], change: Callable[[], None]) -> None:
    """Let ``change`` write to ``parameters``, but if ``skip`` is 1, which no host waits to know.

    They are the same bits as before then, whatever ``change`` would round.
    """
    before = [parameter.clone() for parameter in parameters]
    change()
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old.where(skip > 0, parameter))
