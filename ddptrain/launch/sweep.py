"""A sweep: Hydra's sweeper chooses the trials, each is a whole run started like any other."""

from __future__ import annotations

import json
import subprocess
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ddptrain.compose import compose, config_trees, hydra_arguments
from ddptrain.errors import EXIT_COMPLETED
from ddptrain.run_directory import open_directory


def sweep(overrides: list[str]) -> int:
    """Train once for every combination of the comma-separated values; return the exit code.

    Hydra itself writes only ``multirun.yaml``, under ``runs/sweeps/``; each trial has its run's
    directory. A trial returns ``checkpoint.metric`` to the sweeper.
    """

    @hydra.main(version_base="1.3", config_path=str(config_trees()[0]), config_name="config")
    def trial(_: DictConfig) -> float:
        return run_trial(list(HydraConfig.get().overrides.task))

    own = [
        "hydra.sweep.dir=runs/sweeps/${now:%Y%m%d-%H%M%S}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    sys.argv = [sys.argv[0], "--multirun", *hydra_arguments(overrides, sweep=True), *own]
    trial()
    return EXIT_COMPLETED


def run_trial(overrides: list[str]) -> float:
    """Train with these overrides in processes of their own; return ``checkpoint.metric``."""
    config = compose(overrides)
    run = open_directory(config, overrides)
    print("\ntrial:", *(override.lstrip("+") for override in overrides), flush=True)
    command = [sys.executable, "-m", "ddptrain", "train", *overrides, f"run.dir={run.path}"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RuntimeError(f"trial {' '.join(overrides)} exited {done.returncode}")
    metrics = json.loads(run.result.read_text())["metrics"]
    return float(metrics.get(config.checkpoint.metric, "nan"))
