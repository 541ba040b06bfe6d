"""The values that a sweep is given: put in order, checked before a trial trains, one by number."""

from __future__ import annotations

import math
from itertools import product
from random import Random

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from ddptrain.compose import compose
from ddptrain.errors import Refused
from ddptrain.overrides import parse


def in_order(overrides: list[str]) -> list[str]:
    """With shuffled values spelt out, in an order that is the same whenever a sweep goes on.

    Raises ``Refused`` on a range that holds nothing.
    """
    _check_ranges(overrides)
    lines = []
    for each in parse(overrides):
        value, line = each.value(), str(each.input_line)
        if isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle:
            value.shuffle = False
            values = list(each.sweep_string_iterator())
            Random(line).shuffle(values)
            line = f"{line.partition('=')[0]}={','.join(values)}"
        lines.append(line)
    return lines


def check_values(overrides: list[str]) -> None:
    """Refuse a sweep with a value that no trial can have, before the first trial trains."""
    first, others = [], []
    for given in parse(overrides):
        line = str(given.input_line)
        if line.lstrip("+").startswith("hydra"):
            continue
        if not given.is_sweep_override():
            first.append([line])
            continue
        if not given.is_discrete_sweep() and not given.is_interval_sweep():
            continue
        values = _telling(given)
        first.append(values[:1])
        others.append((len(first) - 1, values[1:]))
    chosen = [line for lines in first for line in lines]
    compose(chosen)
    for place, values in others:
        for value in values:
            compose([*chosen[:place], value, *chosen[place + 1 :]])


def combination(overrides: list[str], number: int) -> list[str]:
    """The overrides of one trial of a grid, counted as a sweep does: the last key changes fastest.

    Raises ``Refused`` if there are not so many.
    """
    choices = [
        _values(each) if each.is_discrete_sweep() else [str(each.input_line)]
        for each in parse(in_order(overrides))
    ]
    count = math.prod(map(len, choices))
    if not 0 <= number < count:
        raise Refused(f"--trial {number}: there are {count} combinations, 0 to {count - 1}")
    chosen = list(product(*choices))[number]
    print(f"trial {number} of {count}: {' '.join(chosen)}", flush=True)
    return list(chosen)


def _check_ranges(overrides: list[str]) -> None:
    """Refuse a range or an interval that holds nothing, or has no logarithm."""
    for given in parse(overrides):
        value = given.value() if given.is_sweep_override() else None
        if isinstance(value, RangeSweep) and not any(True for _ in value.range()):
            raise Refused(f"{given.input_line}: expected a range with something in it")
        if isinstance(value, IntervalSweep):
            low, high = value.start or 0.0, value.end or 0.0
            if low > high or (low <= 0 and "log" in value.tags):
                raise Refused(
                    f"{given.input_line}: expected an interval from a smaller to a larger "
                    "number, both above 0 with tag(log, …)"
                )


def _values(given: Override) -> list[str]:
    """An override for each of the values that one names."""
    return [f"{given.get_key_element()}={value}" for value in given.sweep_string_iterator()]


def _telling(given: Override) -> list[str]:
    """Of an override's values those of which one is wrong if any is: the ends of a range."""
    value = given.value()
    if isinstance(value, IntervalSweep):
        return [f"{given.get_key_element()}={end}" for end in (value.start, value.end)]
    values = _values(given)
    return [values[0], values[-1]] if isinstance(value, RangeSweep) else values
