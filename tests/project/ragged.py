"""A user's own model, task and data set, outside the package, that need all that is promised.

Sentences of different lengths (so counts differ between micro-batches), dropout, and augmentation
that draws from the global generators of Python, numpy and torch.
"""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ddptrain import Loss, Task

LENGTH = 12


def is_first(once: str | None) -> bool:
    """Whether nobody has asked before, who all leave the file ``once``; always without one."""
    if once is None:
        return True
    try:
        open(once, "x").close()
    except FileExistsError:
        return False
    return True


class Sentences(Dataset[dict[str, Tensor]]):
    """Tokens and, as the target, how each compares with the one before; padded with -1."""

    def __init__(
        self,
        samples: int = 86,
        noisy: bool = True,
        fail_at: int | None = None,
        odd_at: int | None = None,
        infinite_at: int | None = None,
        loud_at: int | None = None,
        uneven: bool = False,
        sleep_at: int | None = None,
        kill_at: int | None = None,
        once: str | None = None,
        seconds: float = 0.0,
    ) -> None:
        samples += int(os.environ.get("RANK", "0")) if uneven else 0
        generator = torch.Generator().manual_seed(samples)
        self.tokens = torch.randn(samples, LENGTH, generator=generator)
        self.lengths = torch.randint(1, LENGTH + 1, (samples,), generator=generator)
        if noisy:
            self.tokens = self.tokens[np.random.permutation(samples)]
            self.lengths = self.lengths[torch.randperm(samples)]
        self.noisy = noisy
        self.fail_at = fail_at
        self.odd_at = odd_at
        self.sleep_at = sleep_at
        self.kill_at = kill_at
        self.seconds = seconds
        self.once = once
        if infinite_at is not None:
            self.tokens[infinite_at] = float("inf")
        if loud_at is not None:
            self.tokens[loud_at] *= 1e4

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.fail_at:
            raise ValueError("the file is corrupt")
        if index == self.sleep_at and is_first(self.once):
            time.sleep(10_000)
        if index == self.kill_at and is_first(self.once):
            os.kill(os.getpid(), signal.SIGKILL)  # the loading worker, if there are any
        time.sleep(self.seconds)
        tokens = self.tokens[index]
        target = (tokens > tokens.roll(1)).long()
        target[self.lengths[index] :] = -1
        if self.noisy:
            noise = random.gauss(0, 0.1) + float(np.random.standard_normal()) * 0.1
            tokens = tokens + noise + 0.1 * torch.randn(LENGTH)
        if index == self.odd_at:
            tokens = tokens[:-1]
        return {"tokens": tokens, "target": target}


class Network(nn.Module):
    """A window over neighbouring tokens, with dropout, which also draws from Python and numpy.

    ``extra`` adds a layer that is not used, ``fickle`` one that every other forward uses.
    """

    def __init__(
        self,
        width: int = 8,
        dropout: float = 0.2,
        extra: bool = False,
        fickle: bool = False,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 3, padding=1)
        self.second = nn.Conv1d(width, 2, 3, padding=1)
        self.dropout = dropout
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.fickle = nn.Linear(LENGTH, LENGTH) if fickle else None
        self.forwards = 0
        if extra:
            self.forgotten = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        self.forwards += 1
        hidden = functional.gelu(self.first(tokens.unsqueeze(1).to(self.first.weight.dtype)))
        hidden = self.norm(hidden)
        if self.fickle is not None and self.forwards % 2:
            hidden = self.fickle(hidden)
        if self.training and self.dropout:
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * float(np.random.random()))
        out: Tensor = self.second(functional.dropout(hidden, self.dropout, self.training))
        return out


class Tagging(Task):
    """Cross-entropy over the tokens that are not padding; can be told to fail.

    ``flip_at``, ``kill_at``, ``raise_at`` and ``barrier_at`` are forwards of rank ``culprit``,
    counted from the process's start; a kill or a barrier happens only before the file ``once``
    exists, which it makes; with ``flips_on`` all later forwards flip a bit as well. Forward
    ``hold_at`` of every rank waits until the file ``hold`` exists.
    """

    def __init__(
        self,
        model: nn.Module,
        culprit: int = -1,
        raise_at: int | None = None,
        kill_at: int | None = None,
        once: str | None = None,
        double: bool = False,
        in_place: bool = False,
        flip_at: int | None = None,
        flips_on: bool = False,
        barrier_at: int | None = None,
        hold_at: int | None = None,
        hold: str = "",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model.double() if double else model
        self.is_culprit = int(os.environ.get("RANK", "0")) == culprit
        self.raise_at = raise_at
        self.kill_at = kill_at
        self.once = once
        self.in_place = in_place
        self.flip_at = flip_at
        self.flips_on = flips_on
        self.barrier_at = barrier_at
        self.hold_at = hold_at
        self.hold = hold
        self.scale = scale
        self.forwards = 0

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        self.forwards += 1
        if self.is_culprit and self.forwards == self.raise_at:
            raise KeyError("a bug in user code")
        if self.is_culprit and self.forwards == self.kill_at and is_first(self.once):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.is_culprit and self.forwards == self.barrier_at and is_first(self.once):
            torch.distributed.barrier()  # which no other rank comes to
        while self.forwards == self.hold_at and not os.path.exists(self.hold):
            time.sleep(0.005)
        flips = self.forwards == self.flip_at or (
            self.flips_on and self.flip_at is not None and self.forwards > self.flip_at
        )
        if self.is_culprit and flips:
            bits = next(self.parameters()).data.view(torch.int32)
            bits[0] += 1  # a bad memory cell
        target = batch["target"]
        logits = self.model(batch["tokens"])
        by_token = logits.transpose(1, 2).flatten(0, 1)
        total = functional.cross_entropy(
            by_token, target.flatten(), ignore_index=-1, reduction="sum"
        )
        if self.in_place:
            exponential = logits.exp()
            total = total + exponential.sum()
            exponential += 1  # which backward still needs
        kept = target >= 0
        right = ((logits.argmax(1) == target) & kept).sum()
        return Loss(total * self.scale, kept.sum(), {"accuracy": (right, kept.sum())})


class Alone(Tagging):
    """The task with a model of its own, for a config without one."""

    def __init__(self) -> None:
        super().__init__(Network())
