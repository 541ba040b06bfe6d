"""Exact sums: what the arithmetic promises, over the whole range of floating-point numbers."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launching import PROJECT
from torch import Tensor, nn

from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.errors import NonFiniteError, Refused, TrainingError
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ddp import DataParallel
from ddptrain.parallel.exact import FAINT, LOW, MAX_ADDENDS, Exact, from_words, to_words
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory

CPU = torch.device("cpu")
ADDENDS = 8
LIMIT = 2.0**36 / ADDENDS
within_range = st.floats(-LIMIT, LIMIT, exclude_min=True, exclude_max=True, width=32)
anything = st.floats(width=32)
by_magnitude = st.builds(
    lambda mantissa, exponent: float(torch.tensor(mantissa * 10.0**exponent)),
    st.floats(-1, 1),
    st.integers(-45, 38),
)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def exact_sum(values: list[float]) -> Fraction:
    return sum((Fraction(value) for value in values), Fraction(0))


@given(st.lists(within_range, min_size=1, max_size=ADDENDS), st.randoms())
def test_sums_are_right_to_the_last_bit_kept_in_any_order(
    values: list[float], random: Random
) -> None:
    exact = Exact(ADDENDS)
    words = [exact.encode(torch.tensor([value], dtype=torch.float64)) for value in values]
    total = torch.stack(words).sum(0)
    random.shuffle(words)
    halves = words[: len(words) // 2], words[len(words) // 2 :]
    grouped = sum((sum(half, torch.zeros_like(total)) for half in halves), torch.zeros_like(total))
    assert torch.equal(grouped, total)
    right = exact_sum(values)
    error = abs(Fraction(exact.decode(total).item()) - right)
    assert error <= len(values) * Fraction(2) ** -(LOW + 1) + abs(right) * Fraction(2) ** -52


@given(st.floats(FAINT, 2.0**36, exclude_max=True, width=32), st.booleans())
def test_every_digit_of_a_float32_that_is_not_faint_is_kept(value: float, negative: bool) -> None:
    one = torch.tensor([-value if negative else value])
    high, low = to_words(one)
    assert torch.equal(from_words(high.to(torch.int64), low.to(torch.int64)).float(), one)


def test_the_largest_sums_do_not_overflow() -> None:
    for addends in (1, 3, MAX_ADDENDS):
        exact = Exact(addends)
        largest = math.nextafter(exact.limit, 0)
        for value in (largest, -largest, 2.0**-27 * (1 + 2**-40)):
            words = exact.encode(torch.tensor([value], dtype=torch.float64))
            total = [int(word) * addends for word in words]
            assert max(map(abs, total)) < 2**63
            assert exact.decode(words * addends).item() == pytest.approx(addends * value, rel=1e-9)


class Given(nn.Module):
    """Its parameters' gradients are what ``forward`` is given."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.single = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, wide: Tensor, single: Tensor) -> Tensor:
        return (self.wide * wide).sum() + self.single * single

    def flat(self) -> Tensor:
        assert self.wide.grad is not None
        assert self.single.grad is not None
        return torch.cat([self.wide.grad, self.single.grad.view(1)])


def reduce(exact: Exact, gradients: list[list[float]], dtype: torch.dtype = torch.float32) -> Given:
    """Sum the gradients of micro-batches as a step does, the last number of each being single."""
    module = Given(len(gradients[0]) - 1, dtype)
    strategy = DataParallel(Ranks(Place(), CPU, TIMEOUT), 25, exact)
    replica = strategy.wrap(module)
    rows = torch.tensor(gradients, dtype=dtype)
    replica(rows[0][:-1] * 0, rows[0][-1] * 0).backward()  # as a Step does: DDP rearranges buckets
    module.zero_grad()
    exact.relay()
    for row in rows[:-1]:
        with strategy.accumulate(replica):
            replica(row[:-1], row[-1]).backward()
    replica(rows[-1][:-1], rows[-1][-1]).backward()
    return module


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, ADDENDS).flatmap(
        lambda count: st.lists(
            st.lists(anything | by_magnitude, min_size=4, max_size=4),
            min_size=count,
            max_size=count,
        )
    )
)
@example([[1e30, 1.0, 1e-30, 1e-45]])
@example([[math.inf, 1.0, 1.0, 1.0], [-math.inf, 1.0, 1.0, 1.0]])
@example([[1e-45, 0.0, 0.0, 1e-30], [0.0, 1e-40, 0.0, -1e-30]])
@example([[LIMIT, 0.0, 0.0, 0.0]])
def test_a_gradient_is_right_or_reported(gradients: list[list[float]]) -> None:
    """Over the whole range of float32: subnormal, infinite and NaN values too."""
    exact = Exact(ADDENDS)
    module = reduce(exact, gradients)
    dist.destroy_process_group()
    flat = [value for row in gradients for value in row]
    got = module.flat()
    if not all(abs(value) < LIMIT for value in flat):
        for parameter, columns in ((module.wide, range(3)), (module.single, range(3, 4))):
            fits = all(abs(row[column]) < LIMIT for row in gradients for column in columns)
            assert parameter.grad is not None
            assert bool(parameter.grad.view(-1)[0].isnan()) != fits
        largest = max((abs(value) for value in flat), key=lambda v: math.inf if v != v else v)
        assert exact.objection(largest) is not None
        return
    bound = len(gradients) * Fraction(2) ** -(LOW + 1)
    for column, value in enumerate(got.tolist()):
        right = exact_sum([row[column] for row in gradients])
        assert abs(Fraction(value) - right) <= bound + abs(right) * Fraction(2) ** -23
    faint = exact.take_faint()
    for parameter, columns in ((module.wide, range(3)), (module.single, range(3, 4))):
        largest = max(abs(row[column]) for row in gradients for column in columns)
        assert (0 < largest < FAINT) == any(p is parameter for p in faint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_summed_in_its_own(dtype: torch.dtype) -> None:
    module = reduce(Exact(ADDENDS), [[0.5, -2.0, 1e-3, 3.0], [0.25, 2.0, 1e-3, 4.0]], dtype)
    small = torch.tensor(1e-3, dtype=dtype) * 2
    assert torch.equal(module.flat(), torch.tensor([0.75, 0.0, small, 7.0], dtype=dtype))


def test_the_loss_scale_moves_the_range() -> None:
    scale = torch.tensor(2.0**24)
    module = reduce(Exact(ADDENDS, scale), [[LIMIT * 2.0**20, 0.0, 2.0, 1.0]])
    assert torch.equal(module.flat(), torch.tensor([LIMIT * 2.0**20, 0.0, 2.0, 1.0]))
    dist.destroy_process_group()
    for first, beyond in ((LIMIT * 2.0**24, True), (math.inf, False)):
        exact = Exact(ADDENDS, scale)
        module = reduce(exact, [[first, 0.0, 2.0, 1.0]])
        dist.destroy_process_group()
        assert module.flat().isnan().any()
        assert exact.beyond() is not None
        assert bool(exact.beyond()) == beyond  # an infinite one may be finite at a lower scale


def test_what_is_advised_helps() -> None:
    exact = Exact(ADDENDS)
    assert exact.advice(LIMIT / 2) == ""
    for largest in (LIMIT, 4.62e16, 1e38):
        bits = re.search(r"by 2\*\*-(\d+)", exact.advice(largest))
        assert bits is not None
        assert exact.objection(largest * 2.0 ** -int(bits[1])) is None


class Halves(nn.Module):
    """Parameters of two dtypes, as many elements in each, one of them empty."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(6))
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in "ab")
        self.empty = nn.Parameter(torch.zeros(0, dtype=torch.float64))

    def forward(self, factor: float) -> Tensor:
        parts = torch.stack([part.float().sum() for part in self.parts]).sum()
        return (self.one.sum() + parts + self.empty.sum()) * factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_empty_parameters_and_buckets_that_change_places(dtype: torch.dtype) -> None:
    module, exact = Halves(dtype), Exact(ADDENDS)
    strategy = DataParallel(Ranks(Place(), CPU, TIMEOUT), 25, exact)
    replica = strategy.wrap(module)
    replica(0.0).backward()  # as a Step does: DDP rearranges buckets
    exact.relay()
    for step in range(1, 4):
        module.zero_grad()
        with strategy.accumulate(replica):
            replica(1.0).backward()
        replica(float(step)).backward()
        for parameter in module.parameters():
            assert torch.equal(parameter.grad, torch.full_like(parameter, 1 + step))
    sizes = sum(len(sums) for sums in exact.sums.values())
    assert sizes == 2 * 12 + 3  # no memory is kept of the layout of buckets before


def test_a_number_out_of_range_stops_a_run_whatever_the_loss_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    trainer = build(tmp_path, "task.scale=1e10", "train.precision=fp16", "log.tensorboard=false")
    trainer.step(0, trainer.fetcher.steps(0, 1, 0, 1))
    trainer.done = 1
    with pytest.raises(NonFiniteError, match=r"the loss reaches .* exact sums take.*by 2\*\*-\d"):
        trainer.heed(wait=True)


def test_a_buffer_out_of_range_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    trainer = build(tmp_path, "model.batch_norm=true", "log.tensorboard=false")
    batches = trainer.fetcher.steps(0, 1, 0, 1)
    moved = trainer.task.get_submodule("model.norm")

    def stray(norm: nn.Module, *_: object) -> None:
        norm.get_buffer("running_var").data.add_(1e15)

    moved.register_forward_hook(stray)
    before = {name: tensor.clone() for name, tensor in trainer.task.state_dict().items()}
    trainer.step(0, batches)
    trainer.done = 1
    with pytest.raises(
        NonFiniteError, match=r"the move of buffer model\.norm\.running_var reaches"
    ):
        trainer.heed(wait=True)
    after = trainer.task.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def build(folder: Path, *overrides: str) -> Trainer:
    config = compose(["experiment=ragged", "parallel.reduction=exact", *overrides])
    ranks = Ranks(Place(), CPU, TIMEOUT)
    return build_trainer(config, ranks, RunDirectory(folder), Phases())


def test_a_parameter_with_faint_gradients_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(PROJECT)
    trainer = build(tmp_path, "task.scale=1e-18", "log.tensorboard=false")
    batches = trainer.fetcher.steps(0, 3, 0, 1)
    with caplog.at_level(logging.WARNING, "ddptrain"):
        for step in range(3):
            trainer.step(step, batches)
            trainer.step.read()
    named = [next(iter(record.args or ())) for record in caplog.records]
    assert sorted(map(str, named)) == sorted(name for name, _ in trainer.task.named_parameters())


def test_layers_that_see_what_the_ranks_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    with pytest.raises(Refused, match=r"model is a SyncBatchNorm.*use BatchNorm"):
        build(tmp_path, "model={_target_:torch.nn.SyncBatchNorm,num_features:4}")


def test_more_micro_batches_than_can_be_added_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    sizes = (f"train.global_batch_size={MAX_ADDENDS + 1}", "train.micro_batch_size=1")
    with pytest.raises(Refused, match="at most 65535"):
        build(tmp_path, *sizes, f"data.train.samples={MAX_ADDENDS + 1}")


@pytest.mark.parametrize("fault", ["extra", "fickle"])
def test_a_parameter_that_a_micro_batch_leaves_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.chdir(PROJECT)
    trainer = build(tmp_path, f"model.{fault}=true", "log.tensorboard=false")
    batches = trainer.fetcher.steps(0, 1, 0, 1)
    with pytest.raises(TrainingError, match=r"got no gradient: model\.f[a-z]+\.weight, model\.f"):
        trainer.step(0, batches)
