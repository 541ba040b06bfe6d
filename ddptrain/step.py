"""One optimiser step: micro-batches, gradient reduction, clipping, update, schedule."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddptrain import pulse
from ddptrain.account import Accounted, add_logs, means
from ddptrain.config import NonFinite
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.errors import TrainingError
from ddptrain.fingerprints import Fingerprints
from ddptrain.generators import key_generators
from ddptrain.lagging import Lagging
from ddptrain.optim.loss_scale import LossScale
from ddptrain.optim.schedules import Schedule
from ddptrain.parallel.buffers import Buffers
from ddptrain.parallel.ddp import Strategy
from ddptrain.parallel.ranks import Ranks
from ddptrain.tasks.task import Batch

logger = logging.getLogger(__name__)


class Step:
    """Makes optimiser step s from this rank's micro-batches of it.

    Nothing in it waits for the device: what a log line needs stays there until ``read``.
    """

    def __init__(
        self,
        module: Accounted,
        optimizer: Optimizer,
        schedule: Schedule,
        plan: Plan,
        strategy: Strategy,
        ranks: Ranks,
        *,
        total_steps: int,
        max_norm: float | None,
        nonfinite: NonFinite,
        loss_scale: LossScale | None,
        fingerprints: Fingerprints,
    ) -> None:
        self.module = module
        self.replica = strategy.wrap(module)
        self.optimizer = optimizer
        self.schedule = schedule
        self.plan = plan
        self.strategy = strategy
        self.reduction = strategy.reduction
        self.ranks = ranks
        self.total_steps = total_steps
        self.max_norm = max_norm
        self.nonfinite = nonfinite
        self.loss_scale = loss_scale
        self.fingerprints = fingerprints
        self.names = [n for n, p in module.task.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.task.parameters() if p.requires_grad]
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.told_faint: set[str] = set()
        self.faults = torch.zeros((), device=ranks.device)
        self.norm = torch.zeros((), device=ranks.device)
        self.current: MicroBatch | None = None
        self.taken = torch.zeros((), dtype=torch.int64, device=ranks.device)
        # Who holds it finds the run between two updates, in whatever thread: see Trainer.rescue.
        self.gate = threading.Lock()
        self.is_updating = False
        self.stops = Lagging(ranks.device)
        self.buffers = Buffers(module.task, ranks, self.reduction)
        # DDP lays its buckets out anew after its first backward, and where a number lies in a
        # bucket can decide how it is rounded: a resumed run must not have a first step of its own.
        self.replica(None).backward()
        self.reduction.relay()
        self._clear_gradients()

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Take step ``step`` (from 0), drawing this rank's micro-batches from ``batches``."""
        with self.gate:
            self.fingerprints.begin(step)
            self.buffers.begin()
        self._accumulate(step, batches)
        gradients, account = self._gradients()
        count = account[0]
        self.fingerprints.gather(gradients, count)
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norm = total / count
        # One factor turns sums into means and clips: 1 / count, or max_norm / total if smaller.
        divisor = count if self.max_norm is None else count.maximum(total / self.max_norm)
        torch._foreach_mul_(gradients, divisor.reciprocal())
        # Zero times a number is zero, unless the number is infinite or NaN.
        bad = (norm + account[1]) * 0 != 0
        hopeless = self.reduction.beyond()
        if (stray := self.buffers.arrive(len(self.plan.micro_batches(step)))) is not None:
            bad = bad | stray
            hopeless = stray if hopeless is None else hopeless | stray
        self.stops.put(account[3])
        pulse.enter(pulse.UPDATE)
        with self.gate:
            self.is_updating = True
            self.norm = norm
            self._follow_schedule(step)
            self._record(account[:3], bad)
            self._update(self._must_skip(bad, hopeless))
            self.taken += 1
            self.is_updating = False

    def _accumulate(self, step: int, batches: Iterator[Batch]) -> None:
        """Sum the gradients of this rank's micro-batches; all-reduce them with the last."""
        mine = self.plan.micro_batches(step, self.ranks.rank, self.ranks.world_size)
        for micro_batch in mine[:-1]:
            with self.strategy.accumulate(self.replica):
                self._backward(micro_batch, batches, pulse.FORWARD)
            self._refuse_unused(self._unreduced())
        if mine:
            self._backward(mine[-1], batches)
        else:
            pulse.enter(pulse.REDUCING, step)
            self.replica(None).backward()
        self.buffers.reduce()
        self.current = None

    def _backward(
        self, micro_batch: MicroBatch, batches: Iterator[Batch], phase: str = pulse.REDUCING
    ) -> None:
        self.current = micro_batch
        pulse.enter(pulse.LOADING, micro_batch.step)
        batch = next(batches)
        pulse.enter(pulse.FORWARD)
        self.fingerprints.batch(micro_batch, batch)
        key_generators(self.plan.forward_key(micro_batch), self.ranks.device)
        total = self.replica(batch)
        if self.loss_scale is not None:
            total = total * self.loss_scale.value
        pulse.enter(phase)
        total.backward()
        self.buffers.collect()

    def _gradients(self) -> tuple[list[Tensor], Tensor]:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        unused = [n for n, p in zip(self.names, self.parameters, strict=True) if p.grad is None]
        self._refuse_unused(unused or self._unreduced())
        account = self.module.account.grad
        assert account is not None
        return gradients, account

    def _unreduced(self) -> list[str]:
        """Of an accumulated gradient DDP alone knows that the last backward did not reach it."""
        return [self.names[i - 1] for i in self.strategy.unreduced(self.replica) if i > 0]

    def _refuse_unused(self, unused: list[str]) -> None:
        if unused:
            raise TrainingError(
                f"{len(unused)} of {len(self.parameters)} parameters got no gradient: "
                f"{', '.join(unused)}; use them in the loss, or freeze them (requires_grad=False)"
            )

    def _follow_schedule(self, step: int) -> None:
        rate = self.schedule(step, self.total_steps)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate

    def _record(self, account: Tensor, bad: Tensor) -> None:
        """Add the step to the window of the next log line."""
        if self.loss_scale is not None:
            account = account / self.loss_scale.value
        self.module.window.end_step(account, bad)

    def _must_skip(self, bad: Tensor, hopeless: Tensor | None) -> Tensor:
        """1 if the weights are to be left alone, else 0: after a fault that stops, for good."""
        fault = bad if self.loss_scale is None else self.loss_scale.update(bad, hopeless)
        if self.nonfinite is NonFinite.skip:
            self.faults += fault
            return bad.float()
        stopped = (self.faults + fault > 0).float()
        self.faults += stopped
        return stopped if self.loss_scale is None else stopped.maximum(bad.float())

    def _update(self, skip: Tensor) -> None:
        if self.skips_on_device:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skip.item():
            self.optimizer.step()
        self.buffers.move(skip)
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def stop_is_agreed(self, wanted: bool) -> bool:
        """Whether some rank wanted to stop in this step or, on a GPU, in one shortly before it.

        The same on every rank; what a rank wants counts from the next step on.
        """
        self.module.wants_stop = wanted
        return self.stops.take() > 0

    def finished(self) -> int:
        """The steps that are finished and count.

        On a GPU the count is the device's, which may be behind this process; a step that a
        collective keeps from ever ending is not among them.
        """
        faults = 0 if self.nonfinite is NonFinite.skip else int(self.faults.item())
        return int(self.taken.item()) - faults

    def first_fault(self, steps: int) -> int | None:
        """After ``steps`` steps: the one whose numbers were not finite, if that stops the run."""
        faults = int(self.faults.item())
        return steps - faults if faults and self.nonfinite is NonFinite.stop else None

    def read(self) -> dict[str, float]:
        """Return what the window holds, over all ranks; every rank must call it."""
        self._tell_faint()
        window = self.module.window
        scale = self.norm if self.loss_scale is None else self.loss_scale.value
        numbers = torch.stack([*window.account, self.norm, self.faults, scale]).tolist()
        count, total, told, norm, faults, scale_now = numbers
        scalars = {
            "loss": total / count if count else float("nan"),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
        }
        if told:
            scalars |= means(add_logs(self.ranks.gather(window.logs())))
        if faults:
            scalars["skipped_steps"] = faults
        if self.loss_scale is not None:
            scalars["loss_scale"] = scale_now
        return scalars

    def _tell_faint(self) -> None:
        """Warn, once, of each parameter whose gradients are too small for an exact sum."""
        faint = {id(parameter) for parameter in self.reduction.take_faint()}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if id(parameter) in faint and name not in self.told_faint:
                self.told_faint.add(name)
                logger.warning(
                    "the gradient of %s was so small in a step that its sum over micro-batches "
                    "kept fewer digits than float32 has, or none (exact sums keep what is above "
                    "2**-68): multiply the loss's sum and its count by 2**20, or more if this is "
                    "said again, which leaves their ratio, or use parallel.reduction=mean",
                    name,
                )

    def numbers(self, alone: bool = False) -> dict[str, Any]:
        """What a checkpoint must hold besides tensors of the model and the optimiser.

        Every rank must call it, unless ``alone``. What was recorded for the next log line is among
        it, for a curve that does not show where a run was stopped; alone, of what tasks log, this
        rank's share.
        """
        skipping = self.nonfinite is NonFinite.skip
        window = self.module.window
        account = window.account.tolist()
        logs = window.logs(alone) if account[2] else {}
        if account[2] and not alone:
            logs = add_logs(self.ranks.gather(logs))
        numbers = {
            "skipped_steps": self.faults.item() if skipping else 0.0,
            "window": {"account": account, "logs": logs},
            "grad_norm": self.norm.item(),
        }
        if self.loss_scale is not None:
            numbers["loss_scale"] = self.loss_scale.value.item()
            numbers["finite_steps"] = self.loss_scale.finite_steps.item()
        return numbers

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Put back what ``numbers`` returned, and the rate of the last step, for its log line."""
        self._follow_schedule(max(0, int(self.taken) - 1))
        norm = numbers.get("grad_norm", 0.0)
        self.norm = torch.tensor(norm, dtype=torch.float64, device=self.ranks.device)
        self.faults.fill_(numbers["skipped_steps"])
        window = numbers["window"]
        self.module.window.load(window["account"], window["logs"] if self.ranks.is_first else {})
        if self.loss_scale is not None and "loss_scale" in numbers:
            self.loss_scale.value.fill_(numbers["loss_scale"])
            self.loss_scale.finite_steps.fill_(numbers["finite_steps"])
