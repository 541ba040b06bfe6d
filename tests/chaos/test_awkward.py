"""Faults that need something of the machine; skipped, with the reason, without."""

from __future__ import annotations

from contextlib import ExitStack
from errno import EIO, EROFS
from pathlib import Path

import pytest

from chaos import hangs, machine, network
from chaos.damage import DAMAGE
from chaos.events import Fault
from chaos.faults import KILLS, LOADING
from chaos.setting import Setting
from chaos.story import in_turn, short_run, tell

ONE_RANK, RANK_0, _, AGENT, _ = KILLS
TWO_NODES = ("resilience.hang_seconds=8",)
"""More than a link is cut for that comes back."""


def unless(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """One in the run directory and one in memory; and a worker that loads is killed."""
    truncated, _, _, _, flipped, _ = DAMAGE
    setting = short_run(tmp_path, Setting)
    tell(in_turn(setting, (truncated, 12), (flipped, 12), (LOADING[0], 4)))


def test_hangs_are_ended(tmp_path: Path) -> None:
    """Under torchrun, whose agent would wait for a stopped process forever."""
    setting = short_run(tmp_path, Setting, disturbing=hangs.OVERRIDES, launcher="torchrun")
    tell(in_turn(setting, *((fault, 9) for fault in hangs.AT_WORK)))


def test_a_machine_runs_out_of_memory_and_disk_and_its_clock_jumps(tmp_path: Path) -> None:
    """A rank dies while there is no room for snapshots, and one after the clock was set."""
    for reason in (machine.disk_unavailable(), machine.preload_unavailable()):
        unless(reason)
    variables = machine.preloaded(tmp_path)
    setting = short_run(tmp_path, machine.SmallMachine, variables=variables)
    faults: list[tuple[Fault, int]] = [
        (machine.FullMemory(seconds=2.0), 9),
        (ONE_RANK, 4),
        (machine.Jump(3600), 5),
        (RANK_0, 3),
        (machine.Jump(-3600), 3),
    ]
    with ExitStack() as stack:
        stack.enter_context(setting.disks())
        if machine.memory_unavailable() is None:
            stack.enter_context(machine.small_memory())
            faults.append((machine.OutOfMemory(), 3))
        tell(in_turn(setting, *faults, (machine.Full(seconds=6.0), 3)))


@pytest.mark.parametrize("error", [EIO, EROFS])
def test_a_disk_breaks_for_a_while_and_a_rank_dies(error: int, tmp_path: Path) -> None:
    unless(machine.preload_unavailable())
    setting = short_run(tmp_path, Setting, variables=machine.preloaded(tmp_path))
    tell(in_turn(setting, (machine.Broken(4.0, error), 9), (ONE_RANK, 3)))


def test_a_node_loses_a_rank_and_its_link_for_a_while_and_for_good(tmp_path: Path) -> None:
    unless(network.unavailable())
    setting = short_run(tmp_path, network.TwoNodes, disturbing=TWO_NODES)
    with setting.network():
        tell(in_turn(setting, (ONE_RANK, 9), (network.Cut(5.0), 9), (network.Cut(None), 9)))


def test_a_node_loses_its_agent(tmp_path: Path) -> None:
    unless(network.unavailable())
    setting = short_run(tmp_path, network.TwoNodes, disturbing=TWO_NODES)
    with setting.network():
        tell(in_turn(setting, (AGENT, 9)))
