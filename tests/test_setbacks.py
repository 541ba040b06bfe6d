"""Numbers gone wrong: the same decision on every rank, and a run that ends as its config says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, read_result, run, train
from torch import Tensor

from ddptrain.observe.loggers import read_json_lines
from ddptrain.optim.guard import FINE, IN_A_ROW, NONFINITE, SPIKE, Guard, Spikes

CPU = torch.device("cpu")
EXACT = ["experiment=ragged", "parallel.reduction=exact", "log.tensorboard=false"]
ALONE = ["data.val=null", "eval.every_steps=null", "checkpoint.keep_best=0"]
SHORT = [*EXACT, *ALONE, "train.max_steps=40"]
FEW = ["train.spike.window=8", "train.rewind_every_steps=5"]


def judge(guard: Guard, loss: float) -> bool:
    value = torch.tensor(loss)
    bad = ~value.isfinite()
    return bool(guard.judge(value, bad, bad))


def scalar(tensor: Tensor) -> float:
    return tensor.item()


# --- the guard ---------------------------------------------------------------------------------


@given(st.lists(st.floats(0.98, 1.05), min_size=8, max_size=40), st.floats(20, 1e6))
def test_a_loss_far_above_the_others_is_a_spike(losses: list[float], wild: float) -> None:
    guard = Guard(CPU, halts=True, stops=False, spikes=Spikes(CPU, 6, 16, halts=False))
    for loss in losses:
        assert not judge(guard, loss)
        assert guard.kind == FINE
    assert judge(guard, wild)
    assert guard.kind == SPIKE
    assert not judge(guard, losses[0])
    assert scalar(guard.skipped) == 1
    assert scalar(guard.halted) == 0


def test_there_is_no_spike_before_half_of_the_window_is_known() -> None:
    guard = Guard(CPU, halts=True, stops=False, spikes=Spikes(CPU, 6, 16, halts=False))
    assert not any(judge(guard, loss) for loss in (1, 1, 1, 1, 1, 1, 1, 1000))
    assert judge(guard, 1000)


def test_a_step_that_halts_is_the_last_that_does_anything() -> None:
    guard = Guard(CPU, halts=True, stops=True, spikes=Spikes(CPU, 6, 4, halts=True))
    kinds = []
    for loss in (1.0, 1.1, 0.9, 50.0, 1.0, float("nan"), 1.0):
        judge(guard, loss)
        kinds.append(int(guard.kind))
    assert kinds == [FINE, FINE, FINE, SPIKE, FINE, FINE, FINE]
    assert scalar(guard.halted) == 4
    assert guard.spikes is not None
    assert scalar(guard.spikes.counted) == 3


def test_a_row_of_faults_halts_although_each_would_be_passed_over() -> None:
    guard = Guard(CPU, halts=False, stops=False)
    for _ in range(IN_A_ROW - 1):
        assert judge(guard, float("inf"))
    assert not judge(guard, 1.0)
    for _ in range(IN_A_ROW - 1):
        judge(guard, float("inf"))
        assert not scalar(guard.halted)
    judge(guard, float("nan"))
    assert guard.kind == NONFINITE
    assert scalar(guard.halted) == 1


@given(st.lists(st.one_of(st.floats(0.5, 1.5), st.just(99.0), st.just(float("nan"))), max_size=60))
def test_a_guard_that_is_stored_and_loaded_goes_on_alike(losses: list[float]) -> None:
    def make() -> Guard:
        return Guard(CPU, halts=False, stops=False, spikes=Spikes(CPU, 6, 8, halts=False))

    one = make()
    for loss in losses:
        other = make()
        other.load(json.loads(json.dumps(one.numbers())))
        assert judge(one, loss) == judge(other, loss)
        assert one.numbers() == other.numbers()


# --- a run -------------------------------------------------------------------------------------


def weights_by_step(run_dir: Path) -> dict[int, Any]:
    lines = read_json_lines(run_dir / "fingerprints.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return {line["step"]: line["weights"] for line in lines}


def anomalies(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(run_dir / "anomalies.jsonl"))


REWINDS = {
    "nonfinite": ["train.nonfinite=rewind", "data.train.infinite_at=17"],
    "spike": ["train.spike.action=rewind", "data.train.loud_at=17"],
}


@pytest.mark.parametrize(
    "fault",
    [f if f == "nonfinite" else pytest.param(f, marks=pytest.mark.long) for f in REWINDS],
)
def test_a_rewind_is_the_same_on_any_ranks_and_through_a_crash(tmp_path: Path, fault: str) -> None:
    """Killed between an anchor and the fault behind it, and between two anchors after one."""
    options = [*SHORT, *FEW, *REWINDS[fault], "log.fingerprint_every=1"]
    one = train(tmp_path / "one", 1, *options)
    found = anomalies(tmp_path / "one")
    assert found
    weights = weights_by_step(tmp_path / "one")
    for line in found:
        step, back_to = line["step"], line["back_to"]
        assert (line["fault"], line["action"]) == (fault, "rewind")
        assert back_to == step - step % 5
        assert 17 in line["samples"]
        assert len(line["samples"]) == 24 or step % 4 == 3  # the last step of an epoch
        assert "samples 17" in line["report"] or ", 17" in line["report"]
        assert weights[step + 1] == weights[back_to]
    again = train(tmp_path / "two", 2, *options)
    assert again["weights_sha256"] == one["weights_sha256"]
    assert [{**line, "report": ""} for line in anomalies(tmp_path / "two")] == [
        {**line, "report": ""} for line in found
    ]
    if fault == "spike":  # the same way back
        return
    first = found[0]["step"] if found[0]["step"] % 5 else found[1]["step"]
    kills = [f"task.kill_at={6 * first + 2}", "task.culprit=1", f"task.once={tmp_path / 'once'}"]
    command = [*DDPTRAIN, "train", "launch.nproc_per_node=2", f"run.dir={tmp_path / 'killed'}"]
    finished = run([*command, *options, *kills], PROJECT)
    assert finished.returncode == 0, finished.stderr
    killed = read_result(tmp_path / "killed")
    assert (killed["restarts"], killed["lost_steps"]) == (1, 0)
    assert killed["weights_sha256"] == one["weights_sha256"]
    assert weights_by_step(tmp_path / "killed") == weights


def test_steps_before_a_rewind_are_no_part_of_the_speed_after_it(tmp_path: Path) -> None:
    """A sample takes 4 ms, so 250 a second is the most that there can be."""
    slow = [*FEW, *REWINDS["nonfinite"], "data.train.seconds=0.004", "log.every_steps=10"]
    train(tmp_path / "run", 1, *SHORT, *slow)
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    assert speeds
    assert max(speeds) < 250


@pytest.mark.long
def test_a_spike_can_be_passed_over_or_stop_the_run(tmp_path: Path) -> None:
    options = [*SHORT, *FEW, "data.train.loud_at=17"]
    skipped = train(tmp_path / "skip", 1, *options, "train.spike.action=skip")
    found = anomalies(tmp_path / "skip")
    assert [line["action"] for line in found] == ["skip"] * len(found)
    assert found
    metrics = read_json_lines(tmp_path / "skip" / "metrics.jsonl")
    assert metrics[-1]["skipped_steps"] == len(found)
    assert skipped["status"] == "completed"
    stop = [*DDPTRAIN, "train", *options, "train.spike.action=stop"]
    finished = run([*stop, f"run.dir={tmp_path / 'stop'}", "launch.nproc_per_node=2"], PROJECT)
    assert finished.returncode == 1
    assert len(read_json_lines(tmp_path / "stop" / "attempts.jsonl")) == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert f"step {found[0]['step']} of data.train (Sentences): a mean loss of" in last
    assert "train.spike.action=skip passes over such steps" in last
    assert read_result(tmp_path / "stop")["step"] == found[0]["step"]


def test_replicas_that_differ_are_set_right(tmp_path: Path) -> None:
    """From the last state in which they were equal: a checkpoint, or else the beginning."""
    options = [*SHORT, "parallel.check_every_steps=2"]
    flips = ["task.culprit=1", "task.flip_at=46"]
    clean = train(tmp_path / "clean", 3, *options, "checkpoint.every_steps=null")
    for every in (4, None):
        run_dir = tmp_path / f"every-{every}"
        saves = f"checkpoint.every_steps={'null' if every is None else every}"
        mended = train(run_dir, 3, *options, *flips, saves)
        assert mended["weights_sha256"] == clean["weights_sha256"]
        (line,) = anomalies(run_dir)
        found = r"after step (\d+): rank 1 holds other weights than the 2 others"
        told = re.match(found, line["report"])
        assert told is not None
        noticed, back_to = int(told[1]), line["step"]
        assert line["fault"] == "divergence"
        assert back_to == (0 if every is None else (noticed - 1) // every * every)
        assert mended["restarts"] == 1
        assert noticed <= back_to + mended["lost_steps"] <= noticed + 1
        steps = [m["step"] for m in read_json_lines(run_dir / "metrics.jsonl")]
        assert steps == sorted(steps)
