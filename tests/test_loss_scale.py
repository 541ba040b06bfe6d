"""fp16's loss scale must find its height by itself, and not hide numbers that are at fault."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddptrain.optim.loss_scale import GROWTH_INTERVAL, LARGEST, SMALLEST, LossScale

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(False), torch.tensor(True)


def scale_at(value: float, finite_steps: int = 0) -> LossScale:
    scale = LossScale(CPU, initial=value)
    scale.finite_steps.fill_(finite_steps)
    return scale


def test_a_step_that_overflows_halves_it() -> None:
    scale = scale_at(4096.0, finite_steps=500)
    assert not scale.update(BAD, GOOD)
    assert scale.value == 2048.0
    assert scale.finite_steps == 0


def test_a_thousand_finite_steps_double_it() -> None:
    scale = LossScale(CPU, initial=256.0)
    for step in range(1, 2 * GROWTH_INTERVAL + 1):
        assert not scale.update(GOOD, GOOD)
        assert scale.value == 256.0 * 2 ** (step // GROWTH_INTERVAL)


def test_an_overflow_just_before_starts_the_count_again() -> None:
    scale = scale_at(256.0, finite_steps=GROWTH_INTERVAL - 1)
    scale.update(BAD, GOOD)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(GOOD, GOOD)
    assert scale.value == 128.0
    scale.update(GOOD, GOOD)
    assert scale.value == 256.0


def test_at_the_smallest_scale_the_numbers_themselves_are_at_fault() -> None:
    scale = scale_at(2 * SMALLEST)
    assert not scale.update(BAD, GOOD)
    assert scale.value == SMALLEST
    assert scale.update(BAD, GOOD)
    assert scale.value == SMALLEST
    assert not scale.update(GOOD, GOOD)


def test_what_no_scale_makes_finite_is_a_fault_and_leaves_it_alone() -> None:
    scale = scale_at(4096.0)
    assert scale.update(BAD, BAD)
    assert scale.value == 4096.0


def test_it_grows_no_further_than_the_largest() -> None:
    scale = scale_at(LARGEST, finite_steps=GROWTH_INTERVAL - 1)
    scale.update(GOOD, GOOD)
    assert scale.value == LARGEST


@given(
    start=st.integers(0, 24),
    bad=st.lists(st.booleans(), max_size=60),
    finite_steps=st.integers(0, GROWTH_INTERVAL - 1),
)
def test_it_is_always_a_power_of_two_within_its_bounds(
    start: int, bad: list[bool], finite_steps: int
) -> None:
    """A power of two scales without rounding, so that fp16 has the gradients of fp32."""
    scale = scale_at(2.0**start, finite_steps)
    for is_bad in bad:
        before = scale.value.item()
        fault = scale.update(torch.tensor(is_bad), GOOD)
        assert fault.item() == (is_bad and before == SMALLEST)
        assert SMALLEST <= scale.value.item() <= LARGEST
        assert math.log2(scale.value.item()).is_integer()
        assert 0 <= scale.finite_steps.item() < GROWTH_INTERVAL
        if is_bad:
            assert scale.value.item() == max(SMALLEST, before / 2)


@pytest.mark.parametrize("bad", [GOOD, BAD])
def test_it_stays_a_tensor_of_one_type(bad: torch.Tensor) -> None:
    scale = LossScale(CPU)
    fault = scale.update(bad, GOOD)
    assert fault.dtype == torch.bool
    assert scale.value.dtype == scale.finite_steps.dtype == torch.float32
    assert scale.value.shape == scale.finite_steps.shape == ()
