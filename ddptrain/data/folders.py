"""Files in a folder for each class: which of them make up a split, in an order of their names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddptrain.data.classes import check_classes, check_outputs, not_in_training
from ddptrain.data.splits import check_split, no_samples, split_indices
from ddptrain.errors import Refused
from ddptrain.nearest import suggest


class ClassFolders:
    """The files of a split below ``folder``, with their labels.

    They lie in folder/<class>/, at any depth, and are divided by ``fractions``; or folder/train
    holds the folders of the classes, and so do folder/val and folder/test. ``files`` are in the
    order of their paths, whatever that of the file system is; ``labels`` are 0 to C-1 in the order
    of ``class_names``, those of the training split. Hidden files and folders do not count. Raises
    ``Refused`` on what cannot be trained with.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        suffixes: Sequence[str],
        fractions: Sequence[float],
        classes: int | None,
        outputs: int | None,
    ) -> None:
        check_split(split)
        self.folder = folder
        self.suffixes = suffixes
        root = existing_folder(folder)
        if _is_divided(root):
            training = self._by_class(root / "train")
            mine = training if split == "train" else self._by_class(self._of_split(root, split))
        else:
            found = self._by_class(root)
            training = self._part(found, "train", fractions)
            mine = self._part(found, split, fractions)
        self.class_names = sorted({name for _, name in training})
        positions = {name: label for label, name in enumerate(self.class_names)}
        for file, name in mine:
            if name not in positions:
                raise not_in_training(str(file), name)
        self.files = [str(file) for file, _ in mine]
        self.labels = [positions[name] for _, name in mine]
        check_classes(folder, split, [name for _, name in mine], self.class_names)
        check_outputs(folder, self.class_names, classes, outputs)

    def _part(
        self, found: list[tuple[Path, str]], split: str, fractions: Sequence[float]
    ) -> list[tuple[Path, str]]:
        chosen = sorted(split_indices(len(found), split, fractions).tolist())
        if not chosen:
            raise no_samples(self.folder, split, fractions, f"{len(found)} files")
        return [found[index] for index in chosen]

    def _of_split(self, root: Path, split: str) -> Path:
        if not (root / split).is_dir():
            hint = suggest(split, [path.name for path in _folders(root)])
            raise Refused(
                f"{self.folder}: it has a folder train, and none for {split}{hint} "
                f"(or set data.{split}=null)"
            )
        return root / split

    def _by_class(self, root: Path) -> list[tuple[Path, str]]:
        """Each file below the folders in ``root``, with the name of that folder."""
        found = []
        for folder in _folders(root):
            files = files_below(folder, self.suffixes)
            if not files:
                raise Refused(
                    f"{folder}: no file that ends in {', '.join(self.suffixes)}; put some there, "
                    "or take the folder away, for each one is a class"
                )
            found += [(file, folder.name) for file in files]
        if not found:
            raise Refused(
                f"{root}: there are no folders in it; one for each class is expected, such as "
                f"{root}/cat with the files of that class"
            )
        return found


def existing_folder(folder: str) -> Path:
    """The path of a folder. Raises ``Refused`` if there is none."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise Refused(f"{folder}: no such folder (looked for from {Path.cwd()})")
    return root


def files_below(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files below ``root`` that end in one of ``suffixes``, in the order of their paths."""
    found = []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = _visible(below)
        found += [
            Path(folder, name) for name in _visible(files) if name.lower().endswith(tuple(suffixes))
        ]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _is_divided(root: Path) -> bool:
    """Whether the folders are splits: train, which might be a class, has folders of its own."""
    return (root / "train").is_dir() and bool(_folders(root / "train"))


def _folders(root: Path) -> list[Path]:
    names = _visible(path.name for path in root.iterdir() if path.is_dir())
    return [root / name for name in sorted(names)]


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]
