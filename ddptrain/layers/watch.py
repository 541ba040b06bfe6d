"""Watches a step every so many, and tells what was seen: numbers, pictures, and what is wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ddptrain import pulse
from ddptrain.layers.activations import together
from ddptrain.layers.faults import Fault, Layer, find
from ddptrain.layers.noise import Noise, advise, mean
from ddptrain.layers.sight import Parameter, Share, Sight
from ddptrain.observe.histograms import Histogram
from ddptrain.observe.observer import Observer
from ddptrain.parallel.ranks import Ranks
from ddptrain.screen import say
from ddptrain.step import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What was seen of the step after which ``done`` are done, by every rank."""

    done: int
    sight: Sight
    shares: list[Share]


class Layers:
    """Looks into the layers in every ``every``-th step; with None it does nothing, ever.

    What it knows of earlier steps is in the run's ``layers.jsonl``, and nowhere else.
    """

    def __init__(
        self, step: Step, ranks: Ranks, observer: Observer, every: int | None, log_every: int
    ) -> None:
        """``log_every`` is how many steps are between two log lines."""
        self.step = step
        self.ranks = ranks
        self.observer = observer
        self.every = every
        self.log_every = log_every
        self.noises: dict[int, Noise] = {}  # by steps done; on rank 0
        self.told: set[tuple[str, str]] = set()
        self.seen: Seen | None = None  # that is still to be told

    def restore(self) -> None:
        """Know again what the run's log has of the steps that are done."""
        self.seen = None
        if self.every is None:
            return
        self.noises, self.told = {}, set()
        for line in self.observer.begin_layers():
            if noise := line.get("noise"):
                self.noises[line["step"]] = Noise(**noise)
            self.told |= {(kind, layer) for kind, layer in line.get("faults", [])}

    def watch(self, step: int) -> AbstractContextManager[None]:
        """What step ``step`` (from 0) is to be taken in; ``tell`` tells of it."""
        if self.every is None or (step + 1) % self.every:
            return nullcontext()
        return self._watched(step + 1)

    @contextmanager
    def _watched(self, done: int) -> Iterator[None]:
        sight = Sight(self.step, self.ranks.is_first)
        with ExitStack() as hooks:
            sight.register(hooks)
            yield
        pulse.enter("looking into the layers")
        self.seen = Seen(done, sight, self.ranks.gather(sight.share()))

    def tell(self, done: int) -> None:
        """Tell of the step after which ``done`` are done, if it was looked into and not told of.

        That is, once it is known to count, or to be the one at fault: on a GPU a step may have been
        taken behind one that the run goes back from, and is taken again.
        """
        if self.seen is None or self.seen.done != done:
            return
        sight, shares, self.seen = self.seen.sight, self.seen.shares, None
        if self.ranks.is_first:
            self._tell(done, sight, shares)

    def forget(self) -> None:
        """Tell nothing of a step that does not count: the run has gone back."""
        self.seen = None

    def _tell(self, done: int, sight: Sight, shares: list[Share]) -> None:
        micro_batches = {i: m for share in shares for i, m in share.micro_batches.items()}
        outputs = together([share.outputs for share in shares])
        noise = sight.noise(micro_batches)
        if noise is not None and math.isfinite(noise.trace) and math.isfinite(noise.signal):
            self.noises[done] = noise
        parameters = sight.parameters()
        given = {name: seen.histogram() for name, seen in outputs.items()}
        dead = {n: (s.dead, s.values) for n, s in outputs.items() if s.dead is not None}
        broken = None
        if not all(math.isfinite(each.loss) for each in micro_batches.values()):
            broken = next((name for name, seen in given.items() if seen.not_finite), None)
        faults = find(_layers(parameters, given), dead, broken)
        line: dict[str, Any] = {
            "step": done,
            "gradients": {name: _finite(p.norm) for name, p in parameters.items()},
            "updates": {name: _finite(p.ratio) for name, p in parameters.items()},
            "activations": {name: _finite(seen.rms) for name, seen in given.items()},
            "dead": {name: share for name, (share, _) in dead.items()},
            "noise": vars(noise) if noise is not None and done in self.noises else None,
            "faults": [[fault.kind, fault.layer] for fault in faults],
        }
        histograms = {f"gradients/{name}": p.gradient for name, p in parameters.items()}
        histograms |= {f"activations/{name}": seen for name, seen in given.items()}
        self.observer.layers(line, histograms)
        self._warn(done, faults)

    def _warn(self, done: int, faults: list[Fault]) -> None:
        """Say each fault of each layer once."""
        for fault in faults:
            if (fault.kind, fault.layer) not in self.told:
                self.told.add((fault.kind, fault.layer))
                logger.warning("step %d: %s", done, fault.sentence)

    def scalars(self, done: int) -> dict[str, float]:
        """What the log line after ``done`` steps tells: the noise scale since the one before."""
        since = (done - 1) // self.log_every * self.log_every
        noise = mean(noise for step, noise in self.noises.items() if since < step <= done)
        scale = None if noise is None else noise.scale
        return {} if scale is None else {"noise_scale": scale}

    def conclude(self, done: int) -> None:
        """Say what the second half of a run tells of its batch size, if that was measured."""
        late = [noise for step, noise in self.noises.items() if step > done // 2]
        if (noise := mean(late)) is not None:
            say(advise(noise, len(late)))


def _layers(parameters: dict[str, Parameter], given: dict[str, Histogram]) -> list[Layer]:
    """The layers with weights, in the order of the forward pass as far as that was seen."""
    squares: dict[str, float] = {}
    numbers: dict[str, int] = {}
    for name, parameter in parameters.items():
        if not parameter.is_weight:
            continue
        layer = name.rpartition(".")[0]
        histogram = parameter.gradient
        squares[layer] = squares.get(layer, 0.0) + histogram.squares
        numbers[layer] = numbers.get(layer, 0) + histogram.total - histogram.zeros
    seen = [layer for layer in given if layer in squares]
    names = seen if len(seen) == len(squares) else list(squares)
    return [
        Layer(
            name,
            _finite(math.sqrt(squares[name] / numbers[name]) if numbers[name] else 0.0),
            _finite(given[name].rms) if name in given else None,
        )
        for name in names
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
