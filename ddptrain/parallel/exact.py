"""Gradient sums whose every bit is the same on any number of ranks: wide fixed-point addition.

Floating-point addition rounds after every term, so the sum depends on the order and the grouping
of its terms, hence on the number of ranks. Integer addition is associative and commutative. Each
micro-batch's gradient is therefore rounded once, by itself, to a grid that is the same everywhere,
and only integers are added after that; all that depends on the number of ranks is who adds them.

One 64-bit integer is too narrow for that: a grid that is fine enough for a gate's gradient
overflows at an embedding's. So a value is cut into two words (Kulisch's long accumulator, of which
this keeps 104 bits; see also Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", 2013):

    value ≈ high · 2⁻²⁶ + low · 2⁻⁶⁸,    high = ⌊value · 2²⁶⌉,  low = ⌊(value · 2²⁶ − high) · 2⁴²⌉

Scaling by a power of two is exact, and so is the subtraction: x − ⌊x⌉ has no digit that x lacks.
What is lost is below 2⁻⁶⁹ per addend. |low| ≤ 2⁴¹, so 2²⁰ addends stay below 2⁶²; and each addend
must stay below 2³⁶ / addends, which is checked, so that high stays below 2⁶² as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddptrain.parallel.reduction import Summed, finished

HIGH, LOW = 26, 68
"""Minus the binary logarithms of the two words' units."""
TOP = 62 - HIGH
"""A sum must stay below 2 ** TOP."""
FAINT = 2.0 ** (24 - LOW)
"""Below this a float32 has more digits than are kept."""
MAX_ADDENDS = 1 << 20
COUNT = 21  # bits of a field that counts addends
PART = 1 << 15
FULL = (torch.float32, torch.float64)


def to_words(values: Tensor) -> tuple[Tensor, Tensor]:
    """Cut float ``values`` into the words (high, low): whole numbers, in floating point."""
    scaled = values * 2.0**HIGH
    high = scaled.round()
    low = scaled.sub_(high).mul_(2.0 ** (LOW - HIGH)).round_()
    return high, low


def from_words(high: Tensor, low: Tensor) -> Tensor:
    """The float64 values that int64 words stand for."""
    return torch.add(high.double() * 2.0**-HIGH, low.double(), alpha=2.0**-LOW)


def make_deterministic(device: torch.device) -> None:
    """Have this process compute a micro-batch's gradient with the same bits as any other would."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # a sum that is cut among threads depends on how many there are
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


class Exact:
    """Adds gradients as integers, in a communication hook, so that it overlaps with backward.

    The hook sees every micro-batch, not only the last: it adds the bucket to this rank's integers
    and clears it; with the last micro-batch those are summed over the ranks and become the
    gradient. Three counts per parameter travel with them: of micro-batches out of range, not zero,
    and not faint. A gradient out of range makes the step one that is not finite.

    ``loss_scale`` is the factor, a power of two, that gradients carry.
    """

    wraps_one_rank = True

    def __init__(self, addends: int, loss_scale: Tensor | None = None) -> None:
        if addends > MAX_ADDENDS:
            raise ValueError(f"expected at most {MAX_ADDENDS} addends, got {addends}")
        self.limit = 2.0**TOP / addends
        self.loss_scale = loss_scale
        self.summed = Summed()
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.begun: set[int] = set()
        self.accumulating = False
        self.faint: dict[tuple[int, int], tuple[list[Tensor], Tensor]] = {}

    def attach(self, replica: DistributedDataParallel) -> None:
        replica.register_comm_hook(None, self._hook)

    @contextmanager
    def accumulate(self, _: DistributedDataParallel) -> Iterator[None]:
        self.accumulating = True
        try:
            yield
        finally:
            self.accumulating = False

    def encode(self, values: Tensor) -> Tensor:
        """The words of ``values``, and how many of them are out of range."""
        fits = values.abs() < self.limit
        words = torch.cat([*to_words(values.where(fits, 0.0)), (~fits).sum().view(1)])
        return words.to(torch.int64)

    def decode(self, total: Tensor) -> Tensor:
        values = from_words(*total[:-1].chunk(2))
        return values.masked_fill(total[-1] > 0, torch.nan)

    def objection(self, largest: float) -> str | None:
        if largest < self.limit:
            return None
        if not largest < float("inf"):
            return "is not finite"
        return (
            f"reaches {largest:.3g}, beyond the {self.limit:.3g} that exact sums take: multiply "
            "the loss's sum and its count by 2**-20, which leaves their ratio, or use "
            "parallel.reduction=mean"
        )

    def take_faint(self) -> list[Tensor]:
        found = [
            parameter
            for parameters, marks in self.faint.values()
            for parameter, mark in zip(parameters, marks.tolist(), strict=True)
            if mark
        ]
        self.faint.clear()
        return found

    def _hook(self, _: None, bucket: GradBucket) -> Future[Tensor]:
        buffer, index = bucket.buffer(), bucket.index()
        gradients = bucket.gradients()
        size = buffer.numel()
        key = index, size
        if key not in self.sums:
            length = 2 * size + len(gradients)
            self.sums[key] = torch.empty(length, dtype=torch.int64, device=buffer.device)
        sums = self.sums[key]
        self._add(sums, buffer, gradients, begins=index not in self.begun)
        self.begun.add(index)
        if self.accumulating:
            return finished(buffer.zero_())
        self.begun.discard(index)
        parameters = bucket.parameters()

        def finish(done: Future[Tensor]) -> Tensor:
            done.value()  # raises what the sum failed with
            self._judge(key, parameters, sums[2 * size :], buffer)
            return buffer

        return self.summed.start(index, sums).then(finish)

    def _add(self, sums: Tensor, buffer: Tensor, gradients: list[Tensor], begins: bool) -> None:
        size = buffer.numel()
        for part in _parts(buffer):
            values = buffer[part] if buffer.dtype in FULL else buffer[part].float()
            for word, addend in enumerate(to_words(self._unscaled(values))):
                _put(sums[word * size : (word + 1) * size][part], addend, begins)
        largest = self._unscaled(_largest(gradients))
        # Not (largest >= limit): a NaN compares false with everything.
        counts = (
            (~(largest < self.limit)).to(torch.int64)
            + ((largest > 0).to(torch.int64) << COUNT)
            + ((largest >= FAINT).to(torch.int64) << 2 * COUNT)
        )
        _put(sums[2 * size :], counts, begins)

    def _unscaled(self, values: Tensor) -> Tensor:
        return values if self.loss_scale is None else values / self.loss_scale

    def _judge(
        self, key: tuple[int, int], parameters: list[Tensor], counts: Tensor, buffer: Tensor
    ) -> None:
        """Turn the sums into the gradient, which is NaN somewhere if one was out of range."""
        high, low = self.sums[key][: 2 * buffer.numel()].chunk(2)
        for part in _parts(buffer):
            total = from_words(high[part], low[part])
            buffer[part] = total if self.loss_scale is None else total * self.loss_scale
        one = (1 << COUNT) - 1
        out_of_range, any_at_all, not_faint = (counts >> i * COUNT & one for i in range(3))
        buffer[0].masked_fill_(out_of_range.any(), torch.nan)
        mark = (any_at_all > 0) & (not_faint == 0)
        if key in self.faint:
            mark |= self.faint[key][1]
        self.faint[key] = parameters, mark


def _parts(buffer: Tensor) -> Iterator[slice]:
    """Cut a bucket into what stays in a core's cache; a GPU takes it whole."""
    step = PART if buffer.device.type == "cpu" else buffer.numel()
    return (slice(start, start + step) for start in range(0, buffer.numel(), step))


def _put(where: Tensor, addend: Tensor, begins: bool) -> None:
    if begins:
        where.copy_(addend)
    else:
        where.add_(addend.to(torch.int64))


def _largest(gradients: list[Tensor]) -> Tensor:
    """The largest absolute value in each, or NaN, shape (len(gradients),)."""
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, float("inf")))
    extremes = [torch.stack(torch.aminmax(g)) if g.numel() else g.new_zeros(2) for g in gradients]
    return torch.stack(extremes).abs().amax(1)
