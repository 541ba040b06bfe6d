"""Nothing stops a run: kill anything, at any moment, and it ends with the same weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from chaos.faults import KILLS, STOPS
from chaos.operator import StoryFailed
from chaos.setting import Setting
from chaos.story import SEED, at_random, in_turn, short_run, tell

FAULTS_OF_A_STORY = 4


@pytest.mark.long
def test_a_run_survives_what_comes(tmp_path: Path) -> None:
    """Under the launcher that knows nothing of this framework."""
    faults = Random(SEED).sample([*KILLS, *STOPS], FAULTS_OF_A_STORY)
    story = at_random(faults, short_run(tmp_path, Setting, launcher="torchrun"), SEED)
    assert not tell(story).faults  # all have come


@pytest.mark.long
def test_a_restart_that_changes_the_weights_a_little_is_noticed(tmp_path: Path) -> None:
    setting = short_run(tmp_path, Setting, disturbing=("task.perturb=true",))
    with pytest.raises(StoryFailed, match="weights_sha256"):
        tell(in_turn(setting, (KILLS[1], 30)))
