"""This process among those of its run, as the launcher's environment tells it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddptrain.errors import Refused
from ddptrain.srun import refuse_tasks, refuse_torchruns

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process that it starts."""
SIOCGIFADDR = 0x8915
"""Linux's request for the address of a network interface: see netdevice(7)."""
LINK_LOCAL = "20"
"""The scope, in /proc/net/if_inet6, of an address that means nothing without its interface."""


@dataclass(frozen=True)
class Place:
    """This process among those of the run, as the launcher's environment tells it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @staticmethod
    def from_environment() -> Place:
        """Read torchrun's variables; one rank where there are none. Raises ``Refused``."""
        present = [name for name in ENVIRONMENT if name in os.environ]
        if not {"RANK", "WORLD_SIZE"} & set(present):
            refuse_tasks()
            return Place()
        if missing := [name for name in ENVIRONMENT if name not in os.environ]:
            raise Refused(
                f"{', '.join(present)} set but not {', '.join(missing)}: start the ranks with "
                "torchrun or `ddptrain train`, which set them all, or unset them for one rank"
            )
        refuse_torchruns()
        rank, world_size = _number("RANK"), _number("WORLD_SIZE")
        if rank >= world_size:
            raise Refused(
                f"RANK={rank}: expected less than WORLD_SIZE={world_size}; ranks begin at 0"
            )
        if _number("MASTER_PORT") > 65535:
            raise Refused(f"MASTER_PORT={os.environ['MASTER_PORT']}: expected at most 65535")
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Place(rank, world_size, _number("LOCAL_RANK"), restarts)

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({socket.gethostname()})"


def _number(variable: str) -> int:
    value = os.environ[variable]
    if not value.isdecimal():
        raise Refused(f"{variable}={value!r}: expected a number, 0 or above")
    return int(value)


def choose_interface(name: str | None) -> None:
    """Have gloo and NCCL use the network interface of that name. Raises ``Refused``.

    Without a name gloo takes that by which this machine reaches rank 0's, and not, as it would by
    itself, that of its own host name's address, by which others may not reach it at all.
    """
    if name is None:
        address = own_address()
        interface = None if address is None else interface_of(address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        return
    there = [each for _, each in socket.if_nameindex()]
    if name not in there:
        raise Refused(f"launch.interface={name}: this machine has {', '.join(there)}")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def own_address(interface: str | None = None) -> str | None:
    """The address of this machine's ``interface``, or that from which it reaches rank 0's machine.

    None if that cannot be told.
    """
    if interface is not None:
        return next((address for address, name in _addresses() if name == interface), None)
    first = os.environ.get("MASTER_ADDR")
    return None if first is None else address_towards([first])


def open_port(port: int = 0) -> socket.socket:
    """A socket that listens on all addresses of this machine; 0 is a port that is free."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def interface_of(address: str) -> str | None:
    """The network interface that has a numeric ``address``; None if none here has it."""
    return next((name for known, name in _addresses() if known == address), None)


def is_here(address: str) -> bool:
    """Whether a numeric ``address`` is one of this machine's, the second of an interface too."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
        asked.bind((address, 0))
        return True
    return False


def _addresses() -> Iterator[tuple[str, str]]:
    """The numeric addresses of this machine with their interfaces, the IPv4 ones first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(asked, SIOCGIFADDR, request)
                yield socket.inet_ntoa(answer[20:24]), name
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope != LINK_LOCAL:
                yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), name


def address_towards(others: Iterable[str]) -> str | None:
    """The numeric address that this machine has on the way to the first of ``others`` with a way.

    None if there is none. Of its own name a machine often knows no more than 127.0.1.1.
    """
    for other in others:
        with suppress(OSError):
            for family, kind, _, _, target in socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM):
                with suppress(OSError), socket.socket(family, kind) as way:
                    way.connect(target)  # sends nothing
                    return str(way.getsockname()[0])
    return None
