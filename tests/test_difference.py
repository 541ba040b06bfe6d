"""`ddptrain diff` names the first step in which two runs differ, and what differed first in it."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import DDPTRAIN, PROJECT, TORCHRUN, run

from ddptrain.errors import Refused
from ddptrain.hashing import BLOCK, hash_tensor
from ddptrain.observe.difference import Fingerprints, compare
from ddptrain.resilience.divergence import describe
from ddptrain.run_directory import RunDirectory

RUN = [
    *("experiment=ragged", "train.max_steps=6", "log.tensorboard=false", "log.fingerprint_every=1"),
    *("data.val=null", "eval.every_steps=null", "checkpoint.keep_best=0"),
]
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    two_ranks = [*TORCHRUN, "2", "-m", "ddptrain"]
    for name, launcher, overrides in (
        ("one", DDPTRAIN, ["parallel.reduction=exact"]),
        ("two", two_ranks, ["parallel.reduction=exact", "log.every_steps=2"]),
        ("mean", DDPTRAIN, []),
    ):
        finished = run([*launcher, *RUN, f"run.dir={folder / name}", *overrides])
        assert finished.returncode == 0, finished.stderr[-3000:]
    shutil.copytree(folder / "mean", folder / "bare")
    (folder / "bare" / "fingerprints.jsonl").unlink()
    return {name: folder / name for name in ("one", "two", "mean", "bare")}


@pytest.mark.parametrize(
    ("other", "code", "expected"),
    [
        ("two", 0, ["config: log.every_steps: 1 → 2", "ranks: 1 → 2",
                    "the same: 6 recorded steps are equal, and the same weights after step 6"]),
        ("mean", 1, ["config: parallel.reduction: exact → mean",
                     "step 1: the gradient differs first: model.first.weight"]),
        ("bare", 1, ["config: parallel.reduction: exact → mean", "step "]),
    ],
)  # fmt: skip
def test_runs_are_compared(runs: Runs, other: str, code: int, expected: list[str]) -> None:
    finished = run([*DDPTRAIN, "diff", str(runs["one"]), str(runs[other])])
    assert finished.returncode == code, finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning)
    assert ("which may be rounding" in lines[-1]) == (other == "mean")
    is_bare = ", train: loss: " in lines[-1] and "no fingerprints in" in lines[-1]
    assert is_bare == (other == "bare")


def test_what_is_no_run_is_refused(runs: Runs, tmp_path: Path) -> None:
    finished = run([*DDPTRAIN, "diff", str(runs["one"]), str(tmp_path)])
    assert finished.returncode == 2
    assert "not a run" in finished.stderr


@pytest.fixture
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(PROJECT)


def damaged(whole: Path, folder: Path, **contents: str) -> RunDirectory:
    """A copy of a run with other contents of some of its files."""
    copied = RunDirectory(Path(shutil.copytree(whole, folder)))
    for name, content in contents.items():
        getattr(copied, name).write_text(content)
    return copied


@pytest.mark.usefixtures("in_project")
def test_runs_of_which_little_is_left_are_compared_by_that(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = RunDirectory(runs["one"])
    lines = whole.fingerprints.read_text().splitlines()
    for case, (contents, expected) in enumerate(
        [
            ({"fingerprints": lines[0] + "\n"}, "6 lines of metrics are equal, and the same we"),
            ({"fingerprints": "\n".join(lines[1:])}, "6 lines of metrics are equal, and the sam"),
            ({"fingerprints": "\n".join([*lines[:3], "null", '{"step": 3}', lines[4][:50]])},
             "2 recorded steps are equal, and the same weights after step 6"),
            ({"result": ""}, "the same: 6 recorded steps are equal"),
            ({"result": "", "fingerprints": "", "metrics": ""}, None),
        ]
    ):  # fmt: skip
        other = damaged(runs["one"], tmp_path / str(case), **contents)
        if expected is None:
            with pytest.raises(Refused, match="recorded nothing of one step"):
                compare(whole, other)
            continue
        same, told = compare(whole, other)
        assert same
        assert expected in told
    assert "result.json is damaged, and passed over" in caplog.text


@pytest.mark.usefixtures("in_project")
def test_weights_that_only_the_end_tells_apart(runs: Runs, tmp_path: Path) -> None:
    whole = RunDirectory(runs["one"])
    result = json.dumps(whole.outcome() | {"weights_sha256": "0"})
    other = damaged(runs["one"], tmp_path / "other", result=result)
    assert compare(whole, other) == (False, "other weights after step 6, at the end")


@pytest.mark.usefixtures("in_project")
def test_a_config_from_before_there_was_a_key_is_read(runs: Runs, tmp_path: Path) -> None:
    stored = (runs["one"] / "config.yaml").read_text()
    older = re.sub(r"\n +(fingerprint_every|check_every_steps|resume): .*", "", stored)
    assert len(older.splitlines()) == len(stored.splitlines()) - 3
    other = damaged(runs["one"], tmp_path / "older", config=older)
    assert other.load().parallel.check_every_steps == 100
    assert other.load().log.fingerprint_every is None


def test_names_in_another_order_are_no_difference() -> None:
    one, other = recorded(1), recorded(1)
    other.header["tensors"] = ["mean", "w"]
    other.steps[1]["weights"].reverse()
    assert one.parting(other) is None


HEADER = {"step": 0, "parameters": ["w"], "tensors": ["w", "mean"], "weights": ["0", "0"]}
RECORD = {"samples": "a", "batch": "b", "gradients": ["c"], "norms": [1.0], "weights": ["d", "e"]}


def recorded(*steps: int) -> Fingerprints:
    return Fingerprints(
        copy.deepcopy(HEADER), {step: copy.deepcopy({"step": step, **RECORD}) for step in steps}
    )


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"samples": "x", "weights": ["y", "e"]}, "step 2: the data differs first: it takes other"),
        ({"batch": "x", "gradients": ["y"]}, "step 2: the data differs first: the same samples"),
        ({"gradients": ["x"], "norms": [1.5]}, "step 2: the gradient differs first: w; norms"),
        ({"weights": ["d", "x"]}, "step 2: the weights differ first, after equal gradients: mean"),
    ],
)
def test_the_first_link_that_differs_is_named(changed: dict[str, Any], expected: str) -> None:
    one, other = recorded(1, 2, 3), recorded(1, 2, 3)
    other.steps[2].update(changed)
    other.steps[3].update(samples="z")
    told = one.parting(other)
    assert told is not None
    assert told.startswith(expected)
    assert one.parting(recorded(2, 3, 4)) is None


def test_steps_between_records_are_not_passed_over_in_silence() -> None:
    one, other = recorded(10, 20), recorded(5, 10, 15, 20)
    other.steps[20].update(batch="x")
    assert "nothing is recorded of the steps 11 to 19" in str(one.parting(other))


def test_other_weights_at_the_start_and_other_models_are_told() -> None:
    one, other, wider = recorded(1), recorded(1), recorded(1)
    other.header["weights"] = ["0", "1"]
    wider.header["parameters"] = ["w", "v"]
    assert str(one.parting(other)) == "before step 1: other weights: mean"
    assert str(one.parting(wider)) == "from the start: other parameters: v"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.randn(4).double(),
        torch.randint(256, (9,), dtype=torch.uint8),
        torch.tensor([True, False]),
        torch.randn(BLOCK + 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tensor.numel()}",
)
def test_a_flipped_bit_always_changes_the_hash(tensor: torch.Tensor) -> None:
    before = hash_tensor(tensor)
    data = tensor.view(-1).view(torch.uint8)
    for place in {0, len(data) // 2, len(data) - 1}:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert hash_tensor(tensor) != before
            data[place] ^= 1 << bit
    assert hash_tensor(tensor) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_signs_that_change_change_the_hash(dtype: torch.dtype) -> None:
    """Also in pairs and patterns in which multiples of their places would cancel."""
    tensor = torch.randn(64, dtype=dtype)
    hashes = {int(hash_tensor(tensor)), int(hash_tensor(-tensor))}
    for pattern in itertools.product((1, -1), repeat=8):
        hashes.add(int(hash_tensor(tensor * torch.tensor(pattern * 8))))
    assert len(hashes) == 2**8


def test_places_that_are_exchanged_change_the_hash() -> None:
    tensor = torch.randn(100)
    assert hash_tensor(tensor) != hash_tensor(tensor.flip(0))
    assert hash_tensor(tensor[::2]) == hash_tensor(tensor[::2].clone())
    assert hash_tensor(torch.zeros(0)) == 0


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ([(1, 2), (1, 3), (1, 2)], "rank 1 holds other weights than the 2 others, first in b;"),
        ([(4, 2), (1, 3), (1, 3), (1, 3), (1, 7)],
         "ranks 0 and 4 hold other weights than the 3 others, first in a;"),
        ([(1, 2), (1, 3)], "ranks 0 and 1 hold different weights, first in b;"),
        ([(1, 2), (5, 3), (7, 2)], "ranks 0, 1 and 2 hold different weights, first in a;"),
    ],
)  # fmt: skip
def test_divergence_names_the_ranks_and_the_first_tensor(
    of_ranks: list[tuple[int, ...]], expected: str
) -> None:
    assert f"after step 7: {expected}" in describe(7, of_ranks, ["a", "b"])
