"""Data that every machine has offline: two sets of scikit-learn's, and Python's own source."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ddptrain.data.shuffle import Permutation
from ddptrain.keys import derive

SPLITS = {"train": (0.0, 0.70), "val": (0.70, 0.85), "test": (0.85, 1.0)}
"""Which part of a fixed permutation of the samples a split is; the run's seed has no say."""


def split_indices(samples: int, split: str) -> npt.NDArray[np.int64]:
    """The indices of ``split`` ("train", "val" or "test"); the three are disjoint and complete."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    low, high = (round(samples * part) for part in SPLITS[split])
    return Permutation(samples, derive(0, "split"))(np.arange(low, high))


class Digits(TensorDataset):
    """scikit-learn's handwritten digits: images (1, 8, 8) in [0, 1], labels 0 to 9."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        mine = split_indices(len(labels), split)
        images = torch.from_numpy(pixels[mine]).float().view(-1, 1, 8, 8) / 16
        super().__init__(images, torch.from_numpy(labels[mine]))


class BreastCancer(TensorDataset):
    """scikit-learn's breast cancer data: 30 features, standardised; label 1 is benign."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_breast_cancer

        features, labels = load_breast_cancer(return_X_y=True)
        seen = features[split_indices(len(labels), "train")]
        mine = split_indices(len(labels), split)
        standardised = (features[mine] - seen.mean(axis=0)) / seen.std(axis=0)
        super().__init__(torch.from_numpy(standardised).float(), torch.from_numpy(labels[mine]))


class StandardLibrary(Dataset[Tensor]):
    """The source of the Python that is running, as windows of ``context + 1`` bytes.

    Whole files go to one split, one in fifty to validation, by a hash of their path. Windows of
    the concatenated files overlap by one byte, so every byte but the first is predicted once.
    """

    def __init__(self, split: str, context: int) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split {split!r}: expected 'train' or 'val'")
        root = Path(sysconfig.get_paths()["stdlib"])
        text = bytearray()
        for name in _source_files(root):
            if (derive(0, f"file/{name}") % 50 == 0) == (split == "val"):
                text += (root / name).read_bytes()
        self.bytes = torch.frombuffer(text, dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.bytes[start : start + self.context + 1].long()

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        windows = self.bytes.unfold(0, self.context + 1, self.context)
        return windows[torch.as_tensor(indices)].long()


def _source_files(root: Path) -> list[str]:
    """Python files below ``root`` in name order, without those of installed packages."""
    names = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "__pycache__")]
        here = Path(folder).relative_to(root)
        names += [(here / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)
