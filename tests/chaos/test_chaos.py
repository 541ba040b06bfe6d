"""Nothing stops a run: kill anything, at any moment, and it ends with the same weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from chaos.faults import KILLS, STOPS
from chaos.operator import StoryFailed
from chaos.setting import LAUNCHERS, Setting
from chaos.story import SEED, at_random, in_turn, short_run, tell

FAULTS_OF_A_STORY = 3


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_survives_what_comes(launcher: str, tmp_path: Path) -> None:
    """Other faults under each launcher."""
    shuffled = Random(SEED).sample([*KILLS, *STOPS], len([*KILLS, *STOPS]))
    first = LAUNCHERS.index(launcher) * FAULTS_OF_A_STORY
    faults = shuffled[first : first + FAULTS_OF_A_STORY]
    tell(at_random(faults, short_run(tmp_path, Setting, launcher=launcher), SEED))


def test_a_restart_that_changes_the_weights_a_little_is_noticed(tmp_path: Path) -> None:
    setting = short_run(tmp_path, Setting, disturbing=("task.perturb=true",))
    with pytest.raises(StoryFailed, match="weights_sha256"):
        tell(in_turn(setting, (KILLS[1], 30)))
