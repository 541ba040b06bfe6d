"""`ddptrain init`: a small project of one's own to begin from, which trains at once."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree, ignore_patterns

from ddptrain.errors import Refused
from ddptrain.screen import say, short

PACKAGE = Path(__file__).resolve().parent


def new_project(folder: Path) -> None:
    """Write the project into ``folder``. Raises ``Refused`` if there is something already."""
    template = next(d for d in (PACKAGE / "template", PACKAGE.parent / "template") if d.is_dir())
    try:
        if folder.exists() and any(folder.iterdir()):
            raise Refused(f"{folder}: it is not empty; name a new folder")
        copytree(
            template, folder, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__", "runs")
        )
    except OSError as error:
        raise Refused(f"{folder} cannot be written to: {error.strerror}") from error
    say(
        f"project      {short(folder.absolute())}\n"
        f"train it     cd {short(folder.absolute())} && ddptrain train experiment=mine\n"
        "test it      pytest"
    )
