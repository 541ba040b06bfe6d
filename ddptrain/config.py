"""The typed schema of a config; values and their comments live in conf/, the rules in rules.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

from omegaconf import MISSING

EXECUTION_ONLY = (
    "run.", "launch.", "slurm.", "log.", "checkpoint.", "resilience.", "data.workers",
    "parallel.check_every_steps",
)  # fmt: skip
"""Keys that begin so say where and how a run executes, not what it computes: they may change
between a run's first start and its continuation."""


class Resume(Enum):
    auto = "auto"
    never = "never"
    must = "must"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Remedy(Enum):
    stop = "stop"
    skip = "skip"
    rewind = "rewind"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Clock(Enum):
    step = "step"
    epoch = "epoch"


class Strategy(Enum):
    ddp = "ddp"


class Reduction(Enum):
    mean = "mean"
    exact = "exact"


class Direction(Enum):
    max = "max"
    min = "min"


ALL = "all"
"""A ``train.global_batch_size`` that is the whole training set."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    name: str | None = MISSING
    dir: str | None = MISSING
    resume: Resume = MISSING


@dataclass(kw_only=True, slots=True)
class GradClipConfig:
    max_norm: float | None = MISSING
    per_unit: float | None = MISSING
    max_value: float | None = MISSING


class Averaging(Enum):
    ema = "ema"
    swa = "swa"


@dataclass(kw_only=True, slots=True)
class AverageConfig:
    kind: Averaging | None = MISSING
    decay: float = MISSING
    start: float = MISSING
    every: int = MISSING


class Penalised(Enum):
    weights = "weights"
    all = "all"


@dataclass(kw_only=True, slots=True)
class PenaltyConfig:
    l1: float = MISSING
    l2: float = MISSING
    of: Penalised = MISSING


@dataclass(kw_only=True, slots=True)
class SpikeConfig:
    action: Remedy | None = MISSING
    deviations: float = MISSING
    window: int = MISSING


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig:
    metric: str | None = MISSING
    mode: Direction = MISSING
    patience: int = MISSING
    threshold: float = MISSING


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    max_steps: int | None = MISSING
    max_epochs: int | None = MISSING
    global_batch_size: int | str = MISSING
    micro_batch_size: int = MISSING
    precision: Precision = MISSING
    grad_clip: GradClipConfig = field(default_factory=GradClipConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    nonfinite: Remedy = MISSING
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    rewind_every_steps: int = MISSING
    schedule_by: Clock = MISSING
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    compile: bool = MISSING
    device: Device = MISSING

    def sizes(self, samples: int) -> tuple[int, int]:
        """Of a global batch and of a micro-batch, for a training set of so many ``samples``."""
        size = samples if self.global_batch_size == ALL else int(self.global_batch_size)
        return size, min(size, self.micro_batch_size)

    def micro_batches(self) -> int | None:
        """How many a step has; None if that is a matter of the training set."""
        if self.global_batch_size == ALL:
            return None
        size, micro = self.sizes(0)
        return size // micro


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    every_steps: int | None = MISSING
    micro_batch_size: int | None = MISSING


@dataclass(kw_only=True, slots=True)
class LogConfig:
    every_steps: int = MISSING
    tensorboard: bool = MISSING
    fingerprint_every: int | None = MISSING
    layers_every_steps: int | None = MISSING


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    dir: str | None = MISSING
    every_steps: int | None = MISSING
    memory_every_steps: int | None = MISSING
    keep_last: int = MISSING
    keep_best: int = MISSING
    keep_faults: int = MISSING
    metric: str = MISSING
    mode: Direction = MISSING


@dataclass(kw_only=True, slots=True)
class ResilienceConfig:
    hang_seconds: float | None = MISSING
    grace_seconds: float = MISSING


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    strategy: Strategy = MISSING
    reduction: Reduction = MISSING
    bucket_mb: float = MISSING
    check_every_steps: int | None = MISSING


@dataclass(kw_only=True, slots=True)
class DataConfig:
    train: Any = None
    val: Any = None
    test: Any = None
    workers: int = MISSING
    shuffle: bool = MISSING


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    nproc_per_node: str = MISSING
    max_restarts: int | None = MISSING
    interface: str | None = MISSING
    bind_cpus: bool = MISSING
    timeout: float | None = MISSING
    check: bool = MISSING


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    nodes: int = MISSING
    time: str | None = MISSING
    partition: str | None = MISSING
    account: str | None = MISSING
    qos: str | None = MISSING
    gpus_per_node: int | None = MISSING
    cpus_per_node: int | None = MISSING
    memory: str | None = MISSING
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    python: str | None = MISSING
    interface: str | None = MISSING


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run. ``Any`` marks what a ``_target_`` builds: a user may put their own there."""

    seed: int = MISSING
    restarts: int = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    task: Any = None
    model: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: Any = None
    schedule: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


GROUPING = ("groups", "decay", "layer_decay")
"""Keys of ``optim`` that say which parameters are treated alike; the others are the optimiser's."""
BUILT = ("model", "task", "optim", "schedule", "data.train", "data.val", "data.test")
"""Sections that describe an object by its ``_target_``."""


def to_plain(config: Config) -> dict[str, Any]:
    """The config as a nested dict of plain values, ready for YAML; the inverse of ``validate``."""

    def plain(value: object) -> object:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return value

    return cast("dict[str, Any]", plain(dataclasses.asdict(config)))


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaf values."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
