"""Averages of weights: what they are, that they are evaluated and exported, and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, read_result, run
from safetensors.torch import load_file
from torch import nn

from ddptrain.build import build_trainer
from ddptrain.checkpoint.saved import MODEL, OPTIMIZER
from ddptrain.compose import compose
from ddptrain.observe.loggers import read_json_lines
from ddptrain.observe.phases import Phases
from ddptrain.optim.average import KEY, Average
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import load_optimizer, optimizer_tensors


@given(
    values=st.lists(st.floats(-3, 3), min_size=1, max_size=20),
    start=st.integers(0, 5),
    every=st.integers(1, 3),
)
def test_swa_is_the_mean_and_ema_forgets(values: list[float], start: int, every: int) -> None:
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizers = [torch.optim.SGD([parameter], 0.1) for _ in range(2)]
    swa = Average(optimizers[0], None, float(start or 0.0), every, 100)
    ema = Average(optimizers[1], 0.9, float(start or 0.0), every, 100)
    taken: list[float] = []
    by_hand = 0.0
    for step, value in enumerate(values):
        with torch.no_grad():
            parameter.fill_(value)
        for average in (swa, ema):
            average.update(step, torch.tensor(0.0))
        if step >= start and (step - start) % every == 0:
            decay = min(0.9, (1 + len(taken)) / (10 + len(taken)))
            by_hand = value if not taken else decay * by_hand + (1 - decay) * value
            taken.append(value)
    found = [optimizer.state[parameter].get(KEY) for optimizer in optimizers]
    if not taken:
        assert found == [None, None]
        return
    assert float(found[0]) == pytest.approx(sum(taken) / len(taken), abs=1e-6)
    assert float(found[1]) == pytest.approx(by_hand, abs=1e-6)


def test_a_step_that_is_passed_over_does_not_count() -> None:
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], 0.1)
    average = Average(optimizer, None, 0.0, 1, 10)
    average.update(0, torch.tensor(0.0))
    with torch.no_grad():
        parameter.fill_(9.0)
    average.update(1, torch.tensor(1.0))
    assert float(optimizer.state[parameter][KEY]) == 1.0


SHORT = ["experiment=ragged", "train.max_steps=20", "log.tensorboard=false", "eval.every_steps=5"]
EMA = [*SHORT, "train.average.kind=ema", "train.average.decay=0.8", "train.average.start=0.3"]


def test_averages_are_evaluated_and_exported(tmp_path: Path) -> None:
    """Not before there are any; and what is trained is as it would be without."""
    for name, overrides in (("with", EMA), ("without", SHORT)):
        done = run([*DDPTRAIN, "train", *overrides, f"run.dir={tmp_path / name}"], PROJECT)
        assert done.returncode == 0, done.stderr
    with_them, without = (read_result(tmp_path / name) for name in ("with", "without"))
    assert with_them["weights_sha256"] == without["weights_sha256"]
    losses = [
        {line["step"]: line["loss"] for line in lines if line["split"] == "val"}
        for lines in (read_json_lines(tmp_path / n / "metrics.jsonl") for n in ("with", "without"))
    ]
    assert losses[0][5] == losses[1][5]
    assert all(losses[0][step] != losses[1][step] for step in (10, 15, 20))
    files = [tmp_path / "average.safetensors", tmp_path / "last.safetensors"]
    for file, last in zip(files, ([], ["--last"]), strict=True):
        run([*DDPTRAIN, "export", str(tmp_path / "with"), f"--output={file}", *last], PROJECT)
    checkpoint = tmp_path / "with" / "checkpoints" / "step-00000020"
    averages = {
        name.removesuffix(f"/{KEY}"): tensor
        for name, tensor in load_file(checkpoint / OPTIMIZER).items()
        if name.endswith(f"/{KEY}")
    }
    exported = load_file(files[0])
    assert averages
    assert all(torch.equal(exported[name], averages[name]) for name in averages)
    last_of_all = load_file(checkpoint / MODEL)
    assert all(torch.equal(load_file(files[1])[name], last_of_all[name]) for name in last_of_all)
    told = run([*DDPTRAIN, "evaluate", str(tmp_path / "with"), "--split=val"], PROJECT)
    assert json.loads(told.stdout)["val/loss"] == losses[0][20]


@pytest.mark.parametrize("optimiser", ["adamw", "rmsprop", "sgd", "muon"])
def test_averages_are_saved_with_the_optimiser(tmp_path: Path, optimiser: str) -> None:
    def trainer() -> Any:
        given = ["experiment=breast_cancer", f"optim={optimiser}", "log.tensorboard=false"]
        config = compose([*given, "train.average.kind=swa", "train.average.start=2"])
        ranks = Ranks(Place(), torch.device("cpu"), None)
        return build_trainer(config, ranks, RunDirectory(tmp_path), Phases())

    whole, resumed = trainer(), trainer()
    whole.fetch()
    for step in range(5):
        whole.step(step, whole.batches)
    resumed.task.load_state_dict(whole.task.state_dict())
    kept = optimizer_tensors(whole.task, whole.step.optimizer)
    load_optimizer(resumed.task, resumed.step.optimizer, *kept)
    resumed.done = 5
    resumed.fetch()
    for step in range(5, 9):
        whole.step(step, whole.batches)
        resumed.step(step, resumed.batches)
    found = [made.evaluated().state_dict() for made in (whole, resumed)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][n], whole.task.state_dict()[n]) for n in found[0])
