"""Everything that a run tells while it goes, in one place for the loop to call."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ddptrain.config import Config, flatten, to_plain
from ddptrain.files import read_json, replace_text
from ddptrain.observe.console import Screen, Silent, open_screen
from ddptrain.observe.figures import Draw, drawn, save_figure
from ddptrain.observe.histograms import Histogram, ShowsHistograms
from ddptrain.observe.history import History
from ddptrain.observe.loggers import (
    JsonLines,
    Logger,
    Scalars,
    ShowsPictures,
    TensorBoard,
    read_json_lines,
)
from ddptrain.observe.phases import Phases
from ddptrain.observe.pictures import Plots
from ddptrain.origin import versions
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say
from ddptrain.stored import changes, computed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)


class Observer:
    """Hands numbers on to the screen, ``metrics.jsonl`` and TensorBoard; silent but on rank 0."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        phases: Phases,
        *,
        speaks: bool,
        world_size: int,
        guard: Callable[[], None] | None = None,
    ) -> None:
        """``guard`` raises if this process may no longer write to the run's directory."""
        self.guard = guard
        self.config = config
        self.run = run
        self.phases = phases
        self.speaks = speaks
        self.world_size = world_size
        self.screen: Screen = Silent()
        self.loggers: list[Logger] = []
        self.board: TensorBoard | None = None
        self.fingerprints: JsonLines | None = None
        self.anomalies: JsonLines | None = None
        self.layer_lines: JsonLines | None = None
        self.resumed_at = 0
        self.told: set[str] = set()
        self.said: set[str] = set()
        self.history = History(run)
        self.plots = Plots(run.plots)

    def open(self, resumed_at: int, total_steps: int, known: int = 0) -> None:
        """Begin, or go on after ``resumed_at`` steps: what was told of later ones is taken back.

        ``known`` is how many steps the last start is known to have finished.
        """
        if not self.speaks:
            return
        before = self.history.ranks_before()
        with self._surviving(self.history):
            self.history.begin(resumed_at, self.world_size, known)
        if resumed_at < total_steps:  # or it is done, and what was told of that stays
            with self._surviving(self):
                self.run.result.unlink(missing_ok=True)
        spilled = self.run.memories()[0] / self.run.metrics.name
        lines = read_json_lines(self.run.metrics) + read_json_lines(spilled)
        self.told = {str(line.get("split")) for line in lines if line.get("step") == resumed_at}
        self.resumed_at = resumed_at
        if before is not None and not resumed_at:
            say(f"starting {self.run.path} again from step 0: it has no checkpoint yet")
        if resumed_at:
            line = f"continuing {self.run.path} after {resumed_at} of {total_steps} steps"
            if before not in (None, self.world_size):
                line += (
                    f", on {self.world_size} rank(s) instead of {before}: the same samples, global "
                    "batch and schedule, shared out anew"
                )
            say(line)
            then = self.run.provenance().get("versions", {})
            for change in changes(then, versions()):
                logger.warning("the run began with other versions: %s", change)
        self.loggers = [self._lines(self.run.metrics, resumed_at)]
        if self.config.log.tensorboard:
            text = yaml.safe_dump(to_plain(self.config), sort_keys=False)
            with self._surviving(self):
                self.board = TensorBoard(self.run.tensorboard, resumed_at, text)
                self.loggers.append(self.board)
        if self.run.anomalies.exists():
            self.anomalies = self._lines(self.run.anomalies, resumed_at - 1)
        self.screen = open_screen(total_steps, resumed_at)
        self.loggers.append(self.screen)

    def _lines(self, file: Path, resumed_at: int, **of: dict[str, Any] | None) -> JsonLines:
        return JsonLines(file, resumed_at, self.run.memories()[0] / file.name, **of)

    def has_saved(self) -> bool:
        """Whether a start of the run has ended in a way that leaves a checkpoint on disk."""
        ended = self.run.outcome()
        return ended.get("status") in ("completed", "stopped") and ended.get("step", 0) > 0

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
            with self._surviving(self):
                replace_text(self.run.data, json.dumps(data, indent=1))

    @staticmethod
    def _compare_data(data: dict[str, Any], file: Path, what: str) -> None:
        before = read_json(file) or data
        for change in changes(flatten(before), flatten(data)):
            logger.warning("the data differs from %s: data.%s", what, change)

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        if self._is_told(step, split):
            return
        self._may_write()
        with self._surviving(self.history):
            self.history.write()
        for each in self.loggers:
            with self._surviving(each):
                each.log(step, split, scalars)

    def _is_told(self, step: int, split: str) -> bool:
        """Whether it is a repeated evaluation of the step that this run was resumed at."""
        return step == self.resumed_at and split in self.told

    def show(self, step: int, split: str, drawings: dict[str, Callable[[Axes], Any]]) -> None:
        """Draw what an evaluation gave to look at, once its numbers are logged.

        The newest is a file in ``plots/``; loggers that can show pictures get each.
        """
        for metric, draw in drawings.items():
            name = f"{split}/{metric}"
            if (picture := self.plots.draw(name, step, draw)) is None:
                continue
            self._may_write()
            with self._surviving(self.plots):
                self.plots.keep(name, picture)
            for each in [] if self._is_told(step, split) else self.loggers:
                if isinstance(each, ShowsPictures):
                    with self._surviving(each):
                        each.show(step, name, picture)

    def _may_write(self) -> None:
        if self.guard is not None and self.speaks:
            self.guard()

    @contextmanager
    def _surviving(self, each: object) -> Iterator[None]:
        """A logger that cannot write stops no training; each cause is said once."""
        try:
            yield
        except OSError as error:
            cause = f"{type(each).__name__} {error.errno}"
            if cause not in self.said:
                self.said.add(cause)
                logger.warning("%s cannot write: %s; training goes on", type(each).__name__, error)

    def begin_fingerprints(self, header: dict[str, Any], record: dict[str, Any] | None) -> None:
        """Open the file of fingerprints; ``header`` says what its lines are of.

        ``record`` is that of the step that the run goes on from.
        """
        if self.speaks:
            file, at = self.run.fingerprints, self.resumed_at
            self.fingerprints = self._lines(file, at, header=header, record=record)
            with self._surviving(self.fingerprints):
                self.fingerprints.flush()

    def fingerprint(self, record: dict[str, Any] | None) -> None:
        if self.fingerprints is not None and record is not None:
            self._may_write()
            with self._surviving(self.fingerprints):
                self.fingerprints.write(record)

    def begin_layers(self) -> list[dict[str, Any]]:
        """Open the file of what was seen in layers; return the lines of steps that are done."""
        if not self.speaks:
            return []
        self.layer_lines = self._lines(self.run.layers, self.resumed_at)
        with self._surviving(self.layer_lines):
            self.layer_lines.flush()
        return read_json_lines(self.run.layers)

    def layers(self, line: dict[str, Any], histograms: dict[str, Histogram]) -> None:
        """Record what was seen in layers; loggers that can show histograms get each, by name."""
        self._may_write()
        if self.layer_lines is not None:
            with self._surviving(self.layer_lines):
                self.layer_lines.write(line)
        for each in self.loggers:
            if isinstance(each, ShowsHistograms):
                with self._surviving(each):
                    for name, histogram in histograms.items():
                        each.histogram(line["step"], name, histogram)

    def anomaly(self, line: dict[str, Any]) -> None:
        """Note that something was wrong with the step that ``line`` names."""
        if self.speaks:
            self._may_write()
            with self._surviving(self):
                if self.anomalies is None:
                    self.anomalies = self._lines(self.run.anomalies, line["step"])
                self.anomalies.write(line)

    def divergence(self, step: int, report: str) -> None:
        """Tell that the replicas went back to what they were after ``step`` steps."""
        if self.speaks:
            report += f"; all ranks go on from the state after {step} steps, when they were equal"
            logger.warning("%s", report)
            self.anomaly(
                {"step": step, "fault": "divergence", "action": "rewind", "report": report}
            )

    def ends_early(self, step: int, total_steps: int, why: str) -> None:
        if self.speaks and step < total_steps:
            say(f"ends after step {step} of {total_steps}: {why}")

    def finish(self, step: int, metrics: Scalars, best: Scalars, figures: Draw) -> None:
        """Write the task's pictures, and the run's row for the HPARAMS tab; close everything."""
        for name, figure in drawn(figures, self.run.metrics).items():
            with self._surviving(self.run):
                save_figure(figure, self.run.plots / f"{name}.png")
            if self.board is not None:
                with self._surviving(self.board):
                    self.board.figure(step, name, figure)
        if self.board is not None:
            outcome = {f"final/{name}": value for name, value in metrics.items()}
            outcome |= {f"best/{name}": value for name, value in best.items()}
            with self._surviving(self.board):
                self.board.finish(step, computed(self.config), outcome)
        self.close()

    def close(self) -> None:
        """Close every logger; one that cannot be closed is noted, and hides no other error."""
        with self._surviving(self.history):
            self.history.close()
        for each in self.loggers:
            try:
                with self._surviving(each):
                    each.close()
            except Exception:
                logger.exception("%s could not be closed", type(each).__name__)
        self.loggers = []
        for file in (self.fingerprints, self.anomalies, self.layer_lines):
            if file is not None:
                with self._surviving(file):
                    file.close()
        self.fingerprints = self.anomalies = self.layer_lines = None
