"""Texts of the user's as bytes: windows for a language model, or whole files with a class."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddptrain.data.folders import ClassFolders, files_below
from ddptrain.data.named import byte_name
from ddptrain.data.splits import FRACTIONS, check_named, check_split, no_samples, split_indices
from ddptrain.errors import Refused

SUFFIXES = (".txt",)


class Windows(Dataset[Tensor]):
    """A text as windows of ``context + 1`` bytes, int64, shape (context + 1,).

    Windows overlap by one byte, so every byte but the first is predicted once; what is left at the
    end and fills no window is left out. ``chosen`` are the windows that belong to this data set,
    null takes all.
    """

    def __init__(
        self, text: bytearray, context: int, chosen: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.bytes = torch.frombuffer(text, dtype=torch.uint8)
        self.context = context
        self.chosen = None if chosen is None else torch.from_numpy(chosen)

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return count_windows(len(self.bytes), self.context)

    def __getitem__(self, index: int) -> Tensor:
        window: Tensor = self.__getitems__([index])[0]
        return window

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Windows of a micro-batch, shape (len(indices), context + 1)."""
        numbers = torch.as_tensor(indices)
        if self.chosen is not None:
            numbers = self.chosen[numbers]
        windows = self.bytes.unfold(0, self.context + 1, self.context)
        return windows[numbers].long()


class TextFiles(Windows):
    """The files of a folder (``*.txt`` at any depth) or of a pattern such as ``notes/**/*.md``, one
    after the other in the order of their paths, as windows of ``context + 1`` bytes.

    With ``split_by="file"`` whole files go to a split, with ``"window"`` single windows do, which a
    few long files need; ``path`` may also name a folder or pattern for each split. All text of a
    split is held in memory, on each rank. Raises ``Refused``.
    """

    def __init__(
        self,
        split: str,
        path: str | Mapping[str, str],
        context: int,
        split_by: str = "file",
        fractions: Sequence[float] = FRACTIONS,
    ) -> None:
        check_split(split)
        if split_by not in ("file", "window"):
            raise Refused(f"split_by: expected file or window, got {split_by!r}")
        if context < 1:
            raise Refused(f"context: expected a number of bytes above 0, got {context}")
        files = _files_of(path, split)
        where = path if isinstance(path, str) else path[split]
        chosen = None
        if isinstance(path, str) and split_by == "file":
            indices = split_indices(len(files), split, fractions)
            if not indices.size:
                nothing = no_samples(where, split, fractions, f"{len(files)} files")
                raise Refused(f"{nothing}; or set split_by=window to divide the files themselves")
            files = [files[index] for index in np.sort(indices)]
        text = joined(files)
        windows = count_windows(len(text), context)
        if isinstance(path, str) and split_by == "window" and windows:
            chosen = np.sort(split_indices(windows, split, fractions))
        if not (windows if chosen is None else len(chosen)):
            raise Refused(
                f"{where}: {len(text)} bytes in {len(files)} files of split {split} are "
                f"{windows} windows of context={context}, too few; take more text, or a shorter "
                "context"
            )
        super().__init__(text, context, chosen)


class TextFolder(Dataset[tuple[Tensor, int]]):
    """(bytes, label): the first ``length`` bytes of a file, int64, shape (length,), and its class.

    A shorter file is filled up with 0. Files are folder/<class>/*.txt, or folder/train/<class>/,
    folder/val/<class>/ and folder/test/<class>/; they are read when they are asked for. Raises
    ``Refused``.
    """

    def __init__(
        self,
        split: str,
        folder: str,
        length: int,
        fractions: Sequence[float] = FRACTIONS,
        outputs: int | None = None,
        classes: int | None = None,
    ) -> None:
        if length < 1:
            raise Refused(f"length: expected a number of bytes above 0, got {length}")
        found = ClassFolders(folder, split, SUFFIXES, fractions, classes, outputs)
        self.files, self.labels, self.class_names = found.files, found.labels, found.class_names
        self.token_names = [byte_name(byte) for byte in range(256)]
        self.length = length

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open(self.files[index], "rb") as file:
            text = file.read(self.length)
        padded = bytearray(text.ljust(self.length, b"\0"))
        return torch.frombuffer(padded, dtype=torch.uint8).long(), self.labels[index]


def count_windows(length: int, context: int) -> int:
    """How many windows of ``context + 1`` bytes, which overlap by one, a text of ``length`` has."""
    return max(length - 1, 0) // context


def joined(files: Iterable[Path]) -> bytearray:
    """The bytes of files, one after the other."""
    text = bytearray()
    for file in files:
        text += file.read_bytes()
    return text


def _files_of(path: str | Mapping[str, str], split: str) -> list[Path]:
    """The files at ``path``, or at that of a split. Raises ``Refused`` if there are none."""
    if not isinstance(path, str):
        check_named(path, split)
        path = path[split]
    place = Path(path).expanduser()
    if place.is_dir():
        files = files_below(place, SUFFIXES)
    else:
        found = glob.glob(str(place), recursive=True)
        files = [Path(name) for name in sorted(found) if Path(name).is_file()]
    if not files:
        raise Refused(
            f"{path}: no such file, and no folder with *.txt in it (looked for from {Path.cwd()}); "
            "a pattern such as 'notes/**/*.md' takes files of other names"
        )
    return files
