"""Checkpoints at any path that fsspec knows; S3 is a real server on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from launching import DDPTRAIN, LIMIT_SECONDS, TORCHRUN, kill_tree, read_result, run, start, train
from torch import nn

from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import Remote
from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.retention import Retention
from ddptrain.checkpoint.saved import MODEL, capture
from ddptrain.checkpoint.store import MANIFEST, OWNER, Store
from ddptrain.errors import EXIT_REFUSED, CheckpointError, Refused, Superseded
from ddptrain.run_directory import RunDirectory

moto_server = pytest.importorskip("moto.server", reason="the dev extra installs moto and s3fs")
BUCKET = "weights"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an empty bucket; the server's address is in the environment, as for any S3."""
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(variables)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}"
    server.stop()
    for name in variables:
        del os.environ[name]


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}/run"
    return f"{request.param}://{tmp_path}/run"


def checkpoints(url: str, tmp_path: Path) -> Checkpoints:
    memory = Memory([tmp_path / "memory"])
    return Checkpoints(Store(Remote(url)), memory, Retention(keep_last=2), "val/loss", {})


def save(kept: Checkpoints, step: int) -> nn.Module:
    torch.manual_seed(step)
    model = nn.Linear(30, 20)
    kept.save(capture(step, model, torch.optim.AdamW(model.parameters()), {}, {}), durable=True)
    kept.settle()
    return model


@pytest.mark.filterwarnings("ignore")  # of botocore and aiohttp
def test_a_store_at_any_url(url: str, tmp_path: Path) -> None:
    kept = checkpoints(url, tmp_path)
    assert kept.store.steps() == []
    models = {step: save(kept, step) for step in (1, 2, 3)}
    assert kept.store.steps() == [2, 3]
    again = checkpoints(url, tmp_path)  # as another process sees it
    found = again.newest()
    assert found is not None
    assert found.step == 3
    assert torch.equal(found.tensors(MODEL)["weight"], models[3].weight)
    medium = again.store.medium
    content = bytearray(medium.read("step-00000003", MODEL))
    content[-7] ^= 4
    medium.write("step-00000003", MODEL, bytes(content))
    with pytest.raises(CheckpointError, match=r"step-00000003/model\.safetensors.*damaged"):
        again.read(3)
    found = again.newest()
    assert found is not None
    assert found.step == 2
    medium.remove("step-00000002", MANIFEST)
    assert again.store.steps() == [3]
    save(again, 4)
    assert "step-00000002" not in medium.folders()


@pytest.mark.filterwarnings("ignore")
def test_a_start_that_was_cut_off_finds_another_in_the_store(url: str, tmp_path: Path) -> None:
    """On another machine, with a run.dir of its own: the store is all that both have."""
    starts = [Store(Remote(url), token=f"{uuid4().hex}:{uuid4().hex}") for _ in range(2)]
    manifest = {"step": 1, "files": {}}
    for store in starts:
        store.claim()
        store.write(1, {}, manifest)
    with pytest.raises(Superseded, match="another start has taken over"):
        starts[0].write(2, {}, manifest)
    assert starts[1].steps() == [1]
    survivor = Store(Remote(url), token=starts[0].token)  # which has claimed nothing itself
    with pytest.raises(Superseded):
        survivor.delete(1)
    Store(Remote(url), token=starts[1].token).write(2, {}, manifest)
    assert starts[1].steps() == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_a_start_that_found_the_store_away_has_it_later_unless_another_run_does(
    url: str, tmp_path: Path
) -> None:
    before, late = (Store(Remote(url), token=f"one:{start}") for start in ("first", "second"))
    other = Store(Remote(url), token="other:first")
    before.claim()
    late.write(1, {}, {"step": 1, "files": {}})
    with pytest.raises(Superseded):
        before.write(2, {}, {"step": 2, "files": {}})
    other.claim()
    still_later = Store(Remote(url), token="one:third")
    with pytest.raises(Superseded):
        still_later.write(2, {}, {"step": 2, "files": {}})


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_store_another_run_has_taken_is_not_started_again(tmp_path: Path) -> None:
    shared = ["experiment=ragged", "train.max_steps=400", "log.tensorboard=false"]
    shared += ["data.train.seconds=0.002", f"checkpoint.dir={tmp_path / 'kept'}"]
    first = [*DDPTRAIN, "train", *shared, f"run.dir={tmp_path / 'first'}", "launch.max_restarts=3"]
    running = start(first)
    owner = tmp_path / "kept" / OWNER
    deadline = time.monotonic() + LIMIT_SECONDS
    while not owner.exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    owner.write_text("another:start")
    _, told = running.communicate(timeout=LIMIT_SECONDS)
    assert running.returncode == 1
    assert "another start has taken over this checkpoint.dir" in told.splitlines()[-1]
    assert owner.read_text() == "another:start"


def test_a_scheme_that_nobody_knows_is_refused() -> None:
    with pytest.raises(Refused, match=r"checkpoint\.dir=nowhere://a"):
        Remote("nowhere://a")


@pytest.mark.filterwarnings("ignore")
def test_a_run_moves_to_another_machine_through_s3(s3: str, tmp_path: Path) -> None:
    """Its directory and the memory of its node are lost; the bucket is what is left."""
    ragged = ["experiment=ragged", "train.max_steps=60", "log.tensorboard=false"]
    expected = train(tmp_path / "clean", 1, *ragged)["weights_sha256"]
    remote = [*ragged, f"checkpoint.dir={s3}/moving", "checkpoint.every_steps=5"]
    first = start([*DDPTRAIN, *remote, f"run.dir={tmp_path / 'first'}"])
    store = Store(Remote(f"{s3}/moving"))
    deadline = time.monotonic() + LIMIT_SECONDS
    while not store.steps() or store.steps()[-1] < 20:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
    first.send_signal(signal.SIGKILL)
    kill_tree(first.pid)
    first.communicate()
    for memory in RunDirectory(tmp_path / "first").memories():
        shutil.rmtree(memory, ignore_errors=True)
    second = run([*DDPTRAIN, *remote, f"run.dir={tmp_path / 'second'}"])
    assert second.returncode == 0, second.stderr
    assert "continuing" in second.stdout
    assert read_result(tmp_path / "second")["weights_sha256"] == expected


@pytest.mark.long
def test_what_a_start_may_do_is_held_against_a_store_elsewhere_too(tmp_path: Path) -> None:
    """``run.resume``, where run.dir is new and checkpoint.dir is not, through a restart as well."""
    few = ["experiment=ragged", "log.tensorboard=false", "data.val=null", "eval.every_steps=null"]
    few.append("checkpoint.keep_best=0")
    few.append(f"checkpoint.dir={tmp_path / 'kept'}")
    one_rank = [*DDPTRAIN, *few, "train.max_steps=4"]
    none = run([*one_rank, f"run.dir={tmp_path / 'first'}", "run.resume=must"])
    assert none.returncode == EXIT_REFUSED, none.stderr
    assert f"run.resume=must but {tmp_path / 'kept'}" in none.stderr.splitlines()[-1]
    killed = ["task.culprit=1", "task.kill_at=20", f"task.once={tmp_path / 'once'}"]
    launched = [*DDPTRAIN, "train", "launch.nproc_per_node=2", *few, *killed, "train.max_steps=4"]
    new = run([*launched, f"run.dir={tmp_path / 'second'}", "run.resume=never"])
    assert new.returncode == 0, new.stderr
    assert "starting the ranks again" in new.stderr
    under_torchrun = [*TORCHRUN, "1", "--max-restarts=1", "-m", "ddptrain", *few]
    there = run(
        [*under_torchrun, f"run.dir={tmp_path / 'third'}", "train.max_steps=4", "run.resume=never"]
    )
    assert there.returncode == 1, there.stderr  # of torchrun, which asks twice
    assert there.stderr.count("holds a checkpoint; name another checkpoint.dir") >= 2
    again = run([*one_rank, f"run.dir={tmp_path / 'fourth'}", "run.resume=must"])
    assert again.returncode == 0, again.stderr
    assert "continuing" in again.stdout


@pytest.mark.filterwarnings("ignore")
def test_a_bucket_that_is_not_there_is_told_at_the_start(s3: str, tmp_path: Path) -> None:
    lost = ["experiment=ragged", "checkpoint.dir=s3://no-such-bucket/run"]
    finished = run([*DDPTRAIN, *lost, f"run.dir={tmp_path / 'run'}"])
    assert finished.returncode == 1
    (line,) = finished.stderr.strip().splitlines()
    assert "s3://no-such-bucket/run: cannot be read: The specified bucket does not exist" in line


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_store_that_goes_away_stops_no_training_and_is_told_of_in_the_end(
    s3: str, tmp_path: Path
) -> None:
    """Steps go on; the exit says what is not durable, and the next start has it from memory."""
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
    ragged = ["experiment=ragged", "train.max_steps=60", "log.tensorboard=false"]
    run_dir = tmp_path / "run"
    command = [*DDPTRAIN, *ragged, f"run.dir={run_dir}"]
    os.environ["AWS_ENDPOINT_URL"], before = url, os.environ["AWS_ENDPOINT_URL"]
    try:
        alone = start([*command, f"checkpoint.dir={s3}/run", "checkpoint.every_steps=5"])
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < 10:
        assert alone.poll() is None, alone.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.stop()
    _, err = alone.communicate(timeout=LIMIT_SECONDS)
    assert alone.returncode == 1
    assert err.count("training goes on") == 1
    last = err.strip().splitlines()[-1]
    assert f"the checkpoint of step 60 is not in {s3}/run" in last
    assert "it is in memory at" in last
    again = run(command)
    assert again.returncode == 0, again.stderr
    assert read_result(run_dir)["lost_steps"] == 0
