"""The commands around a run, as a user types them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from launching import DDPTRAIN, LIMIT_SECONDS, PROJECT, TORCHRUN, Finished, read_result, run, start
from safetensors.torch import load_file

from ddptrain.files import make_new

SHORT = ["experiment=ragged", "train.max_steps=12", "eval.every_steps=6", "log.every_steps=3"]


def ended_well(finished: Finished) -> str:
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(PROJECT, tmp_path_factory.mktemp("commands") / "project"))
    (folder / ".gitignore").write_text("runs\n__pycache__\n")
    author = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for git in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *git], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    """A run on two ranks that keeps its best checkpoint."""
    best = ["checkpoint.keep_best=1", "launch.nproc_per_node=2"]
    out = ended_well(run([*DDPTRAIN, "train", *SHORT, *best, "run.dir=runs/first"], project))
    assert "completed after 12 steps" in out
    assert "tensorboard --logdir runs" in out
    return project / "runs" / "first"


def test_run_directory_holds_what_is_promised(trained: Path) -> None:
    present = {path.name for path in trained.iterdir()}
    promised = {"config.yaml", "metrics.jsonl", "result.json", "tensorboard", "checkpoints", "logs"}
    assert promised <= present
    logs = sorted(path.name for path in (trained / "logs").iterdir())
    assert [name.split(".")[0] for name in logs] == ["rank-0", "rank-1"]
    result = read_result(trained)
    assert result["status"] == "completed"
    assert (result["step"], result["world_size"], result["restarts"]) == (12, 2, 0)
    assert set(result) == {
        *("status", "step", "samples", "epochs", "metrics", "weights_sha256", "wall_seconds"),
        *("step_ms_median", "world_size", "restarts", "lost_steps"),
    }
    first_step = (trained / "logs" / logs[0]).read_text()
    assert "first step after" in first_step
    assert "imports" in first_step


def test_metrics_are_against_optimiser_steps_with_samples_beside(trained: Path) -> None:
    lines = list(map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()))
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [3, 6, 9, 12]
    # 86 samples in batches of 24: the fourth step of an epoch has 14
    assert [line["samples"] for line in train] == [72, 134, 196, 258]
    assert {"loss", "lr", "grad_norm", "samples_per_second", "accuracy"} <= set(train[0])
    assert [line["step"] for line in lines if line["split"] == "val"] == [6, 12]


def test_evaluate_agrees_with_the_run_on_any_number_of_ranks(trained: Path, project: Path) -> None:
    told = read_result(trained)["metrics"]["val/loss"]  # on two ranks
    three_ranks = [*TORCHRUN, "3", "-m", "ddptrain"]
    out = ended_well(run([*three_ranks, "evaluate", str(trained)], project))
    metrics = json.loads(out.strip().splitlines()[-1])
    assert metrics["step"] == 12
    assert metrics["val/loss"] == pytest.approx(told, rel=1e-12)


def test_export_holds_the_weights_of_the_checkpoint(trained: Path, project: Path) -> None:
    out = ended_well(run([*DDPTRAIN, "export", str(trained), "--checkpoint", "best"], project))
    assert out.strip() == str(trained / "model.safetensors")
    weights = load_file(trained / "model.safetensors")
    assert sorted(weights) == [
        *("model.first.bias", "model.first.weight", "model.second.bias", "model.second.weight"),
    ]


def test_rerun_repeats_a_run_in_a_new_directory(trained: Path, project: Path) -> None:
    out = ended_well(run([*DDPTRAIN, "rerun", str(trained)], project))
    assert "the code and versions are the same" in out
    (new,) = (project / "runs" / "ragged").iterdir()
    assert read_result(new)["weights_sha256"] == read_result(trained)["weights_sha256"]


def test_rerun_says_what_differs_in_the_data(trained: Path, project: Path) -> None:
    original = (project / "ragged.py").read_text()
    changed = original.replace("manual_seed(samples)", "manual_seed(samples + 1)")
    (project / "ragged.py").write_text(changed)
    try:
        finished = run([*DDPTRAIN, "rerun", str(trained)], project)
    finally:
        (project / "ragged.py").write_text(original)
    assert "git_changes.ragged.py: not set → " in ended_well(finished)
    assert "the same" not in finished.stdout
    assert "the data differs from its original" in finished.stderr
    assert "data.train.sha256" in finished.stderr


def test_fifty_starts_at_once_make_fifty_directories(tmp_path: Path) -> None:
    program = (
        "from ddptrain.compose import compose; from ddptrain.run_directory import open_directory;"
        "[print(open_directory(compose(['experiment=digits']), []).path) for _ in range(5)]"
    )
    with ThreadPoolExecutor(10) as pool:
        finished = list(
            pool.map(lambda _: run([sys.executable, "-c", program], tmp_path), range(10))
        )
    paths = {path for one in finished for path in ended_well(one).split()}
    assert len(paths) == 50
    assert {str(path) for path in (tmp_path / "runs" / "digits").iterdir()} == paths


def test_no_two_runs_get_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = iter([*"same", *"same", *"else"] * 2)
    monkeypatch.setattr(
        random.SystemRandom, "choices", lambda *_, k: [next(letters) for _ in range(k)]
    )
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    made = [make_new(tmp_path).name for _ in range(2)]
    assert made == ["20260101-000000-same", "20260101-000000-else"]


def test_config_prints_what_a_run_would_store(trained: Path, project: Path) -> None:
    import yaml

    best = ["checkpoint.keep_best=1", "launch.nproc_per_node=2", f"run.dir={trained}"]
    printed = yaml.safe_load(ended_well(run([*DDPTRAIN, "config", *SHORT, *best], project)))
    stored = yaml.safe_load((trained / "config.yaml").read_text())
    provenance = stored.pop("provenance")
    assert stored == printed
    assert provenance["overrides"][0] == "experiment=ragged"
    assert set(provenance["versions"]) >= {"python", "torch", "ddptrain"}


@pytest.mark.parametrize(("given", "code"), [("--version", 0), ("--unknown", 2), ("trian", 2)])
def test_a_process_does_what_is_due_at_its_end(given: str, code: int) -> None:
    script = (
        "import atexit, sys, ddptrain.__main__ as entry; main = entry.main; "
        "entry.main = lambda: (atexit.register(print, 'registered meanwhile'), main())[1]; "
        f"sys.argv = ['ddptrain', {given!r}]; sys.exit(entry.run_command())"
    )
    finished = run([sys.executable, "-c", script])
    assert finished.returncode == code, finished.stderr
    assert finished.stdout.splitlines()[-1] == "registered meanwhile"


def test_output_that_is_not_written_is_no_success() -> None:
    script = (
        "import sys, ddptrain.__main__ as entry; entry.main = lambda: print('a line') or 0; "
        "sys.exit(entry.run_command())"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        shown = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert shown.returncode == 1
    assert b"No space left" in shown.stderr


def test_a_command_that_is_interrupted_says_so_in_a_line(trained: Path, tmp_path: Path) -> None:
    """While it reads a data set that takes ten seconds for a sample."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["data"]["train"]["seconds"] = 10.0
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    command = start([*DDPTRAIN, "replay", str(run_dir), "11"], trained.parents[1])
    assert command.stdout is not None
    assert command.stdout.readline().startswith("replaying step 11")
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=LIMIT_SECONDS)
    assert command.returncode == 1
    assert err.splitlines()[-1] == "ddptrain: interrupted"
    assert "Traceback" not in err
