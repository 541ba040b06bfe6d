"""What no single key of a config can tell is wrong, refused in one line before anything starts."""

from __future__ import annotations

from ddptrain.config import ALL, Config, Resume, TrainConfig
from ddptrain.errors import Refused


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
    if config.train.max_steps is None and config.train.max_epochs is None:
        raise Refused("train.max_steps: set it, or train.max_epochs, to say when a run ends")
    _check_evaluation(config)
    _check_restarts(config)
    count = config.launch.nproc_per_node
    if count != "auto" and not (count.isdecimal() and int(count) > 0):
        raise Refused(f"launch.nproc_per_node: expected 'auto' or a number above 0, got {count!r}")


def _check_sizes(config: Config) -> None:
    train = config.train
    positive = {
        "train.max_steps": train.max_steps,
        "train.max_epochs": train.max_epochs,
        "train.micro_batch_size": train.micro_batch_size,
        "train.grad_clip.max_norm": train.grad_clip.max_norm,
        "train.grad_clip.per_unit": train.grad_clip.per_unit,
        "train.grad_clip.max_value": train.grad_clip.max_value,
        "train.spike.deviations": train.spike.deviations,
        "train.spike.window": train.spike.window,
        "train.rewind_every_steps": train.rewind_every_steps,
        "eval.every_steps": config.eval.every_steps,
        "eval.micro_batch_size": config.eval.micro_batch_size,
        "log.every_steps": config.log.every_steps,
        "log.fingerprint_every": config.log.fingerprint_every,
        "log.layers_every_steps": config.log.layers_every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.memory_every_steps": config.checkpoint.memory_every_steps,
        "resilience.hang_seconds": config.resilience.hang_seconds,
        "resilience.grace_seconds": config.resilience.grace_seconds,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "parallel.bucket_mb": config.parallel.bucket_mb,
        "parallel.check_every_steps": config.parallel.check_every_steps,
        "launch.timeout": config.launch.timeout,
        "train.early_stop.patience": train.early_stop.patience,
        "train.average.every": train.average.every,
        "slurm.nodes": config.slurm.nodes,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise Refused(f"{key}: expected a number above 0, got {value}")
    counts: dict[str, float | None] = {
        "train.penalty.l1": train.penalty.l1,
        "train.penalty.l2": train.penalty.l2,
        "train.average.start": train.average.start,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "checkpoint.keep_faults": config.checkpoint.keep_faults,
        "data.workers": config.data.workers,
        "launch.max_restarts": config.launch.max_restarts,
    }
    for key, count in counts.items():
        if count is not None and count < 0:
            raise Refused(f"{key}: expected 0 or more, got {count}")
    if not 0 < train.average.decay < 1:
        raise Refused(
            f"train.average.decay: expected a number between 0 and 1, got {train.average.decay}"
        )
    size = train.global_batch_size
    if size == ALL:
        return
    if not isinstance(size, int) or size < 1:
        raise Refused(f"train.global_batch_size: expected a number above 0, got {size}; or all")
    if size % min(size, train.micro_batch_size):
        raise Refused(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}"
            f"; micro-batch sizes that fit: {_divisors(size)}"
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
    if config.train.early_stop.metric is not None and config.eval.every_steps is None:
        raise Refused(
            f"train.early_stop.metric={config.train.early_stop.metric} needs evaluations to go by, "
            "but eval.every_steps is null: set it, or train.early_stop.metric=null"
        )
    if config.run.resume is Resume.must and config.run.dir is config.checkpoint.dir is None:
        raise Refused("run.resume=must but run.dir is not set: name the run to continue")


def _check_restarts(config: Config) -> None:
    if config.restarts < 1:
        raise Refused(f"restarts: expected a number above 0, got {config.restarts}")
    if config.restarts == 1:
        return
    if config.data.val is None:
        raise Refused(f"restarts={config.restarts}: set data.val, by which to tell the best")
    if not config.checkpoint.metric.startswith("val/"):
        raise Refused(
            f"restarts={config.restarts}: the best is told by checkpoint.metric, which is "
            f"{config.checkpoint.metric}; choose one of val"
        )
    if config.train.compile:
        raise Refused(f"restarts={config.restarts}: set train.compile=false, or restarts=1")


def check_world_size(config: Config, world_size: int) -> None:
    """Refuse more ranks than a step has micro-batches, if that does not depend on the data."""
    micro_batches = config.train.micro_batches()
    if micro_batches is not None and world_size > micro_batches:
        size, _ = config.train.sizes(0)
        raise idle(world_size, micro_batches, config.train, size)


def idle(world_size: int, micro_batches: int, train: TrainConfig, size: int) -> Refused:
    """What to say of more ranks than a step of ``size`` samples has micro-batches.

    Some would never have work.
    """
    fitting = [d for d in _divisors(size) if size // d >= world_size]
    remedy = (
        f"train.micro_batch_size={max(fitting)} or less would do"
        if fitting
        else f"train.global_batch_size must be at least {world_size}"
    )
    return Refused(
        f"{world_size} ranks share {_count(micro_batches, 'micro-batch', 'es')} a step "
        f"(train.global_batch_size={size} / train.micro_batch_size="
        f"{train.micro_batch_size}), so some would have no work; start at most "
        f"{_count(micro_batches, 'rank')}, or {remedy}"
    )


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending if number != 1 else ''}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 1 << 20 else [1, n]
