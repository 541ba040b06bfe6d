"""The three models and data sets that every contender trains, and the stopwatch inside them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

SAMPLES = 8192
BATCH_PER_RANK = {"mlp": 32, "cnn": 32, "gpt": 16}
HORIZON = 100_000  # steps of the schedule; the benchmark ends a contender long before
LEARNING_RATE = 1e-3
WARM_UP = 20


class Stopwatch:
    """Notes when each forward begins: the same measure for every loop, outside of all of them.

    A rank that is warm tells its process id in the folder that ``BENCHMARK_FOLDER`` names, and
    stops itself until it is told to go on. On SIGUSR2 rank 0 writes there what it has measured.
    """

    def __init__(self) -> None:
        self.forwards: list[float] = []
        self.first_step_done = 0.0
        self.folder = os.environ.get("BENCHMARK_FOLDER")
        if self.folder is not None:
            signal.signal(signal.SIGUSR2, self.report)

    def forward(self) -> None:
        self.forwards.append(time.perf_counter())
        if len(self.forwards) == 2:
            self.first_step_done = time.perf_counter()
            if (beat := os.environ.get("BENCHMARK_BEAT")) and os.environ["RANK"] == "0":
                Path(beat).write_text(f"{os.getpid()} {time.monotonic()}\n")
        if len(self.forwards) == WARM_UP and self.folder is not None:
            self.tell(f"rank-{os.environ['RANK']}", os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)

    def report(self, *_: Any) -> None:
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        report = {
            "forwards": self.forwards,
            "first_step_done": self.first_step_done,
            "peak_mb": int(peak.split()[1]) / 1024,
        }
        self.tell("report", report)

    def tell(self, name: str, value: Any) -> None:
        whole = Path(str(self.folder)) / name
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.rename(whole)


stopwatch = Stopwatch()


def build_model(case: str) -> nn.Module:
    """The model of a case, with the same weights for every contender."""
    torch.manual_seed(0)
    if case == "mlp":
        return nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
    if case == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, 10),
        )
    from ddptrain.models import GPT

    return GPT(vocabulary=256, context=64, layers=4, heads=4, width=128)


class Data(TensorDataset):
    """Random samples of a case: features, images or tokens, with labels."""

    def __init__(self, case: str) -> None:
        generator = torch.Generator().manual_seed(0)
        if case == "gpt":
            tokens = torch.randint(0, 256, (SAMPLES, 65), generator=generator)
            super().__init__(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            return
        shape = (64,) if case == "mlp" else (1, 8, 8)
        inputs = torch.randn(SAMPLES, *shape, generator=generator)
        super().__init__(inputs, torch.randint(0, 10, (SAMPLES,), generator=generator))


class Timed(nn.Module):
    """A model that notes when its forward begins, and returns the mean loss."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.model = build_model(case)

    def forward(self, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        stopwatch.forward()
        logits = self.model(inputs)
        return functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction=reduction
        )


def task(case: str) -> Any:
    """The same model as a ddptrain task."""
    from ddptrain import Loss, Task

    class Case(Task):
        def __init__(self) -> None:
            super().__init__()
            self.timed = Timed(case)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
            inputs, targets = batch
            return Loss(self.timed(inputs, targets, "sum"), targets.numel())

    return Case()
