"""The gradient noise scale: how large a batch has to be before a larger one hardly helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FAR = 4.0
"""Twice the batch makes 1.7 times the progress where the batch is a fourth of the noise scale, and
1.1 times where it is four times that."""


@dataclass(frozen=True)
class Noise:
    """Estimates from one step, or their means over several; each is right on average alone.

    ``trace`` is that of the covariance of one unit's gradient, ``signal`` the squared norm of the
    mean gradient (which may come out negative), and ``count`` how many units a step has: what the
    loss counts, samples or tokens.
    """

    trace: float
    signal: float
    count: float

    @property
    def scale(self) -> float | None:
        """Trace ÷ signal, in units of the count; None if the estimates are too rough for it."""
        return self.trace / self.signal if self.signal > 0 and self.trace > 0 else None


def estimate(squares: Sequence[float], counts: Sequence[float], total: float) -> Noise | None:
    """Estimate from one step's micro-batches; None of fewer than two.

    ``squares`` are the squared norms of the gradients gᵢ of their summed losses, ``counts`` their
    nᵢ, ``total`` that of g = Σ gᵢ. E|gᵢ|²/nᵢ = nᵢ|G|² + S with the mean gradient G and the trace S
    of the covariance, and E|g|²/N = N|G|² + S for N = Σ nᵢ, which are two equations (McCandlish et
    al., *An Empirical Model of Large-Batch Training*, 2018, there for two batch sizes).
    """
    known = [(s, n) for s, n in zip(squares, counts, strict=True) if n > 0]
    if len(known) < 2:
        return None
    count = sum(n for _, n in known)
    trace = (sum(s / n for s, n in known) - total / count) / (len(known) - 1)
    return Noise(trace, (total / count - trace) / count, count)


def mean(of_steps: Iterable[Noise]) -> Noise | None:
    """The mean of trace and signal, each by itself: a ratio's mean would be off."""
    known = list(of_steps)
    if not known:
        return None
    each = (
        sum(getattr(noise, name) for noise in known) / len(known)
        for name in ("trace", "signal", "count")
    )
    return Noise(*each)


def advise(noise: Noise, steps: int) -> str:
    """What the mean of so many ``steps`` says of the batch size, in a line.

    A step's progress at the best rate is 1 / (1 + scale / batch) of the most that any batch gives.
    """
    scale = noise.scale
    told = f"{steps} steps" if steps > 1 else "one step"
    if scale is None:
        return (
            f"gradient noise scale: no estimate by {told}, for the noise "
            "hides the gradient; look into more of them (log.layers_every_steps)"
        )
    share, doubled = (1 / (1 + scale / (times * noise.count)) for times in (1, 2))
    if noise.count * FAR < scale:
        verdict = "far below it: a larger one would need nearly as many samples, in fewer steps"
    elif noise.count > scale * FAR:
        verdict = "far above it: a smaller one would need fewer samples, in hardly more steps"
    else:
        verdict = "near it: a larger one would need fewer steps, but more samples"
    return (
        f"gradient noise scale about {scale:.3g}, by {told}; these had {noise.count:.3g} in the "
        f"mean (samples, or what the loss counts), {verdict} (the progress of a step is "
        f"{share:.0%} of what the largest batch would make, with twice the batch {doubled:.0%})"
    )
