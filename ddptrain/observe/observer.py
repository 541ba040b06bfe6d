"""Everything that a run tells while it goes, in one place for the loop to call."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import yaml

from ddptrain.compose import flatten, to_plain
from ddptrain.config import Config
from ddptrain.files import replace_text
from ddptrain.observe.console import Screen, Silent, open_screen
from ddptrain.observe.loggers import JsonLines, Logger, Scalars, TensorBoard, read_json_lines
from ddptrain.observe.phases import Phases
from ddptrain.run_directory import RunDirectory, changes, computed, versions

logger = logging.getLogger(__name__)


class Observer:
    """Hands numbers on to the screen, ``metrics.jsonl`` and TensorBoard; silent but on rank 0."""

    def __init__(self, config: Config, run: RunDirectory, phases: Phases, speaks: bool) -> None:
        self.config = config
        self.run = run
        self.phases = phases
        self.speaks = speaks
        self.screen: Screen = Silent()
        self.loggers: list[Logger] = []
        self.board: TensorBoard | None = None
        self.resumed_at = 0
        self.told: set[str] = set()
        self.history = History(run.path / "attempts.jsonl")

    def open(self, resumed_at: int, total_steps: int) -> None:
        """Begin, or go on after ``resumed_at`` steps: what was told of later ones is taken back."""
        if not self.speaks:
            return
        self.history.begin(resumed_at, self.run.metrics)
        lines = read_json_lines(self.run.metrics)
        self.told = {line["split"] for line in lines if line["step"] == resumed_at}
        self.resumed_at = resumed_at
        if resumed_at:
            print(
                f"continuing {self.run.path} after {resumed_at} of {total_steps} steps", flush=True
            )
            then = self.run.provenance().get("versions", {})
            for change in changes(then, versions()):
                logger.warning("the run began with other versions: %s", change)
        self.loggers = [JsonLines(self.run.metrics, resumed_at)]
        if self.config.log.tensorboard:
            text = yaml.safe_dump(to_plain(self.config), sort_keys=False)
            self.board = TensorBoard(self.run.tensorboard, resumed_at, text)
            self.loggers.append(self.board)
        self.screen = open_screen(total_steps, resumed_at)
        self.loggers.append(self.screen)

    def at(self, step: int) -> None:
        self.screen.step = step

    def first_step_done(self, data: dict[str, Any]) -> None:
        """Log how long the start took; compare the data with what the run began with."""
        self.phases.mark("first step")
        logger.info("%s", self.phases)
        self._compare_data(data, self.run.data, "what this run began with")
        if original := self.run.provenance().get("rerun_of"):
            self._compare_data(data, RunDirectory(Path(original)).data, f"its original {original}")
        if not self.run.data.exists():
            replace_text(self.run.data, json.dumps(data, indent=1))

    @staticmethod
    def _compare_data(data: dict[str, Any], file: Path, what: str) -> None:
        before = json.loads(file.read_text()) if file.exists() else data
        for change in changes(flatten(before), flatten(data)):
            logger.warning("the data differs from %s: data.%s", what, change)

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        if step == self.resumed_at and split in self.told:
            return  # a repeated evaluation of the step that this run was resumed at
        for each in self.loggers:
            each.log(step, split, scalars)

    def finish(self, step: int, metrics: Scalars, best: Scalars) -> None:
        """Write the run's row for TensorBoard's HPARAMS tab, and close everything."""
        if self.board is not None:
            outcome = {f"final/{name}": value for name, value in metrics.items()}
            outcome |= {f"best/{name}": value for name, value in best.items()}
            self.board.finish(step, computed(self.config), outcome)
        self.close()

    def close(self) -> None:
        """Close every logger; one that cannot be closed is noted, and hides no other error."""
        for each in self.loggers:
            try:
                each.close()
            except Exception:
                logger.exception("%s could not be closed", type(each).__name__)
        self.loggers = []


class History:
    """The starts of a run: how often it was resumed, and which steps had to be done again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.began = time.monotonic()

    def begin(self, resumed_at: int, metrics: Path) -> None:
        """Note a start. Steps logged past ``resumed_at`` by the last one are lost."""
        last = max((line.get("step", 0) for line in read_json_lines(metrics)), default=0)
        start = {"time": time.time(), "step": resumed_at, "lost_steps": max(0, last - resumed_at)}
        with self.file.open("a") as stream:
            stream.write(json.dumps(start) + "\n")

    def totals(self) -> dict[str, int]:
        starts = list(read_json_lines(self.file))
        return {
            "restarts": max(0, len(starts) - 1),
            "lost_steps": sum(start["lost_steps"] for start in starts),
        }
