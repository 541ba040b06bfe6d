"""Images of the user's, in a folder for each class, read when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from ddptrain.data.folders import ClassFolders
from ddptrain.data.splits import FRACTIONS
from ddptrain.errors import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """(image, label): float32 in [0, 1], shape (1 or 3, size, size), and the class, 0 to C-1.

    An image lies in folder/<class>/, or in folder/train/<class>/, folder/val/<class>/ and
    folder/test/<class>/. It is turned as its camera says, scaled until it covers the square, and
    its middle is cut out. ``flip`` mirrors half of the training images, ``shift`` moves each by up
    to so many pixels and repeats its border (both drawn anew in each epoch, from the run's seed).

    Raises ``Refused`` on a folder that cannot be trained with, and ``ValueError`` with the file's
    name on an image that cannot be read.
    """

    def __init__(
        self,
        split: str,
        folder: str,
        size: int,
        colour: bool = False,
        fractions: Sequence[float] = FRACTIONS,
        flip: bool = False,
        shift: int = 0,
        inputs: int | None = None,
        outputs: int | None = None,
        classes: int | None = None,
    ) -> None:
        if size < 1:
            raise Refused(f"size: expected a number of pixels above 0, got {size}")
        if not 0 <= shift < size:
            raise Refused(f"shift: expected 0 to {size - 1} pixels, below size, got {shift}")
        if split != "train" and (flip or shift):
            raise Refused(f"flip, shift: they are for training, not for split {split}")
        self.channels = 3 if colour else 1
        if inputs is not None and inputs != self.channels:
            raise Refused(
                f"colour={str(colour).lower()}: images have {self.channels} channels, but "
                f"model.inputs={inputs}; set one of them otherwise"
            )
        found = ClassFolders(folder, split, SUFFIXES, fractions, classes, outputs)
        self.files, self.labels, self.class_names = found.files, found.labels, found.class_names
        self.size, self.flip, self.shift = size, flip, shift

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        # What a disk or a network says of itself stays as it is: it may pass.
        encoded = Path(file).read_bytes()
        try:
            pixels = self._square(encoded)
        except Exception as error:
            raise ValueError(f"{file}: it cannot be read as an image: {error}") from error
        return self._augmented(pixels), self.labels[index]

    def _square(self, encoded: bytes) -> Tensor:
        """An encoded image as float32 in [0, 1], shape (channels, size, size)."""
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as opened:
            upright = ImageOps.exif_transpose(opened)
            plain = _of_8_bits(upright).convert("RGB" if self.channels == 3 else "L")
            square = ImageOps.fit(plain, (self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(square, dtype=np.float32)) / 255
        return pixels.view(self.size, self.size, self.channels).permute(2, 0, 1).contiguous()

    def _augmented(self, pixels: Tensor) -> Tensor:
        """Mirrored and moved, by torch's generator, which is keyed for each sample of an epoch."""
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        if self.shift:
            down, right = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            wide = functional.pad(pixels[None], [self.shift] * 4, mode="replicate")[0]
            pixels = wide[:, down : down + self.size, right : right + self.size]
        return pixels.contiguous()


def _of_8_bits(image: Image) -> Image:
    """The same image; one of 16 bits would be cut off at 255 rather than scaled."""
    from PIL import Image as images

    if not image.mode.startswith("I"):
        return image
    return images.fromarray((np.asarray(image) >> 8).astype(np.uint8))
