"""The number of ranks changes nothing: gradients, evaluations and logged values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PROJECT, TORCHRUN, run

Found = dict[str, Any]
ALONE = 1


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What ``several_ranks.py`` finds on 1, 2 and 3 real ranks, and a part of it on 4."""
    script = Path(__file__).with_name("several_ranks.py")
    found = {}
    for ranks in (1, 2, 3, 4):
        file = tmp_path_factory.mktemp(f"ranks{ranks}") / "found.json"
        # -m would put tests/ instead of the project on the path
        command = [*TORCHRUN, str(ranks), str(script), str(file)]
        finished = run(command, PROJECT)
        assert finished.returncode == 0, finished.stderr[-3000:]
        found[ranks] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", [2, 3, 6])
@pytest.mark.parametrize(
    ("clip", "double", "tolerance"),
    [("None", "False", 1e-6), ("0.05", "False", 1e-6), ("0.05", "True", 1e-12)],
)
def test_gradient_is_that_of_one_process_on_the_whole_batch(
    by_ranks: dict[int, Found],
    ranks: int,
    micro: int,
    clip: str,
    double: str,
    tolerance: float,
) -> None:
    whole = torch.tensor(by_ranks[ALONE]["gradients"][f"24/{clip}/{double}"])
    cut = torch.tensor(by_ranks[ranks]["gradients"][f"{micro}/{clip}/{double}"])
    for step in (0, 1):  # a full global batch, then a short one
        error = torch.linalg.vector_norm(cut[step] - whole[step])
        assert error <= tolerance * torch.linalg.vector_norm(whole[step])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_collective_a_step_whatever_the_accumulation(
    by_ranks: dict[int, Found], ranks: int
) -> None:
    assert by_ranks[ranks]["collectives"] == (ranks > 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_buckets_small_and_large_are_summed(by_ranks: dict[int, Found], ranks: int) -> None:
    assert by_ranks[ranks]["reduced"] == {"1": True, "1000": True, "1000000": True}


def test_sums_in_a_ring_do_not_depend_on_where_a_run_began(by_ranks: dict[int, Found]) -> None:
    assert by_ranks[3]["resumes"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_seen_in_layers_is_the_same_and_changes_nothing(
    by_ranks: dict[int, Found], ranks: int
) -> None:
    """To the bit, with exact sums: gradients, outputs, their histograms and the noise scale."""
    found, alone = by_ranks[ranks]["layers"], by_ranks[ALONE]["layers"]
    assert found == alone
    assert found["null"] == found["2"]
    assert [line["step"] for line in found["lines"]] == [2, 4]
    assert all(line["noise"]["trace"] > 0 for line in found["lines"])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_exact_sums_give_the_same_bits_in_one_go_and_resumed(
    by_ranks: dict[int, Found], ranks: int
) -> None:
    """Built-in experiments, a user's own, and sizes drawn at random."""
    alone = {name: hashes[0] for name, hashes in by_ranks[ALONE]["exact"].items()}
    assert len(set(alone.values())) == len(alone) == 22
    for name, hashes in by_ranks[ranks]["exact"].items():
        assert hashes == [alone[name]] * 2, name


@pytest.mark.parametrize("ranks", [2, 3])
def test_running_statistics_do_not_depend_on_ranks(by_ranks: dict[int, Found], ranks: int) -> None:
    alone, together = by_ranks[ALONE]["buffers"], by_ranks[ranks]["buffers"]
    assert len(alone) == 3
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, rel=1e-6), name


def test_clipping_binds(by_ranks: dict[int, Found]) -> None:
    free, clipped = (by_ranks[2]["gradients"][f"6/{clip}/False"] for clip in ("None", "0.05"))
    assert free != clipped


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_sees_each_of_21_samples_once(by_ranks: dict[int, Found], ranks: int) -> None:
    alone, together = by_ranks[ALONE]["evaluations"], by_ranks[ranks]["evaluations"]
    assert alone.keys() == together.keys()
    for case, metrics in alone.items():
        for name, value in metrics.items():
            assert together[case][name] == value, case


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", range(1, 9))
def test_no_sample_is_counted_twice(by_ranks: dict[int, Found], ranks: int, micro: int) -> None:
    assert by_ranks[ranks]["evaluations"][f"digits/{micro}"]["samples"] == 21


def test_micro_batch_size_does_not_change_an_evaluation(by_ranks: dict[int, Found]) -> None:
    for metrics in by_ranks[3]["evaluations"].items():
        experiment = metrics[0].split("/")[0]
        assert metrics[1]["accuracy"] == by_ranks[1]["evaluations"][f"{experiment}/1"]["accuracy"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logged_values_are_weighted_means_whoever_logs_them(
    by_ranks: dict[int, Found], ranks: int
) -> None:
    everything = sum(s * (s + 1) for s in range(12)) / sum(s + 1 for s in range(12))
    expected = {"all": everything}
    expected |= {f"only_{k}": sum(range(k, 12, 3)) / 8 for k in range(3)}
    assert by_ranks[ranks]["logs"] == pytest.approx(expected, rel=1e-12)
