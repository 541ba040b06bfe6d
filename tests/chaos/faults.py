"""Faults that are signals: who is killed, who is asked to stop, and in what order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2, Signals

from launching import tree

from chaos.events import Context, Fault
from chaos.processes import Process, kill_all, send

GONE_SECONDS = 2.0
"""So long what an agent has started may outlive it."""
KEEP_ALIVE_SECONDS = 15.0
"""So long torch's agents take to miss the one of another node."""
Choice = Callable[[Context], list[Process]]


def one_rank(context: Context) -> list[Process]:
    """Any rank but 0."""
    ranks = [p for p in context.processes() if p.is_rank and p.rank != 0]
    return [context.random.choice(ranks)] if ranks else []


def first_rank(context: Context) -> list[Process]:
    return [p for p in context.processes() if p.is_rank and p.rank == 0]


def any_rank(context: Context) -> list[Process]:
    ranks = [p for p in context.processes() if p.is_rank]
    return [context.random.choice(ranks)] if ranks else []


def all_ranks(context: Context) -> list[Process]:
    return [p for p in context.processes() if p.is_rank]


def agent(context: Context) -> list[Process]:
    """Of several nodes, one."""
    agents = [p for p in context.processes() if p.pid in context.agents()]
    return [context.random.choice(agents)] if agents else []


def loading_worker(context: Context) -> list[Process]:
    workers = [p for p in context.processes() if p.is_loading]
    return [context.random.choice(workers)] if workers else []


def everything(context: Context) -> list[Process]:
    """Agents, ranks, and what the ranks have started, as the end of a container does."""
    return context.processes()


@dataclass(frozen=True)
class Signal:
    """One signal to those that ``choice`` chooses, all at once."""

    name: str
    number: Signals
    choice: Choice
    stops: bool = False
    spares: bool = True

    def inject(self, context: Context) -> bool:
        chosen = self.choice(context)
        orphans = {pid for p in chosen for pid in tree(p.pid)} if self.choice is agent else set()
        send(self.number, chosen)
        if self.number is SIGKILL and orphans:
            if len(context.agents()) > 1:
                context.postpone(KEEP_ALIVE_SECONDS)
            context.doom(orphans, GONE_SECONDS)
        return bool(chosen)


@dataclass(frozen=True)
class Tree:
    """SIGKILL of everything, again until nothing is left: a machine that loses its power."""

    name: str = "SIGKILL of everything"
    stops: bool = False
    spares: bool = False

    def inject(self, context: Context) -> bool:
        kill_all(context.setting.mark)
        return True


@dataclass(frozen=True)
class Impatient:
    """SIGTERM to the agent, and SIGKILL of everything ``seconds`` later."""

    name: str = "SIGTERM, SIGKILL after 1 s"
    seconds: float = 1.0
    stops: bool = False
    spares: bool = False

    def inject(self, context: Context) -> bool:
        send(SIGTERM, agent(context))
        time.sleep(self.seconds)  # it is the fault
        kill_all(context.setting.mark)
        return True


KILLS: list[Fault] = [
    Signal("SIGKILL of a rank that is not 0", SIGKILL, one_rank),
    Signal("SIGKILL of rank 0", SIGKILL, first_rank),
    Signal("SIGKILL of all ranks", SIGKILL, all_ranks, spares=False),
    Signal("SIGKILL of the agent", SIGKILL, agent),
    Tree(),
]
STOPS: list[Fault] = [
    Signal("SIGTERM to a rank", SIGTERM, any_rank, stops=True),
    Signal("SIGTERM to the agent", SIGTERM, agent, stops=True),
    Impatient(),
    Signal("SIGINT to the agent", SIGINT, agent, stops=True),
    Signal("SIGHUP to the agent", SIGHUP, agent, stops=True),
    Signal("SIGUSR1 to the agent", SIGUSR1, agent, stops=True),
    Signal("SIGUSR2 to the agent", SIGUSR2, agent, stops=True),
    Signal("SIGTERM to everything", SIGTERM, everything, stops=True),
]
LOADING: list[Fault] = [Signal("SIGKILL of a loading worker", SIGKILL, loading_worker)]
