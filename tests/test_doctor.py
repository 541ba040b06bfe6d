"""`ddptrain doctor` finds what is wrong with a launch, before it costs a queue."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boxes import Boxes, unavailable
from chaos.machine import small_disk
from launching import DDPTRAIN, LIMIT_SECONDS, PROJECT, TORCHRUN, run

from ddptrain.launch.findings import GB, MB, Finding, State, judge, judge_speed
from ddptrain.launch.machine import Machine, room_in_groups
from ddptrain.launch.probes import Probes

CHECKS = [
    "ranks",
    "versions",
    "devices",
    "threads",
    "memory",
    "network",
    "clocks",
    "disk",
    "folder",
    "code",
]
ROOM = ("memory", "disk")
"""How much of them the machine of the tests has is not theirs to say."""
RAGGED = ["experiment=ragged", "log.tensorboard=false"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


def rows(table: str) -> dict[str, str]:
    """The lines of the table by check and state."""
    found = {}
    for line in table.splitlines():
        if row := re.match(r"(\S+) +(ok|warning|failed) +(.*\S)", line):
            found[f"{row[1]} {row[2]}"] = row[3]
    return found


@pytest.mark.parametrize(
    "launcher",
    [
        [*DDPTRAIN, "doctor", "launch.nproc_per_node=2"],
        [*TORCHRUN, "2", "-m", "ddptrain", "doctor"],
    ],
    ids=["ddptrain", "torchrun"],
)
def test_a_launch_that_is_well_says_so_of_all(project: Path, launcher: list[str]) -> None:
    finished = run([*launcher, *RAGGED], project)
    assert finished.returncode == 0, finished.stderr
    told = rows(finished.stdout)
    names = [name.partition(" ")[0] for name in told]
    assert list(dict.fromkeys(names)) == [*CHECKS, "all-reduce"], finished.stdout
    wrong = [name for name in told if not name.endswith("ok") and not name.startswith(ROOM)]
    assert not wrong, finished.stdout
    assert told["ranks ok"].startswith("2: 2 on ")
    assert "seen by all ranks, and its locks hold" in told["folder ok"]
    assert len(re.findall(r"in [\d.]+ ms", told["all-reduce ok"])) == 4
    assert list(project.glob(".ddptrain*")) == []
    assert not (project / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_a_line_of_the_table(project: Path) -> None:
    finished = run([*DDPTRAIN, "doctor", *RAGGED, "train.device=cuda"], project)
    assert finished.returncode == 2
    told = rows(finished.stdout)
    assert told["devices failed"].startswith("train.device=cuda: torch ")
    assert "versions ok" in told
    assert finished.stderr.strip() == "ddptrain: not fit to train: devices"


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs is mounted by root alone")
def test_a_check_that_fails_refuses_the_training(project: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", mebibytes=20) as small:
        scant = ["launch.nproc_per_node=2", "launch.check=true", f"run.dir={small}/run"]
        finished = run([*DDPTRAIN, "train", *RAGGED, *scant], project)
    assert finished.returncode == 2
    assert re.search(r"disk: .*/small.*: 2\d\.\d MB free: make room", finished.stderr), (
        finished.stderr
    )


def test_a_check_that_holds_lets_the_training_go_on(project: Path) -> None:
    short = ["launch.check=true", "train.max_steps=2", "run.dir=run", "launch.nproc_per_node=2"]
    finished = run([*DDPTRAIN, "train", *RAGGED, *short], project)
    assert finished.returncode == 0, finished.stderr
    assert (project / "run" / "result.json").exists()


@pytest.mark.long
@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_what_parts_machines_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three that reach the first, and not each other; one has a disk of its own."""
    monkeypatch.setenv("MAX_RESTARTS", "0")
    runs = tmp_path / "runs"
    runs.mkdir()
    boxes = Boxes(tmp_path)
    arguments = ["doctor", *RAGGED, f"run.dir={runs}/new"]
    with boxes.network():
        boxes.part(1, 2)
        first = boxes.start(0, arguments, "3")
        boxes.start(1, arguments, "3")
        boxes.start(2, arguments, "3", hidden=runs)
        assert first.wait(LIMIT_SECONDS) != 0
    told = (tmp_path / "box-0.txt").read_text()
    found = rows(told)
    assert found["ranks ok"].count("10.214.0.") == 3, told
    assert re.search(
        r"^network +failed +box1 \(10\.214\.0\.2\) does not reach box2 \(10", told, re.M
    )
    assert re.search(
        r"^network +failed +box2 \(10\.214\.0\.3\) does not reach box1 \(10", told, re.M
    )
    assert "box0" not in found["network failed"]
    assert found["folder warning"].startswith("box2 (10.214.0.3): not the folder that rank 0")
    assert "not fit to train: network" in told
    train = ["launch.check=true", *RAGGED, f"run.dir={runs}/new"]
    with boxes.network():
        boxes.part(1, 2)
        started = [boxes.start(number, train, "3") for number in range(3)]
        assert all(each.wait(LIMIT_SECONDS) != 0 for each in started)
    told = (tmp_path / "box-0.txt").read_text()
    assert re.search(r"network: box1 \S+ does not reach box2 .*; network: box2 \S+ does not", told)
    assert not (runs / "new" / "result.json").exists()


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_a_slow_link_is_told_with_what_it_carries(tmp_path: Path) -> None:
    """Between machines that have IPv6 addresses alone, over the interface that was named."""
    boxes = Boxes(tmp_path, "fd00::")
    with boxes.network():
        for number in (0, 1):
            boxes.slow_down(number, "20mbit")
        arguments = ["doctor", *RAGGED, "launch.interface=cable", f"run.dir={tmp_path}/new"]
        started = [boxes.start(number, arguments, "2") for number in (0, 1)]
        assert [each.wait(LIMIT_SECONDS) for each in started] == [0, 0], boxes.told()
    found = rows((tmp_path / "box-0.txt").read_text())
    assert found["network ok"].endswith("box0 over cable, box1 over cable")
    assert "1.0 MB in " in found["all-reduce warning"]
    assert "67.1 MB" not in found["all-reduce warning"].partition("would take")[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'n"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_imported_is_told_before_it_is_built(
    project: Path, line: str, expected: str
) -> None:
    with (project / "ragged.py").open("a") as module:
        module.write(f"{line}\n")
    finished = run([*DDPTRAIN, "doctor", "launch.nproc_per_node=2", *RAGGED], project)
    assert finished.returncode == 2
    told = rows(finished.stdout)["code failed"]
    assert re.match(rf"rank 0 \(.*\): ragged\.\w+: {expected}", told)
    assert finished.stderr.count("not fit to train: code") == 1


WELL = Machine(
    rank=0,
    host="n0",
    address="10.0.0.1",
    interface="eth0",
    speed=10e9,
    versions={"torch": "2.13.0"},
    device="H100",
    gpu_memory=(79 * GB, 80 * GB),
    cpus=16,
    threads=4,
    memory=100 * GB,
    shared_memory=50 * GB,
    folder="/runs",
    disk=500 * GB,
    unwritable=None,
)
FOUND = Probes(clock=1000.0, lock_holds=True, flush_seconds=0.001)


def findings(changes: dict[str, object], found: dict[str, object]) -> list[Finding]:
    """Of four ranks on two machines, the third of which is changed."""
    machines = [
        replace(WELL, rank=rank, host=f"n{rank // 2}", address=f"10.0.0.{rank // 2 + 1}")
        for rank in range(4)
    ]
    probes = [FOUND] * 4
    machines[2] = replace(machines[2], **changes)  # type: ignore[arg-type]
    probes[2] = replace(FOUND, **found)  # type: ignore[arg-type]
    return judge(machines, probes)


def test_all_is_well_with_machines_that_are_alike() -> None:
    told = findings({}, {})
    assert [each.check for each in told] == CHECKS[:-1]
    assert all(each.state is State.ok and not each.remedy for each in told)


@pytest.mark.parametrize(
    ("changes", "found", "expected", "remedy"),
    [
        (
            {"versions": {"torch": "2.12.0"}},
            {},
            "versions failed n1 .*torch 2.12.0, not 2.13.0",
            "same",
        ),
        ({"device": "A100"}, {}, "devices warning 3 × H100, 1 × A100", "alike"),
        ({"gpu_memory": (10 * GB, 80 * GB)}, {}, "devices warning rank 2 .*10.0 GB of 80.0", "smi"),
        ({"threads": 16}, {}, "threads warning n1.*2 ranks of 16 threads on 16", "NUM_THREADS=8"),
        ({"memory": GB}, {}, "memory warning n1.*1.0 GB for 2 ranks", "--mem"),
        ({"shared_memory": 64 * MB}, {}, "memory warning n1.*/dev/shm has 64.0 MB", "--shm-size"),
        ({}, {"unreached": ["n0 (10.0.0.1)"]}, "network failed n1 .* n0 .* from eth0", "interface"),
        ({"address": "127.0.1.1"}, {}, "network failed n1 would be 127", "MASTER_ADDR"),
        ({}, {"clock": 4600.0}, "clocks warning n1 .*3600 s ahead", "NTP"),
        ({}, {"clock": 990.0}, "clocks warning n1 .*10 s behind", "NTP"),
        ({}, {"sees_folder": False}, "folder warning n1 .*not the folder that rank 0", "run.dir"),
        ({}, {"lock_holds": False}, "folder warning its locks keep nobody out", "nolock"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    changes: dict[str, object], found: dict[str, object], expected: str, remedy: str
) -> None:
    wrong = [each for each in findings(changes, found) if each.state is not State.ok]
    told = [f"{each.check} {each.state.name} {each.found}" for each in wrong]
    assert len(wrong) == 1, told
    assert re.match(expected, told[0]), told
    assert remedy in wrong[0].remedy


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"disk": MB}, {}, "disk failed /runs: 1.0 MB free"),
        ({"disk": GB}, {}, "disk warning /runs: 1.0 GB free"),
        ({"unwritable": "Permission denied"}, {}, "disk failed /runs: Permission denied"),
        ({}, {"flush_seconds": 0.5}, "folder warning a flush takes 500 ms"),
    ],
)
def test_the_first_ranks_disk_is_judged(
    changes: dict[str, object], found: dict[str, object], expected: str
) -> None:
    machine = replace(WELL, **changes)  # type: ignore[arg-type]
    told = judge([machine], [replace(FOUND, lock_holds=None, **found)])  # type: ignore[arg-type]
    wrong = [f"{each.check} {each.state.name} {each.found}" for each in told if each.remedy]
    assert wrong == [expected]


@pytest.mark.parametrize(
    ("seconds", "gpu", "state"), [(0.06, None, "ok"), (1.0, None, "warning"), (1.0, (1, 1), "ok")]
)
def test_a_link_that_is_hardly_used_is_told(
    seconds: float, gpu: tuple[int, int] | None, state: str
) -> None:
    """Between GPUs there may be links of which the network's driver knows nothing."""
    machines = [replace(WELL, rank=r, address=f"10.0.0.{r}", gpu_memory=gpu) for r in range(2)]
    (finding,) = judge_speed(machines, {1 << 26: seconds})
    assert finding.state.name == state
    share = (1 << 26) * 8 / seconds / 10e9
    assert f"{share:.0%} of the slowest link's 10 Gbit/s" in finding.found


def test_a_jobs_memory_is_that_of_the_least_of_its_groups(tmp_path: Path) -> None:
    """As the kernel writes them, in both versions; what has no limit says "max", or a lot."""
    for path, limit in {"": "max", "slurm": str(9 * GB), "slurm/job_7": str(3 * GB)}.items():
        folder = tmp_path / path
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{2 * GB}\n")
        (folder / "memory.stat").write_text(f"anon {GB}\ninactive_file {GB}\n")
    assert min(room_in_groups("0::/slurm/job_7\n", tmp_path)) == 2 * GB
    assert min(room_in_groups("0::/slurm/elsewhere\n", tmp_path)) == 8 * GB
    first = tmp_path / "memory" / "slurm"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text(str(GB))
    (first / "memory.usage_in_bytes").write_text(str(GB // 2))
    (first / "memory.stat").write_text("total_inactive_file 0\n")
    assert room_in_groups("0::/\n", tmp_path / "memory") == []
    groups = "5:cpu,memory:/slurm/x\n1:name=systemd:/a:b\n"
    assert room_in_groups(groups, tmp_path) == [GB - GB // 2]
