"""What a checkpoint is of: the state of a run as it is taken, and as it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.optim import Optimizer

from ddptrain.errors import CheckpointError
from ddptrain.state import (
    State,
    Tensors,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


def capture(
    step: int,
    task: nn.Module,
    optimizer: Optimizer,
    step_numbers: dict[str, Any],
    metrics: dict[str, float],
    line: dict[str, float] | None = None,
    record: dict[str, Any] | None = None,
    heeded: list[dict[str, Any]] | None = None,
) -> State:
    """The state of a run after ``step`` steps, as it is now: no tensor is copied.

    ``metrics``, ``line`` and ``record`` are what evaluations, the log line and the fingerprint of
    this very step say, for who goes on from here to write down if nobody else has; ``heeded`` is
    what those have seen that go by evaluations.
    """
    tensors, numbers = optimizer_tensors(task, optimizer)
    return State(
        step,
        {MODEL: model_tensors(task), OPTIMIZER: tensors},
        {
            "metrics": dict(metrics),
            "line": dict(line or {}),
            "record": record,
            "heeded": list(heeded or []),
            "step_numbers": step_numbers,
            "optimizer_numbers": numbers,
        },
    )


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read: its manifest, and the verified content of its files."""

    manifest: dict[str, Any]
    contents: dict[str, bytes]
    origin: str

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def tensors(self, name: str) -> Tensors:
        """The tensors of a file. Raises ``CheckpointError``."""
        try:
            return load(self.contents[name])
        except KeyError:
            raise CheckpointError(f"{self.origin}: it has no {name}") from None
        except SafetensorError as error:
            raise _refusal(f"{self.origin}/{name}", self.contents[name], error) from error

    def put_back(self, task: nn.Module, optimizer: Optimizer | None) -> None:
        """Load it into a task and, for training, its optimiser. Raises ``CheckpointError``."""
        load_model(task, self.tensors(MODEL))
        if optimizer is not None:
            numbers = self.manifest["optimizer_numbers"]
            load_optimizer(task, optimizer, self.tensors(OPTIMIZER), numbers)


def _refusal(file: str, content: bytes, error: Exception) -> CheckpointError:
    """Why a file is not loaded: damaged, or never one of safetensors."""
    if content[8:9] == b"{":
        return CheckpointError(f"{file}: {error}; train on from an earlier checkpoint")
    # How pickles begin: of protocol 2 and later, as torch.save writes them, and of the first.
    looks = "; it looks like a pickle" if content.startswith((b"\x80", b"PK", b"c")) else ""
    return CheckpointError(
        f"{file}: no safetensors file{looks}. It was not loaded, because loading a pickle can run "
        "code; save its tensors with safetensors, or take another checkpoint"
    )
