"""The processes of a run: who I am, who the others are, and small messages between us."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from ddptrain import pulse
from ddptrain.errors import Refused
from ddptrain.parallel.roll_call import Attempt, Process, meet
from ddptrain.place import Place

T = TypeVar("T")
STORE_TIMEOUT = timedelta(seconds=30)


def choose_device(wanted: str, place: Place) -> torch.device:
    """Return this rank's device: its own GPU, or the CPU. Raises ``Refused``."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if place.local_rank >= gpus:
        raise Refused(
            f"train.device={wanted}: local rank {place.local_rank} has no GPU of its own, this "
            f"machine has {gpus}; start at most {gpus} ranks here, or set train.device=cpu"
        )
    return torch.device("cuda", place.local_rank)


class Ranks:
    """Joins the process group, and passes small Python objects between ranks on the CPU.

    With one rank there is no group, and every message comes straight back.
    """

    def __init__(self, place: Place, device: torch.device, timeout: timedelta | None) -> None:
        """With a ``timeout`` the group is formed at once, without when ``join`` is called."""
        self.place = place
        self.device = device
        self.store: Store | None = None
        self.attempt = Attempt((Process(),), uuid4().hex)
        if device.type == "cuda":
            # Before any collective: NCCL and a user's own .cuda() take the current device.
            torch.cuda.set_device(device)
        if place.world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        self.store = _connect(place, timeout or STORE_TIMEOUT, first=True)
        if timeout is not None:
            self.meet(None)
            self.join(timeout)

    def meet(self, seconds: float | None) -> None:
        """Wait for the other ranks. Raises ``TrainingError`` if one has not come in time."""
        if self.store is not None and self.world_size > 1:
            board = PrefixStore("roll-call", self.store)
            self.attempt = meet(board, self.rank, self.world_size, seconds)

    def join(self, timeout: timedelta) -> None:
        """Form the process group of several ranks, which have met."""
        if self.store is not None and self.world_size > 1:
            self.form_group(PrefixStore(self.attempt.name, self.store), timeout)

    def form_group(self, store: Store | None = None, timeout: timedelta | None = None) -> None:
        """Form the process group, if there is none yet; one rank alone needs no ``store``."""
        if dist.is_initialized():
            return
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=HashStore() if store is None else store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=self.device if on_gpu else None,
        )

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        return self.place.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with pulse.together():
            dist.all_gather_object(values, value)
        return values

    def agree(self, mine: dict[str, Any], differs: str, remedy: str) -> None:
        """Raise ``Refused`` on every rank if one has other entries than rank 0.

        It reads "rank 1 <differs> rank 0: key: its value, not rank 0's; <remedy>".
        """
        first, *others = self.gather(mine)
        for rank, other in enumerate(others, start=1):
            if different := [
                f"{key}: {other.get(key, 'not set')}, not {first.get(key, 'not set')}"
                for key in sorted(first.keys() | other.keys())
                if first.get(key) != other.get(key)
            ]:
                raise Refused(f"rank {rank} {differs} rank 0: {'; '.join(different)}; {remedy}")

    def from_first(self, value: T | None) -> T:
        """Return rank 0's value on every rank; the others' is ignored."""
        return self.from_rank(0, value)

    def from_rank(self, source: int, value: T | None) -> T:
        """Return the value of rank ``source`` on every rank; the others' is ignored."""
        box = [value]
        if self.world_size > 1:
            with pulse.together():
                dist.broadcast_object_list(box, src=source)
        return box[0]  # type: ignore[return-value]

    def bytes_from(self, source: int, content: bytes | None, size: int) -> bytes:
        """Return the ``size`` bytes that rank ``source`` has on every rank."""
        if self.world_size == 1 or size == 0:
            return content or b""
        buffer = bytearray(size) if content is None else bytearray(content)
        with pulse.together():
            dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), src=source)
        return bytes(buffer)

    def barrier(self) -> None:
        if self.world_size > 1:
            with pulse.together():
                dist.barrier(device_ids=None)

    def board(self) -> Store | None:
        """A connection to the store for messages of this attempt, not held up by the others'."""
        if self.store is None or self.world_size == 1:
            return None
        return PrefixStore(f"board-{self.attempt.name}", _connect(self.place, STORE_TIMEOUT))

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(place: Place, timeout: timedelta, first: bool = False) -> TCPStore:
    """Open the store that torchrun's agent keeps for the whole run, over all restarts.

    The process group takes a prefix per attempt on it: on a shared prefix the ranks of a new
    attempt can read the addresses of the ranks that have died (see ``roll_call``).
    """
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=first and place.rank == 0 and not agent_has_store,
        timeout=timeout,
        wait_for_workers=False,
    )
