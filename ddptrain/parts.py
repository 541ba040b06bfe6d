"""From a config to one part of a run: each is built by itself, or refused with its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.nn import SyncBatchNorm

from ddptrain import pulse
from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import Disk, Medium, Remote
from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.retention import Retention
from ddptrain.checkpoint.store import Store
from ddptrain.claim import Claim
from ddptrain.config import (
    Config,
    Direction,
    Precision,
    Remedy,
    TrainConfig,
    flatten,
    to_plain,
)
from ddptrain.config import Reduction as ReductionChoice
from ddptrain.data.fetch import Source
from ddptrain.data.packages import stay_offline
from ddptrain.data.plan import Plan
from ddptrain.errors import Refused
from ddptrain.generators import key_generators
from ddptrain.keys import derive
from ddptrain.observe.faults import noted_faults
from ddptrain.optim.guard import Guard, Spikes
from ddptrain.optim.loss_scale import LossScale
from ddptrain.optim.patience import Patience
from ddptrain.origin import versions
from ddptrain.parallel.ddp import DataParallel
from ddptrain.parallel.exact import MAX_ADDENDS, Exact
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Mean, Reduction
from ddptrain.run_directory import RunDirectory
from ddptrain.stored import changes, computed
from ddptrain.tasks.restarts import Restarts
from ddptrain.tasks.task import Task
from ddptrain.tasks.transformer_configs import check_entries
from ddptrain.trust import check_objects

Autocast = Callable[[], AbstractContextManager[Any]]


def build_task(config: Config, device: torch.device) -> Task:
    """Build the model and its task, with weights drawn from the seed. Raises ``Refused``."""
    tasks = [_build_one(config, device, number) for number in range(config.restarts)]
    try:
        task = Restarts(tasks) if len(tasks) > 1 else tasks[0]
    except ValueError as error:
        raise Refused(f"restarts={len(tasks)}: {error}") from None
    if config.train.compile:
        _tell_of_compiling()
        task.compile()
    return task


def _build_one(config: Config, device: torch.device, number: int) -> Task:
    """Build the task of one of the restarts; the first has the weights of a run without others."""
    key_generators(derive(config.seed, "weights", *([number] if number else [])), device)
    model = {}
    if config.model is not None:
        model["model"] = build_part("model", instantiate, config.model, _convert_="all")
        check_entries("model", config.model)
    task = build_part("task", instantiate, config.task, _convert_="all", **model)
    if not isinstance(task, Task):
        raise Refused(f"task: {type(task).__name__} is no ddptrain.Task; derive it from that class")
    return task.to(device)


def _tell_of_compiling() -> None:
    """Have the pulse say when torch compiles, which may take minutes."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda _: pulse.enter(pulse.COMPILING))
    callback_handler.register_end_callback(lambda _: pulse.enter(pulse.FORWARD))


def build_source(config: Config, split: str, whole: bool = True) -> Source:
    """Build the data set of one split. Raises ``Refused``.

    With ``whole`` its plan is one pass over all samples, in order, for an evaluation; without, it
    is that of the training steps.
    """
    # One key for all splits: a data set that shuffles before it takes its part gets the same order.
    key_generators(derive(config.seed, "data"))
    dataset = build_part(f"data.{split}", instantiate, getattr(config.data, split), _convert_="all")
    label = f"data.{split} ({type(dataset).__name__})"
    try:
        samples = len(dataset)
    except TypeError:
        raise Refused(
            f"{label}: it has no length; a map-style data set with __len__ and __getitem__ "
            "is expected"
        ) from None
    if samples == 0:
        raise Refused(f"{label}: it is empty")
    if not whole:
        train = config.train
        size, micro = train.sizes(samples)
        if samples < size:
            raise Refused(
                f"{label} has {samples} samples, fewer than train.global_batch_size="
                f"{train.global_batch_size}: make the batch smaller, or the data set larger"
            )
        return Source(split, dataset, Plan(samples, size, micro, config.seed, config.data.shuffle))
    size = config.eval.micro_batch_size or config.train.micro_batch_size
    return Source(split, dataset, Plan(samples, samples, size, config.seed, shuffled=False))


def check_data(task: Task, split: str, source: Source) -> None:
    """Have the task look at the data set of a split. Raises ``Refused`` with its key."""
    try:
        task.check_data(source.dataset)
    except Refused as error:
        raise Refused(f"data.{split}: {error}") from None


def build_strategy(
    config: Config, ranks: Ranks, task: Task, loss_scale: LossScale | None, micro_batches: int
) -> DataParallel:
    """Build what keeps the replicas one model, for steps of so many micro-batches at most.

    Raises ``Refused``.
    """
    reduction: Reduction = Mean()
    if config.parallel.reduction is ReductionChoice.exact:
        for name, module in task.named_modules():
            if isinstance(module, SyncBatchNorm):
                raise Refused(
                    f"parallel.reduction=exact: {name} is a SyncBatchNorm, which normalises over "
                    "what the ranks hold at once, so that its result depends on their number; use "
                    "BatchNorm, which normalises over a micro-batch, or GroupNorm or LayerNorm"
                )
        if micro_batches > MAX_ADDENDS:
            raise Refused(
                f"parallel.reduction=exact: a step has {micro_batches} micro-batches, it takes at "
                f"most {MAX_ADDENDS}; make train.micro_batch_size larger"
            )
        reduction = Exact(micro_batches, None if loss_scale is None else loss_scale.value)
    return DataParallel(ranks, config.parallel.bucket_mb, reduction)


def build_guard(train: TrainConfig, device: torch.device) -> Guard:
    """Build what decides in each step whether it may change the weights."""
    action = train.spike.action
    spikes = None
    if action is not None:
        halts = action is not Remedy.skip
        spikes = Spikes(device, train.spike.deviations, train.spike.window, halts)
    return Guard(
        device,
        halts=train.nonfinite is not Remedy.skip,
        stops=train.nonfinite is Remedy.stop and action in (None, Remedy.stop),
        spikes=spikes,
    )


def build_checkpoints(
    config: Config, run: RunDirectory, ranks: Ranks | None = None, claim: Claim | None = None
) -> Checkpoints:
    """Build the store of a run's checkpoints and the rule by which they are kept."""
    keep = config.checkpoint
    is_larger_better = keep.mode is Direction.max
    retention = Retention(
        keep.keep_last,
        keep.keep_best,
        is_larger_better,
        keep.keep_faults,
        lambda: [line["step"] for line in noted_faults(run)],
    )
    facts = {"config": to_plain(config), "versions": versions()}
    medium: Medium = Disk(run.checkpoints)
    if keep.dir is not None:
        path = keep.dir.removeprefix("file://")
        medium = Remote(path) if "://" in path else Disk(Path(path).expanduser())
    token = f"{run.known_identity()}:{claim.token}" if claim and keep.dir else None
    store = Store(medium, None if claim is None else claim.check, token)
    mine = computed(config)

    def differences(manifest: dict[str, Any]) -> list[str]:
        """What else another run computes; keys that only one of the versions has do not count."""
        stored = json.loads(json.dumps(flatten(manifest.get("config", {}))))
        own = json.loads(json.dumps(mine))
        both = own.keys() & stored.keys()
        return changes({k: stored[k] for k in both}, {k: own[k] for k in both})

    memory = Memory(run.memories())
    checkpoints = Checkpoints(store, memory, retention, keep.metric, facts, differences)
    if ranks is not None:
        homes = ranks.gather(memory.home())
        checkpoints.keeps_memory = homes.index(homes[ranks.rank]) == ranks.rank
    return checkpoints


def build_early_stop(train: TrainConfig) -> Patience | None:
    """Build what ends a run whose evaluations get no better."""
    early = train.early_stop
    if early.metric is None:
        return None
    try:
        return Patience(early.metric, early.mode.name, early.patience, early.threshold)
    except ValueError as error:
        raise Refused(f"train.early_stop.{error}") from None


def build_autocast(precision: Precision, device: torch.device) -> Autocast:
    """Return what to enter around a forward for this precision."""
    if precision is Precision.fp32:
        return nullcontext
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float16
    return partial(torch.autocast, device.type, dtype=dtype)


def build_part(key: str, build: Callable[..., Any], node: Any, *arguments: Any, **more: Any) -> Any:
    """Build what a config node describes, or say in one line which key failed and why."""
    stay_offline()
    check_objects(key, node)
    try:
        return build(node, *arguments, **more)
    except (InstantiationException, ImportError, AttributeError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, Refused):
            raise Refused(f"{key}: {cause}") from None
        name = node.get("_target_") if isinstance(node, dict) else node
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise Refused(f"{key}: could not build {name}: {reason}") from cause
