"""What the README tells a newcomer to paste works when pasted."""

from __future__ import annotations

import re
from pathlib import Path

from launching import DDPTRAIN, read_result, run

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(text for text in blocks if containing in text)


def test_own_model_on_own_data(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(block("python", "class Spirals"))
    config = tmp_path / "conf" / "experiment" / "spirals.yaml"
    config.write_text(block("yaml", "mine.Arms"))
    command = block("console", "experiment=spirals").removeprefix("$ ddptrain ").split()
    finished = run([*DDPTRAIN, *command, "train.max_epochs=30"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    (run_dir,) = (tmp_path / "runs" / "spirals").iterdir()
    assert read_result(run_dir)["metrics"]["test/loss"] < 0.1


def test_every_command_named_exists(tmp_path: Path) -> None:
    listed = run([*DDPTRAIN, "--help"], tmp_path).stdout
    for command in set(re.findall(r"\$ ddptrain ([\w-]+)", README)):
        assert re.search(rf"^ +{command}( |$)", listed, re.MULTILINE), command


def test_typo_is_answered_as_shown(tmp_path: Path) -> None:
    shown = re.search(r"\$ ddptrain (train .*)\n(ddptrain: unknown.*)\n", README)
    assert shown is not None
    finished = run([*DDPTRAIN, *shown[1].split()], tmp_path)
    assert finished.stderr.strip() == shown[2]


def test_each_decision_is_a_paragraph_of_its_own() -> None:
    decisions = (Path(__file__).parent.parent / "docs" / "decisions.md").read_text()
    assert not re.findall(r"[^\n]\n(\*\*.*)", decisions)
