"""Several initialisations of a task, trained side by side as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ddptrain.generators import remember_generators
from ddptrain.stacked import Stacked
from ddptrain.tasks.task import Batch, Loss, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

logger = logging.getLogger(__name__)

Place: TypeAlias = tuple[dict[str, Any], str]
"""Where a module keeps a parameter or a buffer, and under which name."""
Tensors: TypeAlias = dict[str, Tensor]
BEST = "best_restart"


class Restarts(Task):
    """Trains ``tasks``, which differ in nothing but their weights, on the same samples at once.

    Parameters and buffers have the names that they have in a task, and a first dimension more. The
    gradient is that of the sum of all losses, so that each copy gets its own; the loss itself, and
    what is logged, are those of the ``best`` copy. Where a forward can be batched (``vmap`` of
    ``torch.func``), all copies are computed as one, each with random numbers of its own; else one
    after another. The ``tasks`` become views of what is trained, so they must not be moved.

    Raises ``ValueError`` if they do not even differ in their weights.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        _refuse_equal(tasks)
        whole = deepcopy(tasks[0])
        _replace(whole, [_tensors(task) for task in tasks], _stack)
        for number, task in enumerate(tasks):
            _replace(task, [_tensors(whole)], partial(_part, number))
        self._modules.update(whole._modules)
        self._parameters.update(whole._parameters)
        self._buffers.update(whole._buffers)
        self._non_persistent_buffers_set |= whole._non_persistent_buffers_set
        self.device = next(whole.parameters()).device
        self.register_buffer(BEST, torch.zeros((), dtype=torch.int64, device=self.device))
        self.copies = tuple(tasks)  # in a tuple, and so no modules of this one
        self.shown: int | None = None
        """The copy that metrics are of; None: the best."""
        self.is_told = False

    @property
    def best(self) -> Task:
        """The copy that was best at the last evaluation; before it, the first."""
        return self.copies[int(self.get_buffer(BEST))]

    def choose(self, number: int) -> None:
        """Take a copy for the best."""
        self.get_buffer(BEST).fill_(number)

    def check_data(self, dataset: object) -> None:
        self.copies[0].check_data(dataset)

    def train(self, mode: bool = True) -> Restarts:
        for copy in self.copies:
            copy.train(mode)
        super().train(mode)
        return self

    def forward(self, batch: Batch) -> Loss:
        # The module of whose forward all make use must be in the modes that this one's parts are.
        for module, its in zip(self.modules(), self.copies[0].modules(), strict=True):
            its.training = module.training
        buffers = {name: buffer for name, buffer in self.named_buffers() if name != BEST}
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        put_back = remember_generators(self.device)
        # Anew each time, for by what an earlier batch brought a resumed run would not know to go.
        try:
            found = self._batched(batch, buffers)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever kind; what is wrong with the task comes again
            self._tell(error)
            put_back()
            for name, buffer in buffers.items():
                buffer.copy_(before[name])
            found = self._in_turn(batch, buffers)
        loss, values, replaced = found
        for name, tensor in replaced.items():
            buffers[name].copy_(tensor.detach())
        return self._of_best(loss, values)

    def _tell(self, error: Exception) -> None:
        if not self.is_told:
            self.is_told = True
            why = " ".join(str(error).split())[:200]
            logger.info("restarts are computed one after another, for vmap says: %s", why)

    def _of_one(
        self, batch: Batch, parameters: Tensors, buffers: Tensors
    ) -> tuple[Loss, list[Any], Tensors]:
        """A copy's loss, whatever in it may be a tensor, and buffers that it put others in for."""
        given = {**parameters, **buffers}
        loss = functional_call(self.copies[0], given, (batch,))
        replaced = {name: given[name] for name in buffers if given[name] is not buffers[name]}
        return loss, list(_values(loss)), replaced

    def _batched(self, batch: Batch, buffers: Tensors) -> tuple[Loss, list[Any], Tensors]:
        seen: list[tuple[Loss, list[Any]]] = []

        def of_one(parameters: Tensors, own: Tensors) -> tuple[list[Tensor], Tensors]:
            loss, values, replaced = self._of_one(batch, parameters, own)
            seen.append((loss, values))
            return [value for value in values if isinstance(value, Tensor)], replaced

        parameters: Tensors = dict(self.named_parameters())
        tensors, replaced = vmap(of_one, randomness="different")(parameters, buffers)
        ((loss, values),) = seen
        stacked = iter(tensors)
        found = [next(stacked) if isinstance(value, Tensor) else value for value in values]
        return loss, found, replaced

    def _in_turn(self, batch: Batch, buffers: Tensors) -> tuple[Loss, list[Any], Tensors]:
        parameters = self._apart(dict(self.named_parameters()))
        of_copies = zip(parameters, self._apart(buffers), strict=True)
        done = [self._of_one(batch, *own) for own in of_copies]
        losses, values, replaced = zip(*done, strict=True)
        found = [
            torch.stack([torch.as_tensor(value, device=self.device) for value in same])
            for same in zip(*values, strict=True)
        ]
        together = {n: torch.stack([own[n] for own in replaced]) for n in replaced[0]}
        return losses[0], found, together

    def _apart(self, stacked: Tensors) -> list[Tensors]:
        """What each copy has of ``stacked`` tensors, as views."""
        parts = {name: tensor.unbind() for name, tensor in stacked.items()}
        return [{name: p[i] for name, p in parts.items()} for i in range(len(self.copies))]

    def _of_best(self, loss: Loss, values: list[Any]) -> Loss:
        """The best copy's loss, with all copies' gradients; what each copy tells is in its logs.

        ``values`` are what is in ``loss``: tensors of all copies, or what is alike in them.
        """
        best = self.get_buffer(BEST).reshape(1)
        chosen, count, logs = _told(loss, values, lambda v: v.index_select(0, best)[0])
        for number in range(len(self.copies)):
            own, its_count, its_logs = _told(loss, values, itemgetter(number))
            its_logs = {"loss": (own, its_count), **its_logs}
            logs |= {f"{_prefix(number)}{name}": value for name, value in its_logs.items()}
        total = values[0].sum()
        # The difference is zero, and has the gradient; NaN, if any copy's loss is not finite.
        return Loss(chosen + (total - total.detach()), count, logs)

    @property
    def is_projected(self) -> bool:
        return self.copies[0].is_projected

    def project(self) -> None:
        for copy in self.copies:
            copy.project()

    def metrics(self) -> dict[str, Metric]:
        return self.best.metrics()

    def update(self, metrics: dict[str, Metric], batch: Batch) -> None:
        copy = self.best if self.shown is None else self.copies[self.shown]
        copy.update(metrics, batch)

    def example(self) -> str | None:
        return self.best.example()

    def figures(self, lines: list[dict[str, Any]]) -> dict[str, Figure]:
        """Those of the best, by what it was itself that the lines tell."""
        prefix = _prefix(self.copies.index(self.best))
        told = [
            {**line, **{k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}}
            for line in lines
        ]
        return self.best.figures(told)


def _values(loss: Loss) -> Iterator[Any]:
    """Whatever of a loss may be a tensor, always in the same order."""
    yield loss.sum
    yield loss.count
    for value in loss.logs.values():
        yield from value if isinstance(value, tuple) else (value,)


def _prefix(number: int) -> str:
    """What the names begin with under which a copy's loss and logs are."""
    return f"restart_{number}/"


def _told(
    loss: Loss, values: list[Any], pick: Callable[[Tensor], Tensor]
) -> tuple[Any, Any, dict[str, Any]]:
    """The sum, the count and the logs of one copy, which ``pick`` takes from those of all."""
    picked = iter([pick(v.detach()) if isinstance(v, Tensor) else v for v in values])
    total, count = next(picked), next(picked)
    logs = {
        name: tuple(next(picked) for _ in value) if isinstance(value, tuple) else next(picked)
        for name, value in loss.logs.items()
    }
    return total, count, logs


def _refuse_equal(tasks: Sequence[Task]) -> None:
    first, *others = (list(task.parameters()) for task in tasks)
    if all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        raise ValueError(
            "nothing of the weights is drawn, so all would be the same; a parameter that starts "
            "anew each time is {_target_: torch.randn, size: [2]}, for example"
        )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [owner[key] for owner, key in _places(module)]


def _places(module: nn.Module) -> Iterator[Place]:
    """Where all parameters and buffers of a module are; those that are shared, each time."""
    for _, owner in module.named_modules():
        for kept in (owner._parameters, owner._buffers):
            yield from ((kept, key) for key, tensor in kept.items() if tensor is not None)


def _replace(
    module: nn.Module, of_others: Sequence[list[Tensor]], make: Callable[[list[Tensor]], Tensor]
) -> None:
    """Put what ``make`` makes of others' tensors in each place of ``module``: shared ones once."""
    made: dict[int, Tensor] = {}
    for (owner, key), *same in zip(_places(module), *of_others, strict=True):
        before = id(owner[key])
        if before not in made:
            made[before] = make(same)
        owner[key] = made[before]


def _stack(same: list[Tensor]) -> Tensor:
    stacked = torch.stack([tensor.detach() for tensor in same])
    is_parameter = isinstance(same[0], nn.Parameter)
    return Stacked(stacked, same[0].requires_grad) if is_parameter else stacked


def _part(number: int, of_whole: list[Tensor]) -> Tensor:
    (stacked,) = of_whole
    part = stacked.detach()[number]
    return nn.Parameter(part, False) if isinstance(stacked, Stacked) else part
