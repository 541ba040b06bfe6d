"""The screen: a live bar on a terminal, one plain line a time where there is none."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from ddptrain.observe.loggers import Scalars
from ddptrain.screen import say

if TYPE_CHECKING:
    from rich.progress import Progress


class Screen(Protocol):
    """A logger that also follows every step; ``at`` must cost next to nothing."""

    step: int

    def log(self, step: int, split: str, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class Silent:
    """The screen of a rank that is not the first."""

    step = 0

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class PlainLines:
    """One line per logged step, for files, pipes and batch jobs."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.step = first_step
        self.total_steps = total_steps
        self.first_step = first_step
        self.began = time.monotonic()

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        line = f"step {step}/{self.total_steps}  {format_scalars(split, scalars)}"
        if split == "train" and step > self.first_step:
            per_step = (time.monotonic() - self.began) / (step - self.first_step)
            left = timedelta(seconds=round(per_step * (self.total_steps - step)))
            line += f"  left {left}"
        say(line)

    def close(self) -> None:
        """Every line was flushed."""


class LiveBar:
    """A progress bar with steps, loss, learning rate, samples per second and the time left.

    It redraws itself twice a second from ``step``, which the loop sets, so a step pays nothing.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.step = first_step
        self.text = ""
        self.bar = self._make_bar()
        self.task = self.bar.add_task("training", total=total_steps, completed=first_step, text="")
        self.bar.start()

    def _make_bar(self) -> Progress:
        from rich.console import RenderableType
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        screen = self

        class FromStep(Progress):
            def get_renderable(self) -> RenderableType:
                if self.tasks:
                    self.update(screen.task, completed=screen.step, text=screen.text)
                return super().get_renderable()

        return FromStep(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            refresh_per_second=2,
        )

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        if split == "train":
            self.text = format_scalars("", scalars)
        else:
            self.bar.console.print(f"step {step}  {format_scalars(split, scalars)}")

    def close(self) -> None:
        self.bar.stop()


SHOWN = {"loss": "loss {:.4f}", "lr": "lr {:.2e}", "samples_per_second": "{:,.0f} samples/s"}


def format_scalars(split: str, scalars: Scalars) -> str:
    """The scalars that fit on a line: a few of training, all of an evaluation."""
    if split in ("train", ""):
        parts = [text.format(scalars[name]) for name, text in SHOWN.items() if name in scalars]
        skipped = scalars.get("skipped_steps")
        parts += [f"skipped {skipped:.0f}"] if skipped else []
        rewinds = scalars.get("rewinds")
        parts += [f"rewinds {rewinds:.0f}"] if rewinds else []
    else:
        parts = [f"{split}/{name} {value:.4f}" for name, value in scalars.items()]
    return "  ".join(parts)


def open_screen(total_steps: int, first_step: int) -> Screen:
    """Return rank 0's screen: live on a terminal, else plain."""
    if sys.stdout.isatty():
        return LiveBar(total_steps, first_step)
    return PlainLines(total_steps, first_step)
