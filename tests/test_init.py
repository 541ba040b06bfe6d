"""`ddptrain init` writes a project that passes its own tests, and trains on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from launching import DDPTRAIN, read_result, run


def test_a_new_project_passes_its_tests_and_trains_on_two_ranks(tmp_path: Path) -> None:
    done = run([*DDPTRAIN, "init", "my-project"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cd my-project && ddptrain train experiment=mine" in done.stdout
    project = tmp_path / "my-project"
    assert (project / ".gitignore").read_text().startswith("runs/")
    tested = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], project)
    assert tested.returncode == 0, tested.stdout
    two = ["train.max_epochs=1", "launch.nproc_per_node=2", "run.dir=two"]
    trained = run([*DDPTRAIN, "train", "experiment=mine", *two], project)
    assert trained.returncode == 0, trained.stderr
    assert read_result(project / "two")["world_size"] == 2


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("precious")
    done = run([*DDPTRAIN, "init", str(tmp_path)], tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"ddptrain: {tmp_path}: it is not empty; name a new folder\n"
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]
