"""Any function at all: minima, what parameters may be, the same bits everywhere, the pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from launching import DDPTRAIN, PROJECT, read_metrics, read_result, run, train
from project import functions
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_step import HostReads
from torch import Tensor
from torch.distributions import (
    ExpTransform,
    SoftmaxTransform,
    SoftplusTransform,
    StickBreakingTransform,
    constraints,
)

from ddptrain.build import build_trainer
from ddptrain.cli import main
from ddptrain.compose import compose
from ddptrain.data.sets import BreastCancer
from ddptrain.errors import EXIT_REFUSED
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.optim.guard import change_unless
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import open_directory
from ddptrain.tasks.functions import rosenbrock
from ddptrain.tasks.objective import Objective
from ddptrain.tasks.projections import Ball, Box, Simplex

REGRESSION = ("experiment=logistic_regression", "parallel.reduction=exact")
POINTS = arrays(np.float64, st.integers(1, 5), elements=st.floats(-100, 100, width=32))
SIZES = st.floats(0.01, 50)


# --- the built-in experiments --------------------------------------------------------------------


@pytest.fixture(scope="module")
def valley(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("valley") / "run"
    train(path, 1, "experiment=rosenbrock")
    return path


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("regression") / "run"
    train(path, 1, *REGRESSION)
    return path


def weights(run_dir: Path) -> dict[str, Tensor]:
    (file,) = run_dir.glob("checkpoints/step-*/model.safetensors")
    return load_file(file)


def test_rosenbrock_ends_at_its_minimum(valley: Path) -> None:
    assert read_result(valley)["metrics"]["val/loss"] < 1e-7
    assert weights(valley)["free.x"].item() == pytest.approx(1, abs=1e-3)
    assert weights(valley)["free.y"].item() == pytest.approx(1, abs=1e-3)
    lines = read_metrics(valley)
    assert lines[0]["x"] == pytest.approx(-1.5, abs=0.1)  # the mean of the first few steps
    assert lines[-1]["y"] == pytest.approx(1, abs=1e-3)


def test_logistic_regression_agrees_with_sklearn(regression: Path) -> None:
    features, labels = (t[:396].double().numpy() for t in BreastCancer("train").tensors)
    exact = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000).fit(features, labels)
    mine = weights(regression)
    assert np.abs(mine["free.coefficients"].numpy() - exact.coef_[0]).max() < 1e-4
    assert abs(mine["free.intercept"].item() - exact.intercept_[0]) < 1e-4


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_any_number_of_ranks_has_the_same_bits(
    regression: Path, tmp_path: Path, ranks: int
) -> None:
    again = train(tmp_path / "run", ranks, *REGRESSION)
    assert again["weights_sha256"] == read_result(regression)["weights_sha256"]
    assert read_metrics(tmp_path / "run") == read_metrics(regression)


@pytest.mark.long
def test_two_ranks_of_a_function_without_data(valley: Path, tmp_path: Path) -> None:
    """Refused by default, for a step has one sample; with two it is the same run."""
    refused = run([*DDPTRAIN, "train", "experiment=rosenbrock", "launch.nproc_per_node=2"])
    assert refused.returncode == EXIT_REFUSED
    assert "2 ranks share 1 micro-batch a step" in refused.stderr
    again = train(tmp_path / "run", 2, "experiment=rosenbrock", "train.global_batch_size=2")
    assert again["weights_sha256"] == read_result(valley)["weights_sha256"]


# --- a run in this process -----------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(PROJECT)

    def make(name: str, *overrides: str) -> Trainer:
        config = compose(["train.device=cpu", *overrides, f"run.dir={tmp_path / name}"])
        ranks = Ranks(Place(), torch.device("cpu"), TIMEOUT)
        return build_trainer(config, ranks, open_directory(config, []), Phases())

    return make


def minimise(
    function: str, parameters: str, constraints: str, *more: str, steps: int = 200
) -> list[str]:
    """What to say for a function of the test project."""
    return [
        *("task=objective", "data=nothing"),
        *("train.global_batch_size=1", "train.micro_batch_size=1"),
        *("optim=sgd", "optim.lr=0.1", "schedule=constant", f"train.max_steps={steps}"),
        f"task.function={{_target_: functions.{function}, _partial_: true}}",
        f"task.parameters={parameters}",
        f"task.constraints={constraints}",
        "log.tensorboard=false",
        *more,
    ]  # fmt: skip


def projected(kind: str, **arguments: float) -> str:
    told = "".join(f", {key}: {value}" for key, value in arguments.items())
    return f"{{point: {{_target_: ddptrain.tasks.projections.{kind}{told}}}}}"


GOAL = "+task.function.goal=[1.0, 2.0, -0.5]"


@pytest.mark.parametrize(
    ("constraint", "start", "nearest"),
    [
        ("{}", "[0, 0, 0]", [1.0, 2.0, -0.5]),
        (projected("Box", low=0, high=1.5), "[0, 0, 0]", [1.0, 1.5, 0.0]),
        (projected("Box", low=0), "[0, 0, 0]", [1.0, 2.0, 0.0]),
        (projected("Ball", radius=1), "[0, 0, 0]", [0.4364, 0.8729, -0.2182]),
        (projected("Simplex"), "[0.2, 0.3, 0.5]", [0.0, 1.0, 0.0]),
        (projected("Simplex", total=2), "[0.5, 0.5, 1]", [0.5, 1.5, 0.0]),
        ("{point: {_target_: torch.clamp, _partial_: true, max: 0}}", "[-1, -1, -1]", [0, 0, -0.5]),
    ],
)
def test_a_run_ends_at_the_nearest_allowed_point(
    build: Any, constraint: str, start: str, nearest: list[float]
) -> None:
    trainer = build("run", *minimise("distance", f"{{point: {start}}}", constraint, GOAL))
    trainer.train()
    assert trainer.task.values()["point"].tolist() == pytest.approx(nearest, abs=1e-3)


@pytest.mark.parametrize("middle", [1, 7])
def test_resumed_in_the_middle_it_has_the_same_bits(build: Any, middle: int) -> None:
    """Projections are part of the step: what is saved after it is where they led."""
    said = minimise("distance", "{point: [0, 0, 0]}", projected("Ball"), GOAL, steps=12)
    whole = build("whole", *said, "log.every_steps=2")
    whole.train()
    half = build("half", *said, "log.every_steps=2")
    stop_after(half, middle)
    resumed = build("half", *said, "log.every_steps=2")
    resumed.train()
    assert resumed.started_at == middle
    assert torch.equal(resumed.task.free["point"], whole.task.free["point"])
    paths = [trainer.observer.run.path for trainer in (whole, resumed)]
    assert read_metrics(paths[0]) == read_metrics(paths[1])
    assert [(path / "plots/trajectory.png").read_bytes()[:8] for path in paths] == [
        b"\x89PNG\r\n\x1a\n"
    ] * 2


def stop_after(trainer: Trainer, steps: int) -> None:
    trainer.restore()
    trainer.fetch()
    for step in range(steps):
        trainer.step(step, trainer.batches)
        trainer.advance(step + 1)
        trainer.heed()
        trainer.tend()
    trainer.save()
    trainer.checkpoints.settle()
    trainer.observer.close()


def test_of_data_a_function_returns_a_loss(build: Any) -> None:
    """A scale that has to be positive, and a value that the function logs itself."""
    said = minimise(
        "spread", "{centre: 0.0, scale: 3.0}",
        "{scale: {_target_: torch.distributions.SoftplusTransform}}",
        "data=breast_cancer", "data.train.samples=396", "train.global_batch_size=396",
        "train.micro_batch_size=66", "log.every_steps=10",
    )  # fmt: skip
    trainer = build("run", *said)
    trainer.train()
    features = BreastCancer("train").tensors[0][:396, 0]
    values = trainer.task.values()
    assert values["centre"].item() == pytest.approx(features.mean().item(), abs=1e-3)
    assert values["scale"].item() == pytest.approx(features.std(correction=0).item(), abs=1e-3)
    assert read_metrics(trainer.observer.run.path)[0].keys() >= {"largest", "centre", "scale"}


def test_in_double_precision_it_gets_closer(build: Any) -> None:
    """A start by numpy has it; the function's value, the gradients and the sums then have, too."""
    start = "{point: {_target_: numpy.zeros, shape: 3}}"
    trainer = build("run", *minimise("distance", start, "{}", GOAL, "parallel.reduction=exact"))
    trainer.train()
    assert trainer.task.values()["point"].tolist() == pytest.approx([1, 2, -0.5], abs=1e-9)


@pytest.mark.parametrize(
    "transform", [SoftmaxTransform(), StickBreakingTransform()], ids=["softmax", "sticks"]
)
def test_a_simplex_without_a_projection(transform: Any) -> None:
    costs = [0.3, -1.0, 0.5]
    function = partial(functions.entropy, costs=costs)
    task = Objective(function, {"point": [0.2, 0.3, 0.5]}, {"point": transform})
    descent = torch.optim.Adam(task.parameters(), lr=0.1)
    for _ in range(300):
        descent.zero_grad()
        task(torch.empty(1, 0)).sum.backward()
        descent.step()
    expected = torch.softmax(-torch.tensor(costs), 0)
    torch.testing.assert_close(task.values()["point"].detach(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("constraint", "start"),
    [
        (ExpTransform(), 0.01),
        (SoftplusTransform(), 20.0),
        (constraints.positive, [1e-3, 1e3]),
        (constraints.interval(-2, 3), [[2.9, -1.9], [0.0, 1.0]]),
        (constraints.greater_than(4.0), 4.5),
        (constraints.simplex, [0.7, 0.2, 0.1]),
        (constraints.lower_cholesky, [[1.0, 0.0], [0.5, 2.0]]),
    ],
)
def test_a_function_gets_the_start_and_never_what_is_not_allowed(
    constraint: Any, start: Any
) -> None:
    task = Objective(lambda p: p.sum(), {"p": start}, {"p": constraint})
    torch.testing.assert_close(task.values()["p"].detach(), torch.tensor(start), rtol=1e-4, atol=0)
    with torch.no_grad():
        for free in task.free.values():
            free.add_(torch.randn(free.shape, generator=torch.Generator().manual_seed(0)) * 3)
    if isinstance(constraint, constraints.Constraint):
        assert constraint.check(task.values()["p"]).all()
    else:
        assert (task.values()["p"] > 0).all()


# --- projections against a slow reference --------------------------------------------------------


def is_nearest(found: Tensor, point: Tensor, inside: Tensor) -> bool:
    """Whether no step from ``found`` towards a point ``inside`` of a convex set leads nearer."""
    slack = 1e-9 * (1 + point.abs().max().item()) ** 2 * point.numel()
    return float(torch.dot(point - found, inside - found)) <= slack


@given(POINTS, st.floats(-50, 50), SIZES, st.randoms(use_true_random=False))
def test_a_box_gives_the_nearest_point(point: Any, low: float, width: float, random: Any) -> None:
    point, box = torch.from_numpy(point), Box(low, low + width)
    found = box(point)
    assert ((found >= low) & (found <= low + width)).all()
    for _ in range(5):
        inside = torch.tensor([low + width * random.random() for _ in point], dtype=torch.float64)
        assert is_nearest(found, point, inside)


@given(POINTS, SIZES, st.randoms(use_true_random=False))
def test_a_ball_gives_the_nearest_point(point: Any, radius: float, random: Any) -> None:
    point = torch.from_numpy(point)
    found = Ball(radius)(point)
    assert found.norm() <= radius * (1 + 1e-12)
    assert point.norm() > radius or torch.equal(found, point)
    for _ in range(5):
        inside = torch.tensor([random.random() - 0.5 for _ in point], dtype=torch.float64)
        assert is_nearest(found, point, inside * radius / max(1e-9, inside.norm().item()))


@given(POINTS, SIZES)
def test_a_simplex_gives_the_nearest_point(point: Any, total: float) -> None:
    """The amount by which all are lowered, found by halving: slow, and nothing to get wrong."""
    low, high = point.min() - total, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > total else (low, middle)
    found = Simplex(total)(torch.from_numpy(point)).numpy()
    np.testing.assert_allclose(found, np.maximum(point - high, 0), atol=1e-10 * (1 + total))


@given(POINTS, SIZES)
def test_a_second_projection_changes_nothing(point: Any, size: float) -> None:
    point = torch.from_numpy(point)
    for projection in (Box(-size, size), Box(low=0), Ball(size), Simplex(size)):
        once = projection(point)
        torch.testing.assert_close(projection(once), once, rtol=1e-12, atol=1e-12 * size)


def test_projections_of_large_numbers_and_of_rows() -> None:
    assert Simplex()(torch.tensor([1e8, 0.0])).tolist() == [1, 0]
    rows = torch.tensor([[1e8, 0.0, 3.0], [0.2, 0.2, 0.2], [-5.0, -5.0, -5.5]])
    expected = torch.stack([Simplex()(row) for row in rows])
    assert torch.equal(Simplex()(rows), expected)
    assert expected.sum(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert Ball()(torch.full((4,), 1e30)).tolist() == pytest.approx([0.5] * 4)
    assert Ball()(torch.zeros(2)).tolist() == [0, 0]
    assert Simplex()(torch.tensor([torch.nan, 1.0])).isnan().any()  # for the step to judge


def test_a_skipped_update_leaves_every_bit() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.1, -0.0, torch.inf]))
    before = parameter.detach().clone()
    change_unless(torch.tensor(1.0), [parameter], lambda: parameter.mul_(torch.nan))
    assert torch.equal(parameter.view(torch.int32), before.view(torch.int32))
    change_unless(torch.tensor(0.0), [parameter], lambda: parameter.zero_())
    assert parameter.tolist() == [0, 0, 0]


def test_a_projection_waits_for_no_device() -> None:
    sets = {"a": Box(-1, 1), "b": Ball(0.5), "c": Simplex()}
    starts = {"a": [0.5, 0.5], "b": [0.1, 0.1], "c": [0.5, 0.5]}
    task = Objective(lambda a, b, c: (a + b + c).sum(), starts, sets)
    with torch.no_grad():
        for free in task.free.values():
            free.add_(2)
    with HostReads() as reads:
        change_unless(torch.tensor(0.0), list(task.parameters()), task.project)
    assert reads.count == 0
    found = [value.tolist() for value in task.values().values()]
    assert found == [[1, 1], pytest.approx([0.125**0.5] * 2), [0.5, 0.5]]


# --- what is refused -----------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    capsys.readouterr()
    code = main(["train", "launch.nproc_per_node=1", "log.tensorboard=false", *overrides])
    told = capsys.readouterr().err.strip()
    assert code == EXIT_REFUSED, told
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "task.parameters.z=1",
            "unknown key task.parameters.z: ddptrain.tasks.functions.rosenbrock takes no such",
        ),
        ("~task.parameters.x", "task.parameters.x: ddptrain.tasks.functions.rosenbrock needs it"),
        ("task.function.c=1", "unknown key task.function.c"),
        ("task.function._target_=ddptrain.tasks.functions.rosenbrok", "did you mean"),
        (
            "task.constraints={z: {_target_: torch.distributions.ExpTransform}}",
            "unknown key task.constraints.z: task.parameters has no such name; there is x, y",
        ),
        (
            "task.constraints={x: {_target_: ddptrain.tasks.projections.Boxx}}",
            "did you mean ddptrain.tasks.projections.Box?",
        ),
        ("task.constrains={}", "did you mean task.constraints?"),
    ],
)
def test_a_typo_is_refused_before_anything_is_started(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refusal(capsys, "experiment=rosenbrock", override)
    assert list(tmp_path.iterdir()) == []


def test_a_start_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    """By the process that trains, for it takes torch to know."""
    short = "task.parameters.coefficients.size=[29]"
    finished = run([*DDPTRAIN, *REGRESSION, short, "run.dir=run"], tmp_path)
    assert finished.returncode == EXIT_REFUSED
    assert "coefficients (29,) and intercept (), expected (30,) and ()" in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"parameters": {"x": [[1, 2], [3]], "y": 0}}, "parameters.x: expected a number, nested"),
        ({"parameters": {"x": "one", "y": 0}}, "parameters.x: expected a number, nested lists"),
        ({"parameters": {"x": [1, 2], "y": 0}}, "to get a scalar tensor from it, got (2,)"),
        ({"parameters": {"x": 1}}, "missing a required argument: 'y'; rosenbrock takes a, b, x, y"),
        ({"parameters": {"x": 1, "y": 1, "z": 1}}, "unexpected keyword argument 'z'"),
        ({"parameters": {"batch": 1}}, "parameters.batch: a function gets the data by that name"),
        ({"constraints": {"z": Box()}}, "constraints.z: there is x, y"),
        ({"constraints": {"x": Box(0, 1)}}, "parameters.x: the start -1.0 is outside of what"),
        ({"constraints": {"x": ExpTransform()}}, "parameters.x: the start -1.0 is outside of what"),
        ({"constraints": {"x": Simplex()}}, "one number is no point of a simplex"),
        ({"constraints": {"x": lambda x: x.expand(2)}}, "constraints.x: makes shape (2,) of ()"),
    ],
)  # fmt: skip
def test_what_a_function_cannot_be_called_with(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Objective(rosenbrock, **{"parameters": {"x": -1.0, "y": 2}, **arguments})
    assert told in str(refused.value)


def test_sets_of_no_points() -> None:
    for made in (lambda: Box(1, 0), lambda: Ball(0), lambda: Simplex(-1)):
        with pytest.raises(ValueError, match=r"above"):
            made()


def test_a_function_of_data_has_to_count() -> None:
    task = Objective(functions.mean_of, {"centre": 0.0})
    with pytest.raises(TypeError, match=r"mean_of takes the batch and returned Tensor, expected"):
        task((torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match=r"expected to get a scalar tensor from it, got \(3,\)"):
        Objective(functions.crowded, {"point": [1.0, 2.0, 3.0]})


# --- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["valley", "regression"])
def test_a_picture_is_in_the_directory_and_in_tensorboard(
    which: str, request: pytest.FixtureRequest
) -> None:
    run_dir: Path = request.getfixturevalue(which)
    assert (run_dir / "plots/trajectory.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0})
    events.Reload()
    (image,) = events.Images("trajectory")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.step == read_result(run_dir)["step"]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_path_leads_from_the_start_over_the_logged_points_to_the_end(valley: Path) -> None:
    task = Objective(rosenbrock, {"x": -1.5, "y": 2.0})
    task.load_state_dict(weights(valley))
    (axes,) = task.figures(lines_of(valley))["trajectory"].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")
    path = axes.lines[0].get_xydata()
    logged = [[line["x"], line["y"]] for line in read_metrics(valley)]
    np.testing.assert_allclose(path[0], [-1.5, 2])
    np.testing.assert_allclose(path[1:-1], logged)
    np.testing.assert_allclose(path[-1], [1, 1], atol=1e-3)
    assert axes.collections  # the contour lines


def test_a_picture_of_what_is_not_finite_and_of_what_has_other_shapes() -> None:
    line = {"step": 5, "split": "train", "loss": None, "x": None, "y": 0.5, "p.0": 1.0, "p.1": 2.0}
    lines = [{"step": 5, "split": "val", "loss": 1.0}, line]
    (axes,) = Objective(functions.wild, {"x": 0.5, "y": 1}).figures(lines)["trajectory"].axes
    assert len(axes.lines[0].get_xydata()) == 2  # the start and the end
    (axes,) = Objective(lambda p: p.sum(), {"p": [0.0, 1.0]}).figures(lines)["trajectory"].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("p.0", "p.1")
    assert axes.lines[0].get_xydata()[1].tolist() == [1, 2]
    loss, parameters = (
        Objective(lambda p, y: p.sum() + y, {"p": [0.0, 1.0], "y": 3})
        .figures(lines)["trajectory"]
        .axes
    )
    assert np.isnan(loss.lines[0].get_ydata()).all()
    assert [curve.get_label() for curve in parameters.lines] == ["p.0", "p.1", "y"]
    assert parameters.lines[2].get_xydata().tolist() == [[0, 3], [5, 0.5]]
    many = Objective(lambda p: p.sum(), {"p": torch.zeros(100)})
    assert len(many.figures(lines)["trajectory"].axes) == 1
    assert many.example() is None


def test_a_picture_that_fails_fails_no_run(
    build: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build("run", *minimise("distance", "{point: [0, 0, 0]}", "{}", GOAL, steps=2))
    monkeypatch.setattr(trainer.task, "figures", lambda lines: lines[100])
    trainer.train()
    assert trainer.done == 2
    assert "the pictures of the run could not be drawn" in caplog.text
    assert not (trainer.observer.run.path / "plots").exists()
