"""This process among those of its run, as the launcher's environment tells it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from ddptrain.errors import Refused

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process that it starts."""


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
            return Place()
        if missing := [name for name in ENVIRONMENT if name not in os.environ]:
            raise Refused(
                f"{', '.join(present)} set but not {', '.join(missing)}: start the ranks with "
                "torchrun or `ddptrain train`, which set them all, or unset them for one rank"
            )
        return Place(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({socket.gethostname()})"
