"""`ddptrain batch-find` finds what fits, under real limits of memory, and hangs nobody."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, TORCHRUN, run

from ddptrain.launch.batch_find import FINE, Trial, fitting_size, search
from ddptrain.launch.room import is_out_of_memory

LIMITED = str(Path(__file__).with_name("limited.py"))
MEBIBYTES_A_SAMPLE = (8, 64)
"""Of tests/project/hungry.py, at least two tensors of 4; and what is loaded later has its share."""


@given(limit=st.integers(0, 300), largest=st.integers(1, 200))
def test_the_search_ends_close_below_what_fits(limit: int, largest: int) -> None:
    trials = list(search(lambda n: Trial(n, unfit=None if n <= limit else "no"), largest))
    best = max((trial.size for trial in trials if trial.unfit is None), default=0)
    most = min(limit, largest)
    assert most - max(1, most // FINE) <= best <= most or best == most
    assert (best == 0) == (limit == 0)
    assert len({trial.size for trial in trials}) == len(trials) <= 20


@given(
    largest=st.integers(1, 64), ranks=st.integers(1, 4), micro_batches=st.integers(1, 40),
    micro=st.integers(1, 8),
)  # fmt: skip
def test_what_is_suggested_divides_the_batch_and_leaves_no_rank_idle(
    largest: int, ranks: int, micro_batches: int, micro: int
) -> None:
    size = micro * micro_batches * ranks
    found = fitting_size(largest, size, ranks)
    assert size % found == 0
    assert size // found >= ranks
    fitting = [d for d in range(1, largest + 1) if size % d == 0 and size // d >= ranks]
    assert found == max(fitting)


def test_what_is_taken_for_no_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(None)


def test_a_limit_of_the_process_is_found() -> None:
    done = run([sys.executable, LIMITED, "400", "experiment=hungry"], PROJECT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"fits +(\d+), with 10% of memory left free", done.stdout)
    assert found is not None
    least, most = (400 // size for size in reversed(MEBIBYTES_A_SAMPLE))
    assert least <= int(found[1]) <= most
    assert re.search(r"^ +\d+  out of memory$", done.stdout, re.MULTILINE)
    suggested = re.search(r"suggestion   train\.micro_batch_size=(\d+)", done.stdout)
    assert suggested is not None
    assert 48 % int(suggested[1]) == 0


@pytest.mark.parametrize(
    ("floats", "code", "told"),
    [
        (1 << 20, 0, r"out of memory on rank 1\n.*suggestion   train\.micro_batch_size="),
        (1 << 25, 1, r" 1  out of memory on rank 1\n.* 2  out of memory on rank 1\n$"),
    ],
    ids=["some fit", "none fits"],
)
def test_a_rank_with_less_memory_decides_and_leaves_nobody_waiting(
    floats: int, code: int, told: str
) -> None:
    command = [*TORCHRUN, "2", LIMITED, "0,600", "experiment=hungry", f"model.floats={floats}"]
    done = run(command, PROJECT)
    assert done.returncode == code, done.stderr[-3000:]
    assert re.search(told, done.stdout, re.DOTALL), done.stdout
    assert ("not even one sample fits into memory" in done.stderr) == bool(code)


def test_it_leaves_nothing(tmp_path: Path) -> None:
    command = [*DDPTRAIN, "batch-find", "experiment=digits", "launch.nproc_per_node=1"]
    done = run(
        [*command, "model.channels=4", "train.global_batch_size=100", "train.micro_batch_size=20"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "for there are no more samples" in done.stdout
    assert "suggestion   train.micro_batch_size=100\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
