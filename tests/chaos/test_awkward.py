"""Faults that need something of the machine; skipped, with the reason, without."""

from __future__ import annotations

from contextlib import ExitStack
from errno import EACCES, EIO, EROFS
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


@pytest.mark.long
def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """One in the run directory and one in memory; a loading worker killed, a start stopped."""
    truncated, _, _, _, flipped, _ = DAMAGE
    setting = short_run(tmp_path, Setting, disturbing=hangs.OVERRIDES)
    faults = (truncated, 12), (flipped, 12), (LOADING[0], 4), (hangs.ALL[-1], 4)
    assert not tell(in_turn(setting, *faults)).faults  # all have come


@pytest.mark.long
def test_a_machine_runs_out_of_memory_and_disk_and_its_clock_jumps(tmp_path: Path) -> None:
    """Ranks die while there is no room for snapshots, and while nothing can be written."""
    for reason in (machine.disk_unavailable(), machine.preload_unavailable()):
        unless(reason)
    variables = machine.preloaded(tmp_path)
    setting = short_run(tmp_path, machine.SmallMachine, variables=variables)
    faults: list[tuple[Fault, int]] = [
        (machine.FullMemory(seconds=2.0), 9),
        (ONE_RANK, 4),
        (machine.Jump(3600), 5),
        (machine.Broken(4.0, EROFS), 3),
        (RANK_0, 2),
        (machine.Jump(-3600), 3),
        (machine.Broken(4.0, EIO), 3),
        (machine.Broken(4.0, EACCES), 3),
    ]
    with ExitStack() as stack:
        stack.enter_context(setting.disks())
        if machine.memory_unavailable() is None:
            stack.enter_context(machine.small_memory())
            faults.append((machine.OutOfMemory(), 3))
        story = in_turn(setting, *faults, (machine.Full(seconds=6.0), 3))
        assert not tell(story).faults


@pytest.mark.long
def test_a_node_loses_a_rank_its_agent_and_its_link_for_good(tmp_path: Path) -> None:
    unless(network.unavailable())
    setting = short_run(tmp_path, network.TwoNodes, disturbing=TWO_NODES)
    with setting.network():
        story = in_turn(setting, (ONE_RANK, 9), (AGENT, 9), (network.Cut(None), 9))
        assert not tell(story).faults
