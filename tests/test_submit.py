"""What a job is submitted with: its script, and a copy of the code that later edits leave alone."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import DDPTRAIN, PROJECT, run

from ddptrain.compose import compose
from ddptrain.errors import Refused
from ddptrain.overrides import parse
from ddptrain.snapshot import CODE, LARGEST, code_folder, copy_code

SUBMIT = [*DDPTRAIN, "submit", "experiment=ragged"]


def test_a_dry_run_prints_the_script_and_makes_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    wanted = [
        "slurm.nodes=3",
        "slurm.time=1:00:00",
        "slurm.gpus_per_node=4",
        """run.name="it's\"""",
    ]
    more = ['slurm.sbatch=["--constraint=a100"]', 'slurm.setup=["module load cuda/12"]']
    done = run([*SUBMIT, *wanted, *more, "slurm.python=python", "--dry-run"], folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    expected = ["--nodes=3", "--time=1:00:00", "--gpus-per-node=4", f"--chdir={folder}"]
    assert {*expected, "--requeue", "--constraint=a100", "--ntasks-per-node=1"} <= {*options}
    assert not [option for option in options if option.startswith(("--partition", "--mem"))]
    assert lines.index("module load cuda/12") < lines.index("set -euo pipefail")
    assert lines[-1].startswith("exec python -m ddptrain train experiment=ragged slurm.nodes=3 ")
    assert """'run.name="it'"'"'s"'""" in lines[-1]
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert not (folder / "runs").exists()


def test_what_has_spaces_and_quotes_is_one_option(tmp_path: Path) -> None:
    """Slurm takes options apart as a shell does."""
    folder = Path(shutil.copytree(PROJECT, tmp_path / "my project"))
    done = run([*SUBMIT, """run.name="it's mine\"""", "--dry-run"], folder)
    assert done.returncode == 0, done.stderr
    options = [
        shlex.split(line.removeprefix("#SBATCH "))
        for line in done.stdout.splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert all(len(option) == 1 for option in options)
    assert {f"--chdir={folder}", "--job-name=it's mine"} <= {option for (option,) in options}
    *_, where = shlex.split(done.stdout.splitlines()[-1])
    assert parse([where])[0].value().startswith(f"{folder}/runs/it's mine/")


def test_a_typo_is_answered_before_anything_is_made(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    done = run([*SUBMIT, "slurm.node=3"], folder)
    assert done.returncode == 2
    assert "did you mean slurm.nodes?" in done.stderr
    assert not (folder / "runs").exists()


def test_where_there_is_no_slurm_it_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run([*SUBMIT, f"run.dir={tmp_path / 'run'}"], PROJECT)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "ddptrain: sbatch is not there: load Slurm's module"
    assert not (tmp_path / "run").exists()


def fill(folder: Path) -> None:
    for name in ("mine.py", "conf/experiment/mine.yaml", "package/part.py", "assets/words.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("runs/a/code.diff", "runs/a/code/mine.py", "env/pyvenv.cfg", "env/lib/a.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def copied(target: Path) -> set[str]:
    return {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}


def test_a_copy_has_what_git_knows_and_new_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "project"
    fill(here)
    (here / ".gitignore").write_text("env\nhidden.py\n")
    (here / "large.bin").write_bytes(b"0" * (LARGEST + 1))
    git = ["git", "-C", str(here), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "mine.py", "assets", "large.bin", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (here / "mine.py").write_text("edited")
    (here / "hidden.py").write_text("ignored")
    (here / "notes.txt").write_text("no code")
    monkeypatch.chdir(here)
    assert copy_code(tmp_path / "copy") == ["large.bin"]
    known = {"mine.py", "assets/words.txt", ".gitignore"}
    new = {"conf/experiment/mine.yaml", "package/part.py"}
    assert copied(tmp_path / "copy") == known | new
    assert (tmp_path / "copy" / "mine.py").read_text() == "edited"
    (here / "package").joinpath("deleted.py").write_text("")
    monkeypatch.chdir(here / "package")
    copy_code(tmp_path / "part")
    assert copied(tmp_path / "part") == {"part.py", "deleted.py"}


def test_without_git_a_copy_has_code_and_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "project"
    fill(here)
    monkeypatch.chdir(here)
    assert copy_code(tmp_path / "copy") == []
    assert copied(tmp_path / "copy") == {"mine.py", "conf/experiment/mine.yaml", "package/part.py"}


def test_a_job_reads_configs_and_modules_of_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(PROJECT, tmp_path / "copy"))
    experiment = copy / "conf" / "experiment" / "ragged.yaml"
    experiment.write_text(experiment.read_text().replace("lr: 0.01", "lr: 0.5"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused):
        compose(["experiment=ragged"])
    monkeypatch.setenv(CODE, str(copy))
    assert code_folder() == copy
    assert compose(["experiment=ragged"]).optim["lr"] == 0.5
