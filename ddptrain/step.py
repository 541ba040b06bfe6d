"""One optimiser step: micro-batches, gradient reduction, clipping, update, schedule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddptrain import pulse
from ddptrain.account import Accounted, add_logs, means
from ddptrain.beside import make_ready
from ddptrain.closure import Closure
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.errors import TrainingError
from ddptrain.fingerprints import Fingerprints
from ddptrain.generators import key_generators
from ddptrain.lagging import Lagging
from ddptrain.marks import Marks
from ddptrain.optim.average import Average
from ddptrain.optim.clip import Clip
from ddptrain.optim.guard import Guard, Verdict, change_unless
from ddptrain.optim.loss_scale import LossScale
from ddptrain.optim.penalty import Penalty
from ddptrain.optim.schedules import Schedule
from ddptrain.parallel.buffers import Buffers
from ddptrain.parallel.ddp import Strategy
from ddptrain.parallel.faint import Faint
from ddptrain.parallel.ranks import Ranks
from ddptrain.tasks.task import Batch


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
        clip: Clip,
        penalty: Penalty | None,
        average: Average | None,
        guard: Guard,
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
        self.clip = clip
        self.penalty = penalty
        self.average = average
        self.guard = guard
        self.loss_scale = loss_scale
        self.fingerprints = fingerprints
        # Called with sums of gradients over the ranks, as they are, and what the losses count.
        self.sum_hooks: list[Callable[[list[Tensor], Tensor], None]] = [fingerprints.gather]
        self.names = [n for n, p in module.task.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.task.parameters() if p.requires_grad]
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.searches = isinstance(optimizer, torch.optim.LBFGS)
        self.closure: Closure | None = None
        self.skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.faint = Faint(self.reduction, self.names, self.parameters)
        self.projects = module.task.is_projected
        self.rewinds = 0
        self.norm = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.current: MicroBatch | None = None
        self.marks = Marks(ranks.device)
        # Who holds it finds the run between two updates, in whatever thread: see Run.rescue.
        self.gate = threading.Lock()
        make_ready(ranks.device)
        self.verdicts = Lagging(ranks.device, 5)
        self.buffers = Buffers(module.task, ranks, self.reduction)
        # DDP lays its buckets out anew after its first backward, and where a number lies in a
        # bucket can decide how it is rounded: a resumed run must not have a first step of its own.
        self.replica(None).backward()
        self.reduction.relay()
        self.module.zero_grad()

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Take step ``step`` (from 0), drawing this rank's micro-batches from ``batches``."""
        with self.gate:
            self.fingerprints.begin(step)
            self.buffers.begin()
            self.marks.begun += 1
        mine = self.plan.micro_batches(step, self.ranks.rank, self.ranks.world_size)
        held = list(islice(batches, len(mine))) if self.searches else []
        self.accumulate(step, mine, iter(held) if self.searches else batches)
        gradients, account = self.gradients()
        count = account[0]
        for hook in self.sum_hooks:
            hook(gradients, count)
        if self.penalty is not None:
            self.penalty.add(count)
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norm = total / count
        self.clip(self.parameters, gradients, count, total)
        # Zero times a number is zero, unless the number is infinite or NaN.
        bad = (norm + account[1]) * 0 != 0
        hopeless = self.reduction.beyond()
        micro_batches = len(self.plan.micro_batches(step))
        if (stray := self.buffers.arrive(micro_batches)) is not None:
            bad = bad | stray
            hopeless = stray if hopeless is None else hopeless | stray
        pulse.enter(pulse.UPDATE)
        if not self.skips_on_device:
            bad.item()  # the wait that comes with such an optimiser, not within the gate
        with self.gate:
            self.marks.updating += 1
            self.norm.copy_(norm)
            self._follow_schedule(step)
            skip = self._judge(step, account, bad, hopeless)
            if self.searches:
                self.closure = Closure(self, step, mine, held, micro_batches, account[1] / count)
            self._update(step, skip)
            self.marks.taken += 1

    def accumulate(self, step: int, mine: list[MicroBatch], batches: Iterator[Batch]) -> None:
        """Sum the gradients of this rank's micro-batches; all-reduce them with the last."""
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

    def gradients(self) -> tuple[list[Tensor], Tensor]:
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

    def _judge(self, step: int, account: Tensor, bad: Tensor, hopeless: Tensor | None) -> Tensor:
        """1 if the weights are to be left alone in this step, else 0; record it for the log."""
        recorded, fault = account[:3], bad
        loss = account[1] / account[0]
        if self.loss_scale is not None:
            recorded = recorded / self.loss_scale.value
            lost = ~loss.isfinite()
            fault = self.loss_scale.update(bad, lost if hopeless is None else lost | hopeless)
        skip = self.guard.judge(loss, bad, fault)
        self.module.window.end_step(recorded, skip)
        told = [account[3], self.guard.kind, loss, self.guard.limit, self.guard.in_a_row]
        self.verdicts.put(step, torch.stack(told))
        return skip.float()

    def _update(self, step: int, skip: Tensor) -> None:
        is_taken = self.skips_on_device or not skip.item()
        if self.skips_on_device:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
            self.optimizer.step()
        elif is_taken:
            self.optimizer.step(self.closure)  # type: ignore[arg-type]
        if self.penalty is not None:
            self.penalty.hold()
        if self.projects:
            change_unless(skip, self.parameters, self.module.task.project)
        if self.average is not None and is_taken:
            self.average.update(step, skip)
        self.buffers.move(skip)
        self.module.zero_grad()

    def heard(self, wants_stop: bool, wait: bool) -> list[Verdict]:
        """What is known by now of the steps since the last call, the same on every rank.

        On a GPU that is two steps behind, unless the host is to ``wait`` for it. ``wants_stop``
        is this rank's wish; it counts from the next step on.
        """
        self.module.wants_stop = wants_stop
        return [
            Verdict(step, wish > 0, int(kind), loss, limit, int(row))
            for step, (wish, kind, loss, limit, row) in self.verdicts.take(wait)
        ]

    def finished(self) -> int:
        """The steps that are finished and count; of a GPU, which may never end a later one."""
        return int(self.marks.taken.item()) - int(self.guard.halted.item())

    def read(self) -> dict[str, float]:
        """Return what the window holds, over all ranks; every rank must call it."""
        self.faint.tell()
        window = self.module.window
        scale = self.norm if self.loss_scale is None else self.loss_scale.value
        numbers = [*window.account, self.norm, self.guard.skipped, scale]
        count, total, told, norm, skipped, scale_now = torch.stack(numbers).tolist()
        scalars = {
            "loss": total / count if count else float("nan"),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
        }
        if told:
            scalars |= means(add_logs(self.ranks.gather(window.logs())))
        scalars |= {} if self.penalty is None else self.penalty.scalars()
        faults = {"skipped_steps": skipped, "rewinds": self.rewinds}
        scalars |= {name: count for name, count in faults.items() if count}
        return scalars | ({} if self.loss_scale is None else {"loss_scale": scale_now})

    def numbers(self, alone: bool = False) -> dict[str, Any]:
        """What a checkpoint must hold besides tensors of the model and the optimiser.

        Every rank must call it, unless ``alone``. What was recorded for the next log line is among
        it, for a curve that does not show where a run was stopped; alone, of what tasks log, this
        rank's share.
        """
        window = self.module.window
        account = window.account.tolist()
        logs = window.logs(alone) if account[2] else {}
        if account[2] and not alone:
            logs = add_logs(self.ranks.gather(logs))
        numbers = {
            "guard": self.guard.numbers(),
            "rewinds": self.rewinds,
            "window": {"account": account, "logs": logs},
            "grad_norm": self.norm.item(),
        }
        if self.loss_scale is not None:
            numbers |= self.loss_scale.numbers()
        return numbers

    def load_numbers(self, numbers: dict[str, Any], done: int) -> None:
        """Put back what ``numbers`` returned, and the rate of the last step, for its log line."""
        self._follow_schedule(max(0, done - 1))
        self.norm.fill_(numbers.get("grad_norm", 0.0))
        window = numbers["window"]
        self.module.window.load(window["account"], window["logs"] if self.ranks.is_first else {})
        self.rewinds = numbers["rewinds"]
        self.guard.load(numbers["guard"])
        if self.loss_scale is not None:
            self.loss_scale.load(numbers)
        self.verdicts.forget()

    def rewind(self, numbers: dict[str, Any], done: int) -> None:
        """Go on after ``done`` steps with the ``numbers`` of an earlier one; the log goes on."""
        row, skipped = self.guard.in_a_row.clone(), self.guard.skipped.clone()
        self.guard.load(numbers["guard"])
        self.guard.in_a_row, self.guard.skipped = row, skipped
        if self.loss_scale is not None:
            self.loss_scale.load(numbers)
        self.rewinds += 1
        self.verdicts.forget()
        self.marks.set(done)
