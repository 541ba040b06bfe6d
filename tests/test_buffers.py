"""Buffers that a forward changes move once a step, by the mean over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ddptrain.errors import TrainingError
from ddptrain.launch.worker import TIMEOUT
from ddptrain.parallel.buffers import Buffers
from ddptrain.parallel.exact import Exact
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Mean, Reduction
from ddptrain.place import Place

CPU = torch.device("cpu")
REDUCTIONS: list[Callable[[], Reduction]] = [Mean, lambda: Exact(8)]


def take_step(
    module: nn.Module, buffers: Buffers, batches: list[Tensor], skip: float = 0.0
) -> bool:
    """Return whether the buffers move by what cannot be added."""
    buffers.begin()
    for batch in batches:
        module(batch)
        buffers.collect()
    buffers.reduce()
    stray = buffers.arrive(len(batches))
    buffers.move(torch.tensor(skip))
    return stray is not None and bool(stray)


def of(module: nn.Module, reduction: Reduction) -> Buffers:
    return Buffers(module, Ranks(Place(), CPU, TIMEOUT), reduction)


@pytest.mark.parametrize("make", REDUCTIONS)
def test_batch_norm_takes_one_step_of_its_momentum(make: Callable[[], Reduction]) -> None:
    norm = nn.BatchNorm1d(3)
    buffers = of(norm, make())
    mean = torch.zeros(3)
    for step in range(3):
        batches = [torch.randn(5, 3) for _ in range(4)]
        take_step(norm, buffers, batches)
        mean = 0.9 * mean + 0.1 * torch.stack([batch.mean(0) for batch in batches]).mean(0)
        assert norm.num_batches_tracked == step + 1
    assert torch.allclose(norm.running_mean, mean, atol=1e-6)


@pytest.mark.parametrize("make", REDUCTIONS)
def test_order_and_grouping_of_micro_batches_do_not_matter(make: Callable[[], Reduction]) -> None:
    batches = [torch.randn(5, 3) * 10**i for i in range(4)]
    moved = []
    for order in (batches, batches[::-1]):
        norm = nn.BatchNorm1d(3, momentum=None)  # a cumulative average
        buffers = of(norm, make())
        take_step(norm, buffers, order)
        take_step(norm, buffers, order)
        moved.append(norm.running_var)
    assert torch.allclose(*moved, rtol=1e-6)
    assert torch.equal(*moved) or make is Mean


@pytest.mark.parametrize("make", REDUCTIONS)
def test_a_step_that_is_skipped_moves_nothing(make: Callable[[], Reduction]) -> None:
    norm = nn.BatchNorm1d(3)
    buffers = of(norm, make())
    take_step(norm, buffers, [torch.randn(5, 3)])
    before = {name: tensor.clone() for name, tensor in norm.named_buffers()}
    take_step(norm, buffers, [torch.full((5, 3), torch.nan), torch.randn(5, 3)], skip=1.0)
    assert all(torch.equal(norm.get_buffer(name), tensor) for name, tensor in before.items())


def test_moves_that_cannot_be_added_exactly_are_not_hidden() -> None:
    norm = nn.BatchNorm1d(3)
    buffers = of(norm, Exact(8))
    assert not take_step(norm, buffers, [torch.randn(5, 3)])
    assert take_step(norm, buffers, [torch.full((5, 3), 1e20), torch.randn(5, 3)])


class Constants(nn.Module):
    """Buffers of all kinds that no forward changes, beside one that each does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan, -0.0]))
        self.register_buffer("rotary", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("large", torch.tensor([2**60 + 1]))
        self.register_buffer("view", torch.ones(1).expand(4))
        self.register_buffer("turning", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("tokens", torch.tensor([2**60 + 1]))
        self.register_buffer("lowest", torch.full((2,), torch.inf))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))

    def forward(self, batch: Tensor) -> None:
        self.turning *= 1j
        self.tokens += 2**20
        self.seen |= True
        self.lowest[0] = torch.inf


@pytest.mark.parametrize("make", REDUCTIONS)
def test_constants_of_every_kind_keep_their_bits(make: Callable[[], Reduction]) -> None:
    module = Constants()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    buffers = of(module, make())
    for _ in range(2):
        assert not take_step(module, buffers, [torch.ones(1)] * 3)
    for name in ("mask", "rotary", "large", "view", "lowest"):
        buffer = module.get_buffer(name)
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.contiguous().view(torch.uint8),
                           before[name].contiguous().view(torch.uint8)), name  # fmt: skip
    assert torch.equal(module.turning, torch.full((2,), -1.0 + 0j))
    assert module.tokens == 2**60 + 1 + 2**21
    assert module.seen.all()


def test_the_move_that_cannot_be_added_is_found_by_name() -> None:
    norm = nn.BatchNorm1d(3)
    buffers = of(norm, Exact(8))
    take_step(norm, buffers, [torch.randn(5, 3)])
    before = {name: tensor.clone() for name, tensor in norm.named_buffers()}
    buffers.begin()
    norm(torch.full((5, 3), 1e20))
    moves = buffers.largest_moves()
    assert moves["running_mean"] == pytest.approx(1e19)
    assert moves["num_batches_tracked"] == 1
    assert all(torch.equal(norm.get_buffer(name), tensor) for name, tensor in before.items())


def test_power_iteration_goes_on_from_where_the_step_began() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(4, 4))
    alone = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    buffers = of(layer, Mean())
    batches = [torch.randn(2, 4) for _ in range(3)]
    take_step(layer, buffers, batches)
    moved = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.load_state_dict(alone, strict=False)
    layer(batches[0])  # each micro-batch moves the vectors alike
    for name, tensor in layer.named_buffers():
        assert torch.allclose(tensor, moved[name], atol=1e-6)
        assert not torch.equal(tensor, alone[name])


class Counting(nn.Module):
    def __init__(self, begin: int = 0) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.ones(3))
        self.forwards = 0
        self.begin = begin

    def forward(self, _: Tensor) -> None:
        self.forwards += 1
        if self.forwards > self.begin:
            self.count = self.count + 2  # a new tensor in its place


def test_a_buffer_that_is_replaced_moves_too() -> None:
    module = Counting()
    buffers = of(module, Mean())
    for _ in range(2):
        take_step(module, buffers, [torch.ones(1)] * 3)
    assert module.count == 4
    assert [buffer.name for (buffer,) in buffers.moving.values()] == ["count"]


def test_what_is_loaded_between_steps_is_kept() -> None:
    module = Counting()
    buffers = of(module, Mean())
    take_step(module, buffers, [torch.ones(1)])
    module.load_state_dict({"count": torch.tensor(40), "constant": torch.full((3,), 7.0)})
    take_step(module, buffers, [torch.ones(1)] * 2)
    assert module.count == 42
    assert torch.equal(module.get_buffer("constant"), torch.full((3,), 7.0))


def test_a_buffer_that_begins_to_change_later_is_refused() -> None:
    module = Counting(begin=2)
    buffers = of(module, Mean())
    take_step(module, buffers, [torch.ones(1)] * 2)
    with pytest.raises(TrainingError, match="buffer count changed in this step but not in the"):
        take_step(module, buffers, [torch.ones(1)])
