"""Any function at all: the minimum of a differentiable function of named parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, transform_to
from torch.distributions.constraints import Constraint

from ddptrain.tasks.task import Batch, Loss, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Projection = Callable[[Tensor], Tensor]
"""Maps a point to the nearest one that is allowed, of the same shape."""
FEW = 64
"""A parameter of more numbers is not logged, nor told at the end."""
NEAR = 1e-5
"""How far a start may be from what its constraint allows, relatively, for rounding's sake."""


class Objective(Task):
    """Minimises ``function(**parameters)``, a scalar tensor of shape ().

    A function with an argument ``batch`` gets the micro-batch as well, and returns a ``Loss``.
    ``parameters`` has for each name where it starts: a number, a nested list or a tensor, which
    become floating-point tensors of that shape.

    ``constraints`` says by name what a parameter may be. A transform of ``torch.distributions``,
    or a constraint that it knows a transform to, is a reparameterisation: what is stored is free,
    and the function gets what the transform makes of it. Any other callable is a projection, which
    maps the parameter to the nearest allowed point after every update.

    Raises ``ValueError`` for a name that the function does not take, one that it needs and is not
    given, a start that its constraint does not allow, and a function that returns no scalar.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Mapping[str, Any],
        constraints: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.takes_batch = _takes_batch(function, set(parameters))
        self.transforms: dict[str, Transform] = {}
        self.projections: dict[str, Projection] = {}
        for name, constraint in (constraints or {}).items():
            if name not in parameters:
                raise ValueError(f"constraints.{name}: there is {_listed(parameters)}")
            if isinstance(constraint, Constraint):
                constraint = transform_to(constraint)
            kind = self.transforms if isinstance(constraint, Transform) else self.projections
            kind[name] = constraint
        starts = {name: _tensor(name, start) for name, start in parameters.items()}
        self.free = nn.ParameterDict({name: self._freed(name, at) for name, at in starts.items()})
        self.start = self._numbers()
        if not self.takes_batch:
            self._try()

    def _freed(self, name: str, start: Tensor) -> Tensor:
        """What is stored of a parameter that starts at ``start``."""
        free: Tensor
        if name in self.transforms:
            free = self.transforms[name].inv(start)
            allowed = self.transforms[name](free)
        else:
            free = allowed = self.projections.get(name, torch.clone)(start)
        if allowed.shape != start.shape:
            raise ValueError(
                f"constraints.{name}: makes shape {tuple(allowed.shape)} of {tuple(start.shape)}"
            )
        if not (free.isfinite().all() and torch.allclose(allowed, start, NEAR, NEAR)):
            raise ValueError(
                f"parameters.{name}: the start {start.tolist()} is outside of what "
                f"constraints.{name} allows; begin inside of it"
            )
        return free

    @torch.no_grad()
    def _try(self) -> None:
        value = self.function(**self.values())
        if not isinstance(value, Tensor) or value.dim():
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"function: expected to get a scalar tensor from it, got {kind}")

    def values(self) -> dict[str, Tensor]:
        """The parameters by name, as the function gets them."""
        values: dict[str, Tensor] = dict(self.free.items())
        values |= {name: transform(values[name]) for name, transform in self.transforms.items()}
        return values

    def forward(self, batch: Batch) -> Loss:
        values = self.values()
        if self.takes_batch:
            loss = self.function(batch=batch, **values)
            if not isinstance(loss, Loss):
                raise TypeError(
                    f"{_name(self.function)} takes the batch and returned {type(loss).__name__}, "
                    "expected ddptrain.Loss(sum, count)"
                )
        else:
            loss = Loss(self.function(**values) * len(batch), len(batch))
        return Loss(loss.sum, loss.count, {**loss.logs, **_labelled(values)})

    def project(self) -> None:
        for name, projection in self.projections.items():
            self.free[name].copy_(projection(self.free[name]))

    @torch.no_grad()
    def _numbers(self) -> dict[str, float]:
        return {label: number.item() for label, number in _labelled(self.values()).items()}

    def example(self) -> str | None:
        numbers = self._numbers()
        return "\n".join(f"{label} = {number:.6g}" for label, number in numbers.items()) or None

    @torch.no_grad()
    def figures(self, lines: list[dict[str, Any]]) -> dict[str, Figure]:
        """The way that the parameters took: over contour lines where they are two numbers."""
        from ddptrain.tasks.trajectory import draw_curves, draw_path

        values = self.values()
        total = sum(value.numel() for value in values.values())
        if total == 2 and not self.takes_batch:
            return {"trajectory": draw_path(lines, self.start, self._numbers(), self._at)}
        return {"trajectory": draw_curves(lines, self.start)}

    def _at(self, point: tuple[float, float]) -> Tensor:
        """The function of a ``point`` whose two numbers are those of the parameters, in order."""
        values, taken = {}, 0
        for name, value in self.values().items():
            numbers = value.new_tensor(point[taken : taken + value.numel()])
            values[name] = numbers.reshape(value.shape)
            taken += value.numel()
        height: Tensor = self.function(**values)
        return height


def _takes_batch(function: Callable[..., Any], names: set[str]) -> bool:
    """Whether a function gets the batch; that it can be called with ``names`` is made sure of."""
    signature = inspect.signature(function)
    takes_batch = "batch" in signature.parameters
    if "batch" in names:
        raise ValueError("parameters.batch: a function gets the data by that name; choose another")
    try:
        signature.bind(**dict.fromkeys([*names, "batch"] if takes_batch else names))
    except TypeError as error:
        takes = _listed(name for name in signature.parameters if name != "batch")
        raise ValueError(f"parameters: {error}; {_name(function)} takes {takes}") from None
    return takes_batch


def _name(function: Callable[..., Any]) -> str:
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _tensor(name: str, start: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(start)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"parameters.{name}: expected a number, nested lists of equal lengths, or a tensor, "
            f"got {start!r}: {error}"
        ) from None
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _labelled(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every number of the parameters that are few, by the name under which it is logged."""
    few = {name: value for name, value in values.items() if value.numel() <= FEW}
    return {label: number for name in few for label, number in _split(name, few[name])}


def _split(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Each number of a parameter with its name: ``w``, or ``w.0``, ``w.1`` and so on."""
    if value.dim() == 0:
        return [(name, value)]
    return [pair for i, part in enumerate(value) for pair in _split(f"{name}.{i}", part)]
