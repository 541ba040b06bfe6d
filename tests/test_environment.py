"""A launch that cannot work says so in one line, on every rank, within seconds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import DDPTRAIN, LIMIT_SECONDS, PROJECT, environment, run

SHORT = ["experiment=ragged", "train.max_steps=2", "log.tensorboard=false", "launch.timeout=20"]
ROOT = PROJECT.parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def by_hand(rank: int, world_size: int, port: int, host: str = "127.0.0.1") -> dict[str, str]:
    """The variables of a rank that no launcher has started, on a machine of its own."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def end_of(
    folders: list[Path], variables: list[dict[str, str]], overrides: list[list[str]] | None = None
) -> list[tuple[int, str]]:
    """Start a rank in each of the folders; the exit codes, and what they say in the end."""
    processes = [
        subprocess.Popen(
            [*DDPTRAIN, *SHORT, *(overrides[i] if overrides else [])],
            cwd=folders[i],
            env=environment() | one,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, one in enumerate(variables)
    ]
    told = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def only_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_a_port_that_is_taken_is_named(project: Path, taken: int) -> None:
    ((code, told),) = end_of([project], [by_hand(0, 2, taken)])
    assert code == 2
    assert f"MASTER_PORT={taken} is in use on {socket.gethostname()}" in only_line(told)


def test_rank_0_that_does_not_come_is_missed_at_its_address(project: Path) -> None:
    port = free_port()
    ((code, told),) = end_of([project], [by_hand(1, 2, port)], [["launch.timeout=1"]])
    assert code == 1
    expected = f"nobody listens at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} after 1 s"
    assert expected in only_line(told)
    assert "rank 0 should" in told


def test_a_rank_that_does_not_come_is_named_on_those_that_did(project: Path) -> None:
    port = free_port()
    ended = end_of(
        [project] * 2, [by_hand(rank, 3, port) for rank in (0, 1)], [["launch.timeout=12"]] * 2
    )
    assert [code for code, _ in ended] == [1, 1]
    for _, told in ended:
        assert "of 3 ranks 2 did not come within 12 s" in only_line(told)
        assert "launch.timeout" in told


def test_a_port_at_which_another_program_listens_is_told(project: Path) -> None:
    """Of one that says nothing torch's store would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rank = by_hand(1, 2, silent.getsockname()[1])
        ((code, told),) = end_of([project], [rank], [["launch.timeout=3"]])
    assert code == 1
    assert "is not rank 0 (it does not answer): another program may have the port" in only_line(
        told
    )


def test_a_launch_that_is_one_of_several_ranks_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    told = run([*DDPTRAIN, "train", "experiment=ragged"], project)
    assert told.returncode == 2
    assert "RANK or WORLD_SIZE is set" in only_line(told.stderr)


def test_a_sweep_is_no_rank(project: Path) -> None:
    told = run([*DDPTRAIN, "--multirun", "experiment=ragged", "seed=1,2"], project)
    assert told.returncode == 2
    assert "a sweep is `ddptrain train --multirun" in only_line(told.stderr)


def test_a_name_that_does_not_resolve_in_time_is_refused(project: Path) -> None:
    somewhere = by_hand(1, 2, free_port(), "nowhere.invalid")
    ((code, told),) = end_of([project], [somewhere], [["launch.timeout=1"]])
    assert code == 2
    assert "MASTER_ADDR=nowhere.invalid does not resolve" in only_line(told)


def test_machines_with_other_configs_are_refused_by_key(project: Path) -> None:
    port = free_port()
    ended = end_of(
        [project] * 2, [by_hand(rank, 2, port) for rank in (0, 1)], [[], ["optim.lr=0.5"]]
    )
    for code, told in ended:
        assert code == 2
        assert only_line(told).startswith("ddptrain: rank 1 (")
        assert "was started with another config than rank 0" in told
        assert "optim.lr: 0.5, not " in told


def test_machines_with_other_code_are_refused_by_module(project: Path, tmp_path: Path) -> None:
    """Also where what differs is imported by what the config names."""
    for name in ("here", "there"):
        folder = Path(shutil.copytree(project, tmp_path / name))
        with (folder / "ragged.py").open("a") as module:
            module.write("import beside  # noqa: E402, F401\n")
        (folder / "beside.py").write_text(f"PLACE = {name!r}\n")
    port = free_port()
    folders = [tmp_path / "here", tmp_path / "there"]
    ended = end_of(folders, [by_hand(rank, 2, port) for rank in (0, 1)])
    for code, told in ended:
        assert code == 2
        assert "runs other code than rank 0" in only_line(told)
        assert "module beside: " in told
        assert "module ragged" not in told
    assert not (tmp_path / "here" / "runs").exists()


def test_machines_with_other_versions_are_refused_by_package(project: Path, tmp_path: Path) -> None:
    metadata = tmp_path / "safetensors-99.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 99.1\n")
    port = free_port()
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    other = by_hand(1, 2, port) | {"PYTHONPATH": search}
    ended = end_of([project] * 2, [by_hand(0, 2, port), other])
    for code, told in ended:
        assert code == 2
        assert "has other versions than rank 0" in only_line(told)
        assert "safetensors: 99.1, not " in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("ranks", [1, 2])
def test_gpus_that_are_not_there_are_refused(project: Path, ranks: int) -> None:
    command = [*DDPTRAIN, "train", *SHORT, "train.device=cuda", f"launch.nproc_per_node={ranks}"]
    finished = run(command, project)
    assert finished.returncode == 2
    assert "train.device=cuda: torch" in finished.stderr.strip().splitlines()[-1]
    assert "set train.device=cpu" in finished.stderr
    assert not list(project.glob("runs/*/*"))


def test_what_is_refused_leaves_a_run_that_was_there(project: Path) -> None:
    named = [*DDPTRAIN, "train", *SHORT, "run.dir=runs/mine"]
    assert run(named, project).returncode == 0
    (project / "runs" / "mine" / "result.json").unlink()
    assert run([*named, "train.device=cuda", "run.resume=never"], project).returncode == 2
    assert run([*named, "train.device=cuda"], project).returncode == 2
    assert (project / "runs" / "mine" / "attempts.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"RANK": "2"}, "RANK=2: expected less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1': expected a number"),
    ],
)
def test_variables_that_cannot_be_are_refused(
    project: Path, changes: dict[str, str], expected: str
) -> None:
    ((code, told),) = end_of([project], [by_hand(0, 2, 1) | changes])
    assert code == 2
    assert expected in only_line(told)


def test_the_script_for_many_machines_says_that_its_port_is_taken(taken: int) -> None:
    variables = environment() | {"PORT": str(taken)}
    finished = subprocess.run(
        [ROOT / "launch" / "many-boxes.sh", "127.0.0.1", *SHORT],
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert finished.returncode == 2
    assert f"ddptrain: port {taken} is in use on " in only_line(finished.stderr)
