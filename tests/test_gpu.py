"""On a GPU: the host runs ahead of it, and what it holds is saved even if it gets no further."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launching import DDPTRAIN, PROJECT, TORCHRUN, read_result, run, train

from ddptrain.build import build_trainer
from ddptrain.checkpoint.saved import MODEL, OPTIMIZER
from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import Tensors, model_tensors, optimizer_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SHARED = [str(Path(__file__).parent / "shared_gpu.py")]
STEPS = 40
STUCK_CYCLES = int(12e9)
"""Of a GPU's clock: some six seconds."""
HOST_SECONDS = 1.0
"""So long the host has, to get ahead of it."""
QUIET = [
    *("experiment=ragged", "eval.every_steps=null", "checkpoint.keep_best=0"),
    *("checkpoint.every_steps=null", "checkpoint.memory_every_steps=null"),
    *("parallel.check_every_steps=null", "log.tensorboard=false", "log.every_steps=100"),
]
EXACT = [*QUIET, "parallel.reduction=exact", "log.every_steps=1", f"train.max_steps={STEPS}"]
Build = Callable[..., Trainer]


@pytest.fixture
def build(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Build]:
    monkeypatch.chdir(PROJECT)
    device = torch.device("cuda", 0)
    make_deterministic(device)
    ranks = Ranks(Place(), device, TIMEOUT)
    made: list[Trainer] = []

    def make(*overrides: str) -> Trainer:
        folder = RunDirectory(tmp_path_factory.mktemp("run"))
        trainer = build_trainer(compose([*QUIET, *overrides]), ranks, folder, Phases())
        made.append(trainer)
        trainer.restore()
        trainer.fetch()
        return trainer

    yield make
    torch.cuda.synchronize()
    for trainer in made:
        trainer.checkpoints.memory.forget()
        trainer.observer.close()
    made.clear()
    ranks.leave()
    torch.use_deterministic_algorithms(False)


def take_steps(trainer: Trainer, count: int) -> None:
    """Train as ``Trainer.go_on`` does."""
    for step in range(trainer.done, trainer.done + count):
        trainer.step(step, trainer.batches)
        trainer.record = trainer.step.fingerprints.take(step)
        trainer.advance(step + 1)
        trainer.heed()
        trainer.observer.fingerprint(trainer.record)
        trainer.tend()


def tensors_of(trainer: Trainer) -> dict[str, Tensors]:
    files = {
        MODEL: model_tensors(trainer.task),
        OPTIMIZER: optimizer_tensors(trainer.task, trainer.step.optimizer)[0],
    }
    return {file: {n: t.cpu().clone() for n, t in some.items()} for file, some in files.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "exact"])
@pytest.mark.parametrize("action", ["nonfinite=stop", "spike.action=skip"])
def test_between_log_lines_nothing_waits_for_the_gpu(
    build: Build, precision: str, reduction: str, action: str
) -> None:
    trainer = build(
        f"train.precision={precision}", f"parallel.reduction={reduction}", f"train.{action}"
    )
    take_steps(trainer, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(trainer, 6)
        with pytest.raises(RuntimeError, match="synchroniz"):
            trainer.step.norm.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sticks", ["between two steps", "in a step"])
@pytest.mark.parametrize("reduction", ["mean", "exact"])
def test_the_last_finished_step_is_saved_from_a_gpu_that_gets_no_further(
    build: Build, sticks: str, reduction: str
) -> None:
    """As in a kernel of NCCL that waits for a rank that has died; the host is already further.

    The thread that saves is another, as in life, and the one that trains must not be: in a new
    thread libraries allocate memory first, for which they wait for the GPU.
    """
    options = ["model.batch_norm=true", f"parallel.reduction={reduction}"]
    options.append("train.micro_batch_size=24")  # or the queue may be full within the step
    clean = build(*options)
    take_steps(clean, 5)
    expected = tensors_of(clean)

    trainer = build(*options)
    take_steps(trainer, 5)
    torch.cuda.synchronize()
    if sticks == "in a step":
        once = iter([STUCK_CYCLES])
        trainer.task.register_forward_hook(lambda *_: torch.cuda._sleep(next(once, 0)))
    else:
        torch.cuda._sleep(STUCK_CYCLES)

    found_stuck: list[bool] = []
    is_ahead: list[bool] = []

    def save() -> None:
        until = time.monotonic() + HOST_SECONDS
        while trainer.done < 7 and time.monotonic() < until:
            time.sleep(0.01)
        is_ahead.append(trainer.done > 5)
        now = time.monotonic()
        trainer.rescue(now + 10, now + 10, lambda: False)
        found_stuck.append(not torch.cuda.default_stream().query())
        trainer.step.gate.release()

    saving = threading.Thread(target=save, daemon=True)
    saving.start()
    take_steps(trainer, 3)
    saving.join()
    assert found_stuck == [True], "the GPU went on before it was read"
    assert is_ahead == [True]
    saved = trainer.checkpoints.read(5, trainer.checkpoints.memory.store)
    for file, tensors in expected.items():
        found = saved.tensors(file)
        assert found.keys() == tensors.keys()
        assert [name for name in tensors if not torch.equal(found[name], tensors[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train(tmp_path_factory.mktemp("clean") / "run", 1, *EXACT)["weights_sha256"])


def test_a_gpu_that_gets_no_further_is_restarted_and_no_step_is_lost(
    undisturbed: str, tmp_path: Path
) -> None:
    stuck = ["task._target_=stuck.Stuck", "task.stick_at=200", f"task.once={tmp_path / 'once'}"]
    launch = ["launch.nproc_per_node=1", "launch.max_restarts=1"]
    command = [*DDPTRAIN, "train", *launch, *EXACT, *stuck]
    ended = run([*command, f"run.dir={tmp_path / 'run'}", "resilience.hang_seconds=5"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "no progress for 5 s" in ended.stderr
    told = read_result(tmp_path / "run")
    assert told["weights_sha256"] == undisturbed
    assert (told["restarts"], told["lost_steps"]) == (1, 0)


def test_two_ranks_of_which_one_is_killed_end_as_one_does(undisturbed: str, tmp_path: Path) -> None:
    killed = ["task.culprit=1", "task.kill_at=100", f"task.once={tmp_path / 'once'}"]
    command = [*TORCHRUN, "2", "--max-restarts=1", *SHARED, *EXACT, *killed]
    ended = run([*command, f"run.dir={tmp_path / 'run'}"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = read_result(tmp_path / "run")
    assert told["weights_sha256"] == undisturbed
    assert (told["restarts"], told["lost_steps"]) == (1, 0)


def test_compiled_bf16_reaches_the_target(tmp_path: Path) -> None:
    told = train(
        tmp_path / "run", 1, "experiment=digits", "train.precision=bf16", "train.compile=true"
    )
    assert told["metrics"]["test/accuracy"] > 0.95


def test_the_largest_micro_batch_that_fits_is_found() -> None:
    """Samples of a hundredth of the memory each, several times over in the backward."""
    floats = torch.cuda.get_device_properties(0).total_memory // 4 // 100
    hungry = ["experiment=hungry", f"model.floats={floats}"]
    done = run([*DDPTRAIN, "batch-find", *hungry, "launch.nproc_per_node=1"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory" in done.stdout
    found = next(line for line in done.stdout.splitlines() if line.startswith("fits"))
    assert 8 <= int(found.split()[1].rstrip(",")) <= 50
