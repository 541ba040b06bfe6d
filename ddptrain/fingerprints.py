"""Records by which two runs can be compared step by step: what went in, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddptrain.data.fetch import tensors_in
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.hashing import hash_all
from ddptrain.parallel.ranks import Ranks
from ddptrain.tasks.task import Batch, Task

Record = dict[str, Any]


class Fingerprints:
    """Hashes a step's samples, batches, gradients and weights, every so many steps.

    None of the hashes depends on the number of ranks: what is hashed by micro-batch is added up
    modulo 2⁶⁴, each times an odd number that belongs to its place in the global batch.
    """

    def __init__(
        self, task: Task, plan: Plan, ranks: Ranks, every: int | None, total_steps: int
    ) -> None:
        self.task = task
        self.plan = plan
        self.ranks = ranks
        self.every = every
        self.total_steps = total_steps
        self.active = False
        self.content = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.parts: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Say that step ``step`` begins, so that it is known whether it is one to record."""
        done = step + 1
        self.active = self.every is not None and (
            done % self.every == 0 or done == self.total_steps
        )
        self.content.zero_() if self.active else None

    def batch(self, micro_batch: MicroBatch, batch: Batch) -> None:
        """Hash the contents of one of this rank's micro-batches."""
        tensors = list(tensors_in(batch)) if self.active else []
        for place, value in enumerate(hash_all(tensors) if tensors else ()):
            self.content += value * (2 * (micro_batch.index * len(tensors) + place) + 1)

    def gather(self, gradients: Sequence[Tensor], count: Tensor) -> None:
        """Hash the gradients of the sum of losses, before they are divided by ``count``.

        And add up the hashes of the ranks' batches, before the update: once that has begun, any
        rank alone can tell of the step.
        """
        if self.active:
            if self.ranks.world_size > 1:
                dist.all_reduce(self.content)
            self.parts["gradients"] = hash_all(gradients)
            norms = torch._foreach_norm(list(gradients))
            self.parts["norms"] = torch.stack(norms) / count

    def take(self, step: int) -> Record | None:
        """Return the record of a step that has just been taken, if it is one to record."""
        if not self.active:
            return None
        indices = blake2b(digest_size=8)
        for micro_batch in self.plan.micro_batches(step):
            indices.update(self.plan.indices(micro_batch).tobytes())
        return {
            "step": step + 1,
            "samples": indices.hexdigest(),
            "batch": _hex(self.content.view(1))[0],
            "gradients": _hex(self.parts["gradients"]),
            "norms": self.parts["norms"].tolist(),
            "weights": self._weights(),
        }

    def header(self, done: int) -> Record:
        """What the records' lists are of, and the weights after ``done`` steps."""
        trained = [name for name, p in self.task.named_parameters() if p.requires_grad]
        return {
            "step": done,
            "parameters": trained,
            "tensors": list(self.task.state_dict()),
            "weights": self._weights(),
        }

    def _weights(self) -> list[str]:
        return _hex(hash_all(self.task.state_dict().values()))


def _hex(hashes: Tensor) -> list[str]:
    return [f"{value & 0xFFFF_FFFF_FFFF_FFFF:016x}" for value in hashes.tolist()]
