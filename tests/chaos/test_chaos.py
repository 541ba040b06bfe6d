"""Nothing stops a run: kill anything, at any moment, and it ends with the same weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from chaos.faults import KILLS, STOPS
from chaos.operator import StoryFailed
from chaos.setting import Setting
from chaos.story import at_random, tell

SEED = 20261124


def test_a_run_survives_what_comes(tmp_path: Path) -> None:
    faults = Random(SEED).sample([*KILLS, *STOPS], 6)
    tell(at_random(faults, Setting(tmp_path, steps=50, workers=1), SEED))


def test_a_restart_that_changes_the_weights_a_little_is_noticed(tmp_path: Path) -> None:
    setting = Setting(tmp_path, steps=30, overrides=("task.perturb=true",))
    with pytest.raises(StoryFailed, match="weights_sha256"):
        tell(at_random([KILLS[4], KILLS[1]], setting, SEED))
