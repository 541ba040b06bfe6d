"""Several initialisations of a task, trained side by side as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ddptrain.generators import kept_generators
from ddptrain.stacked import Stacked
from ddptrain.tasks.task import Batch, Loss, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

Place: TypeAlias = tuple[dict[str, Any], str]
"""Where a module keeps a parameter or a buffer, and under which name."""
BEST = "best_restart"


class Restarts(Task):
    """Trains ``tasks``, which differ in nothing but their weights, on the same samples at once.

    Parameters and buffers have the names that they have in a task, and a first dimension more. The
    gradient is that of the sum of all losses, so that each copy gets its own; the loss itself, and
    what is logged, are those of the ``best`` copy. If the model can be batched (``vmap`` of
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
        self.is_batched: bool | None = None

    @property
    def best(self) -> Task:
        """The copy that was best at the last evaluation; before it, the first."""
        return self.copies[int(self.get_buffer(BEST))]

    def choose(self, number: int) -> None:
        """Take a copy for the best."""
        self.get_buffer(BEST).fill_(number)

    def train(self, mode: bool = True) -> Restarts:
        for copy in self.copies:
            copy.train(mode)
        super().train(mode)
        return self

    def forward(self, batch: Batch) -> Loss:
        if self.is_batched is None:
            self.is_batched = self._can_be_batched(batch)
        return self._loss(batch, self._buffers_of_copies())

    def _can_be_batched(self, batch: Batch) -> bool:
        """Try it, without a trace: the step must not depend on whether it is the first."""
        self.is_batched = True
        parameters = [p for p in self.parameters() if p.requires_grad]
        try:
            with kept_generators(self.device):
                copied = {name: b.clone() for name, b in self._buffers_of_copies().items()}
                torch.autograd.grad(self._loss(batch, copied).sum, parameters, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of whatever kind; what is wrong with the model itself comes again
            return False
        return True

    def _buffers_of_copies(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.named_buffers() if name != BEST}

    def _loss(self, batch: Batch, buffers: dict[str, Tensor]) -> Loss:
        losses: list[Loss] = []

        def of_one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, ...]:
            loss = functional_call(self.copies[0], {**parameters, **buffers}, (batch,))
            losses.append(loss)
            return tuple(value for value in _values(loss) if isinstance(value, Tensor))

        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if self.is_batched:
            found = vmap(of_one, randomness="different")(parameters, buffers)
        else:
            of_copies = zip(self._apart(parameters), self._apart(buffers), strict=True)
            each = [of_one(*of_copy) for of_copy in of_copies]
            found = tuple(map(torch.stack, zip(*each, strict=True)))
        return self._of_best(losses[0], found)

    def _apart(self, stacked: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What each copy has of ``stacked`` tensors, as views."""
        parts = {name: tensor.unbind() for name, tensor in stacked.items()}
        return [{name: p[i] for name, p in parts.items()} for i in range(len(self.copies))]

    def _of_best(self, loss: Loss, found: Sequence[Tensor]) -> Loss:
        """The best copy's loss, with all copies' gradients; ``found`` are their tensors."""
        best = self.get_buffer(BEST).reshape(1)
        picked = iter([tensor.detach().index_select(0, best)[0] for tensor in found])
        total = found[0].sum()

        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(pick, value))
            return next(picked) if isinstance(value, Tensor) else value

        # The difference is zero, and has the gradient; NaN, if any copy's loss is not finite.
        chosen = pick(loss.sum) + (total - total.detach())
        count = pick(loss.count)
        return Loss(chosen, count, {name: pick(value) for name, value in loss.logs.items()})

    @property
    def is_projected(self) -> bool:
        return self.copies[0].is_projected

    def project(self) -> None:
        for copy in self.copies:
            copy.project()

    def metrics(self) -> dict[str, Metric]:
        return self.best.metrics()

    def update(self, metrics: dict[str, Metric], batch: Batch) -> None:
        self.best.update(metrics, batch)

    def example(self) -> str | None:
        return self.best.example()

    def figures(self, lines: list[dict[str, Any]]) -> dict[str, Figure]:
        return self.best.figures(lines)


def _values(loss: Loss) -> Iterator[Any]:
    """Whatever of a loss may be a tensor, always in the same order."""
    yield loss.sum
    yield loss.count
    for value in loss.logs.values():
        yield from value if isinstance(value, tuple) else (value,)


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
