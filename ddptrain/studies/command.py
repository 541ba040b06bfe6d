"""`ddptrain study NAME`: starts ranks for all runs of a study at once, or is one of them."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, Refused, Stopped
from ddptrain.launch.agent import DDPTRAIN, Asked, start_ranks
from ddptrain.launch.local import count_ranks, print_failure
from ddptrain.place import Place
from ddptrain.resilience.preemption import listen
from ddptrain.screen import say, short
from ddptrain.studies.study import MOST_RANKS, Study

RANKS = 2
"""What is started without GPUs, if the machine has as many cores and nothing else was asked for."""


def study(parsed: Namespace) -> int:
    """Make the runs that are not there yet, and the report of all; return the exit code."""
    chosen = Study.named(parsed.name, parsed.out, parsed.overrides, parsed.only)
    if "RANK" in os.environ:
        place = Place.from_environment()
        if place.world_size > MOST_RANKS:
            told = (
                f"{place.world_size} ranks: a step of the study has work for {MOST_RANKS} at most"
            )
            raise Refused(f"{told}; start fewer")
        if place.rank == 0:
            chosen.prepare()
        return _be_rank(chosen, place)
    ranks = _count(chosen)
    chosen.prepare()
    told = f"{ranks} ranks" if ranks > 1 else "1 rank"
    say(f"study        {chosen.plan.name}, on {told}, in {short(chosen.folder)}")
    if ranks == 1:
        return _be_rank(chosen, Place())
    return _start(chosen, parsed, ranks)


def _count(chosen: Study) -> int:
    """How many ranks to start. Raises ``Refused`` if that is more than there is work for."""
    config = chosen.config(next(chosen.plan.runs()))
    ranks = count_ranks(config)
    if config.launch.nproc_per_node == "auto":
        cores = len(os.sched_getaffinity(0))
        return min(ranks, MOST_RANKS) if ranks > 1 else min(RANKS, cores)
    if ranks > MOST_RANKS:
        told = f"launch.nproc_per_node={ranks}: a step of the study has work for {MOST_RANKS} ranks"
        raise Refused(f"{told} at most")
    return ranks


def _start(chosen: Study, parsed: Namespace, ranks: int) -> int:
    """Have ranks of their own processes make it."""
    only = [word for name in parsed.only for word in ("--only", name)]
    arguments = ["study", parsed.name, *parsed.overrides, "--out", str(chosen.folder), *only]
    try:
        failure = start_ranks([*DDPTRAIN, *arguments], ranks)
    except Asked as asked:
        say(f"{asked.signal.name}: {_stopped(chosen)}", sys.stderr)
        return EXIT_STOPPED
    if failure is None:
        return EXIT_COMPLETED
    code = print_failure(failure, f"see the logs of the newest run in {short(chosen.folder)}")
    if code == EXIT_FAILED:
        say(f"ddptrain: {_stopped(chosen)}", sys.stderr)
    return code


def _stopped(chosen: Study) -> str:
    again = f"ddptrain study {chosen.plan.name}{chosen.arguments_of_user()}"
    return f"the study is not finished; what there is of it stays: {again} goes on"


def _be_rank(chosen: Study, place: Place) -> int:
    stop_request = listen(place)
    from ddptrain.studies.report import write_report
    from ddptrain.studies.runs import make_runs

    try:
        make_runs(chosen, place, stop_request)
    except Stopped as stopped:
        raise Stopped(f"{str(stopped).partition(';')[0]}; {_stopped(chosen)}") from None
    if place.rank == 0:
        say(write_report(chosen.with_others()))
    return EXIT_COMPLETED
