"""A sweep: Hydra's sweeper chooses the trials, each is a whole run started like any other."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from signal import SIGHUP, SIGTERM

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ddptrain.claim import launching
from ddptrain.compose import config_trees, hydra_arguments, hydra_settings, whole_sections
from ddptrain.errors import EXIT_COMPLETED, Refused, Stopped, TrainingError
from ddptrain.files import make_new
from ddptrain.launch.allocation import Allocation
from ddptrain.launch.combinations import check_values, in_order, ranges
from ddptrain.launch.jobs import followed, refuse_queued
from ddptrain.launch.resources import wanted
from ddptrain.launch.trial import FOLDER, SWEEP, Outcome, apart, run_of, run_trial
from ddptrain.overrides import override, parse
from ddptrain.processes import born
from ddptrain.screen import short

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
SEARCH = "hydra_plugins.ddptrain_optuna.OptunaSweeper"
"""Hydra's own sweeper, which needs no value of a trial, and ours, whose trials may be given up."""


def sweep(overrides: list[str]) -> int:
    """Train once for every combination of the comma-separated values; return the exit code.

    Or for those that another sweeper of Hydra's chooses. Each trial has its run's directory in the
    sweep's folder, and its ``checkpoint.metric`` is returned to the sweeper, which a grid does
    without. One that fails does not keep the others from training; it is told at the end. A sweep
    that is given the folder of one that was interrupted goes on with it.
    """
    composed = hydra_settings(overrides)
    asked = wanted(composed.hydra, composed.slurm)
    overrides = in_order([*overrides, *ranges(composed.hydra, overrides)])
    check_values(overrides)
    folder, rest, is_new = _folder(overrides)
    where = override(FOLDER, short(folder))
    again = f"ddptrain train --multirun {shlex.join([*rest, where])}"
    print(f"sweep {short(folder)}; to go on with it after an interruption:\n  {again}", flush=True)
    try:
        with _interruptible(), launching(folder):
            refuse_queued(folder)
            _run([*rest, *asked], folder, is_new)
    except KeyboardInterrupt:
        print(_summary(folder))
        told = "the sweep was interrupted; a trial that was under way goes on from its last step"
        raise Stopped(f"{told}: {again}") from None
    print(_summary(folder))
    if failed := [each.why for each in _outcomes(folder) if each.status == "failed"]:
        count = f"{len(failed)} trial{'s' * (len(failed) > 1)} failed"
        raise TrainingError(f"{count}: {'; '.join(failed)}")
    return EXIT_COMPLETED


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a sweep as Ctrl-C does."""
    numbers = [n for n in (SIGTERM, SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(overrides: list[str], folder: Path, is_new: bool) -> None:
    """Run the trials. Raises ``Refused``, and takes a new folder away if none was begun."""
    try:
        _hydra(overrides, folder)
    except (HydraException, OmegaConfBaseException, Refused) as error:
        if is_new and not any(each.is_dir() and each.name.isdecimal() for each in folder.iterdir()):
            rmtree(folder)
        raise Refused(" ".join(str(error).split())) from None


def _folder(overrides: list[str]) -> tuple[Path, list[str], bool]:
    """The sweep's folder, which is there then, the other overrides, and whether it is new."""
    if any(line.lstrip("+").startswith("run.dir=") for line in overrides):
        raise Refused(f"run.dir is of one run; {FOLDER}=… names the folder of a sweep")
    named = [line for line in overrides if line.lstrip("+").startswith(f"{FOLDER}=")]
    sweeps = Path("runs") / "sweeps"
    job = Allocation.here()
    if named:
        given = parse(named)[-1]
        told = "" if given.is_sweep_override() else given.value()
        if not isinstance(told, str | int) or not str(told).strip():
            raise Refused(f"{given.input_line}: expected the name of a folder")
        folder = Path(str(told)).expanduser().absolute()
    elif job is not None and job.is_batch:  # to come back to it, whatever starts the job again
        folder = (sweeps / f"slurm-{job.name}").absolute()
    else:
        return make_new(_made(sweeps)), overrides, True
    is_new = not folder.exists()
    return _made(folder), [line for line in overrides if line not in named], is_new


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{FOLDER}={folder}: {error.strerror}") from None
    return folder


def _hydra(overrides: list[str], folder: Path) -> None:
    """Have Hydra's sweeper and launcher run the trials, perhaps on other machines."""
    whole = whole_sections(overrides)
    alike = [line for line in parse(overrides) if not line.is_sweep_override()]
    fixed = {str(line.key_or_group) for line in alike}

    @hydra.main(version_base="1.3", config_path=str(config_trees()[0]), config_name="config")
    def trial(_: DictConfig) -> float:
        own = HydraConfig.get()
        number, judge = int(own.job.num), None
        if own.sweeper["_target_"] == SEARCH:
            from ddptrain.launch.study import judge_of

            judge = judge_of(own.sweeper, folder, number)
        needs_value = own.sweeper["_target_"] != GRID
        chosen = [*own.overrides.task, *whole]
        value = run_trial(folder, number, chosen, fixed, needs_value, judge).value
        return math.nan if value is None else value

    def lost(number: int, chosen: list[str], why: str) -> None:
        print(f"\n{why}", flush=True)
        before, chosen = Outcome.read(run_of(folder, number)), [*chosen, *whole]
        if before is None or before.status == "failed":
            outcome = Outcome(number, apart(chosen, fixed), chosen, "failed", None, why)
            outcome.leave(run_of(folder, number))

    own = [
        override(FOLDER, folder),
        "++hydra.sweeper.params=null",  # they are among the overrides
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or it prints errors itself, and exits
    os.environ[SWEEP] = f"{os.getpid()} {born(os.getpid())}"
    sys.argv = [sys.argv[0], "--multirun", *hydra_arguments(overrides, sweep=True), *own]
    with followed(lost, lambda number: _line(Outcome.read(run_of(folder, number)))):
        trial()


def _outcomes(folder: Path) -> list[Outcome]:
    """Of the trials that have ended, in order of their numbers."""
    found = [Outcome.read(each) for each in folder.iterdir() if each.is_dir()]
    return sorted((each for each in found if each is not None), key=lambda each: each.number)


def _line(trial: Outcome | None) -> str:
    if trial is None:
        return ""
    value = trial.status if trial.value is None else f"{trial.value:.4f}"
    return f"  {trial.number:3}  {value:>10}  {trial.told}"


def _summary(folder: Path) -> str:
    """A line for each trial that has ended: its ``checkpoint.metric`` if it has it, and its run."""
    lines = [_line(each) for each in _outcomes(folder)]
    heading = f"\n{len(lines)} trial{'s' * (len(lines) != 1)} in {short(folder)}:"
    hint = [f"compare      ddptrain compare {short(folder)}"] if lines else []
    return "\n".join([heading, *lines, *hint])
