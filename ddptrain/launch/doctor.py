"""`ddptrain doctor`: tries a launch before it starts, and says what to do about what is wrong."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddptrain.config import Config
from ddptrain.errors import EXIT_COMPLETED, EXIT_REFUSED, Refused
from ddptrain.launch.agreement import agree_on_config, agree_on_loaded, import_targets
from ddptrain.launch.binding import bind_cpus
from ddptrain.launch.findings import Finding, State, judge, judge_speed
from ddptrain.launch.machine import Machine
from ddptrain.launch.patience import MEETING_SECONDS
from ddptrain.launch.probes import all_reduce, probe
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place, choose_interface
from ddptrain.resilience.failure import leave_now
from ddptrain.rules import check_world_size

GROUP_SECONDS, MEASURE_SECONDS, ADDING_SECONDS = 10.0, 6.0, 15.0
PIPE_WIDTH = 180
"""Columns of a table that no terminal shows, so that a line of it can be found."""
LOOKS = {State.ok: "green", State.warning: "yellow", State.failed: "bold red"}

logger = logging.getLogger(__name__)


def doctor(config: Config, place: Place) -> int:
    """Be one rank of a launch that is tried; rank 0 prints the table. Raises ``Refused``."""
    check_world_size(config, place.world_size)
    device, problem = torch.device("cpu"), ""
    try:
        device = choose_device(config.train.device.name, place)
    except Refused as error:
        problem = str(error)
    choose_interface(config.launch.interface)
    ranks = Ranks(place, device, None)
    ranks.meet(config.launch.timeout or MEETING_SECONDS)
    machines, findings = examine(ranks, config)
    findings += _of_devices(ranks, problem) + _try_code(ranks, config)
    if config.launch.bind_cpus:
        bind_cpus(place, device)
    parted = any(each.check in ("network", "versions") for each in failed(findings))
    if ranks.world_size > 1 and not parted:
        findings += _try_adding(ranks, machines, findings)
    if ranks.is_first:
        show(findings)
    if wrong := failed(findings):
        raise Refused(f"not fit to train: {', '.join(dict.fromkeys(each.check for each in wrong))}")
    return EXIT_COMPLETED


def examine(ranks: Ranks, config: Config) -> tuple[list[Machine], list[Finding]]:
    """The machines of all ranks, and what is to be said of them; the same on every rank."""
    here = Machine.here(config, ranks.place, ranks.device)
    machines = [Machine.of(told) for told in ranks.tell(asdict(here))]
    return machines, judge(machines, probe(ranks, machines))


def failed(findings: list[Finding]) -> list[Finding]:
    return [each for each in findings if each.state is State.failed]


def refuse_unfit(ranks: Ranks, config: Config) -> None:
    """Do the quick part before a training: warn of what is doubtful. Raises ``Refused``."""
    _, findings = examine(ranks, config)
    if ranks.is_first:
        for each in findings:
            if each.state is State.warning:
                logger.warning("%s: %s; %s", each.check, each.found, each.remedy)
    if wrong := failed(findings):
        raise Refused("; ".join(f"{each.check}: {each.found}: {each.remedy}" for each in wrong))


def _of_devices(ranks: Ranks, problem: str) -> list[Finding]:
    """That ranks have not the device that they are to have, each reason once."""
    told = [each["problem"] for each in ranks.tell({"problem": problem})]
    return [
        Finding("devices", State.failed, *problem.rsplit("; ", 1)[:2])
        for problem in dict.fromkeys(filter(None, told))
    ]


def _try_code(ranks: Ranks, config: Config) -> list[Finding]:
    """Whether the code that the config names can be imported, and is the same on all ranks."""
    found = []
    wrong = [told["wrong"] for told in ranks.tell({"wrong": import_targets(config)})]
    for rank, problems in enumerate(wrong):
        if problems and problems not in wrong[:rank]:
            where = f"{ranks.name_of(rank)}: {'; '.join(problems)}"
            remedy = "install what is missing, or start where the code lies"
            found.append(Finding("code", State.failed, where, remedy))
    agreements: dict[str, Callable[[Ranks], None]]
    agreements = {"code": agree_on_loaded, "config": partial(agree_on_config, config)}
    for check, agree in agreements.items() if ranks.world_size > 1 else ():
        try:
            agree(ranks)
        except Refused as error:
            told, _, remedy = str(error).rpartition("; ")
            found.append(Finding(check, State.failed, told, remedy))
    alike = ", and the same on all ranks, as the config" if ranks.world_size > 1 else ""
    return found or [Finding("code", State.ok, f"imported{alike}")]


def _try_adding(ranks: Ranks, machines: list[Machine], so_far: list[Finding]) -> list[Finding]:
    """Form a group and all-reduce in it. One that hangs ends the process, with the table."""
    remedy = "see what is between the machines, or choose another interface (launch.interface)"
    hangs = Finding("all-reduce", State.failed, f"not over within {ADDING_SECONDS:g} s", remedy)

    def end() -> None:
        if ranks.is_first:
            show([*so_far, hangs])
        leave_now(EXIT_REFUSED)

    limit = threading.Timer(ADDING_SECONDS, end)
    limit.daemon = True
    limit.start()
    try:
        ranks.join(timedelta(seconds=GROUP_SECONDS))
        found = judge_speed(machines, all_reduce(ranks, MEASURE_SECONDS))
        ranks.leave()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        found = [Finding("all-reduce", State.failed, why, remedy)]
    limit.cancel()
    return found


def show(findings: list[Finding]) -> None:
    """Print the table."""
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
    for each in findings:
        state = f"[{LOOKS[each.state]}]{each.state.name}"
        table.add_row(each.check, state, escape(each.found), escape(each.remedy))
    is_terminal = sys.stdout.isatty()
    Console(width=None if is_terminal else PIPE_WIDTH, markup=True, highlight=False).print(table)
