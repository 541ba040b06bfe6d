"""Finds where a name of a Python module is defined, by reading source and importing nothing."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

RUN_TIME_NAMES = {"globals", "locals", "vars", "exec", "eval", "setattr"}
Definition = ast.ClassDef | ast.FunctionDef


@dataclass
class Scope:
    """The names that a module binds at its top level, how often, and whether it may bind more."""

    bound: dict[str, int] = field(default_factory=dict)
    plain: dict[str, ast.stmt] = field(default_factory=dict)
    stars: list[ast.ImportFrom] = field(default_factory=list)
    binds_more: bool = False


def locate(target: str) -> tuple[str | None, Path | None, list[str]]:
    """Split a dotted name into its module, that module's source if it has any, and the rest."""
    parts = target.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return None, None, parts
    if spec.origin is None or not spec.origin.endswith(".py"):
        return parts[0], None, parts[1:]
    file, taken = Path(spec.origin), 1
    while file.name == "__init__.py" and taken < len(parts):
        name, scope = parts[taken], read_scope(file)
        if scope is None or (taken == len(parts) - 1 and _hides(scope, name, parts[:taken])):
            break
        below = file.parent / name
        if below.with_suffix(".py").is_file():
            file = below.with_suffix(".py")
        elif (below / "__init__.py").is_file():
            file = below / "__init__.py"
        elif below.is_dir() or any(file.parent.glob(f"{name}.*")):
            return ".".join(parts[:taken]), None, parts[taken:]  # a namespace, or compiled
        else:
            break
        taken += 1
    return ".".join(parts[:taken]), file, parts[taken:]


def _hides(scope: Scope, name: str, package: list[str]) -> bool:
    """Whether a package binds ``name`` to something else than its module of that name."""
    statement = scope.plain.get(name)
    if isinstance(statement, ast.ImportFrom):
        beside = statement.level == 1 and statement.module is None
        return not beside and statement.module != ".".join(package)
    return statement is not None


@cache
def read_scope(file: Path) -> Scope | None:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    scope = Scope()
    for node in ast.walk(tree):
        if isinstance(node, ast.Global) or getattr(node, "id", None) in RUN_TIME_NAMES:
            scope.binds_more = True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules":
            scope.binds_more = True
    for statement in _statements(tree):
        names = names_bound_by(statement)
        if _is_star(statement):
            scope.stars.append(cast("ast.ImportFrom", statement))
        elif any(map(_is_star, ast.walk(statement))):
            scope.binds_more = True  # all the names of one of two modules, as with decimal's
        for name in names:
            scope.bound[name] = scope.bound.get(name, 0) + 1
            scope.plain[name] = statement
    scope.binds_more |= "__getattr__" in scope.bound
    return scope


def _is_star(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.names[0].name == "*"


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Top-level statements; imports for type checkers tell where a lazily made name comes from."""
    statements: list[ast.stmt] = []
    for statement in tree.body:
        for_checkers = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(
            statement.test
        )
        statements += statement.body if for_checkers else [statement]  # type: ignore[attr-defined]
    return statements


def names_bound_by(statement: ast.AST) -> list[str]:
    """The names that a statement binds in its own scope, once for each time."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names = [a.asname or a.name.partition(".")[0] for a in statement.names]
        return [name for name in names if name != "*"]
    if isinstance(statement, ast.Name):
        return [statement.id] if isinstance(statement.ctx, ast.Store) else []
    own = [n for n in (getattr(statement, "name", None), getattr(statement, "rest", None)) if n]
    return own + [
        name for child in ast.iter_child_nodes(statement) for name in names_bound_by(child)
    ]


def find_definition(file: Path, name: str, depth: int = 0) -> tuple[Definition, Path] | None:
    """The one place where ``name`` of a module is defined, through imports."""
    scope = read_scope(file)
    if scope is None or depth > 8 or scope.bound.get(name, 0) > 1:
        return None
    statement = scope.plain.get(name)
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return statement, file
    if isinstance(statement, ast.ImportFrom):
        original = next(a.name for a in statement.names if (a.asname or a.name) == name)
        source = _source(statement, file)
        return find_definition(source, original, depth + 1) if source else None
    if statement is not None or scope.binds_more:
        return None
    sources = [_source(star, file) for star in scope.stars]
    found = [find_definition(s, name, depth + 1) for s in sources if s and _may_bind(s, name)]
    return found[0] if len(found) == 1 and None not in sources else None


def _may_bind(file: Path, name: str) -> bool:
    scope = read_scope(file)
    return scope is None or name in scope.bound or scope.binds_more or bool(scope.stars)


def _source(node: ast.ImportFrom, file: Path) -> Path | None:
    """The source of the module that a ``from … import`` names."""
    if node.level == 0:
        _, source, rest = locate(node.module or "")
        return source if not rest else None
    folder = file.parents[node.level - 1]
    base = folder.joinpath(*(node.module or "").split("."))
    choices = (base.with_suffix(".py"), base / "__init__.py")
    return next((choice for choice in choices if choice.is_file()), None)
