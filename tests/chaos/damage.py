"""Faults of a disk: the newest checkpoint is damaged while the run is down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chaos.events import Context, Fault
from chaos.processes import kill_all
from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.store import Store
from ddptrain.errors import CheckpointError

Harm = Callable[[Path, Random], None]


def truncate(file: Path, random: Random) -> None:
    """Cut a file short, as a disk that was full or lost its power does."""
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content))])


def flip(file: Path, random: Random) -> None:
    """Turn one bit over."""
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def delete(file: Path, random: Random) -> None:
    file.unlink()


@dataclass(frozen=True)
class Damage:
    """Everything is killed, and a file of the newest checkpoint harmed, in one of two places.

    Waits until there are two whole checkpoints in all: a run whose only one is damaged is refused,
    and must be. With one process a run cannot have lost more than that.
    """

    name: str
    harm: Harm
    in_memory: bool
    stops: bool = False
    spares: bool = False

    def inject(self, context: Context) -> bool:
        setting = context.setting
        here, there = setting.run / "checkpoints", setting.memories()[0]
        if self.in_memory:
            here, there = there, here
        if not _checkpoints(here) or len([*_checkpoints(here), *_checkpoints(there)]) < 2:
            return False
        kill_all(setting.mark)
        whole = _checkpoints(here)
        if not whole or len([*whole, *_checkpoints(there)]) < 2:
            return True  # one was being replaced when the kill came: nothing to harm
        files = sorted(path for path in whole[-1].iterdir() if path.stat().st_size)
        self.harm(context.random.choice(files), context.random)
        return True


def _checkpoints(folder: Path) -> list[Path]:
    """The whole ones; an earlier fault may have left others."""
    store = Store(Disk(folder))
    found = []
    for step in store.steps():
        with suppress(CheckpointError):
            store.verify(step)
            found.append(Path(store.where(step)))
    return found


DAMAGE: list[Fault] = [
    Damage(f"{what}, in {'memory' if in_memory else 'the run directory'}", harm, in_memory)
    for in_memory in (False, True)
    for what, harm in (
        ("truncated checkpoint", truncate),
        ("flipped bit in a checkpoint", flip),
        ("deleted file of a checkpoint", delete),
    )
]
