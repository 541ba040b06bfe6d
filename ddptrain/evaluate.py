"""An evaluation: every sample of a split once, the metrics over all ranks exact."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ddptrain import pulse
from ddptrain.data.fetch import Fetcher
from ddptrain.data.named import names_of
from ddptrain.data.plan import MicroBatch
from ddptrain.errors import TrainingError
from ddptrain.generators import key_generators
from ddptrain.keys import derive
from ddptrain.parallel.ranks import Ranks
from ddptrain.tasks.pictures import Picture
from ddptrain.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torchmetrics import Metric

logger = logging.getLogger(__name__)


class Evaluation:
    """Runs a task's metrics over one split, its micro-batches shared out among the ranks.

    No rank pads and no sample counts twice: a rank may have no micro-batch at all. The states of
    the metrics are gathered in rank order, which is the split's order, and merged on every rank;
    small sums in floating point by micro-batch, so that the number of ranks does not show in them.
    What is not a number, but can be drawn, is in ``pictures`` afterwards, on rank 0.
    """

    def __init__(
        self,
        task: Task,
        fetcher: Fetcher,
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.task = task
        self.fetcher = fetcher
        self.ranks = ranks
        self.autocast = autocast
        self.batches = fetcher.fetch(self._micro_batches())
        self.pictures: dict[str, Callable[[Axes], Any]] = {}
        self.warned: set[tuple[str, str]] = set()

    def _micro_batches(self) -> list[MicroBatch]:
        plan = self.fetcher.source.plan
        return plan.micro_batches(0, self.ranks.rank, self.ranks.world_size)

    @staticmethod
    def load() -> None:
        """Import what metrics need, which takes seconds: once, and not in a thread beside training.

        What comes along with it may draw from, or seed, the generators that samples draw from.
        """
        if "torchmetrics" not in sys.modules:
            before = pulse.now.phase
            pulse.enter(pulse.START_UP)
            import_module("torchmetrics")
            pulse.enter(before)

    def names(self) -> list[str]:
        """The names of the metrics that are numbers."""
        self.load()
        return [name for name, m in self.task.metrics().items() if not isinstance(m, Picture)]

    def run(self) -> dict[str, float]:
        """Return the metrics that are numbers by name; every rank must call it, and all get them.

        Raises ``TrainingError`` if one is neither a number nor can be drawn.
        """
        self.load()
        metrics = {name: m.to(self.ranks.device) for name, m in self.task.metrics().items()}
        for metric in metrics.values():
            # The states are merged here, once: torchmetrics must not add up the ranks again.
            metric.distributed_available_fn = _not_distributed
        addends = {name: Addends(metric) for name, metric in metrics.items()}
        source = self.fetcher.source
        with _in_eval_mode(self.task), torch.inference_mode(), self.autocast():
            for micro_batch, batch in zip(self._micro_batches(), self.batches, strict=True):
                pulse.enter(f"evaluation of {source.name}")
                key = derive(source.plan.seed, f"evaluation/{source.name}", micro_batch.index)
                key_generators(key, self.ranks.device)
                self.task.update(metrics, batch)
                for of_metric in addends.values():
                    of_metric.take()
        moved: dict[int, Tensor] = {}
        return self._compute(metrics, {name: _state(addends[name], moved) for name in metrics})

    def _compute(self, metrics: dict[str, Metric], own: dict[str, State]) -> dict[str, float]:
        of_ranks = self.ranks.gather(own)
        for rank, states in enumerate(of_ranks):
            if states.keys() != metrics.keys():
                difference = sorted(states.keys() ^ metrics.keys())
                raise TrainingError(
                    f"evaluation: rank {rank} has other metrics than rank {self.ranks.rank}: "
                    f"{', '.join(difference)}; metrics() must return the same on every rank"
                )
        pulse.enter(pulse.COMPUTING)
        values: dict[str, float] = {}
        self.pictures = {}
        class_names = names_of(self.fetcher.source.dataset, "class_names")
        for name, metric in metrics.items():
            if isinstance(metric, Picture):
                if not self.ranks.is_first:
                    continue
                if not metric.class_names and class_names:
                    metric.class_names = class_names
            _merge(metric, [states[name] for states in of_ranks])
            value = self._value(name, metric)
            if isinstance(value, Tensor) and value.numel() == 1:
                values[name] = value.item()
            elif _can_be_drawn(metric):
                if self.ranks.is_first:
                    self.pictures[name] = partial(_draw, metric, value)
            else:
                raise TrainingError(
                    f"evaluation: metric {name} is not one number, but {value}, and its plot() is "
                    "not written, which could draw it"
                )
            metric.reset()  # the samples that it may hold
        return values

    def _value(self, name: str, metric: Metric) -> Any:
        """What a metric comes to; what it has to say of that is said once, with its name."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            value = metric.compute()
        said = {" ".join(str(warning.message).split()) for warning in caught}
        if not said and isinstance(value, Tensor) and value.numel() == 1 and value.isnan():
            said = {"it is NaN"}
        for message in sorted(said):
            if self.ranks.is_first and (name, message) not in self.warned:
                self.warned.add((name, message))
                logger.warning("%s/%s: %s", self.fetcher.source.name, name, message)
        return value


def _can_be_drawn(metric: Metric) -> bool:
    from torchmetrics import Metric

    return type(metric).plot is not Metric.plot


def _draw(metric: Metric, value: Any, axes: Axes) -> None:
    metric.plot(value, ax=axes)


@contextmanager
def _in_eval_mode(task: Task) -> Iterator[None]:
    """Put back what was in training mode, and only that: a user may have frozen the rest."""
    training = [module for module in task.modules() if module.training]
    task.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _not_distributed() -> bool:
    return False


State = dict[str, Any]
Reduce = Callable[[Tensor], Tensor]


class Addends:
    """What each micro-batch adds to those states of a metric that are sums in floating point."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.by_state: dict[str, list[Tensor]] = {key: [] for key in _float_sums(metric)}

    def take(self) -> None:
        """Take the states, which begin at zero again."""
        for key, addends in self.by_state.items():
            value = getattr(self.metric, key)
            addends.append(value)
            setattr(self.metric, key, torch.zeros_like(value))


LARGEST_ADDEND = 1024
"""Elements of a state of which an addend per micro-batch is kept; those of FID are millions."""


def _float_sums(metric: Metric) -> list[str]:
    """The states that are small sums in floating point."""
    return [
        key
        for key, reduction in metric._reductions.items()
        if getattr(reduction, "__name__", "") == "dim_zero_sum"
        and isinstance(start := metric._defaults[key], Tensor)
        and start.is_floating_point()
        and start.numel() <= LARGEST_ADDEND
        and not start.any()
    ]


def _state(addends: Addends, moved: dict[int, Tensor] | None = None) -> State:
    """The states of a metric that has been updated, on the CPU; empty if it has not.

    What metrics have in common is ``moved`` there, and sent to other ranks, once.
    """
    metric = addends.metric
    if next(metric.children(), None) is not None:
        raise TrainingError(
            f"evaluation: {type(metric).__name__} is made of other metrics, whose states are not "
            "its own; return those from metrics(), and combine their values"
        )
    if not metric.update_called:
        return {}
    on_host = {} if moved is None else moved

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in on_host:
            on_host[id(tensor)] = tensor.cpu()
        return on_host[id(tensor)]

    states = {
        key: [move(t) for t in value] if isinstance(value, list) else value.cpu()
        for key, value in metric.metric_state.items()
    }
    return states | {key: torch.stack(own).cpu() for key, own in addends.by_state.items()}


def _merge(metric: Metric, states: list[State]) -> None:
    """Set ``metric`` to the union of the states, by the reduction that it declares for each."""
    present = [state for state in states if state]
    metric._update_count = len(present)
    for key, reduction in metric._reductions.items() if present else ():
        parts = [state[key] for state in present]
        if isinstance(parts[0], list):
            merged: Any = [t.to(metric.device) for part in parts for t in part]
        elif reduction is None:
            merged = torch.stack(parts).to(metric.device)
        elif key in _float_sums(metric):
            merged = torch.cat(parts).sum(0).to(metric.device)
        elif getattr(reduction, "__name__", "") == "dim_zero_cat":
            merged = torch.cat(parts).to(metric.device)
        else:
            merged = cast("Reduce", reduction)(torch.stack(parts)).to(metric.device)
        setattr(metric, key, merged)
