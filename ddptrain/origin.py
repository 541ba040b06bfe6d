"""Where the code of a run came from: versions, commit, and what the folder has beside it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

PACKAGES = ("ddptrain", "torch", "numpy", "hydra-core", "safetensors", "torchmetrics")
DIFF = "code.diff"
KINDS = (".py", ".yaml", ".yml", ".toml")
"""How the names of code and configs end."""


def origin() -> dict[str, Any]:
    """The code that is about to run: versions, and the git state of the folder started from."""
    return {
        "versions": versions(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git_changes(),
    }


def uncommitted() -> str:
    """What `git diff HEAD` says; empty outside of git."""
    return _git("diff", "HEAD") or ""


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    return {"python": python_version(), **{name: _version(name) for name in PACKAGES}}


def loaded_code() -> dict[str, str]:
    """Digests, by module, of the code loaded so far that is of no installed package.

    That is the user's own, and this package where it runs from a checkout: what versions do not
    tell.
    """
    paths = sysconfig.get_paths()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = tuple(
        f"{folder}{os.sep}"
        for folder in {
            *(paths[kind] for kind in kinds),
            *site.getsitepackages(),
            site.getusersitepackages(),
        }
    )
    code = {}
    for name, module in list(sys.modules.items()):
        file = str(getattr(module, "__file__", None))
        is_own = os.path.isabs(file) and not file.startswith(installed)
        if is_own and file.endswith(".py") and not name.startswith("__"):
            code[f"module {name}"] = _digest(Path(file))
    return code


def _git_changes() -> dict[str, str]:
    """Digests, by name, of the files that are not as in the commit.

    Of files that git does not know only code and configs count.
    """
    root = _git("rev-parse", "--show-toplevel")
    if root is None:
        return {}
    changed = _names("-C", root, "diff", "HEAD", "--name-only", "-z")
    unknown = new_code(Path(root))
    return {name: _digest(Path(root, name)) for name in sorted({*changed, *unknown})}


def known_files(folder: Path) -> list[str]:
    """The files below ``folder`` that git knows; none outside of git."""
    return _names("-C", str(folder), "ls-files", "-z")


def new_code(folder: Path) -> list[str]:
    """Code and configs below ``folder`` that git does not know, nor ignores; none of a run's."""
    found = _names("-C", str(folder), "ls-files", "--others", "--exclude-standard", "-z")
    # All folders that the file is in, but not ``folder`` itself.
    above = {name: [folder / part for part in Path(name).parents][:-1] for name in found}
    return [n for n in found if n.endswith(KINDS) and not any(map(is_of_run, above[n]))]


def is_of_run(folder: Path) -> bool:
    """Whether a folder is a run's directory."""
    return (folder / DIFF).exists()


def _digest(file: Path) -> str:
    try:
        return sha256(file.read_bytes()).hexdigest()[:12]
    except OSError:
        return "deleted"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _names(*arguments: str) -> list[str]:
    return [name for name in (_git(*arguments) or "").split("\0") if name]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout if "diff" in arguments else done.stdout.strip()
