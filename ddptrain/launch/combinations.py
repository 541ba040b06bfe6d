"""The values that a sweep is given: put in order, checked before a trial trains, one by number."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import islice, product
from random import Random
from typing import Any, cast

from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from ddptrain.compose import compose, options
from ddptrain.errors import Refused
from ddptrain.overrides import parse

TRIES, MANY = 8, 8


def ranges(settings: DictConfig, overrides: list[str]) -> list[str]:
    """The overrides in ``hydra.sweeper.params``, but for keys that the command line names."""
    sweeper = cast("dict[str, Any]", OmegaConf.to_container(settings.sweeper))
    params = sweeper.get("params") or {}
    if not isinstance(params, dict):
        raise Refused("hydra.sweeper.params: expected ranges by key, {optim.lr: 'interval(0,1)'}")
    named = {str(given.key_or_group) for given in parse(overrides)}
    return [f"{key}={value}" for key, value in params.items() if str(key) not in named]


def in_order(overrides: list[str]) -> list[str]:
    """With shuffled values and globs spelt out, in an order that is the same whenever it goes on.

    Of a key that has values twice the last ones hold. Raises ``Refused`` on a range that holds
    nothing.
    """
    _check_ranges(overrides)
    given = parse(overrides)
    last = {str(each.key_or_group): each for each in given}
    lines = []
    for each in given:
        value, line, key = each.value(), str(each.input_line), str(each.key_or_group)
        is_sweep = each.is_sweep_override() or last[key].is_sweep_override()
        if each is not last[key] and is_sweep:
            continue
        if isinstance(value, Glob):
            if not (names := value.filter(options(key))):
                raise Refused(f"{line}: {key} has {', '.join(options(key)) or 'no options'}")
            line = f"{line.partition('=')[0]}={','.join(names)}"
        elif isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle:
            value.shuffle = False
            values = list(each.sweep_string_iterator())
            Random(line).shuffle(values)
            line = f"{line.partition('=')[0]}={','.join(values)}"
        lines.append(line)
    return lines


def check_values(overrides: list[str]) -> None:
    """Refuse a sweep with a value that no trial can have, before the first trial trains.

    That is one which is refused with the first few combinations of the other keys' values.
    """
    choices = [
        _telling(given) if given.is_sweep_override() else [str(given.input_line)]
        for given in parse(overrides)
        if not str(given.key_or_group).startswith("hydra")
    ]
    problems: dict[tuple[str, ...], Refused | None] = {}

    def problem(combination: tuple[str, ...]) -> Refused | None:
        if combination not in problems:
            try:
                problems[combination] = None
                compose(list(combination))
            except Refused as error:
                problems[combination] = error
        return problems[combination]

    for place, values in enumerate(choices or [[]]):
        for value in values:
            others = [*choices[:place], [value], *choices[place + 1 :]]
            found = []
            for combination in islice(product(*others), TRIES):
                if (error := problem(combination)) is None:
                    break
                found.append(error)
            else:
                raise found[0]


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
    """Refuse a range or an interval that holds nothing, or has no end, or no logarithm."""
    for given in parse(overrides):
        value = given.value() if given.is_sweep_override() else None
        if isinstance(value, RangeSweep):
            bounds = (value.start, value.stop, value.step)
            is_range = all(math.isfinite(n or 0) for n in bounds) and value.step != 0
            if not is_range or not any(True for _ in value.range()):
                raise Refused(f"{given.input_line}: expected a range with something in it")
        if isinstance(value, IntervalSweep):
            low, high = value.start or 0.0, value.end or 0.0
            is_interval = math.isfinite(low) and math.isfinite(high) and low <= high
            if not is_interval or (low <= 0 and "log" in value.tags):
                raise Refused(
                    f"{given.input_line}: expected an interval from a smaller to a larger "
                    "number, both above 0 with tag(log, …)"
                )


def _values(given: Override) -> list[str]:
    """An override for each of the values that one names."""
    return [f"{given.get_key_element()}={value}" for value in given.sweep_string_iterator()]


def _telling(given: Override) -> list[str]:
    """Some of an override's values: those of which one is wrong, as a rule, if any is.

    Of a range, and of many numbers, those are the ends.
    """
    value = given.value()
    if isinstance(value, IntervalSweep):
        return [f"{given.get_key_element()}={end}" for end in (value.start, value.end)]
    values = _values(given)
    if isinstance(value, RangeSweep):
        return list(dict.fromkeys([values[0], values[-1]]))
    if len(values) > MANY:
        with suppress(ValueError):  # not all are numbers
            by_size = sorted(values, key=lambda line: float(line.partition("=")[2]))
            return [by_size[0], by_size[-1]]
    return values
