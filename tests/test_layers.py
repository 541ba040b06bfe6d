"""Imports point one way, and no module or function grows past what one reads in one go."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ddptrain

ROOT = Path(ddptrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

GROUND = {"errors", "keys", "files", "claim", "screen", "parent", "place", "generators", "hashing",
          "srun", "failpoints", "lagging", "pulse", "processes", "beside",
          "garbage", "marks", "nearest", "stacked"}  # fmt: skip
PLAIN = GROUND | {"config", "targets", "compose", "origin", "overrides", "permitted",
                  "rules", "run_directory", "snapshot", "state", "stored", "trust"}  # fmt: skip
PARTS = {"tasks", "data", "optim", "parallel"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "keys": set(),
    "files": set(),
    "claim": {"errors", "files", "screen"},
    "screen": set(),
    "srun": {"errors", "processes"},
    "place": {"errors", "srun"},
    "generators": set(),
    "parent": set(),
    "failpoints": set(),
    "pulse": set(),
    "processes": set(),
    "beside": set(),
    "garbage": set(),
    "marks": set(),
    "lagging": set(),
    "nearest": set(),
    "stacked": set(),
    "hashing": set(),
    "config": {"errors"},
    "rules": {"config", "errors"},
    "sources": set(),
    "signatures": {"sources"},
    "targets": {"errors", "nearest", "signatures", "sources"},
    "permitted": set(),
    "overrides": {"errors"},
    "trust": {"errors", "permitted", "sources"},
    "state": {"errors"},
    "snapshot": {"origin"},
    "compose": {"config", "errors", "nearest", "overrides", "rules", "snapshot", "targets",
                "trust"},
    "origin": set(),
    "stored": {"compose", "config", "errors", "files"},
    "run_directory": {"claim", "compose", "config", "errors", "files", "origin", "overrides",
                      "screen", "stored"},
    "remembered": {"compose", "config", "files", "place"},
    # The parts know nothing of each other, nor of the config: a user may use one alone.
    "models": set(),
    "tasks": GROUND,
    "data": GROUND,
    "optim": GROUND,
    "parallel": GROUND,
    "account": GROUND | {"tasks"},
    "fingerprints": GROUND | PARTS,
    "closure": GROUND | PARTS | {"account", "fingerprints"},
    "step": GROUND | PARTS | {"account", "closure", "fingerprints"},
    "evaluate": GROUND | PARTS | {"account", "config"},
    "contest": GROUND | PARTS | {"evaluate"},
    # Called by the loop, and import none of it.
    "checkpoint": GROUND | {"state", "parallel"},
    "observe": PLAIN,
    "resilience": GROUND | {"data", "parallel", "tasks", "account"},
    "setbacks": PLAIN | PARTS | {"step", "checkpoint", "observe", "resilience"},
    "layers": GROUND | PARTS | {"step", "observe"},
    "run": PLAIN | PARTS
    | {"layers", "step", "fingerprints", "evaluate", "checkpoint", "observe", "resilience",
       "setbacks"},
    "loop": PLAIN | PARTS | {"run"},
    "parts": PLAIN | PARTS | {"checkpoint", "observe"},
    "build": PLAIN | PARTS
    | {"parts", "account", "contest", "fingerprints", "step", "evaluate", "observe", "resilience",
       "setbacks", "layers", "loop"},
    "launch": PLAIN | PARTS
    | {"evaluate", "checkpoint", "observe", "resilience", "remembered", "setbacks", "loop",
       "build", "parts"},
    "verify": PLAIN | PARTS
    | {"evaluate", "checkpoint", "observe", "resilience", "step", "loop", "build", "launch"},
    "explain": PLAIN | PARTS | {"evaluate", "observe", "launch", "parts"},
    "studies": PLAIN | PARTS | {"observe", "resilience", "launch"},
    "command_line": {"compose"},
    "project": {"errors", "screen"},
    "inspection": {"config", "errors", "observe", "launch", "explain", "run_directory"},
    "cli": PLAIN
    | {"command_line", "inspection", "project", "remembered", "observe", "resilience", "launch",
       "studies", "verify"},
    "__main__": {"cli", "errors", "garbage", "parent", "resilience"},
    "__init__": {"loop", "tasks"},
}  # fmt: skip
"""What each module or package may import of ddptrain, besides itself."""


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def layer(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[str]:
    """The layers that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)}: a relative import hides its layer"
            modules = [node.module or ""]
            if node.module == "ddptrain":
                modules = [f"ddptrain.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found |= {m.split(".")[1] for m in modules if m.startswith("ddptrain.")}
    return found - {layer(file)}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_one_way(file: Path) -> None:
    assert layer(file) in ALLOWED, "a new layer: say above what it may import"
    forbidden = imported(file) - ALLOWED[layer(file)]
    assert not forbidden, f"{name(file)} may not import {', '.join(sorted(forbidden))}"


def test_the_table_itself_has_no_circle() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert set(order) == set(ALLOWED)
    assert set(ALLOWED) == {layer(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_module_begins_with_the_reason_it_exists(file: Path) -> None:
    assert file.read_text().startswith('"""')
    reason = (ast.get_docstring(parse(file)) or "").splitlines()[0]
    assert reason.endswith(".")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_module_and_its_functions_are_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 300
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, functions) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < 60, f"{name(file)}: {node.name}"


def test_the_loop_fits_on_one_screen() -> None:
    functions = {
        node.name: node
        for node in ast.walk(parse(ROOT / "loop.py"))
        if isinstance(node, ast.FunctionDef)
    }
    train = functions["train"]
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno < 40


IMPORTS = [
    ("ddptrain.errors", {"torch", "hydra", "omegaconf", "numpy", "torchmetrics", "yaml"}),
    (
        "ddptrain.cli",
        {"torch", "numpy", "torchmetrics", "tensorboard", "sklearn", "rich", "matplotlib"},
    ),
]
MORE_IMPORTS = [
    (
        "ddptrain.tasks",
        {"torchmetrics", "hydra", "omegaconf", "tensorboard", "sklearn", "matplotlib"},
    ),
    ("ddptrain.models", {"torchmetrics", "hydra", "omegaconf", "tensorboard", "sklearn"}),
    ("ddptrain.data", {"pyarrow", "PIL", "torchmetrics", "hydra", "omegaconf", "sklearn"}),
    ("ddptrain.data.sets", {"torchmetrics", "hydra", "omegaconf", "tensorboard", "sklearn"}),
    ("ddptrain.build", {"torchmetrics", "tensorboard", "sklearn", "rich"}),
]


@pytest.mark.parametrize("imports", [IMPORTS, MORE_IMPORTS], ids=["commands", "training"])
def test_nothing_is_imported_that_is_not_used(imports: list[tuple[str, set[str]]]) -> None:
    """One after the other in a fresh process; the first also imports ddptrain itself."""
    program = "import sys\n" + "".join(
        f"import {module}\nprint({module!r}, *({absent!r} & set(sys.modules)))\n"
        for module, absent in imports
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [module for module, _ in imports]


def test_public_names_are_there_and_others_are_not() -> None:
    for public in ddptrain.__all__:
        assert getattr(ddptrain, public).__name__ == public
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        getattr(ddptrain, "Trainr")  # noqa: B009
