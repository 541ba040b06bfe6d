"""What optimisers are given: groups of parameters, matrices or not, a loss to search along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddptrain.build import build_trainer
from ddptrain.compose import compose, options
from ddptrain.errors import Refused
from ddptrain.models import GPT, MLP
from ddptrain.observe.phases import Phases
from ddptrain.optim.build import build_optimizer
from ddptrain.optim.groups import parameter_groups
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.tasks import LanguageModel

ADAMW: dict[str, Any] = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.5}


def gpt() -> LanguageModel:
    return LanguageModel(GPT(vocabulary=16, context=4, layers=2, heads=1, width=4))


def options_by_name(module: nn.Module, **grouping: Any) -> dict[str, dict[str, Any]]:
    """What is different from the optimiser's own, by parameter."""
    groups = parameter_groups(module, 0.1, **grouping)
    return {name: group.options for group in groups for name, _ in group.members}


def test_biases_and_norms_are_not_decayed_unless_that_is_asked_for() -> None:
    found = options_by_name(gpt())
    assert found["model.blocks.0.narrow.weight"] == {}
    assert found["model.tokens.weight"] == {}
    assert found["model.norm.weight"] == found["model.norm.bias"] == {"weight_decay": 0.0}
    assert not any(options_by_name(gpt(), decay="all").values())
    assert not any(options_by_name(gpt(), decays=False).values())
    optimizer = build_optimizer(ADAMW, gpt())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_the_first_pattern_that_matches_has_the_say() -> None:
    groups = [
        {"match": "model.head.*", "lr": 0.3},
        {"match": ["*.blocks.0.*", "*.positions.*"], "frozen": True},
        {"match": "*norm*", "weight_decay": 0.2},
    ]
    module = gpt()
    found = options_by_name(module, groups=groups)
    assert found["model.head.weight"] == {"lr": 0.3}
    assert found["model.norm.bias"] == {"weight_decay": 0.2}
    assert found["model.blocks.1.narrow.weight"] == {}
    assert not any(name.startswith("model.blocks.0.") for name in found)
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert "model.positions.weight" in frozen
    assert found.keys() == {name for name, p in module.named_parameters() if p.requires_grad}


def test_rates_fall_from_layer_to_layer() -> None:
    found = options_by_name(
        gpt(), layer_decay=0.5, decay="all", groups=[{"match": "*.tokens.*", "lr": 0.8}]
    )
    rates = {name: options["lr"] for name, options in found.items()}
    assert rates["model.head.weight"] == pytest.approx(0.1)
    assert rates["model.norm.bias"] == pytest.approx(0.05)
    assert rates["model.blocks.1.attention_norm.weight"] == pytest.approx(0.025)
    assert rates["model.blocks.0.narrow.weight"] == pytest.approx(0.0125)
    assert rates["model.positions.weight"] == pytest.approx(0.1 / 16)
    assert rates["model.tokens.weight"] == pytest.approx(0.8 / 32)


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ({"groups": [{"match": "*.haed.*"}]}, r"groups\[0\].match=\*.haed.\*: no parameter has"),
        ({"groups": [{"lr": 1}]}, r"groups\[0\]: expected a match"),
        ({"groups": [{"match": "*", "frozen": True}]}, "every parameter is frozen"),
        ({"decay": "some"}, "decay=some: expected weights or all"),
    ],
)
def test_groups_that_cannot_be_are_named(grouping: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parameter_groups(gpt(), 0.1, **grouping)


def test_a_typo_in_a_group_is_refused_with_its_key() -> None:
    given = ["experiment=digits", "optim.groups=[{match: '*', weight_decy: 0}]"]
    with pytest.raises(Refused, match=r"optim\.groups\[0\]\.weight_decy: .*did you mean"):
        compose(given)
    with pytest.raises(Refused, match=r"optim\.groups: expected a list of sections"):
        compose(["experiment=digits", "optim.groups=[head]"])
    with pytest.raises(Refused, match=r"unknown key optim\.layer_deca"):
        compose(["experiment=digits", "++optim.layer_deca=0.5"])


def trainer(folder: Path, *overrides: str) -> Any:
    config = compose(["log.tensorboard=false", *overrides])
    ranks = Ranks(Place(), torch.device("cpu"), None)
    return build_trainer(config, ranks, RunDirectory(folder), Phases())


@pytest.mark.parametrize("name", options("optim"))
def test_each_lowers_the_loss_of_the_whole_set(name: str, tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        *("experiment=breast_cancer", f"optim={name}", "schedule=constant", "model.dropout=0"),
        *("train.grad_clip.max_norm=null", "train.global_batch_size=all"),
        "train.micro_batch_size=128",
    )
    made.fetch()
    losses = []
    for step in range(10):
        made.step(step, made.batches)
        account = made.step.module.window.account
        losses.append(float(account[1] / account[0]))
        made.step.module.window.clear()
    assert losses[-1] < losses[0]


def test_l_bfgs_on_the_whole_set_is_torchs(tmp_path: Path) -> None:
    """In micro-batches, against one batch in a plain loop."""
    given = [
        *("experiment=breast_cancer", "optim=lbfgs", "schedule=constant", "model.hidden=[]"),
        *("train.global_batch_size=all", "train.grad_clip.max_norm=null", "model.dropout=0"),
        "optim.max_iter=6",
    ]
    made = trainer(tmp_path, *given)
    alone = MLP(30, [], 1)
    alone.load_state_dict(made.task.model.state_dict())
    optimizer = torch.optim.LBFGS(
        alone.parameters(), lr=1, max_iter=6, history_size=10, line_search_fn="strong_wolfe"
    )
    inputs, labels = made.fetcher.source.dataset.tensors

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = alone(inputs).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        loss.backward()
        return loss

    made.fetch()
    made.step(0, made.batches)
    optimizer.step(closure)
    ours, theirs = (module.layers[0].weight for module in (made.task.model, alone))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert float(made.step.module.window.account[2]) == 0.0


def test_l_bfgs_does_not_search_along_a_clipped_gradient(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"set train\.grad_clip\.max_norm=null"):
        trainer(tmp_path, "experiment=digits", "optim=lbfgs")


def test_muon_takes_the_matrices_that_are_not_named(tmp_path: Path) -> None:
    made = trainer(tmp_path, "experiment=stdlib_lm", "optim=muon", "model.layers=1")
    muon, adamw = made.step.optimizer.parts
    of_muon = {name for group in muon.param_groups for name in group["param_names"]}
    assert of_muon == {
        f"model.blocks.0.{part}.weight"
        for part in ("query_key_value", "attention_out", "widen", "narrow")
    }
    of_adamw = {name for group in adamw.param_groups for name in group["param_names"]}
    assert of_muon | of_adamw == {name for name, _ in made.task.named_parameters()}
    assert "model.tokens.weight" in of_adamw
    with pytest.raises(Refused, match="the model has no matrix for it"):
        trainer(tmp_path, "experiment=digits", "optim=muon")
