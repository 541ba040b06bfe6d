"""`ddptrain verify` passes what keeps the law, and names what breaks it, why, and the remedy."""

from __future__ import annotations

import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import DDPTRAIN, PROJECT, TORCHRUN, Finished, run
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ddptrain import Loss, Task
from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.data.plan import MicroBatch
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.verify.alone import check_loss, check_samples
from ddptrain.verify.attributes import Attributes, observe
from ddptrain.verify.gradients import ROUNDINGS, _distance
from ddptrain.verify.reasons import find_reason
from ddptrain.verify.report import Check, Finding, holds, text
from ddptrain.verify.trace import Difference, Moment, Recorder, Trace, digest, first_difference

RAGGED = ["verify", "experiment=ragged"]
TRAINING = ["data.val=null", "eval.every_steps=null", "checkpoint.keep_best=0"]
LAWLESS = "model={_target_:lawless.With,lawless:%s}"


def verify(folder: Path, *arguments: str) -> Finished:
    """Run the command; whatever it finds, it leaves nothing behind."""
    before = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    finished = run([*DDPTRAIN, *arguments], folder)
    after = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert after == before
    assert finished.stderr == ""
    return finished


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


def lines(finished: Finished) -> dict[str, list[str]]:
    """The checks of a report by their status."""
    found: dict[str, list[str]] = {"ok": [], "FAILED": [], "-": []}
    for line in finished.stdout.splitlines():
        if match := re.match(r"(ok|FAILED|-) +(\S.*)", line):
            found[match[1]].append(match[2])
    return found


def test_digits_holds_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Below /tmp: loading workers make sockets there, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        finished = verify(tmp_path, "verify", "experiment=digits", "parallel.reduction=exact")
        assert not list(Path(temporary).glob("ddptrain-*"))
    assert finished.returncode == 0, finished.stdout
    checks = lines(finished)
    assert not checks["FAILED"]
    assert not checks["-"]
    told = "\n".join(checks["ok"])
    assert re.search(r"1, 2 and 3 ranks +same samples in 24 micro-batches", told)
    assert re.search(r"1, 2 and 3 ranks +same gradients, .* to the bit", told)
    assert re.search(r"resumed after step 1 +same weights", told)
    assert re.search(r"2 loading workers +same weights", told)
    assert re.search(r"evaluation +same metrics of val, test", told)


@pytest.mark.long
def test_users_own_project_holds_up_to_rounding(project: Path) -> None:
    """Augmentation, dropout, uneven counts, a counter that nothing depends on, a BatchNorm."""
    finished = verify(project, *RAGGED, "model.batch_norm=true")
    assert finished.returncode == 0, finished.stdout
    largest = re.search(r"same gradients \(largest relative difference (\S+)\)", finished.stdout)
    assert largest is not None
    assert 0 < float(largest[1]) < 1e-6


@pytest.mark.long
def test_data_set_with_a_generator_of_its_own_is_named(project: Path) -> None:
    finished = verify(project, *RAGGED, *TRAINING, "data.train={_target_:lawless.OwnGenerator}")
    assert finished.returncode == 1
    assert len(lines(finished)["FAILED"]) == 5
    assert "data.train (OwnGenerator) breaks the law" in finished.stdout
    assert "its attribute rng is a numpy Generator of its own" in finished.stdout
    assert "draw from the global generators" in finished.stdout
    assert finished.stdout.count("breaks the law") == 1


@pytest.mark.long
def test_module_with_a_counter_is_named_and_so_is_the_task_that_averages(project: Path) -> None:
    averages = "task._target_=lawless.Averaging"
    finished = verify(project, *RAGGED, *TRAINING, "--steps", "2", LAWLESS % "Warming", averages)
    assert finished.returncode == 1
    assert any(re.match(r"1, 2 and 3 ranks +other grad", c) for c in lines(finished)["FAILED"])
    assert any(c.startswith("resumed after step 1") for c in lines(finished)["FAILED"])
    assert re.search(
        r"model\.norm\.0 \(Warming\) breaks the law: on 2 ranks: step 0, micro-batch 6 on rank 1: "
        r"its output .*\n  why: +its attribute calls went from 0 to \d+",
        finished.stdout,
    )
    assert "keep it in a buffer" in finished.stdout


@pytest.mark.long
def test_rank_that_fails_is_shown_as_in_training(project: Path) -> None:
    finished = run([*DDPTRAIN, *RAGGED, "task.culprit=1", "task.raise_at=3"], project)
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert re.match(r"rank 1 .*verifying on 3 ranks: KeyError: 'a bug in user code'", last)


def test_refusals(project: Path) -> None:
    for arguments, message in (
        (["experiment=digitz"], "experiment"),
        (["experiment=ragged", "train.micro_batch_size=5"], "train.global_batch_size=24"),
        (["experiment=ragged", "--steps", "0"], "--steps 0: expected a number above 0"),
        (["experiment=ragged", "data.train.samples=5"], "has 5 samples, fewer than"),
    ):
        finished = run([*DDPTRAIN, "verify", *arguments], project)
        assert finished.returncode == 2, finished.stderr
        assert message in finished.stderr.strip().splitlines()[-1]


def test_under_torchrun_it_is_refused(project: Path) -> None:
    finished = run([*TORCHRUN, "2", "-m", "ddptrain", *RAGGED], project)
    assert finished.returncode == 1  # the agent's
    assert "`verify` starts ranks itself" in finished.stderr


# One process: the trace, the two checks without a second rank, the reasons.


class Inner(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight * self.factor


class Outer(Task):
    """Two inner modules, with a step between them that is the task's own."""

    def __init__(self, first: float = 1.0, between: float = 1.0, second: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = Inner(first), Inner(second)
        self.between = between
        self.after = 1.0

    def forward(self, batch: Tensor) -> Loss:
        return Loss(self.second(self.first(batch) * self.between).sum() * self.after, len(batch))


def traced(task: Task, batch: Tensor) -> Trace:
    recorder = Recorder(task)
    micro_batches = [MicroBatch(0, 0, 0, 0, len(batch))]
    for given in recorder.evaluating("train", micro_batches, [batch]):
        task(given).sum.backward()
    return recorder.trace


MOMENT = Moment("train", 0, 0)
BATCH = torch.arange(6.0).view(2, 3)


def test_same_work_has_the_same_trace() -> None:
    assert first_difference(traced(Outer(), BATCH), traced(Outer(), BATCH.clone())) is None


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Outer(first=2.0), ("output", "first")),
        (Outer(second=2.0), ("output", "second")),
        (Outer(between=2.0), ("input", "")),  # the second's input is the task's doing
    ],
)
def test_innermost_module_that_differs_first_is_to_blame(
    task: Task, expected: tuple[str, str]
) -> None:
    found = first_difference(traced(Outer(), BATCH), traced(task, BATCH))
    assert found == Difference(MOMENT, *expected)


def test_data_loss_and_backward_are_told_apart() -> None:
    reference = traced(Outer(), BATCH)
    assert first_difference(reference, traced(Outer(), BATCH + 1)) == (MOMENT, "batch", "train")
    other = Outer()
    other.after = 2.0
    assert first_difference(reference, traced(other, BATCH)) == (MOMENT, "loss", "")
    backward = Outer()
    backward.second.weight.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
    assert first_difference(reference, traced(backward, BATCH)) == (MOMENT, "gradient", "second")


def test_digest_sees_every_bit_and_what_is_no_tensor() -> None:
    one = {"tokens": torch.ones(3), "name": ["a", 1]}
    assert digest(one) == digest({"tokens": torch.ones(3), "name": ["a", 1]})
    assert digest(one) != digest({"tokens": torch.ones(3), "name": ["b", 1]})
    assert digest(one) != digest({"tokens": torch.ones(3).nextafter(torch.zeros(3)), "name": []})
    assert digest(torch.ones(2, 3)) != digest(torch.ones(3, 2))


class Held:
    """What a user's object may hold."""

    def __init__(self) -> None:
        self.calls = 0
        self.transforms = [random.Random(0)]
        self.tools = Tools()
        self.keyed = (random._inst, torch.default_generator)  # type: ignore[attr-defined]


class Tools:
    def __init__(self) -> None:
        self.rng = np.random.RandomState(0)
        self.noise = torch.Generator()


def test_generators_of_its_own_are_found_and_the_global_ones_are_not() -> None:
    assert observe(Held()).generators == {
        "attribute transforms[0]": "a random.Random",
        "attribute tools.rng": "a numpy RandomState",
        "attribute tools.noise": "a torch.Generator",
    }


GENERATOR = random.Random(1)


def draw() -> float:
    return GENERATOR.random()


class Draws:
    @property
    def noise(self) -> float:
        return max(draw() for _ in range(2))


class Inherits(Draws):
    pass


class Plain:
    def noise(self) -> float:
        return random.random()


def test_a_global_generator_counts_only_where_it_is_used() -> None:
    where = f"module's global {__name__}.GENERATOR"
    assert observe(Draws()).generators == {where: "a random.Random"}
    assert observe(Inherits()).generators == {where: "a random.Random"}
    assert observe(Plain()).generators == {}


class Clocked(Plain):
    def noise(self) -> float:
        return time.time() % 1


class OfWorker(Plain):
    def noise(self) -> float:
        return get_worker_info().id  # type: ignore[union-attr]


class ByChance(Plain):
    def noise(self) -> float:
        return np.random.default_rng().random()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Clocked, "its code reads the process or the clock"),
        (OfWorker, "its code asks which loading worker runs it"),
        (ByChance, "its code draws from a generator that is seeded by chance"),
        (Plain, "nothing in its attributes tells"),
    ],
)
def test_what_the_code_does_is_told_if_no_attribute_tells(kind: type[Plain], expected: str) -> None:
    seen = observe(kind())
    assert find_reason("data", seen, seen, [])[0].startswith(expected)


def test_reasons() -> None:
    held = Held()
    before = observe(held)
    held.calls = 4
    counting = find_reason("module", Attributes(values=before.values), observe(held), [])
    assert "is a random.Random of its own" in counting[0]
    plain = Attributes(values={"calls": "0"}), Attributes(values={"calls": "4"})
    assert find_reason("module", *plain, [])[0] == (
        "its attribute calls went from 0 to 4 while it ran"
    )
    of_ranks = [Attributes(values={"scale": "1.0"}), Attributes(values={"scale": "2.0"})]
    why, remedy = find_reason("module", of_ranks[0], of_ranks[0], of_ranks)
    assert why == "its attribute scale is 2.0 on rank 1, 1.0 on a rank alone"
    assert remedy.startswith("let nothing depend on the rank")
    assert "look for" in find_reason("data", Attributes(), Attributes(), [])[0]


@pytest.fixture
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(PROJECT)


@pytest.mark.usefixtures("in_project")
@pytest.mark.parametrize(
    ("overrides", "samples_hold", "loss_holds", "why"),
    [
        (["model.batch_norm=true"], True, True, ""),
        (["data.train={_target_:lawless.OwnGenerator}"], False, True, "rng is a numpy Generator"),
        (["task._target_=lawless.Averaging"], True, False, "it divides by its own batch size"),
        (["task._target_=lawless.Contrasting"], True, False, "does not add up over samples"),
        (["train.micro_batch_size=1"], True, None, ""),
        ([LAWLESS % "Noisy"], True, None, ""),
    ],
)
def test_what_one_rank_can_tell(
    tmp_path: Path, overrides: list[str], samples_hold: bool, loss_holds: bool | None, why: str
) -> None:
    ranks = Ranks(Place(), torch.device("cpu"), TIMEOUT)
    config = compose(["experiment=ragged", "data.train._target_=ragged.Sentences", *overrides])
    trainer = build_trainer(config, ranks, RunDirectory(tmp_path), Phases())
    checks = check_samples([trainer.fetcher.source]), check_loss(trainer)
    assert (checks[0].holds, checks[1].holds) == (samples_hold, loss_holds)
    assert why in "".join(finding.why for check in checks for finding in check.findings)


def test_distance_is_relative_to_what_was_added_up() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-3])
    assert _distance(one, one, 2.0).found == 0
    assert _distance(other, one, 2.0).found == pytest.approx(5e-4)
    overflow = torch.tensor([float("inf"), 0.0])
    assert _distance(overflow, overflow, float("inf")).found == 0
    assert _distance(overflow, one, 2.0).found == float("inf")


def test_tolerance_is_a_hundred_thousandth() -> None:
    assert pytest.approx(1e-5, rel=0.01) == ROUNDINGS * torch.finfo(torch.float32).eps


def test_report_is_aligned_and_names_a_culprit_once() -> None:
    one, other = (Finding("model (M)", where, "why", "remedy") for where in ("here", "there"))
    checks = [
        Check("short", "a", True),
        Check("rather long", "b", False, (one,)),
        Check("none", "c", None, ()),
        Check("again", "d", False, (other,)),
    ]
    assert not holds(checks)
    assert holds([checks[0], checks[2]])
    assert text("heading", checks) == (
        "heading\n\nok      short        a\nFAILED  rather long  b\n-       none         c\n"
        "FAILED  again        d\n\nmodel (M) breaks the law: here\n  why:     why\n"
        "  remedy:  remedy"
    )
