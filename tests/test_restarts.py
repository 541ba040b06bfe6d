"""Several initialisations at once: each is trained as it would be alone, and the best is kept."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import DDPTRAIN, PROJECT, TORCHRUN, read_result, run
from safetensors.torch import load_file
from torch import Tensor, nn

from ddptrain import Loss, Task
from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.errors import Refused
from ddptrain.loop import Trainer
from ddptrain.observe.loggers import read_json_lines
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.tasks.restarts import BEST, Restarts

COPIES = 3


def trainer(folder: Path, *overrides: str) -> Trainer:
    config = compose(["experiment=breast_cancer", "log.tensorboard=false", *overrides])
    ranks = Ranks(Place(), torch.device("cpu"), None)
    return build_trainer(config, ranks, RunDirectory(folder), Phases())


def take(made: Trainer, steps: int) -> None:
    made.fetch()
    for step in range(steps):
        made.step(step, made.batches)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.grad_clip.max_norm=0.02"],
        ["optim=sgd", "train.grad_clip.per_unit=0.01", "train.grad_clip.max_norm=null"],
        ["optim=sgd", "train.penalty.l1=0.01", "train.penalty.l2=0.1"],
        ["optim=rmsprop", "optim.layer_decay=0.5", "train.average.kind=ema"],
        ["model={_target_:normed.Normed}", "train.grad_clip.max_norm=0.1"],
    ],
    ids=["clipped", "by unit", "penalties", "averages", "in turn"],
)
def test_each_copy_is_trained_as_it_would_be_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [*overrides, "model.dropout=0"]
    together = trainer(tmp_path, *overrides, f"restarts={COPIES}")
    task = together.task
    assert isinstance(task, Restarts)
    starts = [{n: t.clone() for n, t in copy.state_dict().items()} for copy in task.copies]
    take(together, 4)
    assert task.is_batched == ("normed" not in overrides[0])
    evaluated = together.evaluated()
    assert isinstance(evaluated, Restarts)
    for copy, average, start in zip(task.copies, evaluated.copies, starts, strict=True):
        alone = trainer(tmp_path, *overrides)
        alone.task.load_state_dict(start)
        take(alone, 4)
        assert_close(copy.state_dict(), alone.task.state_dict())
        assert_close(average.state_dict(), alone.evaluated().state_dict())
        assert any(not torch.equal(start[n], w) for n, w in copy.state_dict().items())


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


NORMED = '''
from torch import nn

class Branching(nn.Module):
    """What it does depends on its numbers, so that it cannot be batched."""

    def forward(self, inputs):
        return inputs * 1.5 if inputs.mean() > 0 else inputs

class Normed(nn.Sequential):
    def __init__(self, inputs, **others):
        layers = nn.Linear(inputs, 8), nn.BatchNorm1d(8), Branching(), nn.Linear(8, 1)
        super().__init__(*layers)
'''


def test_the_first_copy_starts_as_a_run_without_others(tmp_path: Path) -> None:
    task = trainer(tmp_path, f"restarts={COPIES}").task
    assert isinstance(task, Restarts)
    alone = trainer(tmp_path).task.state_dict()
    assert all(torch.equal(t, alone[n]) for n, t in task.copies[0].state_dict().items())
    assert any(not torch.equal(t, alone[n]) for n, t in task.copies[1].state_dict().items())
    names = {name for name, _ in task.named_parameters()}
    assert names == {name for name, _ in trainer(tmp_path).task.named_parameters()}


class Tied(Task):
    """A weight that is used twice, a buffer, and all that a loss may log."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, batch: Tensor) -> Loss:
        out = self.two(nn.functional.dropout(self.one(batch), 0.5)).square().sum()
        self.seen[0] += 1
        logs = {"drawn": torch.rand(()), "seven": 7.0, "share": (out.detach(), len(batch))}
        return Loss(out, len(batch), logs)


def of_generators() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_finding_out_whether_it_can_be_batched_leaves_no_trace() -> None:
    tasks = []
    for seed in range(COPIES):
        torch.manual_seed(seed)
        tasks.append(Tied())
    task, batch = Restarts(tasks), torch.randn(5, 3)
    found: list[list[Tensor]] = []
    for known in (None, True):
        task.is_batched = known
        torch.manual_seed(5)
        loss = task(batch)
        gradients = torch.autograd.grad(loss.sum, list(task.parameters()))
        found.append([loss.sum.detach(), loss.logs["drawn"], *gradients])
        assert task.is_batched
        assert loss.logs["seven"] == 7.0
        assert loss.count == 5
        assert loss.logs["share"][0] == loss.sum
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert task.get_buffer("seen").tolist() == [[2, 0]] * COPIES
    assert len(list(task.parameters())) == 3
    task.choose(2)
    torch.manual_seed(5)
    assert task(batch).sum != found[0][0]
    before = of_generators()
    task._can_be_batched(batch)
    assert of_generators() == before


def test_the_best_is_kept_evaluated_and_exported(tmp_path: Path) -> None:
    given = ["experiment=ragged", f"restarts={COPIES}", "train.max_steps=20", "eval.every_steps=10"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = run([*TORCHRUN, "2", "-m", "ddptrain", *given, f"run.dir={whole}"], PROJECT)
    assert done.returncode == 0, done.stderr
    metrics = read_result(whole)["metrics"]
    best = int(metrics["val/restart"])
    assert metrics["val/loss"] <= metrics["val/loss_median"] <= metrics["val/loss_worst"]
    weights = load_file(whole / "checkpoints" / "step-00000020" / "model.safetensors")
    assert int(weights.pop(BEST)) == best
    assert run([*DDPTRAIN, "export", str(whole)], PROJECT).returncode == 0
    exported = load_file(whole / "model.safetensors")
    assert all(torch.equal(exported[name], each[best]) for name, each in weights.items())
    told = run([*DDPTRAIN, "evaluate", str(whole), "--split=val"], PROJECT)
    assert json.loads(told.stdout)["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-6)
    losses = [line["loss"] for line in read_json_lines(whole / "metrics.jsonl")]
    assert len(set(losses)) == len(losses)
    # Killed in the middle, and gone on: the same.
    alike = [*given, f"run.dir={part}", "launch.nproc_per_node=2", "task.culprit=1"]
    alike += ["task.kill_at=24", f"task.once={part}-once"]
    done = run([*DDPTRAIN, "train", *alike], PROJECT)
    assert done.returncode == 0, done.stderr
    assert read_result(part)["restarts"] == 1
    assert read_result(part)["weights_sha256"] == read_result(whole)["weights_sha256"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["restarts=0"], "restarts: expected a number above 0"),
        (["data.val=null", "eval.every_steps=null", "checkpoint.keep_best=0"], "set data.val"),
        (["checkpoint.metric=train/loss"], "is train/loss; choose one of val"),
        (["train.compile=true"], "set train.compile=false"),
    ],
)
def test_what_restarts_cannot_have_is_refused(overrides: Sequence[str], told: str) -> None:
    with pytest.raises(Refused, match=told):
        compose(["experiment=breast_cancer", "restarts=2", *overrides])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim=lbfgs", "train.grad_clip.max_norm=null"], "LBFGS looks at more than one"),
        (["optim=muon"], "Muon looks at more than one"),
    ],
)
def test_what_restarts_cannot_have_is_refused_when_it_is_built(
    tmp_path: Path, overrides: Sequence[str], told: str
) -> None:
    with pytest.raises(Refused, match=told):
        trainer(tmp_path, "restarts=2", *overrides)


def test_restarts_that_draw_nothing_are_refused(tmp_path: Path) -> None:
    given = ["experiment=rosenbrock", "restarts=2", f"run.dir={tmp_path / 'run'}"]
    done = run([*DDPTRAIN, "train", *given], PROJECT)
    assert done.returncode == 2
    assert "restarts=2: nothing of the weights is drawn" in done.stderr.splitlines()[-1]
