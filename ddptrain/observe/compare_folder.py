"""The folder that `ddptrain compare` writes: a picture, and a row for each run for TensorBoard."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from ddptrain.errors import EXIT_COMPLETED, Refused, TrainingError
from ddptrain.files import LASTING
from ddptrain.observe.comparison import MARK, Comparison, RunRecord, is_of_an_earlier_comparison
from ddptrain.observe.loggers import open_writer
from ddptrain.observe.values import number, shown
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say, short

NOTE = "Rows that `ddptrain compare` wrote; the next one into this folder replaces them.\n"
REMEDY = "name another folder with --output"


def compare(paths: list[Path], output: Path | None) -> int:
    """Print how runs compare, then write what takes longer. Raises ``Refused``."""
    comparison = Comparison.of(paths)
    folder = CompareFolder(output or comparison.folder / "compare")
    folder.prepare()
    from ddptrain.observe.table import render, sentence

    for reason in comparison.left_out:
        say(f"left out: {reason}", sys.stderr)
    say(f"{render(comparison)}\n\n{sentence(comparison)}")
    folder.write(comparison)
    say(folder.told())
    return EXIT_COMPLETED


@dataclass(frozen=True)
class CompareFolder:
    """Holds what one comparison left; the next one into the same folder replaces that alone."""

    path: Path

    @property
    def picture(self) -> Path:
        return self.path / "compare.png"

    @property
    def tensorboard(self) -> Path:
        return self.path / MARK.parent

    def prepare(self) -> None:
        """Make the folder, and take away what an earlier comparison left in it.

        Raises ``Refused`` if it holds something else under these names, or cannot be written to.
        """
        with self._told():
            if RunDirectory(self.path).config.exists():
                raise Refused(f"{self.path} is a run's directory; {REMEDY}")
            is_own = is_of_an_earlier_comparison(self.path)
            for path in (self.picture, self.tensorboard):
                if path.exists() and not is_own:
                    raise Refused(f"{path} is there, and not of an earlier comparison; {REMEDY}")
            self.picture.unlink(missing_ok=True)
            if is_own:
                rmtree(self.tensorboard)
            self.tensorboard.mkdir(parents=True)
            (self.path / MARK).write_text(NOTE)

    def write(self, comparison: Comparison) -> None:
        """Draw the picture and write the rows. Raises ``TrainingError`` if that cannot be done."""
        from ddptrain.observe.drawing import draw

        with self._told():
            draw(comparison, self.picture)
            write_rows(comparison, self.tensorboard)

    def told(self) -> str:
        """Where to look."""
        return (
            f"picture      {short(self.picture)}\n"
            f"hparams      tensorboard --logdir {short(self.tensorboard)}"
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = Refused if isinstance(error, LASTING) else TrainingError
            what = f"{self.path} cannot be written to: {error.strerror or error}"
            raise kind(f"{what}; {REMEDY}") from error


def write_rows(comparison: Comparison, folder: Path) -> None:
    """A session of TensorBoard's HPARAMS tab for each run; all tell of the same columns."""
    from torch.utils.tensorboard.summary import hparams as summary

    rows = [(_hparams(comparison, r), _outcome(comparison, r)) for r in comparison.records]
    keys = {key: value for hparams, _ in reversed(rows) for key, value in hparams.items()}
    metrics = {name: 0.0 for _, outcome in rows for name in outcome}
    choices = {
        key: sorted({str(hparams[key]) for hparams, _ in rows if key in hparams})
        for key, value in keys.items()
        if isinstance(value, str)
    }
    # One row's own columns would be those of all: TensorBoard takes the first that it finds.
    columns, _, _ = summary(keys, metrics, choices)  # type: ignore[no-untyped-call]
    for record, (hparams, outcome) in zip(comparison.records, rows, strict=True):
        _, start, end = summary(hparams, outcome)  # type: ignore[no-untyped-call]
        writer = open_writer(folder / comparison.name(record))
        file = writer._get_file_writer()  # type: ignore[no-untyped-call]
        for part in (columns, start, end) if record.is_completed else (columns, start):
            file.add_summary(part)
        for name, (value, step) in outcome.items():
            writer.add_scalar(name, value, step)
        writer.close()


def _hparams(comparison: Comparison, record: RunRecord) -> dict[str, float | str]:
    """The keys that differ, as numbers where all runs that have the key have one."""
    hparams: dict[str, float | str] = {}
    for key in comparison.changed:
        if key in record.config:
            value = number(record.config[key]) if comparison.is_numeric(key) else None
            hparams[key] = shown(record.config, key) if value is None else value
    return hparams


def _outcome(comparison: Comparison, record: RunRecord) -> dict[str, tuple[float, int]]:
    """The final metrics and the best one, named as in a run's own row, each with its step."""
    outcome = {
        f"final/{name}": (value, record.step or 0)
        for name, value in record.metrics.items()
        if math.isfinite(value)
    }
    if best := comparison.best_over(record):
        outcome[f"best/{comparison.metric}"] = best
    return outcome
