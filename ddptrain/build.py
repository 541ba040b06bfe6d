"""From a config to the objects of a run: the one place that knows how the parts fit together."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial

from torch.optim import LBFGS, Adafactor
from torch.optim import Muon as TorchMuon

from ddptrain.account import Accounted, Window
from ddptrain.claim import Claim
from ddptrain.config import (
    GROUPING,
    Averaging,
    Clock,
    Config,
    Direction,
    Penalised,
    Precision,
    TrainConfig,
)
from ddptrain.contest import Contest
from ddptrain.data.fetch import Fetcher
from ddptrain.data.plan import Plan
from ddptrain.errors import Refused
from ddptrain.evaluate import Evaluation
from ddptrain.fingerprints import Fingerprints
from ddptrain.layers import Layers
from ddptrain.loop import Trainer
from ddptrain.observe.observer import Observer
from ddptrain.observe.phases import Phases
from ddptrain.optim.average import Average
from ddptrain.optim.build import build_optimizer, build_schedule
from ddptrain.optim.clip import Clip
from ddptrain.optim.loss_scale import LossScale
from ddptrain.optim.muon import Muon
from ddptrain.optim.penalty import Penalty
from ddptrain.parallel.ranks import Ranks
from ddptrain.parts import (
    Autocast,
    build_autocast,
    build_checkpoints,
    build_early_stop,
    build_guard,
    build_part,
    build_source,
    build_strategy,
    build_task,
    check_data,
)
from ddptrain.resilience.divergence import Replicas
from ddptrain.resilience.preemption import StopRequest
from ddptrain.rules import idle
from ddptrain.run_directory import RunDirectory
from ddptrain.setbacks import Setbacks
from ddptrain.step import Step
from ddptrain.tasks.restarts import Restarts
from ddptrain.tasks.task import Task

logger = logging.getLogger(__name__)

OVER_ALL = (LBFGS, Adafactor, Muon, TorchMuon)
"""Optimisers that look at more than one number at a time."""


def build_trainer(
    config: Config,
    ranks: Ranks,
    run: RunDirectory,
    phases: Phases,
    claim: Claim | None = None,
    stop_request: StopRequest | None = None,
) -> Trainer:
    """Build every part of a training run. Raises ``Refused`` if one cannot be built."""
    train = config.train
    source = build_source(config, "train", whole=False)
    plan = source.plan
    splits = [split for split in ("val", "test") if getattr(config.data, split) is not None]
    others = {split: build_source(config, split) for split in splits}
    sizes = {s.label: f"{s.plan.samples} samples" for s in (source, *others.values())}
    ranks.agree(sizes, "has other data than", "give all nodes the same files")
    task = build_task(config, ranks.device)
    for split, of_split in {"train": source, **others}.items():
        check_data(task, split, of_split)
    autocast = build_autocast(train.precision, ranks.device)
    total_steps = _total_steps(train, plan)
    step = build_step(config, ranks, task, plan, autocast, total_steps)
    fetcher = partial(Fetcher, device=ranks.device, workers=config.data.workers)
    guard = None if claim is None else claim.check
    size = ranks.world_size
    observer = Observer(config, run, phases, speaks=ranks.is_first, world_size=size, guard=guard)
    return Trainer(
        config,
        ranks,
        task,
        fetcher(source),
        step,
        {
            split: _build_evaluation(config, split, task, (fetcher(other), ranks, autocast))
            for split, other in others.items()
        },
        build_checkpoints(config, run, ranks, claim),
        observer,
        Replicas(task, ranks),
        Setbacks(train, step, source, ranks, observer),
        Layers(step, ranks, observer, config.log.layers_every_steps, config.log.every_steps),
        stop_request or StopRequest(ranks.place),
        partial(build_task, config, ranks.device),
        total_steps,
        build_early_stop(train),
    )


def _build_evaluation(
    config: Config, split: str, task: Task, parts: tuple[Fetcher, Ranks, Autocast]
) -> Evaluation:
    if not isinstance(task, Restarts) or split != "val":
        return Evaluation(task, *parts)
    keep = config.checkpoint
    larger = keep.mode is Direction.max
    metric = keep.metric.removeprefix("val/")
    return Contest(task, *parts, metric=metric, is_larger_better=larger)


def build_step(
    config: Config, ranks: Ranks, task: Task, plan: Plan, autocast: Autocast, total_steps: int
) -> Step:
    """Build what takes one optimiser step. Raises ``Refused``."""
    train = config.train
    loss_scale = LossScale(ranks.device) if train.precision is Precision.fp16 else None
    grouping = {key: value for key, value in config.optim.items() if key in GROUPING}
    optim = {key: value for key, value in config.optim.items() if key not in GROUPING}
    optimizer = build_part("optim", build_optimizer, optim, task, grouping)
    clip = Clip(**asdict(train.grad_clip))
    of_all = train.penalty.of is Penalised.all
    penalty = Penalty(optimizer, train.penalty.l1, train.penalty.l2, of_all)
    if (penalty.l1 or penalty.l2) and not penalty.weights():
        raise Refused(
            "train.penalty: the model has no weights (parameters of two dimensions or more) for "
            "it; set train.penalty.of=all"
        )
    average = None
    if train.average.kind is not None:
        decay = train.average.decay if train.average.kind is Averaging.ema else None
        average = Average(optimizer, decay, train.average.start, train.average.every, total_steps)
    if isinstance(optimizer, LBFGS) and (clip or loss_scale or train.penalty.l1):
        raise Refused(
            "optim=lbfgs searches along the gradient as it is: set train.grad_clip.max_norm=null, "
            "train.penalty.l1=0 and train.precision=fp32 or bf16"
        )
    if isinstance(task, Restarts) and isinstance(optimizer, OVER_ALL):
        raise Refused(
            f"optim: {type(optimizer).__name__} looks at more than one number at a time, and "
            "cannot tell restarts apart; choose one that updates each number by itself"
        )
    micro_batches = len(plan.micro_batches(0))
    if micro_batches < ranks.world_size:
        raise idle(ranks.world_size, micro_batches, train, plan.global_batch_size)
    epoch = plan.steps_per_epoch if train.schedule_by is Clock.epoch else None
    return Step(
        Accounted(task, Window(ranks.device), autocast).to(ranks.device),
        optimizer,
        build_part("schedule", build_schedule, config.schedule, epoch),
        plan,
        build_strategy(config, ranks, task, loss_scale, micro_batches),
        ranks,
        total_steps=total_steps,
        clip=clip,
        average=average,
        penalty=penalty if penalty.l1 or penalty.l2 else None,
        guard=build_guard(train, ranks.device),
        loss_scale=loss_scale,
        fingerprints=Fingerprints(task, plan, ranks, config.log.fingerprint_every, total_steps),
    )


def _total_steps(train: TrainConfig, plan: Plan) -> int:
    """The steps of a run: whichever of ``max_steps`` and ``max_epochs`` comes first."""
    by_steps = train.max_steps
    by_epochs = None if train.max_epochs is None else train.max_epochs * plan.steps_per_epoch
    limits = [limit for limit in (by_steps, by_epochs) if limit is not None]
    if by_epochs is not None and by_steps is not None and by_epochs < by_steps:
        logger.warning(
            "the run ends after train.max_epochs=%s, %s steps, before train.max_steps=%s; "
            "set train.max_epochs=null to let the steps decide",
            train.max_epochs,
            by_epochs,
            by_steps,
        )
    return min(limits)
