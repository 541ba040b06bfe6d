"""The store at which ranks meet: torch's, reached or refused in one line."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from ddptrain.errors import PeerFailed, Refused
from ddptrain.place import Place, open_port

STORE_TIMEOUT = timedelta(seconds=30)
"""For one request."""
TRY_SECONDS, PAUSE_SECONDS = 3.0, 0.1
NAME_SECONDS = 30.0
"""So long the name of a machine that has just been started may take to be known."""


def open_store(place: Place, seconds: float | None, first: bool = False) -> TCPStore:
    """Open the store that the launcher keeps for the whole run, over all restarts.

    Where ranks are started by hand, rank 0 keeps it, and is the ``first`` to open it. Raises
    ``Refused`` if its address cannot be, ``PeerFailed`` if nobody answers within ``seconds``.

    The process group takes a prefix per attempt on it: on a shared prefix the ranks of a new
    attempt can read the addresses of the ranks that have died (see ``roll_call``).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if first and place.rank == 0 and not is_launchers:
        return keep(host, port, f"MASTER_PORT={port}")
    who = "its launcher" if is_launchers else "rank 0"
    return reach(host, port, seconds, who, f"MASTER_ADDR={host} MASTER_PORT={port}")


def keep(host: str, port: int, named: str) -> TCPStore:
    """Open the store on this machine, of which ``host`` is an address.

    Raises ``Refused`` if the port is taken, or ``host`` is another machine's; ``named`` is what the
    user has called the port.
    """
    here = socket.gethostname()
    try:
        listener = open_port(port)
    except OSError as error:
        raise Refused(
            f"{named} is in use on {here}, where all are to meet ({error.strerror}); choose "
            "another port, the same for all"
        ) from None
    try:
        socket.create_connection((host, port), TRY_SECONDS).close()
    except OSError as error:
        listener.close()
        raise Refused(
            f"{here} does not reach itself at {host} ({error}), where all are to meet: give an "
            "address of this machine, or start there what is to listen"
        ) from None
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=STORE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def reach(host: str, port: int, seconds: float | None, who: str, named: str) -> TCPStore:
    """Connect to the store that ``who`` keeps there, once it does.

    ``named`` is what the user has called the address. Raises ``Refused`` if it cannot be one,
    ``PeerFailed`` if no store is there within ``seconds``.
    """
    _wait_for(host, port, seconds, who, named)
    return _connect(host, port, seconds, who, named)


def _connect(host: str, port: int, seconds: float | None, who: str, named: str) -> TCPStore:
    """Connect to a store; torch would wait for ever for the answer of who is none."""
    limit = STORE_TIMEOUT.total_seconds() if seconds is None else seconds
    opened: list[TCPStore] = []
    problems = ["it does not answer"]

    def connect() -> None:
        try:
            opened.append(TCPStore(host, port, timeout=STORE_TIMEOUT, wait_for_workers=False))
        except RuntimeError as error:
            problems[0] = str(error).splitlines()[0]

    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    thread.join(limit)
    if not opened:
        raise PeerFailed(
            f"what listens at {named} is not {who} ({problems[0]}): "
            "another program may have the port; choose another one, the same for all"
        )
    return opened[0]


def _wait_for(host: str, port: int, seconds: float | None, who: str, named: str) -> None:
    """Wait until somebody listens there; torch would, too, but fill the screen meanwhile."""
    until = None if seconds is None else time.monotonic() + seconds
    known_by = time.monotonic() + min(NAME_SECONDS, NAME_SECONDS if seconds is None else seconds)
    while True:
        try:
            socket.create_connection((host, port), TRY_SECONDS).close()
            return
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME and time.monotonic() > known_by:
                raise Refused(
                    f"{named.split()[0]} does not resolve on {socket.gethostname()}; give the "
                    "numeric address of that machine"
                ) from None
            why = str(error)
        except OSError as error:
            why = str(error)
        if until is not None and time.monotonic() > until:
            raise PeerFailed(
                f"nobody listens at {named} after {seconds:g} s "
                f"({why}): {who} should; see that it was started, with this address, and that no "
                "firewall is between, or give it more time (launch.timeout)"
            )
        time.sleep(PAUSE_SECONDS)
