"""One rank of a verification: takes part in the trials; rank 0 judges and writes the report."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import yaml

from ddptrain.compose import validate
from ddptrain.config import Config, Reduction
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED
from ddptrain.evaluate import Evaluation
from ddptrain.loop import Trainer
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import choose_device
from ddptrain.place import Place
from ddptrain.resilience.failure import exit_with, leave_now
from ddptrain.verify.alone import check_loss, check_samples
from ddptrain.verify.compare import (
    check_alike,
    check_evaluation,
    check_normalisation,
    check_ranks,
)
from ddptrain.verify.report import Check, holds, text
from ddptrain.verify.result import Result
from ddptrain.verify.trial import Outcome, Trial, run_trial

ORDER = "order.yaml"
REPORT = "report.json"
WORKERS = 2


def verify_rank(folder: Path) -> int:
    """Take this rank's part in what ``order.yaml`` says; return the process's exit code."""
    place = Place.from_environment()
    trial = Trial()
    try:
        order = yaml.safe_load((folder / ORDER).read_text())
        config = validate(order["config"])
        make_deterministic(choose_device(config.train.device.name, place))
        trials = plan_trials(order["world_sizes"], config)
        alone: list[Check] = []

        def look(trainer: Trainer) -> None:
            sources = [trainer.fetcher.source]
            sources += [evaluation.fetcher.source for evaluation in trainer.evaluations.values()]
            alone.extend([check_samples(sources), check_loss(trainer)])

        if place.rank:
            Evaluation.load()  # takes seconds, and rank 0 is busy for some
        outcomes: dict[Trial, list[Outcome]] = {}
        for trial in trials:
            if place.rank < trial.world_size:
                looks = look if trial.is_reference else None
                outcomes[trial] = run_trial(trial, config, order["steps"], place, folder, looks)
                if trial.is_reference and (checks := check_normalisation(outcomes[trial][0])):
                    _report(folder, order, config, [*alone, *checks])
                    leave_now(EXIT_FAILED)  # which ends the other ranks, who would not get far
        if place.rank == 0:
            _report(folder, order, config, [*alone, *judge(outcomes, config)])
        code = EXIT_COMPLETED
    except BaseException as error:
        code = exit_with(error, place, f"verifying on {trial}: ", on_screen=False, told=Event())
    # Not through Python's own end: a thread of the process group that wants Python's lock then
    # aborts the process, and the ranks that are still at work with it.
    if place.world_size > 1:
        leave_now(code)
    return code


def plan_trials(world_sizes: list[int], config: Config) -> list[Trial]:
    """The reference, then what must be like it; most ranks first, which get ready side by side."""
    reloads = config.parallel.reduction is not Reduction.exact
    trials = [Trial(), Trial(1, resumed=True), Trial(2, workers=WORKERS)]
    several = sorted((w for w in world_sizes if w > 1), reverse=True)
    return trials + [Trial(3 + i, w, reloads=reloads) for i, w in enumerate(several)]


def judge(outcomes: dict[Trial, list[Outcome]], config: Config) -> list[Check]:
    """Compare every trial with the reference."""
    (reference,) = outcomes[Trial()]
    resumed, with_workers, *several = (
        Result(trial, of_ranks, reference)
        for trial, of_ranks in outcomes.items()
        if not trial.is_reference
    )
    several.sort(key=lambda result: result.trial.world_size)
    return [
        *check_ranks(several, exact=config.parallel.reduction is Reduction.exact),
        check_alike(f"resumed after step {resumed.outcomes[0].first}", resumed),
        check_alike(f"{WORKERS} loading workers", with_workers),
        *check_evaluation([resumed, with_workers, *several]),
    ]


def _report(folder: Path, order: dict[str, Any], config: Config, checks: list[Check]) -> None:
    report = {"holds": holds(checks), "text": text(_heading(order, config), checks)}
    (folder / REPORT).write_text(json.dumps(report))


def _heading(order: dict[str, Any], config: Config) -> str:
    train = config.train
    micro_batches = train.micro_batches() or "all"
    device = "GPUs" if train.device.name == "cuda" else "the CPU"
    without = ", without train.compile" if order["compiles"] else ""
    return (
        f"{config.run.name} on {device}: {order['steps']} steps of {micro_batches} micro-batches, "
        f"parallel.reduction={config.parallel.reduction.name}{without}"
    )
