"""What the ranks of a run agree on before they build anything: the config, and where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddptrain.claim import Claim
from ddptrain.compose import flatten, to_plain
from ddptrain.config import Config, Resume
from ddptrain.files import replace_text
from ddptrain.parallel.ranks import Ranks
from ddptrain.run_directory import RunDirectory, open_directory

RUN_KEY, BEGUN_KEY = "ddptrain/run.dir", "ddptrain/begun"


def common(config: Config) -> dict[str, Any]:
    """What must be alike on all ranks: more than is computed, for logging is a collective too."""
    own = ("run.", "launch.", "data.workers")
    return {k: v for k, v in flatten(to_plain(config)).items() if not k.startswith(own)}


def agree_on_directory(
    config: Config, ranks: Ranks, overrides: list[str]
) -> tuple[RunDirectory, Claim]:
    """Let rank 0 create or open the run's directory; after a restart it is the same one.

    The store of the agent outlives the ranks, so that a run without ``run.dir`` finds itself.
    """
    claim: Claim | None = None
    if ranks.is_first:
        store = ranks.store
        if store is not None and store.check([RUN_KEY]):
            config.run.dir = store.get(RUN_KEY).decode()
        if store is not None and store.check([BEGUN_KEY]):
            config.run.resume = Resume.auto  # it was held against what there is
        run = open_directory(config, overrides)
        claim = Claim(run.path)
        claim.take()
        if store is not None:
            store.set(RUN_KEY, str(run.path))
        told = str(run.path), claim.token, run.identity.read_text()
    path, token, identity = ranks.from_first(told if claim else None)
    run = RunDirectory(Path(path), identity)
    if ranks.place.local_rank == 0 and RunDirectory(run.path).known_identity() != identity:
        run.path.mkdir(parents=True, exist_ok=True)  # on the file system that this node sees
        replace_text(run.identity, identity)
    return run, claim or Claim(run.path, token)


def tell_of_beginning(ranks: Ranks) -> None:
    """Let later starts of this launch go on from whatever is there by then."""
    if ranks.is_first and ranks.store is not None:
        ranks.store.set(BEGUN_KEY, "1")
