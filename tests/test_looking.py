"""Looking into the layers of a step: what is seen is right, and nothing else is different."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, read_metrics, run
from several_ranks import EXACT
from torch import nn

from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.errors import NonFiniteError, Refused
from ddptrain.lagging import STEPS, Lagging
from ddptrain.layers.counting import count_exponents, sums
from ddptrain.layers.faults import Layer, find
from ddptrain.layers.noise import Noise, advise, estimate, mean
from ddptrain.loop import Trainer
from ddptrain.observe.histograms import Histogram
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.state import fingerprint

Make = Callable[..., Trainer]
LOOK = "log.layers_every_steps=1"
QUIET = (
    *("data.val=null", "data.test=null", "eval.every_steps=null", "checkpoint.keep_best=0"),
    *("train.max_epochs=null", "train.max_steps=6", "log.tensorboard=false"),
)
DEEP = (
    *("experiment=digits", "model._target_=deep.Deep", "~model.inputs", "~model.channels"),
    *("~model.classes", "~model.dropout"),
)
CENTRE, SPREAD = [0.5, -1.0, 0.25], 2.0
CENTRING = (
    *("experiment=ragged", "model=null", "task._target_=deep.Centring", "+task.dimensions=3"),
    *("data.train._target_=deep.Scattered", "+data.train.samples=8000"),
    *(f"+data.train.centre={CENTRE}", f"+data.train.spread={SPREAD}"),
    *("train.global_batch_size=40", "train.micro_batch_size=4", *QUIET),
    *("optim=sgd", "optim.lr=0", "schedule=constant"),
)


TOLD = (
    *("experiment=ragged", *QUIET, LOOK, "train.max_steps=4", "log.every_steps=2"),
    *("checkpoint.every_steps=3", "log.tensorboard=true", "parallel.reduction=exact"),
)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.chdir(PROJECT)

    def built(*overrides: str) -> Trainer:
        ranks = Ranks(Place(), torch.device("cpu"), None)
        return build_trainer(compose(list(overrides)), ranks, RunDirectory(tmp_path), Phases())

    return built


def take(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    """Take steps as the loop does; return what was seen, a line for each that was looked into."""
    trainer.layers.restore()
    trainer.fetch()
    for step in range(steps):
        with trainer.layers.watch(step):
            trainer.step(step, trainer.batches)
        trainer.layers.tell(step + 1)
    trainer.observer.close()
    return lines_of(trainer.observer.run.path)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "layers.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


CONFIGS = {
    "accumulated": ["experiment=ragged", "model.batch_norm=true", "train.micro_batch_size=3"],
    "exact fp16": ["experiment=ragged", "train.precision=fp16", "parallel.reduction=exact"],
    "lbfgs": EXACT["lbfgs"],
    "gpt": [*EXACT["stdlib_lm"], "train.global_batch_size=4", "train.micro_batch_size=2"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_looking_changes_no_bit_and_leaves_nothing_behind(make: Make, name: str) -> None:
    hashes = set()
    for every in ("null", "2"):
        trainer = make(*CONFIGS[name], "log.tensorboard=false", f"log.layers_every_steps={every}")
        lines = take(trainer, 4)
        hashes.add(fingerprint(trainer.task))
        assert len(lines) == {"null": 0, "2": 2}[every]
        assert len(trainer.step.sum_hooks) == 1
        assert not trainer.step.optimizer._optimizer_step_pre_hooks
        assert not any(m._forward_hooks for m in trainer.step.module.modules())
        assert not any(p._backward_hooks for p in trainer.step.module.parameters())
        trainer.observer.run.layers.unlink(missing_ok=True)
    assert len(hashes) == 1


def test_nothing_is_registered_when_nothing_is_due(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    trainer = make("experiment=ragged", *QUIET, "log.layers_every_steps=3")
    monkeypatch.setattr(nn.Module, "register_forward_hook", refuse)
    take(trainer, 2)
    with pytest.raises(AssertionError):
        take(trainer, 3)


def test_an_error_in_a_step_leaves_no_hooks(make: Make) -> None:
    trainer = make(*("experiment=ragged", *QUIET, LOOK, "+task.raise_at=2", "+task.culprit=0"))
    with pytest.raises(KeyError):
        take(trainer, 1)
    assert not any(m._forward_hooks for m in trainer.step.module.modules())
    assert len(trainer.step.sum_hooks) == 1


def test_norms_are_those_of_the_gradient_and_of_the_update(make: Make) -> None:
    trainer = make(
        *("experiment=breast_cancer", *QUIET, LOOK, "optim=sgd", "optim.lr=0.5"),
        *("optim.momentum=0", "optim.nesterov=false", "schedule=constant", "optim.weight_decay=0"),
        *("train.grad_clip.max_norm=0.01", "model.dropout=0"),
    )
    before = {n: p.detach().clone() for n, p in trainer.task.named_parameters()}
    (line,) = take(trainer, 1)
    for name, parameter in trainer.task.named_parameters():
        update = (parameter.detach() - before[name]).norm().item()
        assert line["gradients"][name] == pytest.approx(update / 0.5, rel=1e-3)
        assert line["updates"][name] == pytest.approx(update / before[name].norm().item(), 1e-3)
    whole = math.hypot(*line["gradients"].values())
    assert whole == pytest.approx(0.01, rel=1e-5)  # as the optimiser got them: clipped


def test_outputs_are_those_of_all_micro_batches(make: Make) -> None:
    seen: list[torch.Tensor] = []
    trainer = make("experiment=digits", *QUIET, LOOK, "model.dropout=0")
    module = trainer.task.get_submodule("model.features.2")
    module.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    (line,) = take(trainer, 1)
    whole = torch.cat(seen)
    assert line["activations"]["model.features.2"] == pytest.approx(
        whole.square().mean().sqrt().item(), rel=1e-6
    )
    dead = (whole == 0).all(0).flatten(1).all(1).float().mean().item()
    assert line["dead"]["model.features.2"] == pytest.approx(dead)


def test_a_module_that_runs_again_in_the_backward_counts_once(make: Make) -> None:
    trainer = make("experiment=digits", *QUIET, LOOK, "model.dropout=0")
    plain = take(trainer, 1)[0]["activations"]
    trainer.observer.run.layers.unlink()
    trainer = make("experiment=digits", *QUIET, LOOK, "model.dropout=0")
    features = trainer.task.get_submodule("model.features")
    forward = features.forward
    features.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    assert take(trainer, 1)[0]["activations"] == plain


@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -2.0, float("inf")]), max_size=40
    ),
    st.integers(0, 40),
)
def test_histograms_of_parts_add_up_to_that_of_the_whole(values: list[float], cut: int) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    parts = [count_exponents(part) for part in (whole[:cut], whole[cut:])]
    counts = count_exponents(whole)
    assert torch.equal(parts[0] + parts[1], counts)
    histogram = Histogram(counts.tolist(), *sums(whole).tolist())
    tiny = whole.abs() < 2.0**-126
    assert histogram.total == len(values)
    assert histogram.zeros == tiny.sum()
    assert histogram.not_finite == (~whole.isfinite()).sum()
    limits, buckets = histogram.buckets()
    assert limits == sorted(limits)
    assert sum(buckets) == whole.isfinite().sum()
    edges = [-math.inf, *limits]
    for low, high, count in zip(edges, limits, buckets, strict=False):
        inside = [v for v in whole.double().tolist() if math.isfinite(v) and _is_in(v, low, high)]
        assert count == len(inside)


def _is_in(value: float, low: float, high: float) -> bool:
    """Bins begin at a power of two and end before the next, away from zero."""
    if abs(value) < 2.0**-126:
        return low < 0 < high
    return low < value <= high if high < 0 else low <= value < high and value > 0


@pytest.mark.parametrize("uneven", [False, True])
def test_the_noise_scale_is_right_on_average(uneven: bool) -> None:
    """Of a quadratic, where a sample's gradient is a known mean and known noise."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(1500):
        sizes = draw.integers(1, 6, size=5) if uneven else np.full(5, 3)
        gradients = [draw.normal(CENTRE, SPREAD, size=(n, 3)).sum(0) for n in sizes]
        squares = [float(g @ g) for g in gradients]
        total = sum(gradients)
        found.append(estimate(squares, sizes.tolist(), float(total @ total)))
    average = mean(noise for noise in found if noise is not None)
    assert average is not None
    assert average.trace == pytest.approx(3 * SPREAD**2, rel=0.04)
    assert average.signal == pytest.approx(np.square(CENTRE).sum(), rel=0.1)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-3, 3)), min_size=2, max_size=8),
    st.floats(-3, 3),
)
def test_without_noise_there_is_only_signal(parts: list[tuple[int, float]], g: float) -> None:
    """And the signal does not depend on how a step is cut; micro-batches that count 0 are none."""
    counts = [n for n, _ in parts]
    known = [n for n in counts if n]
    noise = estimate([(n * g) ** 2 for n in counts], counts, (sum(counts) * g) ** 2)
    if len(known) < 2:
        assert noise is None
        return
    assert noise is not None
    assert noise.count == sum(counts)
    assert noise.trace == pytest.approx(0, abs=1e-9)
    assert noise.signal == pytest.approx(g**2, abs=1e-9)


@pytest.mark.parametrize(
    "how",
    [
        (),
        ("train.precision=fp16", "parallel.reduction=exact"),
        ("train.penalty.l2=0.3", "train.penalty.of=all", "train.grad_clip.max_norm=0.01"),
    ],
    ids=["plain", "exact fp16", "penalty"],
)
def test_a_run_measures_the_noise_of_its_data(make: Make, how: tuple[str, ...]) -> None:
    trainer = make(*CENTRING, *how, LOOK, "train.max_steps=100", "log.every_steps=100")
    lines = take(trainer, 100)
    noise = mean(Noise(**line["noise"]) for line in lines)
    assert noise is not None
    assert noise.count == 40
    assert noise.trace == pytest.approx(3 * SPREAD**2, rel=0.1)
    assert noise.signal == pytest.approx(np.square(CENTRE).sum(), rel=0.2)
    assert trainer.layers.scalars(100) == {"noise_scale": noise.scale}
    assert trainer.layers.scalars(101) == {}


def test_the_noise_of_a_step_is_that_of_its_micro_batches(make: Make) -> None:
    """Of losses that count differently, against the definition."""
    trainer = make(*CENTRING, "+task.uneven=true", LOOK)
    (line,) = take(trainer, 1)
    plan = trainer.fetcher.source.plan
    squares, counts, total = [], [], torch.zeros(3, dtype=torch.float64)
    for micro_batch in plan.micro_batches(0):
        points = trainer.fetcher.source.dataset.tensors[0][plan.indices(micro_batch)].double()
        weights = 1 + 2 * (points[:, :1] > 0)
        gradient = -(weights * points).sum(0)
        squares.append(gradient.square().sum().item())
        counts.append(weights.sum().item())
        total += gradient
    expected = estimate(squares, counts, total.square().sum().item())
    assert expected is not None
    assert len(set(counts)) > 1
    assert line["noise"] == pytest.approx(vars(expected), rel=1e-4)


def test_advice_goes_by_how_far_the_batch_is_from_the_noise_scale() -> None:
    said = [advise(Noise(100.0 * scale, 100.0, 32), 2) for scale in (1, 32, 1000)]
    for sentence, verdict in zip(said, ["far above it", "near it", "far below it"], strict=True):
        assert verdict in str(sentence)
    assert "these had 32 in the mean" in str(said[1])
    assert "50%" in str(said[1])
    assert "no estimate by one step" in advise(Noise(1.0, -1.0, 32), 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            [*DEEP, "+model.activation=Sigmoid"],
            "step 1: the gradient vanishes towards the input: a weight of model.layers.0 gets",
        ),
        (
            [*DEEP, "+model.gain=3"],
            "step 1: outputs explode with depth: those of model.layers.19 are",
        ),
        (
            [
                *DEEP,
                "+model.layers=40",
                "+model.width=32",
                *("+model.activation=Tanh", "+model.gain=30"),
            ],
            "step 1: the gradient explodes towards the input: a weight of model.layers.0 gets",
        ),
        (
            [*DEEP, "+model.layers=4", "+model.activation=ReLU", "+model.bias=-30"],
            "step 1: 100% of the units of model.activations.0 give zero for every sample",
        ),
        (
            [*DEEP, "+model.spoilt=2"],
            "step 1: the loss is not finite, and the first output that is not is that of "
            "model.layers.3",
        ),
    ],
    ids=["vanishing", "growing", "exploding", "dead", "nonfinite"],
)
def test_what_is_wrong_is_said_once_and_names_the_layer(
    make: Make, caplog: pytest.LogCaptureFixture, config: list[str], said: str
) -> None:
    trainer = make(*config, *QUIET, LOOK, "train.nonfinite=skip")
    with caplog.at_level(logging.WARNING):
        take(trainer, 2)
        first = [record.getMessage() for record in caplog.records]
        assert first[0].startswith(said)
        assert len(first) == len(set(first))
        trainer.observer.resumed_at = 2
        trainer.layers.restore()  # as a start that goes on does
        assert trainer.layers.told
        with trainer.layers.watch(2):
            trainer.step(2, trainer.fetcher.steps(2, 3, 0, 1))
        trainer.layers.tell(3)
    again = [record.getMessage() for record in caplog.records][len(first) :]
    assert not [message for message in again if said.partition(": ")[2] in message]


@pytest.mark.parametrize(
    "config",
    [
        ["experiment=digits"],
        ["experiment=stdlib_lm", "train.global_batch_size=4", "train.micro_batch_size=2"],
        ["experiment=breast_cancer"],
        [*DEEP, "+model.activation=Tanh"],
        [*DEEP, "+model.activation=ReLU", "+model.gain=1.41"],
    ],
    ids=["convnet", "gpt", "mlp", "deep tanh", "deep relu"],
)
def test_no_false_alarm(make: Make, caplog: pytest.LogCaptureFixture, config: list[str]) -> None:
    trainer = make(*config, *QUIET, LOOK)
    with caplog.at_level(logging.WARNING):
        lines = take(trainer, 3)
    assert [line["faults"] for line in lines] == [[], [], []]
    assert not caplog.records


def test_a_head_that_begins_at_zero_is_no_vanishing_gradient() -> None:
    layers = [Layer(str(number), 0.0) for number in range(8)] + [Layer("head", 1.0)]
    assert find(layers, {}, None) == []


@pytest.mark.long
def test_a_run_tells_its_noise_scale_and_goes_on_from_its_log(tmp_path: Path) -> None:
    """Killed between two log lines, and gone on: what is logged is what would have been."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kill = ["+task.culprit=0", f"+task.kill_at={3 * 12 + 5}", f"+task.once={tmp_path / 'killed'}"]
    config = [*DDPTRAIN, *TOLD, *kill, f"run.dir={tmp_path / 'killed-once'}"]
    assert run(config).returncode != 0
    resumed = run(config)
    whole = run([*DDPTRAIN, *TOLD, f"run.dir={tmp_path / 'whole'}"])
    for finished in (resumed, whole):
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "gradient noise scale about" in finished.stdout
    lines, metrics = lines_of(tmp_path / "whole"), read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines_of(tmp_path / "killed-once") == lines
    assert read_metrics(tmp_path / "killed-once")[1]["noise_scale"] == metrics[1]["noise_scale"]
    noises = [Noise(**line["noise"]) for line in lines]
    averages = [mean(noises[:2]), mean(noises[2:])]
    scales = [average.scale for average in averages if average is not None]
    assert [line.get("noise_scale") for line in metrics] == scales
    events = EventAccumulator(str(tmp_path / "whole/tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    shown = events.Histograms("gradients/model.first.weight")
    assert [each.step for each in shown] == [1, 2, 3, 4]
    assert sum(shown[0].histogram_value.bucket) == 8 * 3
    shown = events.Histograms("activations/model.first")
    assert sum(shown[0].histogram_value.bucket) == 24 * 8 * 12


def late(self: Lagging, wait: bool) -> list[tuple[int, list[float]]]:
    """What a GPU's host knows, at a speed that a CPU has."""
    arrived = [self.pending.popleft() for _ in range(len(self.pending) - (0 if wait else STEPS))]
    return [(step, numbers.tolist()) for step, numbers, _ in arrived]


def trained(run_dir: Path, *overrides: str) -> Trainer:
    given = ["experiment=ragged", *QUIET, *overrides, f"run.dir={run_dir}"]
    config = compose(given)
    ranks = Ranks(Place(), torch.device("cpu"), None)
    trainer = build_trainer(config, ranks, open_directory(config, given), Phases())
    try:
        trainer.train()
    finally:
        trainer.observer.close()
    return trainer


@pytest.mark.parametrize("sample", [17, 3])
def test_a_step_that_is_taken_again_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    """A fault that is known two steps later, and one that is known at once, leave the same."""
    monkeypatch.chdir(PROJECT)
    given = [
        *("log.layers_every_steps=2", "train.max_steps=12", "log.every_steps=100"),
        *("train.nonfinite=rewind", "train.rewind_every_steps=5"),
        f"data.train.infinite_at={sample}",
    ]
    told = []
    for name in ("at once", "late"):
        assert trained(tmp_path / name, *given).step.rewinds > 0
        told.append(lines_of(tmp_path / name))
        monkeypatch.setattr(Lagging, "take", late)
    assert [line["step"] for line in told[1]] == list(range(2, 13, 2))
    assert told[0] == told[1]


def test_what_is_not_finite_is_told_of_before_it_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(PROJECT)
    with pytest.raises(NonFiniteError), caplog.at_level(logging.WARNING):
        trained(tmp_path / "run", LOOK, "data.train.infinite_at=17", "train.max_steps=24")
    assert "the first output that is not is that of model.first" in caplog.text
    assert lines_of(tmp_path / "run")[-1]["faults"]


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(Refused, match=r"log\.layers_every_steps: expected a number above 0"):
        compose(["experiment=digits", "log.layers_every_steps=0"])
