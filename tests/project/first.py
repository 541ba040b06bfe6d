"""The first few samples of a built-in data set."""

from __future__ import annotations

from torch.utils.data import TensorDataset

from ddptrain.data import sets


class First(TensorDataset):
    """The first ``count`` samples of a split of the built-in set called ``of``."""

    def __init__(self, split: str, count: int, of: str) -> None:
        whole = getattr(sets, of)(split)
        super().__init__(*(tensor[:count] for tensor in whole.tensors))
