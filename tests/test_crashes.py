"""A step that fails again and again ends a launch; what a person starts is a launch of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddptrain.errors import TrainingError
from ddptrain.resilience.crashes import LAUNCH, Crashes, launch

AGENT = "TORCHELASTIC_RUN_ID"


@pytest.fixture
def crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crashes:
    monkeypatch.setenv(LAUNCH, "one")
    return Crashes(tmp_path / "crashes.jsonl")


def fail(crashes: Crashes, *steps: int, is_cause: bool = True) -> None:
    for number, step in enumerate(steps):
        start = f"{len(crashes.of_launch())}-{number}"
        crashes.add(start, 1, step, 0, is_cause, f"sample {step}: no file")


def test_the_same_step_three_times_is_the_end(crashes: Crashes) -> None:
    fail(crashes, 7, 7)
    crashes.refuse_loop()
    fail(crashes, 7)
    with pytest.raises(TrainingError, match=r"step 7 has failed 3 times.*sample 7: no file"):
        crashes.refuse_loop()


def test_progress_between_failures_begins_the_count_anew(crashes: Crashes) -> None:
    fail(crashes, 7, 7, 8, 8, 9, 9)
    crashes.refuse_loop()
    fail(crashes, 9)
    with pytest.raises(TrainingError, match="step 9 has failed 3 times"):
        crashes.refuse_loop()


def test_of_the_ranks_of_a_start_the_one_with_the_cause_is_told(crashes: Crashes) -> None:
    for start in "abc":
        crashes.add(start, 0, 7, 0, False, "a collective failed")
        crashes.add(start, 1, 7, 0, True, "sample 60: no file")
    with pytest.raises(TrainingError, match="sample 60: no file"):
        crashes.refuse_loop()


def test_what_the_config_decides_is_not_tried_again(crashes: Crashes) -> None:
    crashes.add("a", 0, 7, 0, True, "the loss is NaN", is_final=True)
    with pytest.raises(TrainingError, match=r"it would fail again.*the loss is NaN"):
        crashes.refuse_loop()


def test_a_person_may_start_it_again_as_often_as_they_like(
    crashes: Crashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mended, or not: under torchrun, with ``ddptrain train``, or as one rank."""
    fail(crashes, 7, 7, 7)
    monkeypatch.setenv(LAUNCH, "another")
    Crashes(crashes.file).refuse_loop()
    monkeypatch.delenv(LAUNCH)
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # in one allocation
    assert launch() != launch()
    monkeypatch.setenv(AGENT, "a-name-of-its-own")
    assert launch() == "a-name-of-its-own"
    monkeypatch.setenv(AGENT, "none")  # torchrun without a name: its process is one
    assert launch() == launch()
    assert launch() not in ("none", "a-name-of-its-own")
