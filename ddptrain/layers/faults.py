"""What is wrong with the layers of a model, if it is beyond doubt; and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEEP = 6
"""Fewer layers with weights have no trend over their depth."""
FAINT = 1e-5
"""A sigmoid loses a factor of seven at each layer, so it takes six of them between the thirds."""
GROWN = 1e4
"""A convolution adds gradients over all places, 10⁴ in a large image, whose norm is the root of
that, up to the number itself where they agree; outputs of models that learn are within 10²."""
DEAD = 0.75
"""A few dead units are harmless, and half of them give zero in a deep layer to which all samples
look alike: by the sign of their random weights."""
ENOUGH = 64
"""Of fewer values of a unit that are all zero, it may still be one that is rarely active."""


@dataclass(frozen=True)
class Layer:
    """A layer with weights in one step; a ``gradient`` or ``output`` that was not seen is None.

    Both are root mean squares: of the gradient over weights that get any.
    """

    name: str
    gradient: float | None = None
    output: float | None = None


@dataclass(frozen=True)
class Fault:
    """What is wrong, with which layer, as a sentence."""

    kind: str
    layer: str
    sentence: str


def find(
    layers: list[Layer],
    dead: Mapping[str, tuple[float, int]],
    not_finite: str | None,
) -> list[Fault]:
    """Faults of a step.

    ``layers`` are in the order of the forward pass, ``dead`` has the share of dead units by module
    and how many values of each were seen, ``not_finite`` is the first module whose output was not
    finite, if neither is the loss.
    """
    if not_finite is not None:
        why = "the loss is not finite, and the first output that is not is that of"
        advice = f"look at what {not_finite} gets, at its weights, and at optim.lr"
        return [Fault("nonfinite", not_finite, f"{why} {not_finite}; {advice}")]
    faults = [_vanishing(layers), _exploding(layers), _growing(layers)]
    for name, (share, values) in dead.items():
        if share > DEAD and values >= ENOUGH:
            sentence = (
                f"{share:.0%} of the units of {name} give zero for every sample; try a lower "
                "optim.lr, another initialisation, or an activation that is not zero anywhere "
                "(LeakyReLU, GELU)"
            )
            faults.append(Fault("dead", name, sentence))
    return [fault for fault in faults if fault is not None]


Known = list[tuple[float, str]]


def _thirds(known: Known) -> tuple[Known, Known, Known] | None:
    third = len(known) // 3
    return (known[:third], known[third:-third], known[-third:]) if len(known) >= DEEP else None


def _gradients(layers: list[Layer]) -> Known:
    return [(layer.gradient, layer.name) for layer in layers if layer.gradient is not None]


def _far_above(large: Known, small: Known) -> tuple[float, str, str] | None:
    """How many times the largest is above all that are small, and the names of both.

    None unless all that are large are far above them.
    """
    (most, of_small), (largest, of_large) = max(small), max(large)
    is_far = min(large)[0] > GROWN * most and most > 0
    return (largest / most, of_large, of_small) if is_far else None


def _vanishing(layers: list[Layer]) -> Fault | None:
    """Whether all layers of the first third get much less than one of the last."""
    if (thirds := _thirds(_gradients(layers))) is None:
        return None
    first, middle, last = thirds
    most, above = max(last)
    if not max(first)[0] < FAINT * most or max(middle)[0] == 0:
        return None  # a head that begins at zero gives nothing to any layer below
    least, name = min(first)
    return Fault(
        "vanishing",
        name,
        f"the gradient vanishes towards the input: a weight of {name} gets {least / most:.0e} of "
        f"what one of {above} gets; try a normalisation, residual connections, another "
        "initialisation or activation (ReLU, GELU)",
    )


def _exploding(layers: list[Layer]) -> Fault | None:
    """Whether all layers of the first third get much more than any of the last."""
    if (thirds := _thirds(_gradients(layers))) is None:
        return None
    first, _, last = thirds
    if (found := _far_above(first, last)) is None:
        return None
    times, name, above = found
    return Fault(
        "exploding",
        name,
        f"the gradient explodes towards the input: a weight of {name} gets {times:.0e} "
        f"times what one of {above} gets; try smaller initial weights, a normalisation, residual "
        "connections",
    )


def _growing(layers: list[Layer]) -> Fault | None:
    """Whether all outputs of the last third are much larger than any of the first."""
    known = [(layer.output, layer.name) for layer in layers if layer.output is not None]
    if (thirds := _thirds(known)) is None:
        return None
    first, _, last = thirds
    if (found := _far_above(last, first)) is None:
        return None
    times, name, below = found
    return Fault(
        "growing",
        name,
        f"outputs explode with depth: those of {name} are {times:.0e} times as large as "
        f"those of {below}; try smaller initial weights, a normalisation, residual connections",
    )
