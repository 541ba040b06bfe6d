"""The built-in experiments reach what their documentation says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import TORCHRUN, read_result, run, train

DOCUMENTED = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text()
ON_TWO_RANKS = [("digits", "test/accuracy", 0.985), ("breast_cancer", "test/auroc", 0.99)]
ON_ONE_RANK = [
    ("forecast", {"relative_mae": (0, 0.72)}),
    ("diabetes", {"r2": (0.42, 1), "coverage": (0.83, 0.97)}),
]


def test_the_documentation_names_the_experiments_that_are_checked() -> None:
    (named,) = re.findall(r"`tests/test_experiments.py` checks the targets of ([^;]*);", DOCUMENTED)
    checked = [experiment for experiment, *_ in (*ON_TWO_RANKS, *ON_ONE_RANK)]
    assert re.findall(r"`(\w+)`", named) == checked


@pytest.mark.parametrize(("experiment", "metric", "target"), ON_TWO_RANKS)
def test_experiment_reaches_its_target(
    tmp_path: Path, experiment: str, metric: str, target: float
) -> None:
    command = [*TORCHRUN, "2", "-m", "ddptrain", f"experiment={experiment}", "run.dir=run"]
    finished = run(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert read_result(tmp_path / "run")["metrics"][metric] >= target


@pytest.mark.parametrize(("experiment", "within"), ON_ONE_RANK)
def test_a_small_experiment_reaches_its_targets_on_one_rank(
    tmp_path: Path, experiment: str, within: dict[str, tuple[float, float]]
) -> None:
    metrics = train(tmp_path / "run", 1, f"experiment={experiment}", folder=tmp_path)["metrics"]
    for name, (low, high) in within.items():
        assert low <= metrics[f"test/{name}"] <= high, name


@pytest.mark.long
def test_language_model_learns_and_writes(tmp_path: Path) -> None:
    """A short run: far from its target, but below the 8 bits of a byte and able to write."""
    short = ["train.max_steps=20", "eval.every_steps=null", "model.layers=2", "run.dir=run"]
    finished = run([*TORCHRUN, "2", "-m", "ddptrain", "experiment=stdlib_lm", *short], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert read_result(tmp_path / "run")["metrics"]["val/bits_per_byte"] < 5.5
    assert "from the model:" in finished.stdout
