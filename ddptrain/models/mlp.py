"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Maps (B, inputs) to (B, outputs) through ReLU layers of the ``hidden`` widths."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([inputs, *hidden]):
            layers += [nn.Linear(before, after), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        last = hidden[-1] if hidden else inputs
        self.layers = nn.Sequential(*layers, nn.Linear(last, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs
