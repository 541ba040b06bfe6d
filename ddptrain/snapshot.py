"""The code of a job that waits: a copy of the folder as it was when the job was submitted."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ddptrain.origin import KINDS, is_of_run, known_files, new_code

CODE = "DDPTRAIN_CODE"
"""The variable that names the copy, in the job."""
LARGEST = 20 * 2**20
"""Bytes: what is larger is data, and stays where it is."""


def code_folder() -> Path:
    """Where modules and a `conf/` of the user's own are: the folder started from, or its copy."""
    return Path(os.environ.get(CODE) or Path.cwd())


def make_importable() -> None:
    """Let a `_target_` name a module in the folder that the user started from."""
    here = str(code_folder())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def copy_code(target: Path) -> list[str]:
    """Copy the code of this folder; return the names of files that were too large.

    In a git repository that is what git knows, and code and configs that it does not ignore;
    elsewhere code and configs. Runs and virtual environments are no code.
    """
    too_large = []
    here = Path.cwd()
    for name in sorted({*known_files(here), *new_code(here)} or _of_folder(here)):
        source = here / name
        if not source.is_file():
            continue  # deleted, or a repository of its own
        if source.stat().st_size > LARGEST:
            too_large.append(name)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target / name)
    return too_large


def _of_folder(here: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(here):
        folders[:] = [each for each in folders if _is_of_code(Path(folder, each))]
        for file in files:
            if file.endswith(KINDS):
                yield str(Path(folder, file).relative_to(here))


def _is_of_code(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return False
    return not is_of_run(folder) and not (folder / "pyvenv.cfg").exists()
