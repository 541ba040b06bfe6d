"""Data that a machine has offline: of some packages, Python's source, drawn people, or none."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ddptrain.data.library import source_files
from ddptrain.data.series import check_log
from ddptrain.data.splits import FRACTIONS, split_indices
from ddptrain.data.tabular import check_lists
from ddptrain.data.texts import Windows, joined
from ddptrain.data.walk_forward import Columns, Split, WalkForward
from ddptrain.errors import Refused
from ddptrain.keys import derive
from ddptrain.nearest import suggest

PURCHASE = ("age", "income", "education")
"""The features of ``Purchase``, in order; income is in thousands."""
OF_LOGIT = (-0.04, 0.05, 0.5)
"""The logit of a purchase for a unit of each…"""
INTERCEPT = -1.5
"""… and for a person who has none of them."""


class Digits(TensorDataset):
    """scikit-learn's handwritten digits: images (1, 8, 8) in [0, 1], labels 0 to 9."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        mine = split_indices(len(labels), split)
        images = torch.from_numpy(pixels[mine]).float().view(-1, 1, 8, 8) / 16
        super().__init__(images, torch.from_numpy(labels[mine]))


class BreastCancer(TensorDataset):
    """scikit-learn's breast cancer data: 30 features, standardised; label 1 is benign.

    ``samples`` takes the first so many of the split.
    """

    def __init__(self, split: str, samples: int | None = None) -> None:
        from sklearn.datasets import load_breast_cancer

        known = load_breast_cancer()
        features, labels = known.data, known.target
        self.feature_names = [str(name) for name in known.feature_names]
        self.class_names = [str(name) for name in known.target_names]
        seen = features[split_indices(len(labels), "train")]
        mine = split_indices(len(labels), split)[:samples]
        standardised = (features[mine] - seen.mean(axis=0)) / seen.std(axis=0)
        super().__init__(torch.from_numpy(standardised).float(), torch.from_numpy(labels[mine]))


class Diabetes(TensorDataset):
    """scikit-learn's diabetes data: 10 features, and how far the disease has gone a year later.

    Both are standardised by mean and deviation of the training split.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_diabetes

        features, targets = load_diabetes(return_X_y=True, scaled=False)
        training, mine = (split_indices(len(targets), name) for name in ("train", split))
        both = [
            torch.from_numpy((values[mine] - seen.mean(axis=0)) / seen.std(axis=0)).float()
            for values, seen in ((features, features[training]), (targets, targets[training]))
        ]
        super().__init__(*both)


class Macrodata(WalkForward):
    """A column of statsmodels' macrodata, the United States by quarter from 1959-01 to 2009-07.

    Samples are those of ``WalkForward``; the options are those of ``ddptrain.data.Series``. A
    quarter has the date of its first day. Raises ``Refused`` without statsmodels.
    """

    def __init__(
        self,
        split: str,
        value: str,
        window: int,
        horizon: int = 1,
        features: Sequence[str] = (),
        log: Sequence[str] = (),
        scale_target: bool = True,
        fractions: Sequence[float] = FRACTIONS,
        until: str | int | None = None,
        test_rows: int | None = None,
        inputs: int | None = None,
        outputs: int | None = None,
        loss: str | None = None,
    ) -> None:
        check_lists({"features": features, "log": log})
        try:
            from statsmodels.datasets import macrodata
        except ModuleNotFoundError:
            raise Refused(
                "the series comes with statsmodels, which is missing: "
                "pip install 'ddptrain[forecast]'"
            ) from None
        table = macrodata.load_pandas().data
        names = list(dict.fromkeys([value, *features]))
        for name in names:
            if name not in table:
                raise Refused(f"macrodata has no column {name!r}{suggest(name, list(table))}")
        check_log(log, names)
        months = (table["year"] - 1970) * 12 + (table["quarter"] - 1) * 3
        dates = months.to_numpy("int64").astype("datetime64[M]").astype("datetime64[s]")
        values = {name: table[name].to_numpy("float64") for name in names}
        columns = Columns("macrodata", dates, values, lambda row: f"row {row + 1}")
        parts = Split(window, horizon, fractions, until, test_rows)
        super().__init__(columns, split, parts, log, scale_target, inputs, outputs, loss)


class Purchase(TensorDataset):
    """People who buy something or do not, drawn from a known model; label 1 has bought.

    Age is uniform over 18 to 70; education one of 0 to 4, with probabilities 0.1, 0.3, 0.3, 0.2 and
    0.1; income, in thousands, log-normal: its logarithm has mean 3 + 0.012 (age − 18) + 0.18
    education and deviation 0.4. A person buys with probability 1 / (1 + exp(−logit)), where the
    logit is −1.5 − 0.04 age + 0.05 income + 0.5 education. ``noise_features`` more features,
    standard normal, have no part in it.

    A sample is (features, label), shapes (3 + ``noise_features``,) and (); features are
    standardised with mean and deviation of the training split. ``seed`` is that of the people, who
    are the same whatever the noise and the run's seed. ``inputs`` is what the model takes, to be
    compared. Raises ``Refused`` if it is another number, or if there are fewer than ten people.
    """

    def __init__(
        self,
        split: str,
        samples: int = 1000,
        seed: int = 0,
        noise_features: int = 0,
        inputs: int | None = None,
    ) -> None:
        if samples < 10 or noise_features < 0:
            raise Refused(
                f"samples={samples}, noise_features={noise_features}: expected 10 people or more, "
                "and no fewer than 0 features"
            )
        width = len(PURCHASE) + noise_features
        if inputs not in (None, width):
            raise Refused(
                f"there are {width} features ({', '.join(PURCHASE)}, {noise_features} of noise), "
                f"but model.inputs={inputs}; set model.inputs={width}"
            )
        people, _, bought = draw_people(samples, seed)
        noise = _generator(seed, "noise").standard_normal((samples, noise_features))
        features = np.hstack([people, noise])
        seen = features[split_indices(samples, "train")]
        mine = split_indices(samples, split)
        standardised = (features[mine] - seen.mean(axis=0)) / seen.std(axis=0)
        self.feature_names = [*PURCHASE, *(f"noise {number}" for number in range(noise_features))]
        super().__init__(torch.from_numpy(standardised).float(), torch.from_numpy(bought[mine]))


def draw_people(
    samples: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Draw ``samples`` people of ``Purchase``.

    Age, income and education, shape (samples, 3); the probability that each buys, and whether it
    has, 0 or 1, both (samples,).
    """
    generator = _generator(seed, "people")
    age = generator.uniform(18, 70, samples)
    education = generator.choice(5, samples, p=[0.1, 0.3, 0.3, 0.2, 0.1])
    spread = generator.normal(0, 0.4, samples)
    income = np.exp(3 + 0.012 * (age - 18) + 0.18 * education + spread)
    people = np.column_stack([age, income, education])
    chances = 1 / (1 + np.exp(-(INTERCEPT + people @ np.array(OF_LOGIT))))
    return people, chances, (generator.random(samples) < chances).astype(np.int64)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive(seed, f"purchase/{purpose}")))


class Nothing(Dataset[Tensor]):
    """``samples`` samples that hold nothing, shape (0,), for a function that needs no data."""

    def __init__(self, samples: int = 1) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.empty(0)


class StandardLibrary(Windows):
    """The source of the Python that is running, as windows of ``context + 1`` bytes.

    Whole files go to one split, one in fifty to validation, by a hash of their path.
    """

    def __init__(self, split: str, context: int) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split {split!r}: expected 'train' or 'val'")
        root = Path(sysconfig.get_paths()["stdlib"])
        mine = [
            root / name
            for name in source_files(root)
            if (derive(0, f"file/{name}") % 50 == 0) == (split == "val")
        ]
        super().__init__(joined(mine), context)
