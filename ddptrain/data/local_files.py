"""Opens local files with the library datasets, and finds the rows of a split in them."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddptrain.data.folders import files_below
from ddptrain.data.packages import import_package
from ddptrain.data.splits import check_named, no_samples, split_indices
from ddptrain.errors import Refused
from ddptrain.nearest import suggest

KINDS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
"""What reads a file, by how its name ends."""
USUAL_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "dev", "valid"),
               "test": ("test",)}  # fmt: skip
"""What data sets call their splits."""
SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Part:
    """The ``rows`` of one split, int64, in ``data``, a ``datasets.Dataset``."""

    split: str
    where: str
    data: Any
    rows: npt.NDArray[np.int64]

    def check_column(self, key: str, name: str) -> None:
        """Refuse a column that is not there, or that lacks values. Raises ``Refused``."""
        if name not in self.data.column_names:
            hint = suggest(name, self.data.column_names)
            raise Refused(f"{key}: {self.where} has no column {name!r}{hint}")
        from pyarrow import compute

        missing = compute.is_null(self.data.data.column(name), nan_is_null=True)
        if count := compute.sum(missing).as_py():
            row = missing.index(True).as_py()
            raise Refused(
                f"{self.where}: column {name!r} has no value in {count} of "
                f"{len(missing)} rows, first in row {row + 1}; fill them in, or take the rows out"
            )

    def values(self, name: str) -> list[Any]:
        """A column, in the order of the rows of this split."""
        values: list[Any] = self.data.select_columns([name])[self.rows.tolist()][name]
        return values

    def place(self, position: int) -> str:
        """Where a user finds the row at ``position`` of this split, counted from 1."""
        return f"{self.where}: row {self.rows[position] + 1}"


def read_parts(
    path: str | Mapping[str, str],
    split: str,
    splits: Mapping[str, str],
    fractions: Sequence[float],
    options: Mapping[str, Any],
) -> tuple[Part, Part]:
    """The training rows, from which classes are learnt, and those of ``split``.

    Raises ``Refused``.
    """
    if isinstance(path, str):
        found = _open(path, options)
        training, mine = (_part(found, path, s, splits, fractions) for s in ("train", split))
        return training, mine
    if splits:
        raise Refused("splits: there is a path for each split; leave splits out")
    parts = {}
    for name in ("train", split):
        check_named(path, name)
        data = _the_only_one(_open(path[name], options), path[name])
        parts[name] = Part(name, path[name], data, np.arange(len(data)))
    return parts["train"], parts[split]


def _part(
    found: Mapping[str, Any],
    where: str,
    split: str,
    splits: Mapping[str, str],
    fractions: Sequence[float],
) -> Part:
    """The rows that the data itself has for a split; or if it has one for all, a fraction."""
    if len(found) == 1 and not splits:
        data = next(iter(found.values()))
        rows = np.sort(split_indices(len(data), split, fractions))
        if not rows.size:
            raise no_samples(where, split, fractions, f"{len(data)} rows")
        return Part(split, where, data, rows)
    usual = next((name for name in USUAL_NAMES[split] if name in found), split)
    name = splits.get(split, usual)
    if name not in found:
        raise Refused(
            f"{where}: there is no split {name!r} for {split}, only {', '.join(found)}; set "
            f"splits: {{{split}: …}}, or data.{split}=null"
        )
    return Part(split, f"{where} ({name})", found[name], np.arange(len(found[name])))


def _the_only_one(found: Mapping[str, Any], where: str) -> Any:
    if len(found) > 1:
        raise Refused(
            f"path: {where} holds splits of its own, {', '.join(found)}; give it alone as path"
        )
    return next(iter(found.values()))


def _open(path: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is at ``path``, by the names of its splits. Raises ``Refused``.

    Text formats become Arrow files in the library's own cache, which its locks keep for one writer
    at a time; a changed file has another place there.
    """
    datasets = import_package("datasets")
    place = Path(path).expanduser()
    try:
        if any((place / name).is_file() for name in SAVED):
            if options:
                raise Refused(f"options: {path} was saved by datasets, and is read without any")
            saved = datasets.load_from_disk(str(place))
            return saved if isinstance(saved, dict) else {"train": saved}
        files = _files_at(path, place)
        kind = _kind_of(path, files)
        if not any(file.stat().st_size for file in files):
            raise Refused(f"{path}: it is empty; rows are expected")
        more = dict(options)
        if files[0].suffix.lower() == ".tsv":
            more.setdefault("delimiter", "\t")
        _check_options(datasets, kind, files, options)
        found = {"train": [str(file.absolute()) for file in files]}
        loaded: Mapping[str, Any] = datasets.load_dataset(kind, data_files=found, **more)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise Refused(f"{path}: cannot be read by datasets: {reason}") from None
    return loaded


def _files_at(path: str, place: Path) -> list[Path]:
    """The file, those of a folder, or of a pattern, in the order of their paths."""
    if place.is_dir():
        files = files_below(place, tuple(KINDS))
    else:
        files = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]
        files = [file for file in files if file.is_file()]
    if not files:
        raise Refused(
            f"{path}: no such file, no folder with *{', *'.join(KINDS)} in it, and none that "
            f"save_to_disk has written (looked for from {Path.cwd()}); nothing is fetched from a "
            "network"
        )
    return files


def _kind_of(path: str, files: Sequence[Path]) -> str:
    suffixes = sorted({file.suffix.lower() for file in files})
    if unknown := [suffix for suffix in suffixes if suffix not in KINDS]:
        raise Refused(
            f"{path}: nothing reads {unknown[0] or 'files without a suffix'}; expected files whose "
            f"names end in one of {', '.join(KINDS)}"
        )
    if len(suffixes) > 1:
        raise Refused(f"{path}: files of several kinds, {', '.join(suffixes)}; name those of one")
    return KINDS[suffixes[0]]


def _check_options(
    datasets: Any, kind: str, files: Sequence[Path], options: Mapping[str, Any]
) -> None:
    builder = datasets.load_dataset_builder(kind, data_files=[str(files[0].absolute())])
    known = {field.name for field in dataclasses.fields(builder.BUILDER_CONFIG_CLASS)}
    known -= {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    for name in options:
        if name not in known:
            raise Refused(
                f"unknown key options.{name}: datasets has no such option for {kind}"
                + suggest(name, sorted(known), "options.")
            )
