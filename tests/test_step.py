"""A step: precisions, clipping, compile, and that it never waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PROJECT
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddptrain.build import build_trainer
from ddptrain.checkpoint.saved import MODEL
from ddptrain.compose import compose
from ddptrain.errors import NonFiniteError, Refused
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.resilience.sanity import Explainer
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.tasks import Classification

Build = Callable[..., Trainer]
PLAIN_DESCENT = (
    *("optim=sgd", "optim.lr=1", "optim.momentum=0", "optim.nesterov=false"),
    *("schedule=constant", "model.dropout=0"),
)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.chdir(PROJECT)

    def make(*overrides: str) -> Trainer:
        config = compose(["experiment=ragged", *overrides])
        ranks = Ranks(Place(), torch.device("cpu"), TIMEOUT)
        return build_trainer(config, ranks, RunDirectory(tmp_path), Phases())

    return make


def take_steps(trainer: Trainer, count: int) -> torch.Tensor:
    """Take steps; return the weights as one vector."""
    batches = trainer.fetcher.steps(0, count, 0, 1)
    for step in range(count):
        trainer.step(step, batches)
    return torch.cat([p.detach().flatten() for p in trainer.task.parameters()])


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host: each would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_never_reads_from_the_device(build: Build, precision: str, nonfinite: str) -> None:
    trainer = build(f"train.precision={precision}", f"train.nonfinite={nonfinite}")
    take_steps(trainer, 2)
    batches = list(trainer.fetcher.steps(2, 4, 0, 1))
    with HostReads() as reads:
        for step in (2, 3):
            trainer.step(step, iter(batches[12 * (step - 2) :]))
    assert reads.count == 0
    with HostReads() as reads:
        trainer.step.read()
    assert reads.count > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_has_the_norm_of_fp32_and_clips_it(build: Build, precision: str) -> None:
    plain = build(*PLAIN_DESCENT, "train.grad_clip.max_norm=0.05")
    low = build(*PLAIN_DESCENT, "train.grad_clip.max_norm=0.05", f"train.precision={precision}")
    start = torch.cat([p.detach().flatten() for p in plain.task.parameters()])
    moved, moved_low = take_steps(plain, 1) - start, take_steps(low, 1) - start
    assert plain.step.norm.item() > 0.05
    assert low.step.norm.item() == pytest.approx(plain.step.norm.item(), rel=0.02)
    assert moved.norm().item() == pytest.approx(0.05, rel=1e-5)
    assert moved_low.norm().item() == pytest.approx(0.05, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(moved, moved_low, dim=0) > 0.99


def test_fp16_overflow_lowers_the_scale_and_spares_the_weights(build: Build) -> None:
    trainer = build("train.precision=fp16", "optim.lr=0.1")
    assert trainer.step.loss_scale is not None
    trainer.step.loss_scale.value.fill_(2.0**24)
    before = torch.cat([p.detach().flatten() for p in trainer.task.parameters()])
    after = take_steps(trainer, 1)
    assert torch.equal(before, after)
    assert trainer.step.loss_scale.value.item() == 2.0**23
    assert trainer.step.finished() == 1
    assert not torch.equal(take_steps(trainer, 20), before)


class Enough(BaseException):
    """Ends a run from within a forward."""


def test_a_rescue_while_a_fault_is_explained_has_the_buffers_before_it(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards are taken again then, of a micro-batch with a number that is not finite."""
    options = ["model.batch_norm=true", "data.train.infinite_at=17", "train.max_steps=12"]
    trainer = build(*options, "log.tensorboard=false", f"run.dir={tmp_path}")
    open_directory(trainer.config, [])
    explain = Explainer.nonfinite

    def explain_while_one_leaves(explainer: Explainer, step: int) -> str:
        before = {n: b.clone() for n, b in trainer.task.named_buffers() if "running" in n}

        def leave(norm: torch.nn.Module, *_: Any) -> None:
            if torch.tensor([b.isfinite().all() for b in norm.buffers()]).all():
                return
            soon = time.monotonic() + 20
            where = trainer.rescue(soon, soon, lambda: False)
            assert where is not None
            rescued = load_file(Path(where) / MODEL)
            assert all(torch.equal(rescued[name], b) for name, b in before.items())
            raise Enough

        trainer.task.model.norm.register_forward_hook(leave)
        return explain(explainer, step)

    monkeypatch.setattr(Explainer, "nonfinite", explain_while_one_leaves)
    with pytest.raises(Enough):
        trainer.train()
    trainer.checkpoints.memory.forget()


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "torch.optim.RMSprop"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_fault_leaves_the_state_of_the_step_before_it(
    build: Build, optimizer: str, batch_norm: bool
) -> None:
    """Also with an optimiser without a fused kernel, and however late the fault is noticed."""
    own = ["~optim.betas", f"optim._target_={optimizer}", f"model.batch_norm={batch_norm}"]
    clean, faulty = build(*own), build(*own, "data.train.infinite_at=17")
    epoch = clean.fetcher.source.plan
    bad = next(
        batch.step
        for step in range(epoch.steps_per_epoch)
        for batch in epoch.micro_batches(step)
        if 17 in epoch.indices(batch)
    )
    assert torch.equal(take_steps(faulty, 12), take_steps(clean, bad))
    for name, buffer in clean.task.named_buffers():
        assert torch.equal(faulty.task.get_buffer(name), buffer), name
    assert faulty.step.finished() == bad
    faulty.done = 12
    with pytest.raises(NonFiniteError, match="samples 17;"):
        faulty.heed(wait=True)


def test_momentum_is_zero_after_a_first_step_that_is_skipped(build: Build) -> None:
    trainer = build("train.precision=fp16", "optim=sgd", "optim.momentum=0.9")
    assert trainer.step.loss_scale is not None
    trainer.step.loss_scale.value.fill_(2.0**24)
    take_steps(trainer, 1)
    buffers = [state["momentum_buffer"] for state in trainer.step.optimizer.state.values()]
    assert buffers
    assert not any(buffer.any() for buffer in buffers)


def test_compile_changes_no_name_and_hardly_a_number(build: Build) -> None:
    overrides = ["task.double=true", "train.micro_batch_size=24", "model.dropout=0"]
    plain, compiled = build(*overrides), build(*overrides, "train.compile=true")
    assert plain.task.state_dict().keys() == compiled.task.state_dict().keys()
    torch.testing.assert_close(take_steps(plain, 3), take_steps(compiled, 3), rtol=1e-6, atol=1e-9)


def test_learning_rate_is_a_function_of_the_step_alone(build: Build) -> None:
    """Whatever the micro-batch size, and after a jump to a later step as a resume makes it."""
    tables = []
    for micro in (2, 8, 24):
        trainer = build(f"train.micro_batch_size={micro}")
        rates = []
        for step in (0, 1, 2, 3, 150, 151, 199):
            trainer.step(step, trainer.fetcher.steps(step, step + 1, 0, 1))
            rates.append(trainer.step.optimizer.param_groups[0]["lr"])
        tables.append(rates)
    assert tables[0] == tables[1] == tables[2]
    assert tables[0][0] == pytest.approx(0.01 / 10)
    assert tables[0][-1] < 1e-5


def test_epoch_and_evaluation_borders_keep_workers(build: Build) -> None:
    """One iterator serves all epochs: no worker starts at a border."""
    trainer = build("data.workers=1")
    batches = trainer.fetcher.steps(0, 9, 0, 1)
    import multiprocessing

    trainer.step(0, batches)
    first = {child.pid for child in multiprocessing.active_children()}
    for step in range(1, 9):  # two epochs of four steps, and one step
        trainer.step(step, batches)
    assert first
    assert {child.pid for child in multiprocessing.active_children()} <= first


def test_mixup_trains_on_sums_and_evaluates_what_is_there() -> None:
    """Of one sample, mixed with itself, the loss is what it is without."""
    torch.manual_seed(0)
    task = Classification(nn.Flatten(), classes=3, mixup=0.5)
    plain = Classification(nn.Flatten(), classes=3)
    inputs, labels = torch.randn(8, 3), torch.randint(0, 3, (8,))
    one = inputs[:1], labels[:1]
    assert torch.allclose(task(one).sum, plain(one).sum)
    mixed = task((inputs, labels))
    assert mixed.count == 8
    assert not torch.allclose(mixed.sum, plain((inputs, labels)).sum)
    task.eval()
    assert torch.equal(task((inputs, labels)).sum, plain((inputs, labels)).sum)
    with pytest.raises(Refused, match="mixup=-1"):
        Classification(nn.Flatten(), classes=3, mixup=-1)
