"""Trains in the process of a test, on one rank, where starting another one would take longest."""

from __future__ import annotations

from pathlib import Path

import torch

from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory


def train_here(folder: Path, *overrides: str) -> dict[str, float]:
    """Take all steps of a run; return the metrics of the test split."""
    return taken(folder, *overrides).evaluations["test"].run()


def taken(folder: Path, *overrides: str) -> Trainer:
    """A trainer that has taken all steps of its run, without what is logged and saved meanwhile."""
    config = compose(["log.tensorboard=false", *overrides])
    ranks = Ranks(Place(), torch.device("cpu"), None)
    trainer = build_trainer(config, ranks, RunDirectory(folder / "here"), Phases())
    trainer.fetch()
    for step in range(trainer.total_steps):
        trainer.step(step, trainer.batches)
        trainer.step.module.window.clear()
    return trainer
