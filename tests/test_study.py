"""`ddptrain study`: real runs in one launch, that are the runs that their commands make."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
from launching import DDPTRAIN, LIMIT_SECONDS, kill_tree, read_result, run, start

from ddptrain.cli import main
from ddptrain.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, Refused
from ddptrain.parts import build_source
from ddptrain.studies.study import Study
from ddptrain.studies.table import plain

ONLY = ["--only", "rates", "--only", "batches", "train.max_steps=46", "--out", "made"]
COMMAND = [*DDPTRAIN, "study", "gradient-descent", *ONLY]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study that was interrupted on one rank after its first run, and has gone on on two."""
    folder = tmp_path_factory.mktemp("study")
    process = start([*COMMAND, "launch.nproc_per_node=1"], folder)
    try:
        assert process.stdout is not None
        assert any("[1/9]" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        kill_tree(process.pid)
    assert process.returncode == EXIT_STOPPED, told
    assert "goes on" in told
    assert not (folder / "made" / "report.md").exists()
    finished = run([*COMMAND, "launch.nproc_per_node=2"], folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_an_interrupted_study_goes_on_where_it_was(made: tuple[Path, str]) -> None:
    folder, out = made
    assert re.search(r"\[1/9\] rate-0.001 +completed before", out)
    assert re.search(r"\[9/9\] batch-1 +completed in", out)
    attempts = (folder / "made" / "rate-0.001" / "attempts.jsonl").read_text()
    assert len(attempts.splitlines()) == 1


def test_a_report_is_of_what_was_made_before_as_well(made: tuple[Path, str]) -> None:
    folder, _ = made
    again = Study.named("gradient-descent", folder / "made", ["train.max_steps=46"], ["batches"])
    told = [comparison.name for comparison in again.with_others().plan.comparisons]
    assert told == ["rates", "batches"]


def test_a_run_is_the_one_that_its_command_makes(made: tuple[Path, str]) -> None:
    """In a process of its own, on another number of ranks: sums are exact."""
    folder, _ = made
    report = (folder / "made" / "report.md").read_text()
    told = re.search(r"\*\*rate-1\*\*.*weights_sha256 `(\w+)`:\n  `ddptrain (.*)`", report)
    assert told is not None
    command = [*shlex.split(told[2]), "run.dir=again", "launch.nproc_per_node=1"]
    finished = run([*DDPTRAIN, *command], folder)
    assert finished.returncode == 0, finished.stderr
    assert read_result(folder / "again")["weights_sha256"] == told[1]
    assert read_result(folder / "made" / "rate-1")["weights_sha256"] == told[1]


def test_a_run_that_diverges_is_told_of_and_the_study_goes_on(made: tuple[Path, str]) -> None:
    folder, _ = made
    result = read_result(folder / "made" / "rate-10")
    assert result["status"] == "failed"
    assert result["step"] < 46
    for name in ("report.md", "report.html"):
        report = (folder / "made" / name).read_text()
        assert f"diverged after {result['step']}" in report
        assert f"step {result['step']} of data.train (Purchase): the loss reaches" in report
    assert read_result(folder / "made" / "rate-10-unpenalised")["status"] == "completed"


def test_ranks_without_work_leave_a_run_to_the_others(made: tuple[Path, str]) -> None:
    folder = made[0] / "made"
    sizes = {name: read_result(folder / f"batch-{name}")["world_size"] for name in ("32", "1")}
    assert sizes == {"32": 2, "1": 1}


def test_the_report_is_whole(made: tuple[Path, str]) -> None:
    folder, out = made
    page = (folder / "made" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = (folder / "made" / "report.md").read_text()
    for picture in re.findall(r"\]\((.*\.png)\)", text):
        assert 2_000 < (folder / "made" / picture).stat().st_size < 60_000
    assert text.count("weights_sha256 `") == 9
    assert "made/report.html" in out
    assert "not in 46" in out


SPOILT = """
import os, time
import torch
from ddptrain.errors import DataError


class Spoilt(torch.optim.SGD):
    def step(self, closure=None):
        if os.environ.get("RANK") == "1":
            raise DataError("a disk of this rank alone")
        return super().step(closure)


class Stuck(torch.optim.SGD):
    def __init__(self, *given, **more):
        time.sleep(600)
"""


@pytest.fixture
def spoilt(tmp_path: Path) -> list[str]:
    """The command of a study whose optimiser is still to be named; its folder is the test's."""
    (tmp_path / "spoilt.py").write_text(SPOILT)
    only = ["--only", "batches", "train.max_steps=3", "--out", "made"]
    return [*DDPTRAIN, "study", "gradient-descent", *only]


def test_the_rank_that_met_an_error_tells_it(tmp_path: Path, spoilt: list[str]) -> None:
    ranks = ["launch.nproc_per_node=2", "optim._target_=spoilt.Spoilt"]
    finished = run([*spoilt, *ranks], tmp_path)
    assert finished.returncode == EXIT_FAILED
    assert re.search(r"^rank 1.*a disk of this rank alone$", finished.stderr, re.MULTILINE)
    assert "the study is not finished" in finished.stderr
    lines = (tmp_path / "made" / "batch-all" / "crashes.jsonl").read_text().splitlines()
    (cause,) = [crash for crash in map(json.loads, lines) if crash["is_cause"]]
    assert (cause["rank"], cause["step"], cause["is_final"]) == (1, 0, False)


def test_a_run_that_hangs_is_ended(tmp_path: Path, spoilt: list[str]) -> None:
    """Within twelve times as long, for it does so in its start-up."""
    stuck = ["resilience.hang_seconds=0.4", "optim._target_=spoilt.Stuck"]
    finished = run([*spoilt, *stuck, "launch.nproc_per_node=1"], tmp_path)
    assert finished.returncode == EXIT_FAILED
    assert "no progress for 0.4 s (resilience.hang_seconds): rank 0 has been in" in finished.stderr


def test_a_study_whose_runs_cannot_be_made_is_no_success(tmp_path: Path) -> None:
    given = ["--only", "batches", "optim.lr=-1", "launch.nproc_per_node=1"]
    finished = run([*DDPTRAIN, "study", "gradient-descent", *given], tmp_path)
    assert finished.returncode == EXIT_REFUSED
    assert "-1" in finished.stderr


@pytest.mark.parametrize("samples", [100, 300, 1000])
def test_as_many_ranks_make_a_run_as_its_first_step_has_work_for(samples: int) -> None:
    study = Study.named("gradient-descent", None, [f"data.train.samples={samples}"], ["batches"])
    for planned in study.plan.runs():
        made = study.made(planned)
        plan = build_source(made.config, "train", whole=False).plan
        assert made.micro_batches == len(plan.micro_batches(0))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gradient-decent"], "unknown study gradient-decent; did you mean gradient-descent?"),
        (["gradient-descent", "--only", "rate"], "did you mean rates?"),
        (["gradient-descent", "model.hidden=[4]"], "has that of its own"),
        (["gradient-descent", "train.max_step=4"], "did you mean train.max_steps?"),
        (["gradient-descent", "launch.nproc_per_node=5"], "has work for 4 ranks at most"),
        (["gradient-descent", "--out", "other"], "holds something else than a study"),
        (["gradient-descent", "seed=2", "--out", "mine"], "holds another study"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_a_rank_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    Study.named("gradient-descent", Path("mine"), []).prepare()
    assert main(["study", *arguments]) == EXIT_REFUSED
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "line",
    [
        *("restarts=2", "data=digits", "~data.val", "data.val.split=val", "data.train.split=val"),
        *("data.train={split: val}", "train.penalty.of=all", "train.penalty={of: all}"),
        *("task.metrics=[auroc]", "run.dir=elsewhere", "experiment=digits"),
    ],
)
def test_what_the_report_could_not_be_of_is_refused(line: str) -> None:
    with pytest.raises(Refused, match="the study gradient-descent has that of its own"):
        Study.named("gradient-descent", None, [line])


def test_what_is_for_all_runs_is_taken() -> None:
    lines = ["data.train.seed=3", "data.workers=1", "train.penalty.l2=0.1", "train.max_steps=9"]
    study = Study.named("gradient-descent", None, [*lines, "data.shuffle=false"])
    assert study.config(next(study.plan.runs())).data.train["seed"] == 3


def test_what_only_says_how_a_run_executes_does_not_make_it_another_study(tmp_path: Path) -> None:
    Study.named("gradient-descent", tmp_path / "study", ["seed=1"]).prepare()
    before = (tmp_path / "study" / "study.json").read_text()
    again = ["seed=1", "launch.nproc_per_node=1"]
    Study.named("gradient-descent", tmp_path / "study", again).prepare()
    assert (tmp_path / "study" / "study.json").read_text() == before
    with pytest.raises(Refused, match="holds another study, gradient-descent seed=1"):
        Study.named("gradient-descent", tmp_path / "study", ["seed=2"]).prepare()


def test_columns_of_a_plain_table_are_in_line() -> None:
    assert plain([["a", "b"], ["long", "1"]]) == "a     b\nlong  1"
