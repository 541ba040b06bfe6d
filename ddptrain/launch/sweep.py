"""A sweep: Hydra's sweeper chooses the trials, each is a whole run started like any other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from itertools import product

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from ddptrain.compose import compose, config_trees, hydra_arguments, parse, whole_sections
from ddptrain.errors import EXIT_COMPLETED, Refused, Stopped, TrainingError
from ddptrain.launch.agent import DDPTRAIN, POLL_SECONDS, heard
from ddptrain.run_directory import open_directory


def sweep(overrides: list[str]) -> int:
    """Train once for every combination of the comma-separated values; return the exit code.

    Hydra itself writes only ``multirun.yaml``, under ``runs/sweeps/``; each trial has its run's
    directory. A trial returns ``checkpoint.metric`` to the sweeper, which a grid does without. One
    that fails does not keep the others from training; it is told at the end.
    """
    _check_values(overrides)
    failed: list[str] = []
    values: dict[str, float | None] = {}

    @hydra.main(version_base="1.3", config_path=str(config_trees()[0]), config_name="config")
    def trial(_: DictConfig) -> float:
        chosen = [*HydraConfig.get().overrides.task, *whole_sections(overrides)]
        told = " ".join(override.lstrip("+") for override in chosen)
        try:
            values[told] = value = run_trial(chosen, told)
            if value is None and "basic" not in HydraConfig.get().sweeper["_target_"]:
                raise TrainingError(f"{told}: checkpoint.metric is none of its metrics")
        except TrainingError as error:
            failed.append(str(error))
            return math.nan
        return math.nan if value is None else value

    own = [
        "hydra.sweep.dir=runs/sweeps/${now:%Y%m%d-%H%M%S}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    sys.argv = [sys.argv[0], "--multirun", *hydra_arguments(overrides, sweep=True), *own]
    try:
        trial()
    except KeyboardInterrupt:
        print(_summary(values))
        told = "the sweep was interrupted; a trial that was under way has saved"
        raise Stopped(told) from None
    print(_summary(values))
    if failed:
        raise TrainingError(f"{len(failed)} trials failed: {'; '.join(failed)}")
    return EXIT_COMPLETED


def combination(overrides: list[str], number: int) -> list[str]:
    """The overrides of one trial of a grid, counted as a sweep does: the last key changes fastest.

    Raises ``Refused`` if there are not so many.
    """
    choices = [
        _values(override) if override.is_discrete_sweep() else [str(override.input_line)]
        for override in parse(overrides)
    ]
    count = math.prod(map(len, choices))
    if not 0 <= number < count:
        raise Refused(f"--trial {number}: there are {count} combinations, 0 to {count - 1}")
    chosen = list(product(*choices))[number]
    print(f"trial {number} of {count}: {' '.join(chosen)}", flush=True)
    return list(chosen)


def _values(override: Override) -> list[str]:
    """An override for each of the values that one names."""
    return [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()]


def _check_values(overrides: list[str]) -> None:
    """Refuse a sweep with a value that no trial can have, before the first trial trains."""
    first, others = [], []
    for override in parse(overrides):
        line = str(override.input_line)
        if line.lstrip("+").startswith("hydra"):
            continue
        if not override.is_discrete_sweep():
            if not override.is_sweep_override():
                first.append([line])
            continue
        values = _values(override)
        first.append(values[:1])
        others.append((len(first) - 1, values[1:]))
    chosen = [line for lines in first for line in lines]
    compose(chosen)
    for place, values in others:
        for value in values:
            compose([*chosen[:place], value, *chosen[place + 1 :]])


def run_trial(overrides: list[str], told: str) -> float | None:
    """Train with these overrides in processes of their own.

    Return ``checkpoint.metric``, NaN if it is not finite, None if the run has no such metric.
    """
    config = compose(overrides)
    run = open_directory(config, overrides)
    print(f"\ntrial: {told}", flush=True)
    command = [*DDPTRAIN, "train", *overrides, f"run.dir={run.path}"]
    with heard() as came:
        process = subprocess.Popen(command)
        asked = False
        while process.poll() is None:
            while came:
                asked = True
                process.send_signal(came.popleft())
            time.sleep(POLL_SECONDS)
    if asked:
        raise KeyboardInterrupt
    if process.returncode:
        raise TrainingError(f"{told} exited {process.returncode}")
    metrics = json.loads(run.result.read_text())["metrics"]
    if config.checkpoint.metric not in metrics:
        return None
    value = metrics[config.checkpoint.metric]
    return math.nan if value is None else float(value)


def _summary(values: dict[str, float | None]) -> str:
    """A line for each trial that ended well, with its ``checkpoint.metric`` if it has it."""
    told = {t: "" if value is None else f"{value:.4f}" for t, value in values.items()}
    width = max(map(len, told.values()), default=0)
    return "\n".join([f"\n{len(told)} trials:", *(f"  {v:{width}}  {t}" for t, v in told.items())])
