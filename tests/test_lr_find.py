"""`ddptrain lr-find` suggests a rate that learns, and leaves nothing but a picture."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from launching import DDPTRAIN, run

from ddptrain.errors import TrainingError
from ddptrain.launch.lr_find import DIVERGED, Curve

GIVEN = ["experiment=digits", "optim=sgd", "optim.nesterov=false", "optim.momentum=0"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rate_is_found_over_all_ranks(ranks: int, tmp_path: Path) -> None:
    command = [*DDPTRAIN, "lr-find", *GIVEN, f"launch.nproc_per_node={ranks}"]
    done = run([*command, "parallel.reduction=exact"], tmp_path)
    assert done.returncode == 0, done.stderr
    suggested = re.search(r"suggestion   optim\.lr=(\S+)", done.stdout)
    assert suggested is not None
    assert 0.01 < float(suggested[1]) < 3
    assert [file.name for file in tmp_path.iterdir()] == ["lr-find.png"]
    assert (tmp_path / "lr-find.png").read_bytes().startswith(b"\x89PNG")


def test_the_steepest_fall_is_suggested() -> None:
    rates = [10.0 ** (-5 + i / 20) for i in range(100)]
    fall = [1 / (1 + math.exp(4 * (math.log10(rate) + 2))) for rate in rates]
    assert Curve(rates, fall, fall).suggestion() == pytest.approx(0.01, rel=0.15)
    rising = list(np.linspace(1, DIVERGED, 100))
    with pytest.raises(TrainingError, match="does not fall at any rate"):
        Curve(rates, rising, rising).suggestion()
    with pytest.raises(TrainingError, match="does not fall at any rate"):
        Curve(rates[:3], fall[:3], fall[:3]).suggestion()


def test_what_has_no_rate_is_refused(tmp_path: Path) -> None:
    done = run([*DDPTRAIN, "lr-find", *GIVEN, "~optim.lr"], tmp_path)
    assert done.returncode == 2
    assert "optim.lr: not set, so there is no rate to find" in done.stderr
