"""Sweeps: each trial is a whole run of its own, whatever chooses the trials, whatever is killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import (
    DDPTRAIN,
    LIMIT_SECONDS,
    PROJECT,
    Finished,
    kill_tree,
    read_metrics,
    read_result,
    run,
    start,
    tree,
)
from omegaconf import DictConfig
from optuna import create_study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import QMCSampler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from ddptrain.errors import Refused
from ddptrain.launch.combinations import check_values, in_order, ranges
from ddptrain.launch.resources import minutes, wanted
from ddptrain.launch.study import JOURNAL, distribution
from ddptrain.launch.study import _open as open_study
from ddptrain.launch.study import _sampler as sampler
from ddptrain.launch.study import _tell as tell
from ddptrain.launch.trial import Outcome, computing
from ddptrain.overrides import override, parse

SWEEP = [*DDPTRAIN, "train", "--multirun"]
SHORT = ["experiment=ragged", "train.max_steps=12", "eval.every_steps=6", "log.every_steps=3"]
QUICK = [*SHORT, "log.tensorboard=false", "checkpoint.keep_best=0"]
SEARCH = ["hydra/sweeper=optuna", "optim.lr=tag(log, interval(1e-4, 1e-1))", "seed=1,2"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


def ended_well(finished: Finished) -> str:
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """What the trials left, in order of their numbers."""
    found = [json.loads(file.read_text()) for file in folder.glob("*/trial.json")]
    return sorted(found, key=lambda each: each["number"])


def wait_for(file: Path, process: Any) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not file.exists() or not file.stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_trial_is_a_run_of_several_ranks_with_a_row_in_hparams(project: Path) -> None:
    out = ended_well(
        run([*SWEEP, *SHORT, "optim.lr=0.1,0.03,0.01", "launch.nproc_per_node=2"], project)
    )
    (folder,) = (project / "runs" / "sweeps").iterdir()
    trials = [folder / number for number in "012"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1", "2"]
    assert [_hparams(path)["optim.lr"] for path in trials] == [0.1, 0.03, 0.01]
    results = [read_result(path) for path in trials]
    assert [(each["status"], each["world_size"]) for each in results] == [("completed", 2)] * 3
    for trial, rate in zip(outcomes(folder), ("0.1", "0.03", "0.01"), strict=True):
        value = results[trial["number"]]["metrics"]["val/loss"]
        assert trial["value"] == value
        assert f"{value:.4f}  optim.lr={rate}" in out
    leftovers = {p.name for p in project.rglob("*") if p.name in (".hydra", "outputs", "multirun")}
    assert not leftovers


def _hparams(run_dir: Path) -> dict[str, Any]:
    """The row of a run in the HPARAMS tab; its final and best metrics must be there too."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert {"final/val/loss", "best/val/loss"} <= set(events.Tags()["scalars"])
    contents = [
        plugin_data_pb2.HParamsPluginData.FromString(content)
        for content in events.summary_metadata.values()
        for content in [content.plugin_data.content]
        if content
    ]
    started = next(c for c in contents if c.HasField("session_start_info"))
    hparams = started.session_start_info.hparams
    return {name: value.number_value or value.string_value for name, value in hparams.items()}


def test_a_sweep_passes_on_what_leaves_a_section_out(project: Path) -> None:
    without = ["data.val=null", "checkpoint.keep_best=0", "eval.every_steps=null", "model=null"]
    trial = ["task._target_=ragged.Alone", "optim.lr=0.1", "hydra.sweep.dir=runs/mine"]
    ended_well(run([*SWEEP, *SHORT, *trial, *without], project))
    made = project / "runs" / "mine" / "0"
    assert yaml.safe_load((made / "config.yaml").read_text())["model"] is None
    assert read_result(made)["status"] == "completed"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.micro_batch_size=2,-1", "optim.lr=0.1,0.2"], "train.micro_batch_size"),
        (
            [*SEARCH, "train.max_steps=int(interval(-5,5))"],
            "train.max_steps: expected a number above 0",
        ),
        (["optim.lr=0.1,0.2", "run.dir=here"], "run.dir is of one run; hydra.sweep.dir=…"),
        (["hydra/sweeper=optuna", "optim.lr=tag(log,interval(0,1))"], "expected an interval from"),
        (["optim.lr=interval(0.1,0.2)"], "does not support sweep type : INTERVAL_SWEEP"),
        (["hydra/sweeper=optunna", "seed=1,2"], "hydra/sweeper=optunna: no such option; did you"),
        (["seed=range(1,5,0)"], "seed=range(1,5,0): expected a range with something in it"),
        (["experiment=glob(nothing*)"], "experiment=glob(nothing*): experiment has "),
        (["seed=1,2", "hydra.sweep.dir=a,b"], "hydra.sweep.dir=a,b: expected the name of a"),
        ([*SEARCH, "hydra/sweeper/sampler=null"], "Config group override must be a string"),
        ([*SEARCH, "hydra.sweeper.params=[a]"], "hydra.sweeper.params: expected ranges by key"),
        ([*SEARCH, "hydra.sweeper.params={optimm.lr:'0.1,0.2'}"], "unknown key optimm; did you"),
        (
            ["hydra/launcher=submitit_local", "hydra.launcher.nodes=2", "seed=1,2"],
            "hydra/launcher: LocalExecutor can use only one node",
        ),
        ([*SEARCH, "hydra.sweeper.trials=2"], "unknown key hydra.sweeper.trials"),
        (["seed=range(5,1)"], "seed=range(5,1): expected a range with something in it"),
        (["seed=1,2", "hydra.sweep.dir=/proc/here"], "hydra.sweep.dir=/proc/here: "),
        ([*SEARCH, "hydra.sweeper.direction=max"], "direction: expected maximize or minimize, got"),
        ([*SEARCH, "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs: expected a number above 0"),
        ([*SEARCH, "hydra.sweeper.n_trials=many"], "hydra.sweeper.n_trials: expected a number"),
        ([*SEARCH, "hydra.sweeper.storage=nowhere"], "hydra.sweeper.storage=nowhere: Could not"),
        ([*SEARCH, "+hydra.sweeper.sampler.nonsense=1"], "nonsense"),
    ],
)
def test_an_impossible_sweep_is_refused_before_any_trial(
    project: Path, overrides: list[str], expected: str
) -> None:
    finished = run([*SWEEP, *SHORT, *overrides], project)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert expected in line
    assert not list(project.glob("runs/sweeps/*"))


@pytest.mark.long
def test_a_trial_outlives_no_sweep_and_is_gone_on_with_at_once(project: Path) -> None:
    """As when the system, out of memory, kills the sweep alone."""
    slow = [*QUICK, "data.train.seconds=0.003", "train.max_steps=40"]
    command = [*SWEEP, *slow, "hydra.sweep.dir=runs/mine"]
    sweep = start(command, project)
    trial = project / "runs" / "mine" / "0"
    wait_for(trial / "metrics.jsonl", sweep)
    sweep.kill()
    ended_well(run(command, project))
    sweep.communicate(timeout=LIMIT_SECONDS)
    assert [each["status"] for each in outcomes(trial.parent)] == ["completed"]
    assert read_result(trial)["restarts"] == 1
    steps = [line["step"] for line in read_metrics(trial)]
    assert steps == sorted(set(steps)), "the trial of the killed sweep saved what it had done"


@pytest.mark.long
@pytest.mark.parametrize("ending", ["Ctrl-C", "SIGTERM", "SIGKILL", "time"])
def test_jobs_on_this_machine_end_with_their_sweep(project: Path, ending: str) -> None:
    slow = [*QUICK, "data.train.seconds=0.02", "train.max_steps=1000", "seed=1,2"]
    local = ["hydra/launcher=submitit_local", "hydra.sweep.dir=runs/mine"]
    if ending == "time":
        local += ["hydra.launcher.timeout_min=1", "+hydra.launcher.max_num_timeout=0"]
    sweep = start([*SWEEP, *slow, *local], project)
    trials = [project / "runs" / "mine" / number for number in "01"]
    for trial in trials:
        wait_for(trial / "metrics.jsonl", sweep)
    started = tree(sweep.pid)[1:]
    if ending == "Ctrl-C":
        os.killpg(sweep.pid, signal.SIGINT)
    elif ending == "time":  # is told so
        for job in [each for each in started if "submitit.core" in command_of(each)]:
            os.kill(job, signal.SIGUSR2)
    else:
        sweep.send_signal(getattr(signal, ending))
    _, err = sweep.communicate(timeout=LIMIT_SECONDS)
    deadline = time.monotonic() + LIMIT_SECONDS
    while left := [process for process in started if Path(f"/proc/{process}").exists()]:
        assert ending == "SIGKILL", left
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert sweep.returncode == {"SIGKILL": -9, "time": 1}.get(ending, 75), err
    assert "Traceback" not in err
    assert [read_result(trial)["status"] for trial in trials] == ["stopped"] * 2
    failed = ["failed"] * 2 if ending == "time" else []
    assert [each["status"] for each in outcomes(trials[0].parent)] == failed
    if ending == "time":
        assert "trial 0: its job's time was up before it was done: give it more (hy" in err


@pytest.mark.long
def test_jobs_of_a_sweep_that_are_lost_are_failed_trials(project: Path) -> None:
    """Two at a time: of the first two one's process is killed, as a node may be that has it."""
    slow = [*QUICK, "data.train.seconds=0.02", "hydra/launcher=submitit_local", "seed=1,2"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2"]
    sweep = start([*SWEEP, *slow, *search, "hydra.sweep.dir=runs/mine"], project)
    folder = project / "runs" / "mine"
    for number in "01":
        wait_for(folder / number / "metrics.jsonl", sweep)
    (victim,) = [p for p in tree(sweep.pid) if _is_job_of(p, folder / "1")]
    os.kill(victim, signal.SIGKILL)
    out, err = sweep.communicate(timeout=LIMIT_SECONDS)
    assert sweep.returncode == 1, err
    assert "Traceback" not in err
    told = r"trial 1: its job \d+ ended without a result \(FINISHED\); see .*log\.out"
    assert re.search(told, out)
    assert re.search(f"ddptrain: 1 trial failed: {told}$", err.splitlines()[-1])
    assert [each["status"] for each in outcomes(folder)] == ["completed", "failed", "completed"]


def _is_job_of(process: int, run_dir: Path) -> bool:
    """Whether a process is submitit's, and has started a trial."""
    children = [command_of(child) for child in tree(process)[1:2]]
    is_job = "submitit.core" in command_of(process)
    return is_job and any(f"run.dir={run_dir}\0" in line for line in children)


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_interrupted_has_its_trial_save(project: Path, number: int) -> None:
    slow = [*SHORT, "data.train.seconds=0.05", "train.max_steps=1000", "seed=1,2"]
    sweep = start([*SWEEP, *slow, "hydra.sweep.dir=runs/mine"], project)
    trial = project / "runs" / "mine" / "0"
    wait_for(trial / "metrics.jsonl", sweep)
    sweep.send_signal(number)
    _, err = sweep.communicate(timeout=LIMIT_SECONDS)
    assert sweep.returncode == 75, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("ddptrain: the sweep was interrupted")
    assert last.endswith(f"ddptrain train --multirun {' '.join(slow)} hydra.sweep.dir=runs/mine")
    assert read_result(trial)["status"] == "stopped"
    assert not outcomes(project / "runs" / "mine")


def test_a_grid_that_was_killed_goes_on_where_it_was(project: Path) -> None:
    slow = [*QUICK, "checkpoint.every_steps=1", "data.train.seconds=0.02", "optim.lr=0.1,0.01"]
    command = [*SWEEP, *slow, "hydra.sweep.dir=runs/mine"]
    sweep = start(command, project)
    folder = project / "runs" / "mine"
    wait_for(folder / "1" / "metrics.jsonl", sweep)
    kill_tree(sweep.pid)
    sweep.communicate()
    finished_before = (folder / "0" / "result.json").stat().st_mtime_ns
    out = ended_well(run(command, project))
    assert "trial 0: optim.lr=0.1: completed before" in out
    assert (folder / "0" / "result.json").stat().st_mtime_ns == finished_before
    assert read_result(folder / "1")["restarts"] == 1
    assert [each["status"] for each in outcomes(folder)] == ["completed"] * 2
    for others in (["optim.lr=0.2,0.01"], ["hydra/sweeper=optuna", "optim.lr=0.2,0.01"]):
        other = run([*SWEEP, *slow[:-1], *others, "hydra.sweep.dir=runs/mine"], project)
        assert other.returncode == 2
        assert "holds another sweep, in which trial 0 was: optim.lr=0.1" in other.stderr


@pytest.mark.long
def test_a_search_that_was_killed_has_the_trials_that_it_would_have_had(project: Path) -> None:
    """Also what its sampler draws, in the interrupted trials and in those after them."""
    given = [*SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=2"]
    given += [*QUICK, "checkpoint.every_steps=1", "data.train.seconds=0.01"]
    ended_well(run([*SWEEP, *given, "hydra.sweep.dir=runs/clean"], project))
    killed = [*SWEEP, *given, "hydra.sweep.dir=runs/killed"]
    sweep = start(killed, project)
    wait_for(project / "runs" / "killed" / "1" / "metrics.jsonl", sweep)
    kill_tree(sweep.pid)
    sweep.communicate()
    ended_well(run(killed, project))
    clean, again = (outcomes(project / "runs" / name) for name in ("clean", "killed"))
    assert len(clean) == 3
    assert again == clean
    restarts = [read_result(project / "runs" / "killed" / str(n))["restarts"] for n in range(3)]
    assert restarts == [0, 1, 0]
    other = [*killed[:-1], "optim.lr=interval(0.1,1)", "hydra.sweeper.n_trials=4", killed[-1]]
    assert "holds another search" in run(other, project).stderr
    for others in (["optim.betas=[0.5,0.9]"], ["optim.weight_decay=0,1"]):
        refused = run([*killed, *others], project)
        assert refused.returncode == 2
        assert "holds another search, of " in refused.stderr
    more = [*killed, "hydra.sweeper.n_trials=3", "launch.nproc_per_node=2", "log.every_steps=2"]
    ended_well(run(more, project))
    best = yaml.safe_load((project / "runs" / "killed" / "best.yaml").read_text())
    assert best["value"] == min(each["value"] for each in clean)
    assert 1e-4 <= best["params"]["optim.lr"] <= 1e-1


def test_a_trial_that_fails_is_a_failed_trial(project: Path) -> None:
    given = [
        *QUICK,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweep.dir=runs/mine",
    ]
    finished = run([*SWEEP, *given, "data.train.fail_at=17,null"], project)
    trials = outcomes(project / "runs" / "mine")
    assert len(trials) == 4
    failed = [each for each in trials if each["status"] == "failed"]
    assert 0 < len(failed) < 4
    assert all(each["told"] == "data.train.fail_at=17" for each in failed)
    assert all(each["value"] > 0 for each in trials if each not in failed)
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last.startswith(f"ddptrain: {len(failed)} trial")
    assert "data.train.fail_at=17 exited 1: rank 0 (" in last
    assert "sample 17: " in last


@pytest.mark.long
def test_a_trial_that_does_badly_is_given_up_on_all_its_ranks(project: Path) -> None:
    """A user's own pruner; what is above its threshold at an evaluation is not trained further."""
    pruners = project / "conf" / "hydra" / "sweeper" / "pruner"
    pruners.mkdir(parents=True)
    threshold = "_target_: optuna.pruners.ThresholdPruner\nupper: 0.6\nn_warmup_steps: 20\n"
    (pruners / "threshold.yaml").write_text(threshold)
    given = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra/sweeper/pruner=threshold"]
    given += ["hydra.sweep.dir=runs/mine", "launch.nproc_per_node=2", "optim.lr=1e-7,0.1"]
    slow = ["data.train.seconds=0.02", "train.max_steps=40"]
    out = ended_well(run([*SWEEP, *QUICK, *given, *slow], project))
    for trial in outcomes(project / "runs" / "mine"):
        run_dir = project / "runs" / "mine" / str(trial["number"])
        result = read_result(run_dir)
        evaluated = read_metrics(run_dir, "val")
        if trial["told"] == "optim.lr=1e-07":
            assert (trial["status"], result["status"]) == ("pruned", "stopped")
            assert result["step"] < 40
            assert evaluated[-1]["loss"] > 0.6
        else:
            assert (trial["status"], result["step"]) == ("completed", 40)
    told = [trial["told"] for trial in outcomes(project / "runs" / "mine")]
    assert set(told) == {"optim.lr=1e-07", "optim.lr=0.1"}, "both values were to be drawn"
    assert out.count("given up: optim.lr=1e-07") == told.count("optim.lr=1e-07")


@pytest.mark.long
def test_jobs_that_start_at_once_do_not_collide(project: Path) -> None:
    """Of two ranks each: neither in a port, nor in a folder."""
    command = [*DDPTRAIN, "train", *QUICK, "train.max_steps=2", "eval.every_steps=null"]
    jobs = [start([*command, "launch.nproc_per_node=2"], project) for _ in range(4)]
    for job in jobs:
        _, err = job.communicate(timeout=LIMIT_SECONDS)
        assert job.returncode == 0, err
    runs = list((project / "runs" / "ragged").iterdir())
    assert [read_result(each)["status"] for each in runs] == ["completed"] * 4
    assert len({read_result(each)["weights_sha256"] for each in runs}) == 1


@pytest.mark.long
def test_a_pruner_that_raises_leaves_no_trial_behind(project: Path) -> None:
    (project / "broken.py").write_text(
        "from optuna.pruners import BasePruner\n\n\n"
        "class Broken(BasePruner):\n"
        "    def prune(self, study, trial):\n"
        "        raise RuntimeError('no idea')\n"
    )
    given = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=runs/mine"]
    given += ["+hydra.sweeper.pruner._target_=broken.Broken", "train.max_steps=1000", "seed=1,2"]
    finished = run([*SWEEP, *QUICK, "data.train.seconds=0.02", *given], project)
    assert finished.returncode == 1
    assert "RuntimeError: no idea" in finished.stderr
    assert read_result(project / "runs" / "mine" / "0")["status"] == "stopped"


@pytest.mark.long
def test_shuffled_trials_have_their_order_for_good(project: Path) -> None:
    """In a folder whose name has signs that mean something to Hydra, too."""
    given = [*SHORT[:1], "train.max_steps=1", "eval.every_steps=null", "log.tensorboard=false"]
    given += ["checkpoint.keep_best=0", "seed=shuffle(range(1,4))"]
    folder = project / "runs" / 'it\'s (a) {sweep}, "mine"'
    where = override("hydra.sweep.dir", folder)
    out = ended_well(run([*SWEEP, *given, where], project))
    told = [each["told"] for each in outcomes(folder)]
    assert sorted(told) == [f"seed={number}" for number in range(1, 4)] != told
    again = re.search("to go on with it after an interruption:\n  ddptrain (.*)\n", out)
    assert again is not None
    out = ended_well(run([*DDPTRAIN, *shlex.split(again[1])], project))
    assert out.count("completed before") == 3
    ended_well(run([*DDPTRAIN, "train", *given, "--trial=2", "run.dir=alone"], project))
    assert (
        read_result(project / "alone")["weights_sha256"]
        == (read_result(folder / "2")["weights_sha256"])
    )


def test_a_trials_job_asks_for_what_the_cluster_is_said_to_need() -> None:
    slurm = {"nodes": 1, "time": "1-02:30", "sbatch": ["--constraint=a100", "--exclusive"]}
    slurm["srun"] = ["--container-image=a b"]
    ours = DictConfig({"launcher": {"_target_": "a.SlurmLauncher", "timeout_min": None}})
    assert wanted(ours, DictConfig(slurm)) == [
        "hydra.launcher.timeout_min=1590",
        "++hydra.launcher.additional_parameters.constraint=a100",
        "++hydra.launcher.additional_parameters.exclusive=true",
        '++hydra.launcher.srun_args=["--container-image=a b"]',
    ]
    assert not wanted(DictConfig({"launcher": {"_target_": "a.Local"}}), DictConfig(slurm))
    with pytest.raises(Refused, match=r"slurm\.sbatch: -C a100: "):
        wanted(ours, DictConfig(slurm | {"sbatch": ["-C a100"]}))
    with pytest.raises(Refused, match="has one node"):
        wanted(ours, DictConfig(slurm | {"nodes": 2}))
    ours.launcher.timeout_min = 5
    assert len(wanted(ours, DictConfig(slurm))) == 3
    times = ("30:01", "1:00:00", "2-3", "2-3:04", "2-3:04:05")
    assert [minutes(time) for time in times] == [31, 60, 3060, 3064, 3065]
    with pytest.raises(Refused, match="expected a time of Slurm"):
        minutes("soon")
    with pytest.raises(Refused, match='put it in quotes, time: "12:00:00"'):
        minutes("43200")


def test_a_value_is_refused_if_no_trial_can_have_it() -> None:
    batch = ["train.global_batch_size=8,64", "train.micro_batch_size=64,8"]
    check_values(["experiment=digits", *batch])
    with pytest.raises(Refused, match="micro_batch_size"):
        check_values(["experiment=digits", "train.global_batch_size=8,64", batch[1] + ",5"])
    with pytest.raises(Refused, match="expected a number above 0"):
        check_values(["experiment=digits", f"train.max_steps={','.join(map(str, range(100)))}"])


def test_globs_and_a_sweepers_own_ranges_are_overrides() -> None:
    (line,) = in_order(["experiment=glob([b*,d*],exclude=diabetes)"])
    assert line == "experiment=breast_cancer,digits"
    assert in_order(["a=1,2", "b=1", "a=3", "b=2", "c=4", "c=5,6"]) == [
        "b=1",
        "a=3",
        "b=2",
        "c=5,6",
    ]
    sweeper = {"params": {"optim.lr": "interval(0,1)", "seed": "1,2"}}
    settings = DictConfig({"sweeper": sweeper})
    assert ranges(settings, ["seed=5"]) == ["optim.lr=interval(0,1)"]


def test_a_journal_that_a_full_disk_has_torn_is_gone_on_with(tmp_path: Path) -> None:
    settings = {"n_trials": 1, "n_jobs": 1, "storage": None, "study_name": "sweep"}
    settings |= {"pruner": None, "direction": None}
    settings["sampler"] = {"_target_": "optuna.samplers.RandomSampler"}
    journal = tmp_path / JOURNAL
    open_study(settings, tmp_path, maximizes=False).ask({"a": FloatDistribution(0, 1)})
    with journal.open("a") as torn:
        torn.write('{"op_code":4,"worker')
    open_study(settings, tmp_path, maximizes=False).ask({"a": FloatDistribution(0, 1)})
    assert len(open_study(settings, tmp_path, maximizes=False).trials) == 2
    with pytest.raises(Refused, match="holds a search that is to minimize, not to maximize"):
        open_study(settings, tmp_path, maximizes=True)
    journal.write_text("nothing\n" + journal.read_text())
    with pytest.raises(Refused, match="is damaged"):
        open_study(settings, tmp_path, maximizes=False)


def test_what_is_not_computed_may_change_when_a_sweep_goes_on() -> None:
    given = ["++optim.lr=1", "++launch.nproc_per_node=2", "++checkpoint.metric=val/loss"]
    assert computing([*given, "++checkpoint.every_steps=3", "experiment=digits"]) == [
        "optim.lr=1", "checkpoint.metric=val/loss", "experiment=digits"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_samplers_draws_come_from_the_number_of_the_trial() -> None:
    """Also of one's own; but for those that draw from one sequence for all trials."""

    def draws(target: str, **settings: Any) -> list[float]:
        study = create_study()
        for number in range(4):
            study.sampler = sampler({"_target_": f"optuna.samplers.{target}", **settings}, number)
            study.ask({"a": FloatDistribution(0, 4)})
            tell(study, number, Outcome(number, "", [], "completed", 1.0))
        return [trial.params["a"] for trial in study.trials]

    for target in ("TPESampler", "RandomSampler"):
        assert draws(target) == draws(target, seed=0) != draws(target, seed=1)
    space = {"a": [0.0, 1.0, 2.0, 3.0]}
    assert sorted(draws("GridSampler", search_space=space)) == space["a"]
    study = create_study(sampler=QMCSampler(seed=3, scramble=True))
    for number in range(4):
        study.ask({"a": FloatDistribution(0, 4)})
        study.tell(number, 1.0)
    in_sequence = [trial.params["a"] for trial in study.trials]
    assert draws("QMCSampler", seed=3, scramble=True) == in_sequence


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=interval(0.1,1)", FloatDistribution(0.1, 1.0)),
        ("a=int(interval(1,8))", IntDistribution(1, 8)),
        ("a=tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("a=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("a=range(1,10,3)", IntDistribution(1, 7, step=3)),
        ("a=range(10,1,-3)", IntDistribution(4, 10, step=3)),
        ("a=range(2,10,4)", IntDistribution(2, 6, step=4)),
        ("a=range(0,1.1,0.1)", FloatDistribution(0, 1.1, step=0.1)),
        ("a=range(0.5,2,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("a=x,null,3", CategoricalDistribution(["x", "null", "3"])),
    ],
)
def test_what_is_searched_is_what_was_typed(given: str, expected: BaseDistribution) -> None:
    assert distribution(parse([given])[0]) == expected
