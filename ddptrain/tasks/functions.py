"""Functions to minimise: of their parameters alone, or of parameters and data."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ddptrain.errors import Refused
from ddptrain.tasks.task import Loss


def rosenbrock(x: Tensor, y: Tensor, a: float = 1.0, b: float = 100.0) -> Tensor:
    """A curved valley whose floor is nearly flat; 0 at (a, a²), and larger everywhere else.

    Rosenbrock, *An Automatic Method for Finding the Greatest or Least Value of a Function*, The
    Computer Journal 3, 1960. ``x`` and ``y`` have shape ().
    """
    return (a - x).square() + b * (y - x.square()).square()


def logistic_regression(
    batch: tuple[Tensor, Tensor],
    coefficients: Tensor,
    intercept: Tensor,
    samples: int,
    C: float = 1.0,
) -> Loss:
    """Σ log(1 + exp(−margin)) + ‖coefficients‖² / 2C, as scikit-learn's LogisticRegression has it.

    A batch is (features, labels), shapes (B, F) and (B,), labels 0 or 1; ``coefficients`` has shape
    (F,), ``intercept`` (). ``samples`` is how many there are in all, so that each bears its share
    of the penalty. Raises ``Refused`` if the shapes do not fit.
    """
    features, labels = batch
    if coefficients.shape != features.shape[1:] or intercept.dim():
        raise Refused(
            f"task.parameters: coefficients {tuple(coefficients.shape)} and intercept "
            f"{tuple(intercept.shape)}, expected {tuple(features.shape[1:])} and (), for a sample "
            "has that many features; start with as many coefficients"
        )
    logits = features @ coefficients + intercept
    total = functional.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), reduction="sum"
    )
    penalty = coefficients.square().sum() / (2 * C)
    return Loss(total + penalty * (len(labels) / samples), len(labels))
