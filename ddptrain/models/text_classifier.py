"""A small convolutional network that tells the class of a text from its bytes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class TextClassifier(nn.Module):
    """Maps bytes (B, T), int64, filled up with 0, to logits (B, classes).

    Each byte is a vector; two convolutions look at pieces of text, and the largest value that a
    feature has anywhere in the text counts (Kim, *Convolutional Neural Networks for Sentence
    Classification*, EMNLP 2014; over bytes as in Zhang, Zhao and LeCun, NeurIPS 2015).
    """

    def __init__(
        self, classes: int, width: int = 64, kernel: int = 5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding="same") for _ in range(2)
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, classes))

    def forward(self, text: Tensor) -> Tensor:
        is_filling = (text == 0).unsqueeze(1)
        found = self.bytes(text).transpose(1, 2)
        for convolution in self.convolutions:
            # 0 beyond the end, as at the border, so that nothing depends on how much is filled up.
            found = functional.relu(convolution(found)).masked_fill(is_filling, 0)
        logits: Tensor = self.head(found.amax(2))
        return logits
