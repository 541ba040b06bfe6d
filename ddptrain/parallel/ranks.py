"""The processes of a run: who I am, who the others are, and small messages between us."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from ddptrain import pulse
from ddptrain.errors import Disagreement, PeerFailed, Refused
from ddptrain.parallel.meeting_point import open_store
from ddptrain.parallel.roll_call import Attempt, Process, exchange, meet
from ddptrain.place import Place

T = TypeVar("T")
BOARD_SECONDS = 30.0
"""A store that was reached before, and is not for so long, has gone."""


def choose_device(wanted: str, place: Place) -> torch.device:
    """Return this rank's device: its own GPU, or the CPU. Raises ``Refused``."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise Refused(
            f"train.device={wanted}: torch {torch.__version__} finds no GPU here ({_why_none()}); "
            "set train.device=cpu, or auto"
        )
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
        self.agreements = 0
        self.patience: float | None = None
        if device.type == "cuda":
            # Before any collective: NCCL and a user's own .cuda() take the current device.
            torch.cuda.set_device(device)
        if timeout is not None:
            self.meet(None)
            self.join(timeout)

    def meet(self, seconds: float | None) -> None:
        """Wait for the other ranks. Raises ``TrainingError`` if one has not come in time."""
        if self.world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        self.patience = seconds
        self.store = open_store(self.place, seconds, first=True)
        if self.world_size > 1:
            board = PrefixStore("roll-call", self.store)
            with _store_may_go():
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

    def agree(
        self, mine: dict[str, Any], differs: str, remedy: str, shared_only: bool = False
    ) -> None:
        """Raise ``Disagreement`` on every rank if one has other entries than rank 0.

        It reads "rank 1 (its host) <differs> rank 0 (its host): key: its value, not rank 0's;
        <remedy>". With ``shared_only`` an entry that one of the two does not have at all is none.
        Ranks that have met, and form no group yet, agree as well: what would keep it from forming.
        """
        first, *others = self.tell(mine)
        for rank, other in enumerate(others, start=1):
            keys = first.keys() & other.keys() if shared_only else first.keys() | other.keys()
            if different := [
                f"{key}: {other.get(key, 'not set')}, not {first.get(key, 'not set')}"
                for key in sorted(keys)
                if first.get(key) != other.get(key)
            ]:
                one, other_one = self.name_of(rank), self.name_of(0)
                raise Disagreement(f"{one} {differs} {other_one}: {'; '.join(different)}; {remedy}")

    def tell(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank tells, in rank order: plain values, for this needs no group."""
        if self.world_size == 1 or dist.is_initialized():
            return self.gather(mine)
        assert self.store is not None
        self.agreements += 1
        board = PrefixStore(f"agree-{self.attempt.name}-{self.agreements}", self.store)
        said = json.dumps(mine, default=str)
        with _store_may_go():
            told = exchange(board, self.rank, self.world_size, said, self.patience)
        return [json.loads(one) for one in told]

    def name_of(self, rank: int) -> str:
        """The rank and its host, as its log names it."""
        return f"rank {rank} ({self.attempt.processes[rank].host})"

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
        return PrefixStore(f"board-{self.attempt.name}", open_store(self.place, BOARD_SECONDS))

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _store_may_go() -> Iterator[None]:
    """Tell in a line that the store has gone, with rank 0 or with the launcher."""
    try:
        yield
    except dist.DistNetworkError as error:
        why = str(error).splitlines()[0]
        raise PeerFailed(
            f"the store in which ranks meet has gone ({why}): rank 0, or its launcher, has left "
            "while all were meeting, and its error is the one to look at"
        ) from None


def _why_none() -> str:
    if torch.version.cuda is None:
        return "it was built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r}"
    return f"it was built for CUDA {torch.version.cuda}; see whether nvidia-smi finds one"
