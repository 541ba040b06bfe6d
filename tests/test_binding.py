"""Ranks that are bound have CPUs of their own: all that there are, whole cores, near their GPUs."""

from __future__ import annotations

import os
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, run

from ddptrain.errors import Refused
from ddptrain.launch.binding import Core, bind_cpus, cores, shares
from ddptrain.place import Place

TWO_SOCKETS = [Core(cpu // 4, (cpu, cpu + 8)) for cpu in range(8)]
"""Of eight hyperthreaded cores in all."""


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=12),
)
def test_ranks_of_one_kind_divide_all_cpus(ranks: int, kinds: list[tuple[int, int]]) -> None:
    there, next_cpu = [], 0
    for node, width in kinds:
        there.append(Core(node, tuple(range(next_cpu, next_cpu + width))))
        next_cpu += width
    found = shares(there, [None] * ranks)
    every = sorted(cpu for core in there for cpu in core.cpus)
    if ranks > len(every):
        assert found == [every] * ranks
        return
    assert sorted(cpu for cpus in found for cpu in cpus) == every
    if ranks <= len(there):
        whole = [[core for core in there if set(core.cpus) <= set(cpus)] for cpus in found]
        assert sum(map(len, whole)) == len(there), "a core is one rank's"
        assert max(map(len, whole)) <= min(map(len, whole)) + 1


def test_a_rank_is_near_its_gpu() -> None:
    found = shares(TWO_SOCKETS, [1, 1, 0, 0])
    assert found == [[4, 5, 12, 13], [6, 7, 14, 15], [0, 1, 8, 9], [2, 3, 10, 11]]
    assert all(not set(one) & set(other) for one, other in combinations(found, 2))
    assert shares(TWO_SOCKETS, [0, None]) == [[0, 1, 2, 3, 8, 9, 10, 11], list(range(16))]
    elsewhere = shares(TWO_SOCKETS[:4], [1, 1])
    assert elsewhere == [[0, 1, 8, 9], [2, 3, 10, 11]], "what Slurm gave may not be near it"


def test_cores_are_read_as_the_kernel_tells_them(tmp_path: Path) -> None:
    files = {
        "devices/system/node/node0/cpulist": "0-1,4-5",
        "devices/system/node/node1/cpulist": "2-3,6-7",
        **{f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}"
           for cpu in range(8)},
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    whole = [Core(0, (0, 4)), Core(0, (1, 5)), Core(1, (2, 6)), Core(1, (3, 7))]
    assert cores(set(range(8)), tmp_path) == whole
    assert cores({1, 2, 5}, tmp_path) == [Core(0, (1, 5)), Core(1, (2,))]
    assert cores({0, 1}, tmp_path / "nowhere") == [Core(0, (0,)), Core(0, (1,))]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two CPUs are needed")
def test_the_ranks_of_a_launch_have_cpus_of_their_own(tmp_path: Path) -> None:
    short = ["experiment=ragged", "train.max_steps=2", "data.workers=1", "log.tensorboard=false"]
    bound = ["launch.nproc_per_node=2", "launch.bind_cpus=true", f"run.dir={tmp_path}/run"]
    finished = run([*DDPTRAIN, "train", *short, *bound], PROJECT)
    assert finished.returncode == 0, finished.stderr
    found = []
    for log in sorted((tmp_path / "run" / "logs").glob("rank-*")):
        told = re.search(r"on CPUs ([\d, ]+)", log.read_text())
        assert told is not None
        found.append([int(cpu) for cpu in told[1].split(",")])
    assert found == shares(cores(os.sched_getaffinity(0)), [None, None])
    assert not set(found[0]) & set(found[1])


def test_ranks_that_do_not_know_each_other_are_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(Refused, match="expected LOCAL_WORLD_SIZE"):
        bind_cpus(Place(rank=0, world_size=2), torch.device("cpu"))
