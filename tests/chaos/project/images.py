"""Small images with random augmentation; a loader that can be told to sleep forever, once."""

from __future__ import annotations

import random
import threading

import torch
from notes import claim
from torch import Tensor
from torch.utils.data import Dataset

SIDE = 8
CLASSES = 4


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Noisy gratings, one direction a class; ``augment`` shifts and blurs them at random."""

    def __init__(self, samples: int = 96, augment: bool = True) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.labels = torch.arange(samples) % CLASSES
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        waves = [torch.sin(0.9 * (rows * (c % 2) + columns * (c // 2))) for c in range(CLASSES)]
        images = torch.stack(waves)[self.labels]
        noise = torch.randn(images.shape, generator=generator)
        self.images = (images + 0.5 * noise).unsqueeze(1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if claim("sleep"):
            threading.Event().wait()
        image = self.images[index]
        if self.augment:
            image = image.roll(random.randrange(SIDE), -1) + 0.1 * torch.randn(image.shape)
        return image, self.labels[index]
