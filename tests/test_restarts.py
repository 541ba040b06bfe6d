"""Several initialisations at once: each is trained as it would be alone, and the best is kept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from launching import DDPTRAIN, PROJECT, TORCHRUN, read_result, run
from safetensors.torch import load_file
from torch import Tensor, nn

from ddptrain import Loss, Task
from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.errors import Refused
from ddptrain.evaluate import Evaluation
from ddptrain.generators import key_generators
from ddptrain.loop import Trainer
from ddptrain.observe.loggers import read_json_lines
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.state import fingerprint, load_optimizer, optimizer_tensors
from ddptrain.stored import differences
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [*overrides, "model.dropout=0"]
    together = trainer(tmp_path, *overrides, f"restarts={COPIES}")
    task = together.task
    assert isinstance(task, Restarts)
    starts = [{n: t.clone() for n, t in copy.state_dict().items()} for copy in task.copies]
    with caplog.at_level("INFO", "ddptrain"):
        take(together, 4)
    assert ("one after another" in caplog.text) == ("normed" in overrides[0])
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
    """A weight that is used twice, buffers written to and replaced, and all that is logged.

    Batches of three it takes by their numbers, which cannot be batched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, batch: Tensor) -> Loss:
        self.seen[0] += 1
        hidden = self.one(nn.functional.dropout(batch, 0.5, self.training))
        self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0)
        out = self.two(hidden).square().sum()
        drawn = random.random()
        told = out.item() if len(batch) == 3 else out.detach()
        return Loss(out, len(batch), {"told": told, "drawn": drawn, "pair": (out.detach(), 2)})


def tied() -> tuple[Restarts, list[Tied]]:
    alone = []
    for seed in range(COPIES):
        torch.manual_seed(seed)
        alone.append(Tied())
    return Restarts(deepcopy(alone)), alone


@pytest.mark.parametrize("samples", [4, 3], ids=["batched", "in turn"])
def test_what_a_forward_does_and_tells_is_that_of_each_copy(
    samples: int, caplog: pytest.LogCaptureFixture
) -> None:
    together, alone = tied()
    together.choose(1)
    batch = torch.randn(samples, 3)
    for task in (together, *alone):
        task.train(False)
    with caplog.at_level("INFO", "ddptrain"):
        losses = [task(batch) for task in (together, *alone)]
    whole, best = losses[0], losses[2]
    assert whole.sum.item() == pytest.approx(best.sum.item(), rel=1e-5)
    assert float(whole.logs["told"]) == pytest.approx(float(best.logs["told"]), rel=1e-5)
    assert whole.logs["pair"][0] == whole.sum
    assert (int(whole.count), int(whole.logs["pair"][1])) == (samples, 2)
    gradients = torch.autograd.grad(whole.sum, list(together.parameters()))
    with caplog.at_level("INFO", "ddptrain"):
        together(batch)
    assert len(caplog.records) == (samples == 3)  # said once
    for number, (task, loss) in enumerate(zip(alone, losses[1:], strict=True)):
        total, count = whole.logs[f"restart_{number}/loss"]
        assert (float(total), int(count)) == (pytest.approx(loss.sum.item(), rel=1e-5), samples)
        assert f"restart_{number}/told" in whole.logs
        own = torch.autograd.grad(loss.sum, list(task.parameters()))
        for mine, its in zip(gradients, own, strict=True):
            torch.testing.assert_close(mine[number], its, rtol=1e-4, atol=1e-5)
        assert together.get_buffer("seen")[number].tolist() == [2, 0]
        task(batch)
        torch.testing.assert_close(together.get_buffer("mean")[number], task.mean)


def test_what_a_forward_draws_depends_on_its_batch_alone() -> None:
    """A process that begins with one that cannot be batched goes on like any other."""
    plain, odd = torch.randn(4, 3), torch.randn(3, 3)
    found = []
    for order in ((plain, odd), (odd, plain)):
        task, _ = tied()
        told = {}
        for batch in order:
            key_generators(5, torch.device("cpu"))
            loss = task(batch)
            told[len(batch)] = loss.sum.item(), float(loss.logs["drawn"])
        found.append(told)
    assert found[0] == found[1]


def test_dropout_goes_on_after_an_evaluation(tmp_path: Path) -> None:
    """Steps after one are those of a run that is resumed there."""
    whole, resumed = (trainer(tmp_path, f"restarts={COPIES}") for _ in range(2))
    take(whole, 2)
    whole.done = 2
    whole.evaluate("val")
    resumed.task.load_state_dict(whole.task.state_dict())
    kept = optimizer_tensors(whole.task, whole.step.optimizer)
    load_optimizer(resumed.task, resumed.step.optimizer, *kept)
    resumed.done = 2
    for made in (whole, resumed):
        made.fetch()
        for step in (2, 3):
            made.step(step, made.batches)
    assert fingerprint(whole.task) == fingerprint(resumed.task)


def test_of_scores_nan_is_the_worst(tmp_path: Path) -> None:
    chosen = "checkpoint.metric=val/loss", "checkpoint.mode=min"
    made = trainer(tmp_path, "restarts=5", "task.metrics=[]", *chosen)
    task, contest = made.task, made.evaluations["val"]
    assert isinstance(task, Restarts)
    with torch.no_grad():
        for number in (1, 4):
            for parameter in task.copies[number].parameters():
                parameter.fill_(math.nan)
    parts = contest.fetcher, contest.ranks, contest.autocast
    losses = [Evaluation(copy, *parts).run()["loss"] for copy in task.copies]
    finite = sorted(loss for loss in losses if not math.isnan(loss))
    found = contest.run()
    assert [found["loss"], found["loss_median"]] == [finite[0], finite[2]]
    assert math.isnan(found["loss_worst"])
    assert losses[int(found["restart"])] == finite[0]
    assert int(task.get_buffer(BEST)) == found["restart"]


def test_a_run_from_before_there_were_restarts_is_read(tmp_path: Path) -> None:
    config = compose(["experiment=breast_cancer", f"run.dir={tmp_path / 'run'}"])
    run = open_directory(config, [])
    plain = yaml.safe_load(run.config.read_text())
    del plain["restarts"]
    run.config.write_text(yaml.safe_dump(plain))
    assert run.load().restarts == 1


def test_what_tells_the_best_is_part_of_what_is_computed() -> None:
    for restarts, told in ((1, []), (2, ["checkpoint.metric: val/auroc → val/loss"])):
        given = ["experiment=breast_cancer", f"restarts={restarts}"]
        both = compose(given), compose([*given, "checkpoint.metric=val/loss"])
        assert differences(*both) == told


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
