"""Which samples of a split are explained, what they are, and what their parts are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddptrain.data.fetch import Fetcher, Source
from ddptrain.data.named import names_of
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.data.shuffle import Permutation
from ddptrain.errors import Refused
from ddptrain.keys import derive
from ddptrain.tasks.task import Key, Task

Kind = Literal["features", "images", "tokens"]
DEFAULT = 200
"""So many images or texts, if nobody says: they are looked at, each for ``--steps`` forwards."""
SUPPORTED = (
    "supported are batches (inputs, targets), or of which the task says in explained_at(batch) "
    "where these are, with inputs that are numbers in floating point, (B, …), images, "
    "(B, channels, height, width), or tokens, int64, (B, length)"
)


@dataclass(frozen=True)
class Drawn(Plan):
    """One pass over ``samples`` of the ``whole`` samples of a data set, in the set's order.

    Which of them is drawn from the seed: the first ones of a set that is sorted are all alike.
    """

    whole: int = 0

    def indices(self, batch: MicroBatch) -> npt.NDArray[np.int64]:
        return _drawn(self.seed, self.whole, self.samples)[batch.start : batch.stop]


def _drawn(seed: int, whole: int, samples: int) -> npt.NDArray[np.int64]:
    order = Permutation(whole, derive(seed, "explain/samples"))
    return np.sort(order(np.arange(samples)))


def draw(source: Source, samples: int | None, kind: Kind) -> Source:
    """The same split with as many samples as are to be explained. Raises ``Refused``."""
    plan = source.plan
    if samples is None:
        samples = plan.samples if kind == "features" else min(plan.samples, DEFAULT)
    if not 1 <= samples <= plan.samples:
        raise Refused(f"--samples {samples}: {source.label} has 1 to {plan.samples} to explain")
    chosen = Drawn(samples, samples, plan.micro_batch_size, plan.seed, False, plan.samples)
    return replace(source, plan=chosen)


@dataclass(frozen=True)
class Example:
    """The first sample of a split as a batch of one, from which all ranks see what there is.

    ``feature_names`` are those that the data set has, or places; none of images and tokens.
    ``has_classes`` says whether its target is one.
    """

    source: Source
    batch: Any
    kind: Kind
    feature_names: list[str]
    has_classes: bool

    @classmethod
    def of(cls, task: Task, source: Source, device: torch.device, workers: int) -> Example:
        """Fetch it, by the same road as batches.

        Raises ``Refused`` if it is of no known kind, or has other features than there are names.
        """
        (batch,) = Fetcher(source, device, workers).fetch([MicroBatch(0, 0, 0, 0, 1)])
        _check_keys(task, batch, source.label)
        inputs = inputs_of(task, batch, source.label)
        kind = _kind_of(inputs, source.label)
        names = _feature_names(source, inputs.shape[1:]) if kind == "features" else []
        return cls(source, batch, kind, names, labels_of(task, batch) is not None)

    def class_name(self, label: int) -> str:
        return _name_of(label, self._class_names) if label >= 0 else "all"

    def token_name(self, token: int) -> str:
        return _name_of(token, self._token_names)

    @cached_property
    def _class_names(self) -> list[str] | None:
        return names_of(self.source.dataset, "class_names")

    @cached_property
    def _token_names(self) -> list[str] | None:
        return names_of(self.source.dataset, "token_names")  # of a vocabulary, many thousands


def _feature_names(source: Source, shape: torch.Size) -> list[str]:
    known = names_of(source.dataset, "feature_names")
    if known is None:
        return [f"feature {', '.join(map(str, place))}" for place in np.ndindex(*shape)]
    if len(known) != shape.numel():
        raise Refused(
            f"{source.label}: it has {len(known)} feature_names, and a sample {shape.numel()} "
            "features; give each of them a name"
        )
    return known


def _name_of(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names and 0 <= number < len(names) else str(number)


def _check_keys(task: Task, batch: Any, label: str) -> None:
    """Hold what a task says of a batch against one. Raises ``Refused``."""
    told = task.explained_at(batch)
    if not isinstance(told, tuple) or len(told) != 2:
        raise Refused(
            f"task: {type(task).__name__}.explained_at(batch) gives {told!r}; expected are two "
            "places, or keys: of the inputs, and of the targets or None"
        )
    if type(task).explained_at is Task.explained_at:
        return  # what is said of its batches is not its own
    for key in told:
        if key is not None and _part(batch, key) is None:
            raise Refused(
                f"task: {type(task).__name__}.explained_at(batch) names {key!r}, which the batch "
                f"of {label} has not: it is {_told(batch)}"
            )


def inputs_of(task: Task, batch: Any, label: str) -> Tensor:
    """The inputs that are explained of a batch. Raises ``Refused`` if it has none."""
    inputs = _part(batch, task.explained_at(batch)[0])
    if isinstance(inputs, Tensor):
        return inputs
    raise Refused(f"{label}: its batch is {_told(batch)}; {SUPPORTED}")


def check_shapes(shapes: Sequence[torch.Size], label: str) -> None:
    """Refuse samples of several ``shapes``: what is put together of them has one."""
    for shape in shapes:
        if shape != shapes[0]:
            raise Refused(
                f"{label}: micro-batches have samples of shapes {tuple(shapes[0])} and "
                f"{tuple(shape)}; give all samples one length"
            )


def with_inputs(task: Task, batch: Any, inputs: Tensor) -> Any:
    """The same batch with other inputs, and all the rest of it."""
    place, _ = task.explained_at(batch)
    parts: Any = list(batch) if isinstance(batch, tuple) else copy(batch)
    parts[place] = inputs
    if not isinstance(batch, tuple):
        return parts
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def labels_of(task: Task, batch: Any) -> Tensor | None:
    """The classes of a batch's samples, int64, shape (B,); None if its targets are none."""
    inputs, place = task.explained_at(batch)
    targets = None if place is None else _part(batch, place)
    if not isinstance(targets, Tensor) or targets.shape != batch[inputs].shape[:1]:
        return None
    return None if targets.is_floating_point() else targets.long()


def _part(batch: Any, place: Key) -> Any:
    """What a batch has there; None if it has nothing."""
    if isinstance(batch, Mapping):
        return batch.get(place)
    is_there = isinstance(batch, tuple | list) and isinstance(place, int) and place < len(batch)
    return batch[place] if is_there else None


def _kind_of(inputs: Tensor, label: str) -> Kind:
    if inputs.is_floating_point() and inputs.dim() == 4:
        return "images"
    if inputs.is_floating_point() and inputs.dim() > 1:
        return "features"
    if inputs.dtype == torch.int64 and inputs.dim() == 2:
        return "tokens"
    raise Refused(f"{label}: its inputs are {_told(inputs)}; {SUPPORTED}")


def _told(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of {str(batch.dtype).removeprefix('torch.')}, {tuple(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(map(_told, batch))})"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {', '.join(map(str, batch))}"
    return f"a {type(batch).__name__}"
