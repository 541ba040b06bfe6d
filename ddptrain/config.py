"""The typed schema of a config and its rules; values and their comments live in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from ddptrain.errors import Refused

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


class Strategy(Enum):
    ddp = "ddp"


class Reduction(Enum):
    mean = "mean"
    exact = "exact"


class Direction(Enum):
    max = "max"
    min = "min"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    name: str | None = MISSING
    dir: str | None = MISSING
    resume: Resume = MISSING


@dataclass(kw_only=True, slots=True)
class GradClipConfig:
    max_norm: float | None = MISSING


@dataclass(kw_only=True, slots=True)
class SpikeConfig:
    action: Remedy | None = MISSING
    deviations: float = MISSING
    window: int = MISSING


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    max_steps: int | None = MISSING
    max_epochs: int | None = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = MISSING
    precision: Precision = MISSING
    grad_clip: GradClipConfig = field(default_factory=GradClipConfig)
    nonfinite: Remedy = MISSING
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    rewind_every_steps: int = MISSING
    compile: bool = MISSING
    device: Device = MISSING


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    every_steps: int | None = MISSING
    micro_batch_size: int | None = MISSING


@dataclass(kw_only=True, slots=True)
class LogConfig:
    every_steps: int = MISSING
    tensorboard: bool = MISSING
    fingerprint_every: int | None = MISSING


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


BUILT = ("model", "task", "optim", "schedule", "data.train", "data.val", "data.test")
"""Sections that describe an object by its ``_target_``."""


def check(config: Config) -> None:
    """Refuse what no single key can tell is wrong. Raises ``Refused`` with one line."""
    for section, what in (("data.train", config.data.train), ("task", config.task)):
        if what is None:
            raise Refused(
                f"{section}: nothing to train; choose an experiment (experiment=digits; "
                f"`ddptrain --help` lists them) or set {section}"
            )
    for section, what in (("optim", config.optim), ("schedule", config.schedule)):
        if what is None:
            raise Refused(f"{section}: none chosen; see conf/{section}/ for what there is")
    _check_sizes(config)
    _check_evaluation(config)
    count = config.launch.nproc_per_node
    if count != "auto" and not (count.isdecimal() and int(count) > 0):
        raise Refused(f"launch.nproc_per_node: expected 'auto' or a number above 0, got {count!r}")


def _check_sizes(config: Config) -> None:
    train = config.train
    positive = {
        "train.max_steps": train.max_steps,
        "train.max_epochs": train.max_epochs,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.grad_clip.max_norm": train.grad_clip.max_norm,
        "train.spike.deviations": train.spike.deviations,
        "train.spike.window": train.spike.window,
        "train.rewind_every_steps": train.rewind_every_steps,
        "eval.every_steps": config.eval.every_steps,
        "eval.micro_batch_size": config.eval.micro_batch_size,
        "log.every_steps": config.log.every_steps,
        "log.fingerprint_every": config.log.fingerprint_every,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.memory_every_steps": config.checkpoint.memory_every_steps,
        "resilience.hang_seconds": config.resilience.hang_seconds,
        "resilience.grace_seconds": config.resilience.grace_seconds,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "parallel.bucket_mb": config.parallel.bucket_mb,
        "parallel.check_every_steps": config.parallel.check_every_steps,
        "launch.timeout": config.launch.timeout,
        "slurm.nodes": config.slurm.nodes,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise Refused(f"{key}: expected a number above 0, got {value}")
    counts: dict[str, int | None] = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "checkpoint.keep_faults": config.checkpoint.keep_faults,
        "data.workers": config.data.workers,
        "launch.max_restarts": config.launch.max_restarts,
    }
    for key, count in counts.items():
        if count is not None and count < 0:
            raise Refused(f"{key}: expected 0 or more, got {count}")
    if train.max_steps is None and train.max_epochs is None:
        raise Refused("train.max_steps: set it, or train.max_epochs, to say when a run ends")
    if train.global_batch_size % train.micro_batch_size:
        raise Refused(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}"
            f"; micro-batch sizes that fit: {_divisors(train.global_batch_size)}"
        )


def _check_evaluation(config: Config) -> None:
    if config.eval.every_steps is not None and config.data.val is None:
        raise Refused(
            f"eval.every_steps={config.eval.every_steps} but data.val is not set: "
            "there is no split to evaluate; set data.val, or eval.every_steps=null"
        )
    if config.checkpoint.keep_best and config.eval.every_steps is None:
        raise Refused(
            f"checkpoint.keep_best={config.checkpoint.keep_best} needs a metric to compare, "
            "but eval.every_steps is null: set it, or checkpoint.keep_best=0"
        )
    if config.run.resume is Resume.must and config.run.dir is config.checkpoint.dir is None:
        raise Refused("run.resume=must but run.dir is not set: name the run to continue")


def check_world_size(config: Config, world_size: int) -> None:
    """Refuse more ranks than a step has micro-batches: some would never have work."""
    train, size = config.train, config.train.global_batch_size
    micro_batches = size // train.micro_batch_size
    if world_size > micro_batches:
        fitting = [d for d in _divisors(size) if size // d >= world_size]
        remedy = (
            f"train.micro_batch_size={max(fitting)} or less would do"
            if fitting
            else f"train.global_batch_size must be at least {world_size}"
        )
        raise Refused(
            f"{world_size} ranks share {_count(micro_batches, 'micro-batch', 'es')} a step "
            f"(train.global_batch_size={size} / train.micro_batch_size="
            f"{train.micro_batch_size}), so some would have no work; start at most "
            f"{_count(micro_batches, 'rank')}, or {remedy}"
        )


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending if number != 1 else ''}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 1 << 20 else [1, n]
