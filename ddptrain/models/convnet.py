"""A small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Maps (B, inputs, H, W) to (B, classes): two convolutions, two at half size, a linear head.

    Normalises by group, not by batch, so that a sample's result does not depend on its
    micro-batch (Wu and He, *Group Normalization*, ECCV 2018).
    """

    def __init__(
        self, channels: int = 32, classes: int = 10, dropout: float = 0.0, inputs: int = 1
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._block(inputs, channels),
            *self._block(channels, channels),
            nn.MaxPool2d(2),
            *self._block(channels, 2 * channels),
            *self._block(2 * channels, 2 * channels),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8 * channels, classes),
        )

    @staticmethod
    def _block(before: int, after: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return [convolution, nn.GroupNorm(4, after), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits
