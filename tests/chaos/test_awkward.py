"""Faults that need something of the machine, one story each; skipped, with the reason, without."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from random import Random
from typing import Any

import pytest

from chaos import hangs, machine, network
from chaos.damage import DAMAGE
from chaos.faults import KILLS, LOADING
from chaos.operator import Fault, Moment, Operator
from chaos.setting import Setting
from chaos.story import tell

SEED = 7
KILL_ALL = KILLS[4]


def story(setting: Setting, *faults: tuple[Fault, int]) -> Operator:
    """Each fault so many steps after the one before."""
    plan = deque((fault, Moment(steps, 0.0)) for fault, steps in faults)
    return Operator(setting, plan, Random(SEED))


def unless(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


def plain(folder: Path, **more: Any) -> Setting:
    """The same run for most stories, so that it is trained undisturbed but once."""
    return Setting(folder, steps=50, workers=1, **more)


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """One in memory and two in the run directory, each of another kind, and a killed worker."""
    truncated, _, deleted, _, flipped, _ = DAMAGE
    faults = [(truncated, 12), (flipped, 12), (deleted, 12), (LOADING[0], 4)]
    tell(story(plain(tmp_path), *faults))


@pytest.mark.parametrize("fault", hangs.ALL, ids=lambda fault: fault.name)
def test_a_hang_is_ended(fault: Fault, tmp_path: Path) -> None:
    setting = plain(tmp_path, overrides=hangs.OVERRIDES)
    tell(story(setting, (fault, 9)))


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    unless(machine.disk_unavailable())
    setting = plain(tmp_path)
    with machine.small_disk(setting.run, mebibytes=8):
        tell(story(setting, (machine.Full(seconds=6.0), 18)))


def test_a_clock_that_jumps_an_hour(tmp_path: Path) -> None:
    unless(machine.clock_unavailable())
    variables = machine.own_clock(tmp_path / "clock")
    setting = plain(tmp_path, variables=variables)
    later, earlier = machine.Jump(3600), machine.Jump(-3600)
    tell(story(setting, (later, 9), (KILL_ALL, 7), (earlier, 9), (KILL_ALL, 7)))


def test_a_rank_that_takes_all_memory(tmp_path: Path) -> None:
    unless(machine.memory_unavailable())
    with machine.small_memory():
        tell(story(plain(tmp_path), (machine.OutOfMemory(), 13)))


def test_a_link_that_is_cut_for_a_while(tmp_path: Path) -> None:
    unless(network.unavailable())
    setting = network.TwoNodes(tmp_path, steps=50, workers=1)
    with setting.network():
        tell(story(setting, (network.Cut(5.0), 13)))


def test_a_link_that_is_cut_for_good(tmp_path: Path) -> None:
    unless(network.unavailable())
    setting = network.TwoNodes(tmp_path, steps=50, workers=1, overrides=hangs.OVERRIDES)
    with setting.network():
        tell(story(setting, (network.Cut(None), 13)))
