"""A step at fault can be taken again after the run: its checkpoint is kept, culprits are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, TORCHRUN, Finished, read_metrics, run, train
from safetensors.torch import load_file

from ddptrain.config import Reduction
from ddptrain.data.plan import Plan
from ddptrain.hashing import hash_all
from ddptrain.launch.past import Past
from ddptrain.observe.loggers import read_json_lines
from ddptrain.observe.result import summarise
from ddptrain.run_directory import RunDirectory

SEED, SAMPLES, GLOBAL_BATCH, MICRO_BATCH, RANKS = 0, 86, 24, 2, 3
RUN = [
    *("experiment=ragged", "parallel.reduction=exact", "log.tensorboard=false", "data.val=null"),
    *("eval.every_steps=null", "checkpoint.keep_best=0", "checkpoint.every_steps=4"),
    *("train.max_steps=40", f"seed={SEED}", "log.fingerprint_every=1", "data.train.samples=86"),
]
NAN = ["train.nonfinite=skip", "data.train.infinite_at=17"]
STARTS = st.lists(st.integers(1, 4), max_size=5)
Noted = list[dict[str, Any]]


def rank_of(sample: int, step: int) -> int:
    """Which of the ranks had a sample, read off the plan."""
    plan = Plan(SAMPLES, GLOBAL_BATCH, MICRO_BATCH, SEED)
    for rank in range(RANKS):
        for batch in plan.micro_batches(step, rank, RANKS):
            if sample in plan.indices(batch):
                return rank
    raise AssertionError(f"step {step} has no sample {sample}")


def replay(run_dir: Path, step: int, *launcher: str) -> Finished:
    return run([*(launcher or DDPTRAIN), "replay", str(run_dir), str(step)], PROJECT)


def stop(run_dir: Path, ranks: int, *overrides: str) -> None:
    """Train with the same config, but for what is done about a step at fault."""
    size = [f"launch.nproc_per_node={ranks}", f"run.dir={run_dir}"]
    stopped = run([*DDPTRAIN, "train", *overrides, "train.nonfinite=stop", *size], PROJECT)
    assert stopped.returncode == 1, stopped.stderr


def noted(run_dir: Path) -> Noted:
    return read_json_lines(run_dir / "anomalies.jsonl")


def weights(run_dir: Path, step: int) -> str:
    manifest = run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return str(json.loads(manifest.read_text())["files"]["model.safetensors"])


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three ranks that passes over steps with a NaN, and keeps one newest checkpoint."""
    run_dir = tmp_path_factory.mktemp("skipped") / "run"
    train(run_dir, RANKS, *RUN, *NAN)
    return run_dir


@pytest.mark.long
def test_the_checkpoint_before_a_step_at_fault_is_kept(skipped: Path) -> None:
    steps = [line["step"] for line in noted(skipped)]
    assert read_metrics(skipped)[-1]["skipped_steps"] == len(steps)
    kept = sorted(int(p.name[5:]) for p in (skipped / "checkpoints").glob("step-*"))
    assert kept == sorted({steps[-1] // 4 * 4, 40})


def test_a_nan_of_one_rank_is_named_with_its_rank_and_sample(skipped: Path) -> None:
    """From the beginning, where there is no checkpoint before it, as well."""
    steps = [line["step"] for line in noted(skipped)]
    on_last = next(step for step in steps if rank_of(17, step) == RANKS - 1)
    saved = steps[-1] // 4 * 4
    for step, start in ((on_last, "the beginning"), (steps[-1], f"its checkpoint of step {saved}")):
        done = replay(skipped, step)
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()
        assert told[0] == f"replaying step {step} of {skipped}, which had 3 ranks, from {start}"
        culprit = f"the loss is nan on rank {rank_of(17, step)}, samples 17"
        assert told[1] == f"step {step} of data.train (Sentences): {culprit}"
        assert told[2] == "the run noted the same (nonfinite, skip, loss not finite)"


def test_what_is_kept_is_the_state_before_the_step(skipped: Path, tmp_path: Path) -> None:
    """The one that a run on one rank saves that stops there."""
    step = noted(skipped)[0]["step"]
    stopped = tmp_path / "run"
    stop(stopped, 1, *RUN, *NAN)
    bundle = skipped / "replays" / f"step-{step:08d}"
    assert replay(skipped, step).returncode == 0
    assert weights(bundle, step) == weights(stopped, step)
    done = replay(stopped, step)
    assert done.returncode == 0, done.stderr
    assert f"from its checkpoint of step {step}" in done.stdout
    assert "(nonfinite, stop, loss not finite)" in done.stdout
    exported = run([*DDPTRAIN, "export", str(bundle)], PROJECT)
    assert exported.returncode == 0, exported.stderr
    assert {p.name for p in bundle.iterdir() if p.is_dir()} == {"checkpoints"}
    beyond = replay(stopped, step + 2)
    assert beyond.returncode == 2
    known = f"{stopped} is known to have come to step {step + 1}"
    assert beyond.stderr == f"ddptrain: step {step + 2}: {known}\n"


@pytest.mark.long
def test_with_rounding_as_many_ranks_give_the_state_to_the_last_digit(tmp_path: Path) -> None:
    """Buffers and loading workers included; a replay takes the place of the one before."""
    options = ["parallel.reduction=mean", "model.batch_norm=true", "data.workers=1"]
    options += ["run.resume=never", "checkpoint.every_steps=null"]
    train(tmp_path / "run", 2, *RUN, *NAN, *options)
    step = noted(tmp_path / "run")[1]["step"]
    bundle = tmp_path / "run" / "replays" / f"step-{step:08d}"
    alone = replay(tmp_path / "run", step)
    assert alone.returncode == 0, alone.stderr
    assert "torchrun --standalone --nproc-per-node 2 -m ddptrain replay" in alone.stdout
    of_one = weights(bundle, step)
    together = replay(tmp_path / "run", step, *TORCHRUN, "2", "-m", "ddptrain")
    assert together.returncode == 0, together.stderr
    assert "torchrun" not in together.stdout
    assert weights(bundle, step) != of_one
    header, *lines = read_json_lines(tmp_path / "run" / "fingerprints.jsonl")
    tensors = load_file(bundle / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    hashes = hash_all([tensors[name] for name in header["tensors"]]).tolist()
    then = next(line["weights"] for line in lines if line["step"] == step)
    assert [f"{value % 2**64:016x}" for value in hashes] == then


def test_a_step_that_was_fine_is_so_again(skipped: Path) -> None:
    at_fault = {line["step"] for line in noted(skipped)}
    step = next(step for step in range(38, 0, -1) if step not in at_fault)
    done = replay(skipped, step)
    assert done.returncode == 0, done.stderr
    assert f"nothing at fault: step {step} of data.train" in done.stdout
    assert "the run noted nothing wrong with this step" in done.stdout
    line = next(line for line in read_metrics(skipped) if line["step"] == step + 1)
    assert f"the loss of the step is {line['loss']:.4g}" in done.stdout


@pytest.mark.long
def test_spikes_and_rewinds_come_again_on_as_many_ranks(tmp_path: Path) -> None:
    """With rounding that depends on their number: the loss is the same to the last digit."""
    loud = ["data.train.loud_at=17", "train.spike.window=8", "train.rewind_every_steps=5"]
    options = ["train.spike.action=rewind", "parallel.reduction=mean"]
    train(tmp_path / "run", 2, *RUN, *loud, *options)
    line = noted(tmp_path / "run")[-1]
    done = replay(tmp_path / "run", line["step"], *TORCHRUN, "2", "-m", "ddptrain")
    assert done.returncode == 0, done.stderr
    assert line["report"].rpartition("; back to")[0] in done.stdout
    assert f"the run noted the same (spike, rewind, loss {line['loss']:.6g})" in done.stdout
    assert "torchrun" not in done.stdout
    alone = replay(tmp_path / "run", line["step"])
    assert alone.returncode == 0, alone.stderr
    assert f"torchrun --standalone --nproc-per-node 2 -m ddptrain replay {tmp_path}" in alone.stdout


def test_a_fault_that_does_not_come_again_is_said_to_be_gone(skipped: Path, tmp_path: Path) -> None:
    """On two ranks, each of which ends with an error, all is told before that."""
    moved = tmp_path / "run"
    moved.mkdir()
    for name in ("config.yaml", "anomalies.jsonl", "attempts.jsonl", "data.json"):
        (moved / name).write_text((skipped / name).read_text())
    config = (moved / "config.yaml").read_text().replace("infinite_at: 17", "infinite_at: null")
    (moved / "config.yaml").write_text(config.replace("samples: 86", "samples: 87"))
    step = noted(skipped)[0]["step"]
    done = replay(moved, step, *TORCHRUN, "2", "-m", "ddptrain")
    assert done.returncode == 1
    told = done.stdout.splitlines()
    assert "  data.train.samples: 86 → 87" in told
    assert told[-3].startswith("nothing at fault: ")
    assert told[-2].startswith(
        "the run noted something else (nonfinite, skip, loss not finite): other code, other data"
    )
    assert told[-1] == f"the state before it: {moved}/replays/step-{step:08d}"


def test_a_fault_that_the_run_went_past_ends_a_replay(skipped: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    for name in ("config.yaml", "anomalies.jsonl", "attempts.jsonl"):
        (moved / name).write_text((skipped / name).read_text())
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("nonfinite: skip", "nonfinite: stop"))
    first, second = (line["step"] for line in noted(skipped)[:2])
    done = replay(moved, second)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"ddptrain: step {first}: loss or gradient is not finite (loss nan), and the run went on: "
    )
    assert not list((moved / "replays").iterdir())


def test_what_cannot_be_kept_is_told_all_the_same(skipped: Path) -> None:
    step = noted(skipped)[2]["step"]
    bundle = skipped / "replays" / f"step-{step:08d}"
    bundle.parent.mkdir(exist_ok=True)
    bundle.write_text("in the way")
    done = replay(skipped, step)
    bundle.unlink()
    assert done.returncode == 0, done.stderr
    assert "the run noted the same" in done.stdout
    assert "the state before it could not be kept: " in done.stdout.splitlines()[-1]


def test_a_nan_is_no_overflow_of_fp16(tmp_path: Path) -> None:
    """It is noted at once, and no loss scale is lowered for it."""
    train(tmp_path / "run", 1, *RUN, *NAN, "train.precision=fp16", "train.max_steps=12")
    lines = noted(tmp_path / "run")
    assert all(17 in line["samples"] for line in lines)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["skipped_steps"] == len(lines) == 3
    assert last["loss_scale"] == 4096
    done = replay(tmp_path / "run", lines[1]["step"])
    assert done.returncode == 0, done.stderr
    assert "the loss is nan on rank 0, samples 17" in done.stdout


@pytest.mark.long
def test_an_overflow_of_fp16_is_no_fault(tmp_path: Path) -> None:
    loud = ["task.scale=1e4", "train.precision=fp16", "train.max_steps=12", "data.shuffle=false"]
    train(tmp_path / "run", 1, *RUN, *loud)
    assert not noted(tmp_path / "run")
    scales = [line["loss_scale"] for line in read_metrics(tmp_path / "run")]
    assert scales[0] == 2048
    done = replay(tmp_path / "run", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3].endswith(
        "; a gradient overflowed at a loss scale of 4096: it was not taken"
    )


@given(STARTS, st.integers(0, 30), st.integers(0, 30))
def test_ranks_that_changed_on_the_way_are_told_of(
    sizes: list[int], since: int, behind: int
) -> None:
    """Each start begins anywhere, with so many ranks; the last that was at a step took it."""
    starts = [(begun * 7 % 30, size) for begun, size in enumerate(sizes)]
    step = since + behind
    past = Past(RunDirectory(Path("run")), step, None, starts)
    took = []
    for at in range(since, step + 1):
        there = [size for begun, size in starts if begun <= at]
        took.append(there[-1] if there else 1)
    told = list(past.warn(Reduction.mean, since, 2))
    assert bool(told) == (set(took) != {2})
    assert all(("do not come again" in line) == (len(set(took)) > 1) for line in told)
    assert not list(past.warn(Reduction.exact, since, 2))


def test_a_summary_does_without_anomalies_that_cannot_be_read(tmp_path: Path) -> None:
    result = {"status": "completed", "step": 4, "epochs": 1.0, "samples": 8, "metrics": {}}
    result |= {"wall_seconds": 1.0, "world_size": 1}
    (tmp_path / "anomalies.jsonl").write_text('{"step": 3, "samples": [1]}\n')
    told = summarise(RunDirectory(tmp_path), result, None)
    assert told.splitlines()[-1].endswith(f"to see why: ddptrain replay {tmp_path} 3")
    (tmp_path / "anomalies.jsonl").unlink()
    (tmp_path / "anomalies.jsonl").mkdir()
    assert "replay" not in summarise(RunDirectory(tmp_path), result, None)


def test_damaged_checkpoints_are_passed_over(skipped: Path, tmp_path: Path) -> None:
    step = noted(skipped)[-1]["step"]
    file = skipped / "checkpoints" / f"step-{step // 4 * 4:08d}" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        done = replay(skipped, step)
    finally:
        file.write_bytes(whole)
    assert done.returncode == 0, done.stderr
    assert f"passing over a checkpoint: {file}" in done.stderr
    assert "from the beginning" in done.stdout


def test_the_step_in_which_a_run_failed_fails_again(tmp_path: Path) -> None:
    failing = ["data.train.fail_at=17", "data.shuffle=false", f"run.dir={tmp_path / 'run'}"]
    assert run([*DDPTRAIN, "train", *RUN, *failing], PROJECT).returncode == 1
    done = replay(tmp_path / "run", 0)
    assert done.returncode == 1
    assert "sample 17: ValueError: the file is corrupt" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("step", ["41", "40", "-1"])
def test_a_step_that_the_run_has_not_is_refused(skipped: Path, step: str) -> None:
    done = run([*DDPTRAIN, "replay", str(skipped), "--", step], PROJECT)
    assert done.returncode == 2
    known = "has steps 0 to 39" if step == "40" else "is known to have come to step 40"
    assert done.stderr == f"ddptrain: step {step}: {skipped} {known}\n"
    assert not (skipped / "replays" / f"step-{int(step):08d}").exists()
