"""Records what each micro-batch made, piece by piece, so that what first differs has a name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ddptrain.data.plan import MicroBatch
from ddptrain.hashing import hash_tensor
from ddptrain.step import Step
from ddptrain.tasks.task import Loss


@dataclass(frozen=True, order=True, slots=True)
class Moment:
    """One micro-batch: of a training step, or of an evaluation of a split."""

    split: str
    step: int
    index: int


class Entry(NamedTuple):
    """A piece of a forward; ``blamed`` is the module that made it, if it is the first to differ."""

    kind: str
    name: str
    blamed: str
    digest: str


@dataclass
class Work:
    """The pieces of one micro-batch: batch, inputs and outputs in order, loss; then gradients."""

    forward: list[Entry] = field(default_factory=list)
    gradients: dict[str, str] = field(default_factory=dict)


Trace = dict[Moment, Work]


class Difference(NamedTuple):
    """Where two traces part: ``kind`` says what differs, ``name`` whose it is."""

    moment: Moment
    kind: str
    name: str


class Recorder:
    """Writes the trace of a task, by hooks on its modules and parameters."""

    def __init__(self, task: nn.Module) -> None:
        self.trace: Trace = {}
        self.work: Work | None = None
        self.step = 0
        self.callers: list[str] = []
        self.magnitudes: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, module in task.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            # Always: a forward that is repeated within backward may be left halfway.
            module.register_forward_hook(partial(self._leave, name), always_call=True)
        for name, parameter in task.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._gradient, name))  # type: ignore[no-untyped-call]

    def rest(self) -> None:
        """What comes until the next batch belongs to no micro-batch."""
        self.work = None

    def training(self, step: Step, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of ``step``, each noted as that of the micro-batch which it draws it for."""
        for batch in batches:
            assert step.current is not None
            self._begin(Moment("train", step.current.step, step.current.index), batch)
            yield batch

    def evaluating(
        self, split: str, micro_batches: list[MicroBatch], batches: Iterable[Any]
    ) -> Iterator[Any]:
        for micro_batch, batch in zip(micro_batches, batches, strict=True):
            self._begin(Moment(split, 0, micro_batch.index), batch)
            yield batch

    def _begin(self, moment: Moment, batch: Any) -> None:
        self.work = self.trace[moment] = Work()
        self.step = moment.step
        self.callers.clear()
        self.work.forward.append(Entry("batch", "", "", digest(batch)))

    def _enter(self, name: str, _: nn.Module, inputs: Any, more: dict[str, Any]) -> None:
        caller = self.callers[-1] if self.callers else ""
        self.callers.append(name)
        if self.work is not None:
            self.work.forward.append(Entry("input", name, caller, digest([inputs, more])))

    def _leave(self, name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        self.callers.pop()
        if self.work is not None:
            loss = isinstance(output, Loss)
            made = [output.sum, output.count] if isinstance(output, Loss) else output
            kind = "loss" if loss else "output"
            self.work.forward.append(Entry(kind, name, name, digest(made)))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if self.work is not None:
            self.work.gradients[name] = digest(gradient)
            self.magnitudes[self.step][name] += gradient.double().norm().item()


def digest(contents: Any) -> str:
    """Equal for equal bits: of tensors in any nesting, with numbers and text beside them."""
    return " ".join(_parts(contents))


def _parts(contents: Any) -> Iterator[str]:
    if isinstance(contents, Tensor):
        dense = contents.to_dense() if contents.is_sparse else contents
        yield f"{dense.dtype}{list(dense.shape)}{hash_tensor(dense).item():x}"
    elif isinstance(contents, dict):
        for key, value in contents.items():
            yield repr(key)
            yield from _parts(value)
    elif isinstance(contents, tuple | list):
        for value in contents:
            yield from _parts(value)
    elif isinstance(contents, str | bytes | int | float):
        yield repr(contents)


def first_difference(reference: Trace, other: Trace) -> Difference | None:
    """The first piece of ``other`` that is not as in ``reference``, which has all its moments."""
    for moment in sorted(other):
        expected, found = reference[moment], other[moment]
        if entry := _first_entry(expected.forward, found.forward):
            name = moment.split if entry.kind == "batch" else entry.blamed
            return Difference(moment, entry.kind, name)
        for name, gradient in expected.gradients.items():
            if found.gradients.get(name) != gradient:
                return Difference(moment, "gradient", name.rpartition(".")[0])
    return None


def _first_entry(expected: list[Entry], found: list[Entry]) -> Entry | None:
    """What differs first; where other modules are called, the caller is to blame."""
    for entry, other in zip(expected, found, strict=False):
        if entry[:3] != other[:3]:
            return Entry("calls", "", entry.blamed, "")
        if entry.digest != other.digest:
            return entry
    longer = max(expected, found, key=len)
    shorter = min(len(expected), len(found))
    return Entry("calls", "", longer[shorter].blamed, "") if len(expected) != len(found) else None
