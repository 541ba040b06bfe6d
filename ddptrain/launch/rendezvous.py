"""torchrun's rendezvous of several machines, which says what it waits for, and who has not come.

It is that of c10d; `torchrun --rdzv-backend=ddptrain --rdzv-endpoint=ADDRESS:PORT` finds it among
the entry points of what is installed: https://docs.pytorch.org/docs/stable/elastic/rendezvous.html.
No machine's name has to resolve here, and one that comes to a later round is let in.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import NoReturn

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from ddptrain.errors import PeerFailed, Refused, TrainingError
from ddptrain.parallel.meeting_point import keep, reach
from ddptrain.place import address_towards, is_here
from ddptrain.screen import say

BACKEND = "ddptrain"
PORT = 29400
JOIN_SECONDS = 600
"""torch's own, where it is told nothing else."""
STAY_SECONDS = 2.0
"""So long one that gives up stays, with the store if it keeps it, for the others to hear why."""


def entry() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What an entry point gives torchrun: how its handler is made."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """Open the store at the endpoint, which one of the machines has, and meet there.

    Ends the process, with one line, if that cannot be.
    """
    try:
        return Named(parameters)
    except TrainingError as error:
        _end(error)


def _end(error: TrainingError) -> NoReturn:
    say(f"ddptrain: {error}", sys.stderr)
    raise SystemExit(error.exit_code) from None


def _numeric(host: str) -> str:
    """The address of ``host``. Raises ``Refused`` if only this machine would take it for one."""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        address = "nothing"
    if host != address and (address == "nothing" or ip_address(address).is_loopback):
        raise Refused(
            f"{host} means {address} on {socket.gethostname()}: give a numeric address at which "
            "all machines reach that one"
        )
    return address


class Roll:
    """Which machines are waiting for the others, by the names that they leave in the store."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = PrefixStore("ddptrain-roll", store)
        self.name = name
        self.store.set(f"name-{self.store.add('names', 1)}", name)

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Wait in here; who has been let in does not wait any more."""
        self.store.set(self.name, "waits")
        yield
        self.store.set(self.name, "is in")

    def waiting(self) -> list[str]:
        count = self.store.add("names", 0)
        names = [self.store.get(f"name-{number + 1}").decode() for number in range(count)]
        return [name for name in dict.fromkeys(names) if self.store.get(name) == b"waits"]

    def give_up(self, why: str) -> None:
        """Leave word for those who still wait."""
        self.store.set("reason", why)

    def reason(self) -> str:
        return self.store.get("reason").decode() if self.store.check(["reason"]) else ""


class Named(RendezvousHandler):
    """c10d's handler, with errors that name the machines."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        """Raises ``Refused`` if the endpoint cannot be, ``PeerFailed`` if nobody opens it."""
        host, port = parse_rendezvous_endpoint(parameters.endpoint, PORT)
        self.where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.least, self.most = parameters.min_nodes, parameters.max_nodes
        self.seconds = int(parameters.get("join_timeout", JOIN_SECONDS))
        address = _numeric(host)
        here = parameters.local_addr or address_towards([address])
        if here is None:
            raise Refused(
                f"{socket.gethostname()} has no way to {host}, where the machines are to meet; "
                "give the address of one of them, in numbers, that all the others reach"
            )
        store = self._open(address, port)
        # Or machines that come late wait for an address that is told in the first round only.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        parameters.local_addr = here
        backend = C10dRendezvousBackend(store, parameters.run_id)
        self.handler = create_handler(store, backend, parameters)
        self.roll = Roll(store, f"{socket.gethostname()} ({here})")

    def _open(self, address: str, port: int) -> TCPStore:
        store = keep(address, port, f"port {port}") if is_here(address) else None
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        say(f"{count} machines meet at {self.where}", sys.stderr)
        who = "the machine of that address, started as this one was,"
        return store or reach(address, port, self.seconds, who, self.where)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the others. Ends the process if too few come, or the store has gone."""
        with self._told(), self.roll.answered():
            return self.handler.next_rendezvous()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RendezvousTimeoutError:
            came = self.roll.waiting()
            why = (
                f"of at least {self.least} machines {len(came)} came to {self.where} within "
                f"{self.seconds} s: {', '.join(came)}; start the others with the same address, see "
                "that no firewall keeps them from it, or give them more time (launch.timeout)"
            )
            self.roll.give_up(why)
            self.handler.set_closed()
            time.sleep(STAY_SECONDS)
            _end(PeerFailed(why))
        except RendezvousClosedError:
            _end(PeerFailed(self.roll.reason() or f"the run that met at {self.where} is over"))
        except RendezvousConnectionError:
            _end(
                PeerFailed(
                    f"nobody is at {self.where} any more, where the machines meet: the screen of "
                    "the machine with that address says why; start all of them again"
                )
            )

    def num_nodes_waiting(self) -> int:
        """How many have come since. Ends the process if the store has gone."""
        with self._told():
            return self.handler.num_nodes_waiting()

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return self.handler.use_agent_store

    def is_closed(self) -> bool:
        return self.handler.is_closed()

    def set_closed(self) -> None:
        self.handler.set_closed()

    def get_run_id(self) -> str:
        return self.handler.get_run_id()

    def shutdown(self) -> bool:
        return self.handler.shutdown()
