"""Penalties and clipping: what is minimised, which weights become zero, how far a step may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.errors import Refused
from ddptrain.observe.phases import Phases
from ddptrain.optim.clip import SMALLEST_NORM, Clip
from ddptrain.optim.penalty import Penalty
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory

LINEAR = [
    *("experiment=breast_cancer", "model.hidden=[]", "model.dropout=0", "log.tensorboard=false"),
    *("train.global_batch_size=all", "train.micro_batch_size=199", "schedule=constant"),
    *("optim=sgd", "optim.lr=0.5", "optim.momentum=0", "optim.nesterov=false"),
    "train.grad_clip.max_norm=null",
]


def trainer(folder: Path, *overrides: str) -> Any:
    ranks = Ranks(Place(), torch.device("cpu"), None)
    return build_trainer(compose([*LINEAR, *overrides]), ranks, RunDirectory(folder), Phases())


def take(made: Any, steps: int) -> None:
    made.fetch()
    for step in range(steps):
        made.step(step, made.batches)


@pytest.mark.parametrize(
    "optimiser",
    [
        ["optim.momentum=0.95", "optim.nesterov=true", "optim.lr=0.2"],
        ["optim=adam", "optim.betas=[0.9,0.99]", "optim.lr=0.05", "schedule=linear"],
    ],
    ids=["momentum", "adam"],
)
def test_l1_has_the_zeros_of_an_exact_solver(optimiser: list[str], tmp_path: Path) -> None:
    """Logistic regression, with what a proximal step would not end at the minimum with."""
    from sklearn.linear_model import LogisticRegression

    l1, steps = 0.2, 600 if optimiser[0] != "optim=adam" else 1200
    base = [line for line in LINEAR if not line.startswith("optim")]
    sgd = optimiser[0] != "optim=adam"
    config = compose(
        [
            *(LINEAR if sgd else base),
            *(*optimiser, f"train.penalty.l1={l1}", "train.max_epochs=null"),
            *(f"train.max_steps={steps}", "schedule.warmup=0", "train.micro_batch_size=398"),
        ]
    )
    ranks = Ranks(Place(), torch.device("cpu"), None)
    made = build_trainer(config, ranks, RunDirectory(tmp_path), Phases())
    inputs, labels = (tensor.numpy() for tensor in made.fetcher.source.dataset.tensors)
    solver = LogisticRegression(
        l1_ratio=1.0, C=1 / (l1 * len(labels)), solver="saga", tol=1e-8, max_iter=20_000
    )
    solver.fit(inputs.astype(np.float64), labels)
    take(made, steps)
    ours = made.task.model.layers[0].weight.detach().numpy()[0]
    assert np.abs(ours - solver.coef_[0]).max() < 1e-4
    assert ((ours == 0) == (solver.coef_[0] == 0)).all()
    told = made.step.read()
    assert told["sparsity"] == pytest.approx((solver.coef_ == 0).mean())
    assert told["penalty"] == pytest.approx(l1 * np.abs(ours).sum(), rel=1e-4)


@given(
    l1=st.floats(0.001, 0.3), l2=st.floats(0, 0.3), lr=st.floats(0.01, 0.2), count=st.integers(1, 9)
)
def test_of_plain_descent_a_step_is_the_proximal_one(
    l1: float, l2: float, lr: float, count: int
) -> None:
    """But where zero is crossed: there it stops for one step."""
    torch.manual_seed(0)
    module = nn.Linear(5, 3).double()
    with torch.no_grad():
        module.weight[0] = 0
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    gradient = torch.randn_like(weight) * 0.3
    module.weight.grad, module.bias.grad = gradient * count, torch.ones_like(bias) * count
    optimizer = torch.optim.SGD(module.parameters(), lr)
    penalty = Penalty(optimizer, l1, l2)
    penalty.add(torch.tensor(float(count)))
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad /= count
    optimizer.step()
    penalty.hold()
    moved = weight - lr * (gradient + l2 * weight)
    expected = moved.sign() * (moved.abs() - lr * l1).clamp(min=0)
    crosses = expected * weight < 0
    assert torch.allclose(module.weight, expected.masked_fill(crosses, 0.0), atol=1e-6)
    assert torch.allclose(module.bias, bias - lr)
    before = module.weight.detach().clone()
    penalty.hold()  # as after an update that was passed over
    assert torch.equal(module.weight, before)


def test_biases_are_penalised_where_that_is_asked_for(tmp_path: Path) -> None:
    strong = ["train.penalty.l1=10", "optim.lr=0.1"]
    weights, everything = (
        trainer(tmp_path, *strong, f"train.penalty.of={of}") for of in ("weights", "all")
    )
    for made in (weights, everything):
        take(made, 5)
        assert not made.task.model.layers[0].weight.any()
    assert weights.task.model.layers[0].bias.any()
    assert not everything.task.model.layers[0].bias.any()


def test_l2_is_the_ridge(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    l2 = 0.05
    given = [
        *("optim=lbfgs", "optim.history_size=20", f"train.penalty.l2={l2}"),
        "~optim.momentum", "~optim.nesterov", "optim.lr=1",
    ]  # fmt: skip
    made = trainer(tmp_path, *given)
    inputs, labels = (tensor.numpy() for tensor in made.fetcher.source.dataset.tensors)
    solver = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=1000)
    solver.fit(inputs.astype(np.float64), labels)
    take(made, 10)
    ours = made.task.model.layers[0].weight.detach().numpy()[0]
    assert np.abs(ours - solver.coef_[0]).max() < 1e-4


@given(
    norm=st.floats(0.1, 5) | st.none(), unit=st.floats(0.01, 2) | st.none(),
    value=st.floats(0.01, 2) | st.none(), count=st.integers(1, 7),
)  # fmt: skip
def test_gradients_are_within_bounds_and_else_means(
    norm: float | None, unit: float | None, value: float | None, count: int
) -> None:
    torch.manual_seed(1)
    shapes = [(4, 3), (2, 3, 2, 2), (5,), ()]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    sums = [torch.randn(shape) * 3 for shape in shapes]
    clipped = [each.clone() for each in sums]
    total = torch.linalg.vector_norm(torch.cat([each.reshape(-1) for each in sums]))
    clip = Clip(norm, unit, value)
    assert bool(clip) == (norm is not None or unit is not None or value is not None)
    clip(parameters, clipped, torch.tensor(float(count)), total)
    expected = [each / count for each in sums]
    if norm is not None and total / count > norm:
        expected = [each * (norm / (total / count)) for each in expected]
    for parameter, mean, found in zip(parameters, expected, clipped, strict=True):
        if unit is not None:
            rows = mean.shape[0] if mean.dim() > 1 else 1
            weight = parameter.detach().reshape(rows, -1).norm(dim=1, keepdim=True)
            size = mean.reshape(rows, -1).norm(dim=1, keepdim=True)
            most = unit * weight.clamp(min=SMALLEST_NORM)
            factor = torch.where(size > most, most / size, torch.ones(()))
            mean = (mean.reshape(rows, -1) * factor).view(mean.shape)
        if value is not None:
            mean = mean.clamp(-value, value)
        assert torch.allclose(found, mean, rtol=1e-4, atol=1e-6)


def test_what_does_not_go_with_l_bfgs_is_refused(tmp_path: Path) -> None:
    lbfgs = ["optim=lbfgs", "~optim.momentum", "~optim.nesterov"]
    for wrong in ("train.penalty.l1=0.1", "train.grad_clip.max_value=1", "train.precision=fp16"):
        with pytest.raises(Refused, match="optim=lbfgs searches along the gradient as it is"):
            trainer(tmp_path, *lbfgs, wrong)
    for key in ("train.penalty.l1", "train.penalty.l2"):
        with pytest.raises(Refused, match=f"{key}: expected 0 or more, got -1"):
            compose([*LINEAR, f"{key}=-1"])


def test_a_penalty_of_nothing_is_refused(tmp_path: Path) -> None:
    given = ["experiment=rosenbrock", "train.penalty.l2=0.1", "log.tensorboard=false"]
    ranks = Ranks(Place(), torch.device("cpu"), None)
    with pytest.raises(Refused, match=r"no weights.*set train\.penalty\.of=all"):
        build_trainer(compose(given), ranks, RunDirectory(tmp_path), Phases())
    given.append("train.penalty.of=all")
    build_trainer(compose(given), ranks, RunDirectory(tmp_path), Phases())
