"""Finds the newest whole state of a run on any node, and gives it to every rank."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import CHECKSUM
from ddptrain.checkpoint.saved import Saved
from ddptrain.checkpoint.store import Store
from ddptrain.errors import CheckpointError, Refused
from ddptrain.failpoints import reach
from ddptrain.parallel.ranks import Ranks

logger = logging.getLogger(__name__)
DURABLE = -1


@dataclass(frozen=True)
class Offer:
    """A checkpoint that a rank can read, in a memory of its node or in the store."""

    step: int
    rank: int
    tier: int
    where: str
    digest: tuple[tuple[str, str], ...]


def recover(checkpoints: Checkpoints, ranks: Ranks) -> Saved | None:
    """Return the newest whole checkpoint of all nodes, on every rank; None if the run is new.

    Survivors of a crash may be a step apart, and the newest state is right: what it is of is
    decided by the config. Of two that say to be of one step and differ, the one that most nodes
    hold counts. Damaged ones are passed over with a warning. Raises ``CheckpointError`` on every
    rank if there are checkpoints but none is whole, or if there may be some in a store that cannot
    be read; with a snapshot at hand such a store is warned of.
    """
    gathered = ranks.gather(_offers(checkpoints, ranks))
    offers = [offer for of_rank, _, _ in gathered for offer in of_rank]
    _, problem, has_held_one = gathered[0]
    reach("restore: offers gathered")
    for offer in ranked(offers):
        saved = _send(checkpoints, ranks, offer)
        if saved is not None:
            if problem is not None and ranks.is_first:
                logger.warning("%s; going on from %s", problem, saved.origin)
            if checkpoints.keeps_memory:
                checkpoints.memory.discard(saved.step)  # they were passed over, for a reason
            ranks.barrier()
            return saved
    if problem is not None:
        raise CheckpointError(f"{problem}; mend that, or name another checkpoint.dir")
    if offers or has_held_one:
        raise checkpoints.none_is_whole(len(offers))
    return None


def ranked(offers: list[Offer]) -> list[Offer]:
    """The offers in the order in which to try them.

    Newest first; those that others contradict, with no majority, last of all. What has no digest,
    its manifest being unreadable, contradicts nobody.
    """
    votes = Counter((offer.step, offer.digest) for offer in offers if offer.digest)
    agreed: list[Offer] = []
    doubtful: list[Offer] = []
    for step in sorted({offer.step for offer in offers}, reverse=True):
        counts = sorted((n for (s, _), n in votes.items() if s == step), reverse=True)
        of_step = sorted(
            (offer for offer in offers if offer.step == step),
            key=lambda o: (-votes[o.step, o.digest], o.tier == DURABLE, o.rank, o.tier),
        )
        if len(counts) > 1:
            told = [offer for offer in of_step if offer.digest]
            logger.warning(
                "%s checkpoints of step %s differ: a machine's memory is at fault: %s",
                len(told),
                step,
                ", ".join(offer.where for offer in told),
            )
        certain = len(counts) < 2 or counts[0] > counts[1]
        (agreed if certain else doubtful).extend(of_step)
    return agreed + doubtful


def _offers(checkpoints: Checkpoints, ranks: Ranks) -> tuple[list[Offer], str | None, bool]:
    """What this rank can read, why it cannot read the store, and whether that has held one."""
    problem: str | None = None
    has_held_one = False
    offers: list[Offer] = []
    if checkpoints.keeps_memory:
        for tier, of_memory in enumerate(checkpoints.memory.stores):
            offers += _of_store(of_memory, of_memory.steps(), tier, ranks.rank)
    if ranks.is_first:
        store = checkpoints.store
        try:
            steps, unfinished = store.contents()
            has_held_one = store.has_held_one()
        except OSError as error:
            problem = f"{store.medium.where('')}: cannot be read: {error}"
            return offers, problem, has_held_one
        offers += _of_store(store, steps, DURABLE, ranks.rank)
        if unfinished:
            others = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
            logger.warning(
                "%s%s has no manifest: writing or deleting it was cut short",
                store.medium.where(unfinished[-1]),
                others,
            )
    return offers, problem, has_held_one


def _of_store(store: Store, steps: list[int], tier: int, rank: int) -> Iterator[Offer]:
    for step in steps:
        digest: tuple[tuple[str, str], ...] = ()
        try:
            files = store.manifest(step)["files"]
            digest = tuple((name, files[name][CHECKSUM]) for name in sorted(files))
        except (CheckpointError, KeyError, TypeError):
            pass  # told when it is tried, which it may not be
        yield Offer(step, rank, tier, store.where(step), digest)


def _send(checkpoints: Checkpoints, ranks: Ranks, offer: Offer) -> Saved | None:
    """Read ``offer`` where it is, and send it to the others; None if it is not whole.

    Raises ``Refused``, on every rank, if it is of a run with another config.
    """
    saved: Saved | None = None
    refusal: str | None = None
    if ranks.rank == offer.rank:
        memory = checkpoints.memory
        store = checkpoints.store if offer.tier == DURABLE else memory.stores[offer.tier]
        try:
            saved = checkpoints.read(offer.step, store)
            if different := checkpoints.differences(saved.manifest):
                refusal = (
                    f"{saved.origin} is of a run with another config: {'; '.join(different)}; name "
                    "another checkpoint.dir and run.dir, or undo the difference"
                )
            reach("restore: read")
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    told = (saved.manifest if saved is not None else None), refusal
    manifest, refusal = ranks.from_rank(offer.rank, told)
    if refusal is not None:
        raise Refused(refusal)
    if manifest is None:
        return None
    reach("restore: verified")
    contents = {
        name: ranks.bytes_from(offer.rank, saved.contents[name] if saved else None, size["bytes"])
        for name, size in manifest["files"].items()
    }
    reach("restore: sent")
    return Saved(manifest, contents, offer.where)
