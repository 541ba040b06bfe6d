"""People who buy: they follow the model that the documentation states, and the splits are fair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddptrain.compose import compose
from ddptrain.data.sets import INTERCEPT, OF_LOGIT, Purchase, draw_people
from ddptrain.errors import Refused

MANY = 40_000


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_people_are_as_the_model_says(seed: int) -> None:
    people, chances, bought = draw_people(MANY, seed)
    age, income, education = people.T
    assert age.min() >= 18
    assert age.max() <= 70
    assert age.mean() == pytest.approx(44, abs=0.5)
    assert age.std() == pytest.approx(52 / 12**0.5, abs=0.3)
    shares = np.bincount(education.astype(int), minlength=5) / MANY
    assert shares == pytest.approx([0.1, 0.3, 0.3, 0.2, 0.1], abs=0.015)
    left = np.log(income) - (3 + 0.012 * (age - 18) + 0.18 * education)
    assert left.mean() == pytest.approx(0, abs=0.012)
    assert left.std() == pytest.approx(0.4, abs=0.01)
    logit = INTERCEPT + people @ np.array(OF_LOGIT)
    assert chances == pytest.approx(1 / (1 + np.exp(-logit)))
    for low in (0.0, 0.25, 0.5, 0.75):  # of those with such chances, so many buy
        of = (chances >= low) & (chances < low + 0.25)
        assert bought[of].mean() == pytest.approx(chances[of].mean(), abs=0.05)


def test_seed_is_that_of_the_people_and_noise_has_no_part_in_it() -> None:
    first, again, other = (Purchase("train", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tensors[0], again.tensors[0])
    assert not torch.equal(first.tensors[0], other.tensors[0])
    torch.manual_seed(1)  # as a run with another seed has it
    noisy = Purchase("train", noise_features=4, inputs=7)
    assert torch.equal(noisy.tensors[0][:, :3], first.tensors[0])
    assert torch.equal(noisy.tensors[1], first.tensors[1])
    assert noisy.tensors[0].shape == (700, 7)


def test_splits_are_disjoint_and_standardised_on_training_alone() -> None:
    parts = [Purchase(split).tensors[0] for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [700, 150, 150]
    assert len(torch.cat(parts).unique(dim=0)) == 1000
    assert parts[0].double().mean(0).abs().max() < 1e-6
    assert (parts[0].double().std(0, correction=0) - 1).abs().max() < 1e-6
    assert parts[2].double().mean(0).abs().max() > 1e-3


def test_a_model_of_another_width_is_told_which() -> None:
    with pytest.raises(Refused, match=r"5 features .*model\.inputs=3; set model\.inputs=5"):
        Purchase("train", noise_features=2, inputs=3)
    with pytest.raises(Refused, match="expected 10 people or more"):
        Purchase("train", samples=3)


def test_val_and_test_take_what_train_says() -> None:
    given = ["data.train.seed=5", "data.train.noise_features=2", "model.inputs=5"]
    data = compose(["experiment=purchase", *given]).data
    own = {key: value for key, value in data.train.items() if key != "split"}
    assert own["seed"] == own["inputs"] == 5
    for split in (data.val, data.test):
        assert {key: value for key, value in split.items() if key != "split"} == own
