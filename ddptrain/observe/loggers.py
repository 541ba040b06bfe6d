"""Where a run's numbers go: a file for machines, and TensorBoard."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ddptrain.errors import Refused
from ddptrain.observe.histograms import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

Scalars = dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A PNG file, with its size in pixels."""

    png: bytes
    width: int
    height: int


class Logger(Protocol):
    """Takes scalars at an optimiser step. Only rank 0 has loggers."""

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        """Record ``scalars`` of ``split`` (train, val, test) after ``step`` optimiser steps."""

    def close(self) -> None:
        """Flush, and write nothing afterwards."""


@runtime_checkable
class ShowsPictures(Protocol):
    """What a logger may also be; pictures are left out of any other."""

    def show(self, step: int, name: str, picture: Picture) -> None:
        """Record a picture, ``<split>/<metric>``, after ``step`` optimiser steps."""


class JsonLines:
    """One object a line, each step once over all resumes; ``metrics.jsonl`` is one such file.

    Lines that cannot be written now are kept, and written before the next one; in ``spill``, a file
    in memory that outlives the process, for the next start if this one is killed before. Which of
    ``header`` and ``record`` the file needs shows when it is opened, which may be later as well:
    what it begins with, and the line of the step that was ``resumed_at``, where it is not there.
    """

    def __init__(
        self,
        file: Path,
        resumed_at: int,
        spill: Path | None = None,
        header: dict[str, Any] | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.file = file
        self.resumed_at = resumed_at
        self.spill = spill
        self.header = header
        self.record = record
        self.descriptor: int | None = None
        self.size = 0
        self.waiting = b""
        lines = read_json_lines(spill) if spill is not None else []
        self.spilled = [line for line in lines if line.get("step", 0) <= resumed_at]
        self.is_spilled = bool(self.spilled)
        with suppress(OSError):  # told with the first line
            self._open()

    def _open(self) -> int:
        if self.descriptor is None:
            last = _cut(self.file, self.resumed_at) if self.file.exists() else None
            there = self.file.read_bytes() if self.file.exists() else b""
            before = b"".join(map(_encoded, self._owed(there, last)))
            self.descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self.size = len(there)
            self.waiting = before + self.waiting
            self.spilled = []
        return self.descriptor

    def _owed(self, there: bytes, last: int | None) -> list[dict[str, Any]]:
        """What belongs between the lines that are ``there``, and those of this start."""
        written = set(there.splitlines(keepends=True))
        owed = [line for line in self.spilled if _encoded(line) not in written]
        begins = owed and self.header is not None and owed[0].keys() == self.header.keys()
        if self.header is not None and not there and not begins:
            return [self.header]  # which is of this step: what there may be before it goes
        last = owed[-1].get("step") if owed else last
        if self.record is not None and last != self.record["step"]:
            owed.append(self.record)
        return owed

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. Raises ``OSError``, and has it wait, if the disk does not take it."""
        self.waiting += _encoded(line)
        self.flush()

    def flush(self) -> None:
        """Write what waits, all of it or nothing: half a line would spoil the one after it."""
        try:
            descriptor = self._open()
        except OSError:
            self._keep()
            raise
        try:
            if os.write(descriptor, self.waiting) < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
        except OSError:
            self._keep()
            os.ftruncate(descriptor, self.size)
            raise
        self.size += len(self.waiting)
        self.waiting = b""
        if self.is_spilled:
            self._keep()

    def _keep(self) -> None:
        """Have ``spill`` hold what waits, if anything does."""
        if self.spill is not None:
            kept = b"".join(map(_encoded, self.spilled)) + self.waiting
            self.is_spilled = bool(kept)
            beside = self.spill.with_name(f".{self.spill.name}.tmp")
            with suppress(OSError):
                self.spill.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                beside.write_bytes(kept)  # of which a kill may leave a part
                beside.replace(self.spill)

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self.write({"step": step, "split": split, **finite})

    def close(self) -> None:
        try:
            if self.waiting:
                self.flush()
        finally:
            if self.descriptor is not None:
                os.close(self.descriptor)
                self.descriptor = None


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a crash cut short is left out."""
    objects = []
    text = file.read_text(errors="replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return objects


def _cut(file: Path, step: int) -> int | None:
    """Cut off what is said of later steps; return the last one that is left.

    In place, for which a full disk has room as well: lines are in the order of their steps.
    """
    end = 0
    last: int | None = None
    kept: int | None = None
    with file.open("rb+") as stream:
        for line in stream:
            with suppress(ValueError, TypeError, KeyError):  # damaged: a reader passes over it
                last = json.loads(line)["step"]
            if not line.endswith(b"\n") or (last is not None and last > step):
                break
            end, kept = end + len(line), last
        stream.truncate(end)
    return kept


@dataclass(frozen=True)
class _Quiet:
    """What is told of threads that fail, but those of TensorBoard: their writer raises it too."""

    before: Callable[[threading.ExceptHookArgs], Any]

    def __call__(self, failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self.before(failed)


def open_writer(folder: Path, purge: int | None = None) -> SummaryWriter:
    """Begin event files; of a disk that is full the writer tells, and no thread beside it."""
    from torch.utils.tensorboard import SummaryWriter

    if not isinstance(threading.excepthook, _Quiet):
        threading.excepthook = _Quiet(threading.excepthook)
    return SummaryWriter(str(folder), purge_step=purge)


class TensorBoard:
    """Event files: curves against optimiser steps, the config as text, hparams at the end.

    They are begun with the first number: their package is slow to import, and a start waits for it.
    """

    def __init__(self, folder: Path, resumed_at: int, config_text: str) -> None:
        # Also from step 0: a start that saved nothing may have left curves.
        begun_before = any(folder.glob("events.*"))
        self.purge = resumed_at + 1 if resumed_at else 0 if begun_before else None
        self.folder = folder
        self.config_text = None if resumed_at else config_text
        self.opened: SummaryWriter | None = None

    def _writer(self) -> SummaryWriter:
        if self.opened is None:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except Exception as error:  # whatever else is installed may not go with it
                why = f"log.tensorboard=true, but it cannot be imported: {error!r}"
                raise Refused(f"{why}; mend that, or set it to false") from error
            self.opened = open_writer(self.folder, self.purge)
            self.purge = None
            if self.config_text is not None:
                self.opened.add_text("config", f"```yaml\n{self.config_text}\n```")
                self.config_text = None
        return self.opened

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        try:
            for name, value in scalars.items():
                self._writer().add_scalar(f"{split}/{name}", value, step)
        except OSError:
            self.opened = None  # one that has failed once takes nothing any more
            raise

    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._writer().add_figure(name, figure, step)

    def show(self, step: int, name: str, picture: Picture) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        image = Summary.Image(
            width=picture.width,
            height=picture.height,
            colorspace=4,  # with transparency
            encoded_image_string=picture.png,
        )
        try:
            writer = self._writer()._get_file_writer()  # type: ignore[no-untyped-call]
            writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        except OSError:
            self.opened = None
            raise

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        limits, counts = histogram.buckets()
        if not limits:
            return  # nothing in it is finite
        numbers = limits[0], limits[-1], sum(counts), histogram.sum, histogram.squares
        try:
            self._writer().add_histogram_raw(name, *numbers, limits, counts, step)
        except OSError:
            self.opened = None
            raise

    def finish(self, step: int, hparams: dict[str, Any], outcome: Scalars) -> None:
        """Write the run as a row of the HPARAMS tab: its config and ``outcome``."""
        from torch.utils.tensorboard.summary import hparams as summary

        plain = {
            k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()
        }
        writer = self._writer()._get_file_writer()  # type: ignore[no-untyped-call]
        for part in summary(plain, outcome):  # type: ignore[no-untyped-call]
            writer.add_summary(part)
        for name, value in outcome.items():
            self._writer().add_scalar(name, value, step)

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
