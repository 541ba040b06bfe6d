"""This process among those of its run, as the launcher's environment tells it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from ddptrain.errors import EXIT_REFUSED, Refused

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
        _refuse_torchruns()
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


def interface_of(address: str) -> str | None:
    """The network interface that has a numeric ``address``; None if none here has it."""
    return next((name for known, name in _addresses() if known == address), None)


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


def refuse_tasks() -> None:
    """Refuse to be one of several processes of srun, each of which would be a run of its own."""
    _refuse_tasks(
        "of these, and each would be a run of its own: leave srun out, for in a batch script or "
        "under salloc `ddptrain train` starts the ranks on all nodes; or have srun start one "
        "(--ntasks=1), for the ranks of one node"
    )


def _refuse_torchruns() -> None:
    """Refuse to be a rank of one of several torchruns that know nothing of each other."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if os.environ.get("GROUP_WORLD_SIZE") == "1" and (name == "none" or _is_of_standalone(name)):
        _refuse_tasks(
            "torchruns, and each would be a run of its own: give them --nnodes, and one --rdzv-id "
            "and --rdzv-endpoint; or leave both out, for in a batch script or under salloc "
            "`ddptrain train` starts the ranks on all nodes"
        )


def _is_of_standalone(name: str) -> bool:
    """Whether a torchrun has named its run itself, so that no other can have the same name."""
    with suppress(ValueError):
        return UUID(name).version == 4
    return False


def _refuse_tasks(why: str) -> None:
    """Raise ``Refused`` in the first of several processes of srun; the others end in silence.

    But not in the one that srun has given a terminal: there sits a person, and what the others were
    to be, such as shells, finds nothing to read.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    number = os.environ.get("SLURM_PROCID", "0")
    if tasks == 1 or (number == "0" and "SLURM_PTY_PORT" in os.environ):
        return
    if number != "0":
        sys.exit(EXIT_REFUSED)
    raise Refused(f"srun has started {tasks} {why}")
