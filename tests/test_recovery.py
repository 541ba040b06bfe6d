"""Which state a start goes on from, and who may write to a run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.recovery import DURABLE, Offer, ranked, recover
from ddptrain.checkpoint.retention import Retention
from ddptrain.checkpoint.store import Store
from ddptrain.claim import Claim
from ddptrain.errors import CheckpointError, Superseded
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.state import State


def offer(step: int, rank: int, content: str = "same", tier: int = 0) -> Offer:
    return Offer(step, rank, tier, f"node-{rank}/step-{step}", (("model", content),))


def test_survivors_that_are_a_step_apart_go_on_from_the_newest() -> None:
    offers = [offer(811, 0), offer(812, 4), offer(800, 0, tier=DURABLE)]
    assert [o.step for o in ranked(offers)] == [812, 811, 800]


def test_of_states_that_contradict_each_other_most_nodes_decide() -> None:
    offers = [offer(812, 0, "flipped"), offer(812, 4), offer(812, 8)]
    assert [o.rank for o in ranked(offers)][:2] == [4, 8]


def test_a_doubtful_state_comes_after_all_that_agree() -> None:
    offers = [offer(812, 0, "one"), offer(812, 4, "other"), offer(800, 0)]
    assert [o.step for o in ranked(offers)] == [800, 812, 812]


@given(
    st.lists(
        st.builds(offer, st.integers(1, 4), st.integers(0, 3), st.sampled_from("ab")),
        max_size=12,
        unique_by=lambda o: (o.step, o.rank),
    ),
    st.randoms(),
)
def test_the_order_is_a_function_of_the_offers(offers: list[Offer], chance: random.Random) -> None:
    shuffled = chance.sample(offers, len(offers))
    assert ranked(offers) == ranked(shuffled)
    assert sorted(map(repr, ranked(offers))) == sorted(map(repr, offers))


def test_a_start_that_was_cut_off_finds_that_another_has_taken_over(tmp_path: Path) -> None:
    """On a file system where the lock of a node that is away does not count any more."""
    cut_off = Claim(tmp_path)
    cut_off.take()
    cut_off.check()
    (tmp_path / ".lock").unlink()  # as a server forgets the locks of a client that it lost
    newer = Claim(tmp_path)
    newer.take()
    newer.check()
    with pytest.raises(Superseded, match=r"another start of this run has taken over.*process \d+"):
        cut_off.check()
    for claim in (cut_off, newer):
        claim.lock.give_up()


def test_a_store_that_has_held_a_checkpoint_is_no_new_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may have been begun by processes that were killed, however many."""
    ranks = Ranks(Place(), torch.device("cpu"), None)
    store = Store(Disk(tmp_path / "checkpoints"))
    kept = Checkpoints(store, Memory([tmp_path / "memory"]), Retention(keep_last=2), "val/loss", {})
    for step in (7, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert recover(kept, ranks) is None
    assert "step-00000009 (and 1 more) has no manifest" in caplog.text
    store.write(10, {}, {"step": 10, "files": {}})
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="its checkpoints are gone"):
        recover(kept, ranks)


def test_snapshots_that_turned_out_wrong_are_gone_and_their_place_is_used_again(
    tmp_path: Path,
) -> None:
    memory = Memory([tmp_path / "memory"])
    for step in (10, 20, 30):
        slot = memory.free()
        assert slot is not None
        memory.take(slot, State(step, {"model": {"w": torch.full((3,), float(step))}}, {}))
        memory.seal(slot, memory.describe(slot, {"step": step}))
        slot.busy = False
    assert memory.store.steps() == [20, 30]  # the memory of the first is used again
    memory.discard(after=20)
    assert memory.store.steps() == [20]
    slot = memory.free()
    assert slot is not None
    assert slot.step is None
    memory.take(slot, State(30, {"model": {"w": torch.zeros(3)}}, {}))
    memory.seal(slot, memory.describe(slot, {"step": 30}))
    assert memory.store.steps() == [20, 30]


def test_runs_that_share_a_memory_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert Memory([one / "run"]).home() == Memory([one / "another"]).home()
    assert Memory([one / "run"]).home() != Memory([other / "run"]).home()


def test_a_manifest_that_cannot_be_read_contradicts_nobody() -> None:
    unreadable = Offer(812, 0, DURABLE, "run/step-812", ())
    assert ranked([unreadable, offer(800, 0), offer(812, 0)]) == [
        offer(812, 0),
        unreadable,
        offer(800, 0),
    ]
