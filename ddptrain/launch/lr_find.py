"""`ddptrain lr-find`: how the loss goes while the learning rate rises, and which rate it suggests.

The range test of Smith, *Cyclical Learning Rates for Training Neural Networks*, WACV 2017: a few
steps of the training, over all ranks, at rates that grow from one to the next by the same factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ddptrain.build import build_trainer
from ddptrain.config import Config
from ddptrain.errors import EXIT_COMPLETED, Refused, TrainingError
from ddptrain.files import replace_bytes
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.observe.pictures import render
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place, choose_interface
from ddptrain.rules import check_world_size
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 120
LOWEST, HIGHEST = 1e-7, 10.0
KEPT = 0.9
"""How much of the smoothed loss stays after a step."""
DIVERGED = 4.0
"""So many times the best smoothed loss ends the test."""
FIRST = 10
"""Steps that a suggestion does not come from: the smoothed loss is that of a few then."""
PICTURE = Path("lr-find.png")


@dataclass(frozen=True)
class Curve:
    """The loss at each rate, and smoothed; the last may be infinite, or NaN."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls fastest, in two digits.

        Raises ``TrainingError`` if it falls nowhere.
        """
        smoothed = np.array(self.smoothed)
        lowest = int(np.nanargmin(smoothed[FIRST:])) + FIRST if len(smoothed) > FIRST + 2 else 0
        if lowest < FIRST + 2 or smoothed[lowest] > 0.99 * smoothed[FIRST]:
            raise TrainingError(
                f"the loss does not fall at any rate from {LOWEST:g} to {self.rates[-1]:.2g}: see "
                f"{PICTURE}, and whether the model can learn at all"
            )
        slopes = np.gradient(smoothed[: lowest + 1], np.log(self.rates[: lowest + 1]))
        return float(f"{self.rates[int(slopes[FIRST:].argmin()) + FIRST]:.1e}")

    def draw(self, axes: Axes) -> None:
        axes.plot(self.rates, self.losses, ".", markersize=3, color="0.7", label="of each step")
        axes.plot(self.rates, self.smoothed, linewidth=1.5, label="smoothed")
        known = [loss for loss in self.smoothed if math.isfinite(loss)]
        lowest = min(loss for loss in (*known, *self.losses) if math.isfinite(loss))
        room = 0.05 * (max(known) - lowest) or 1.0
        axes.set_ylim(lowest - room, min(max(known), 2 * known[0]) + room)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3)


def lr_find(config: Config, place: Place) -> int:
    """Be one rank of the test; rank 0 tells what came of it. Raises ``Refused``."""
    if not isinstance(config.optim.get("lr"), int | float):
        raise Refused("optim.lr: not set, so there is no rate to find")
    check_world_size(config, place.world_size)
    device = choose_device(config.train.device.name, place)
    choose_interface(config.launch.interface)
    ranks = Ranks(place, device, TIMEOUT)
    _simplify(config)
    with TemporaryDirectory(prefix="ddptrain-") as folder:
        curve = measure(build_trainer(config, ranks, RunDirectory(Path(folder)), Phases()))
    ranks.leave()
    if ranks.is_first:
        report(curve, str(config.run.name))
    return EXIT_COMPLETED


def _simplify(config: Config) -> None:
    """Leave out what a few steps need not, or would be disturbed by."""
    config.restarts = 1
    config.train.max_steps, config.train.max_epochs = STEPS, None
    config.schedule = {"_target_": "ddptrain.optim.schedules.Constant"}
    config.data.val = config.data.test = config.eval.every_steps = None
    config.checkpoint.keep_best = 0
    config.train.early_stop.metric = config.log.fingerprint_every = None
    config.train.spike.action = config.train.average.kind = None


def measure(trainer: Trainer) -> Curve:
    """Take the steps; alike on every rank, for the losses are those of all ranks together."""
    step, curve = trainer.step, Curve([], [], [])
    base, best, mean = step.base_rates[0], math.inf, 0.0
    step.schedule = lambda number, _: _rate(number) / base
    trainer.fetch()
    for number in range(STEPS):
        step(number, trainer.batches)
        step.heard(False, wait=False)
        count, total = step.module.window.account[:2].tolist()
        step.module.window.clear()
        loss = total / count if count else math.nan  # of a step that was passed over
        mean = KEPT * mean + (1 - KEPT) * loss
        smoothed = mean / (1 - KEPT ** (number + 1))
        curve.rates.append(_rate(number))
        curve.losses.append(loss)
        curve.smoothed.append(smoothed)
        best = min(best, smoothed)
        if not math.isfinite(loss) or smoothed > best + (DIVERGED - 1) * abs(best):
            break
    return curve


def _rate(number: int) -> float:
    return float(LOWEST * (HIGHEST / LOWEST) ** (number / (STEPS - 1)))


def report(curve: Curve, name: str) -> None:
    """Draw the curve, and say which rate it suggests, as a line of a config."""
    try:
        replace_bytes(PICTURE, render(curve.draw, f"{name}: learning rate").png)
    except OSError as error:
        raise TrainingError(f"{PICTURE} cannot be written: {error.strerror}") from error
    end = f"diverges at {curve.rates[-1]:.2g}" if len(curve.rates) < STEPS else "does not diverge"
    rate = curve.suggestion()
    say(f"curve        {PICTURE}: {end}\nsteepest at  {rate:g}\nsuggestion   optim.lr={rate:g}")
