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
What is lost is below 2⁻⁶⁹ per addend. |low| ≤ 2⁴¹, so 2¹⁶ addends stay below 2⁶²; and each addend
must stay below 2³⁶ / addends, which is checked, so that high stays below 2⁶² as well.
"""

import math
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
COUNT = 16  # bits of a field that counts addends
MAX_ADDENDS = (1 << COUNT) - 1
FIELDS = NOT_FINITE, BEYOND, SOME, CLEAR = range(0, 4 * COUNT, COUNT)  # their lowest bits
KINDS = (0, 1 << SOME, (1 << SOME) + (1 << CLEAR), 1 << BEYOND, 1 << NOT_FINITE)
"""What an addend counts as: zero, faint, with all its digits, out of range, infinite or NaN."""
HEADROOM = 4  # bits, for the steps to come
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
    gradient. Four counts of micro-batches per parameter travel with them, in one integer: not
    finite, out of range, not zero, and not faint. The first two make its first element NaN.

    ``loss_scale`` is the factor, a power of two, that gradients carry.
    """

    wraps_one_rank = True

    def __init__(self, addends: int, loss_scale: Tensor | None = None) -> None:
        if addends > MAX_ADDENDS:
            raise ValueError(f"expected at most {MAX_ADDENDS} addends, got {addends}")
        self.limit = 2.0**TOP / addends
        self.loss_scale = loss_scale
        self.summed = Summed()
        self.sums: dict[int, Tensor] = {}  # by bucket
        self.begins: dict[int, Tensor] = {}  # where in it each parameter begins
        self.begun: set[int] = set()
        self.accumulating = False
        self.faint: dict[int, tuple[list[Tensor], Tensor]] = {}
        self.out_of_range: dict[int, Tensor] = {}
        self.kinds: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def attach(self, replica: DistributedDataParallel) -> None:
        replica.register_comm_hook(None, self._hook)

    @contextmanager
    def accumulate(self, _: DistributedDataParallel) -> Iterator[None]:
        self.accumulating = True
        try:
            yield
        finally:
            self.accumulating = False

    def relay(self) -> None:
        of_buckets = self.sums, self.begins, self.faint, self.out_of_range, self.summed.gathered
        for by_bucket in of_buckets:
            by_bucket.clear()

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
        return f"reaches {largest:.3g}, beyond the {self.limit:.3g} that exact sums take"

    def advice(self, largest: float) -> str:
        if largest < self.limit:
            return ""
        bits = math.ceil(math.log2(largest / self.limit)) + HEADROOM
        return (
            f"multiply the loss's sum and its count by 2**-{bits}, which leaves their ratio, or "
            "use parallel.reduction=mean"
        )

    def beyond(self) -> Tensor | None:
        if self.loss_scale is None:
            return None
        return torch.stack(list(self.out_of_range.values())).any()

    def take_faint(self) -> list[Tensor]:
        found = []
        for parameters, marks in self.faint.values():
            of_bucket = zip(parameters, marks.tolist(), strict=True)
            found += [parameter for parameter, mark in of_bucket if mark]
            marks.zero_()
        return found

    def _hook(self, _: None, bucket: GradBucket) -> Future[Tensor]:
        buffer, index = bucket.buffer(), bucket.index()
        gradients = bucket.gradients()
        size = buffer.numel()
        if not size:
            return finished(buffer)
        sums = self._memory(index, buffer, gradients)
        self._add(sums, buffer, gradients, begins=index not in self.begun)
        self.begun.add(index)
        if self.accumulating:
            return finished(buffer.zero_())
        self.begun.discard(index)
        self.faint[index] = bucket.parameters(), self.faint[index][1]

        def finish(done: Future[Tensor]) -> Tensor:
            done.value()  # raises what the sum failed with
            self._judge(index, sums, buffer)
            return buffer

        return self.summed.start(index, sums).then(finish)

    def _memory(self, index: int, buffer: Tensor, gradients: list[Tensor]) -> Tensor:
        """This rank's integers for a bucket, in memory that is kept from step to step."""
        if index not in self.sums:
            parameters = len(gradients)
            length = 2 * buffer.numel() + parameters
            self.sums[index] = torch.empty(length, dtype=torch.int64, device=buffer.device)
            self.faint[index] = [], torch.zeros(parameters, dtype=torch.bool, device=buffer.device)
            offsets = [g.storage_offset() - buffer.storage_offset() for g in gradients]
            begins = torch.tensor(offsets, device=buffer.device)
            self.begins[index] = begins.clamp(max=buffer.numel() - 1)  # one may be without elements
        return self.sums[index]

    def _add(self, sums: Tensor, buffer: Tensor, gradients: list[Tensor], begins: bool) -> None:
        size = buffer.numel()
        for part in _parts(buffer):
            values = buffer[part] if buffer.dtype in FULL else buffer[part].float()
            for word, addend in enumerate(to_words(self._unscaled(values))):
                _put(sums[word * size : (word + 1) * size][part], addend, begins)
        _put(sums[2 * size :], self._kinds(self._unscaled(_largest(gradients))), begins)

    def _unscaled(self, values: Tensor) -> Tensor:
        return values if self.loss_scale is None else values / self.loss_scale

    def _kinds(self, largest: Tensor) -> Tensor:
        """What each of ``largest``, shape (parameters,), counts as."""
        if largest.dtype not in self.kinds:
            kind = torch.finfo(largest.dtype)
            smallest = kind.smallest_normal * kind.eps
            self.kinds[largest.dtype] = (
                largest.new_tensor([smallest, FAINT, self.limit, float("inf")]),
                torch.tensor(KINDS, device=largest.device),
            )
        edges, kinds = self.kinds[largest.dtype]
        return torch.take(kinds, torch.bucketize(largest, edges, right=True))

    def _judge(self, index: int, sums: Tensor, buffer: Tensor) -> None:
        """Turn the sums into the gradient, which is NaN somewhere if one was out of range."""
        high, low = sums[: 2 * buffer.numel()].chunk(2)
        for part in _parts(buffer):
            total = from_words(high[part], low[part])
            buffer[part] = total if self.loss_scale is None else total * self.loss_scale
        counts = sums[2 * buffer.numel() :]
        not_finite, beyond, some, clear = (counts >> field & MAX_ADDENDS for field in FIELDS)
        wrong = (not_finite | beyond) > 0
        # Added, for a parameter without elements begins where the next one does.
        marks = buffer.new_zeros(()).expand(len(wrong)).masked_fill(wrong, torch.nan)
        buffer.index_add_(0, self.begins[index], marks)
        if self.loss_scale is not None:
            self.out_of_range[index] = beyond.any()
        self.faint[index][1].logical_or_((some != 0) & (clear == 0))


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
    some = [gradient if gradient.numel() else gradient.new_zeros(1) for gradient in gradients]
    if some[0].is_cuda:
        largest = torch.stack(torch._foreach_norm(some, float("inf")))
    else:
        extremes = [torch.stack(torch.aminmax(gradient)) for gradient in some]
        largest = torch.stack(extremes).abs().amax(1)
    return largest if largest.dtype in FULL else largest.float()
