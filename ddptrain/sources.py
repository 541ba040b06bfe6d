"""Finds where a name of a Python module is defined, by reading source and importing nothing."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

RUN_TIME_NAMES = {"globals", "locals", "vars", "exec", "eval", "setattr"}
Definition = ast.ClassDef | ast.FunctionDef
Import = ast.Import | ast.ImportFrom
MAX_IMPORTS = 16
"""Imports of imports that are followed; packages have about four."""


@dataclass
class Scope:
    """The names that a module binds at its top level, how often, and whether it may bind more."""

    bound: dict[str, int] = field(default_factory=dict)
    plain: dict[str, ast.stmt] = field(default_factory=dict)
    stars: list[ast.ImportFrom] = field(default_factory=list)
    imports: dict[str, list[Import]] = field(default_factory=dict)
    binds_more: bool = False


def locate(target: str) -> tuple[str | None, Path | None, list[str]]:
    """Split a dotted name into its module, that module's source if it has any, and the rest."""
    parts = target.split(".")
    try:
        with warnings.catch_warnings():  # setuptools' finder speaks up when asked for pip
            warnings.simplefilter("ignore")
            spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return None, None, parts
    if spec.origin is None:
        file, taken = _below_folders(list(spec.submodule_search_locations or ()), parts)
    else:
        file, taken = Path(spec.origin), 1
    if file.suffix != ".py":
        return parts[0], None, parts[1:]
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


def _below_folders(folders: list[str], parts: list[str]) -> tuple[Path, int]:
    """The first source on the way of a dotted name through folders without ``__init__.py``."""
    places = [Path(folder) for folder in folders]
    for taken, name in enumerate(parts[1:], 2):
        places = [place / name for place in places]
        files = [f for p in places for f in (p / "__init__.py", p.with_suffix(".py"))]
        if found := next((file for file in files if file.is_file()), None):
            return found, taken
    return Path(), 1


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
        for node in _imports(statement):
            for name in names_bound_by(node):
                scope.imports.setdefault(name, []).append(node)
    scope.binds_more |= "__getattr__" in scope.bound
    return scope


def _imports(statement: ast.AST) -> Iterator[Import]:
    """The imports of a statement that bind in its own scope, in branches as well."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield statement
    elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        for child in ast.iter_child_nodes(statement):
            yield from _imports(child)


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


def find_assigned(file: Path, name: str, depth: int = 0) -> tuple[ast.expr, Path] | None:
    """What a module binds ``name`` to, once and for all, with ``=``; through imports."""
    scope = read_scope(file)
    if scope is None or depth > 8 or scope.bound.get(name) != 1:
        return None
    statement = scope.plain[name]
    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
        return statement.value, file
    if isinstance(statement, ast.ImportFrom):
        original = next(a.name for a in statement.names if (a.asname or a.name) == name)
        source = _source(statement, file)
        return find_assigned(source, original, depth + 1) if source else None
    return None


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


def origins(target: str, depth: int = 0) -> set[str]:
    """A dotted name, and those that it may stand for once imports are followed, one by one.

    What source does not tell (a name that is bound at run time, a compiled module) ends the way.
    Raises ``RecursionError`` where imports lead on and on.
    """
    module, file, rest = locate(target)
    scope = read_scope(file) if file else None
    if module is None or file is None or scope is None or not rest:
        return {target}
    if depth > MAX_IMPORTS:
        raise RecursionError(target)
    name, *more = rest
    found = [_imported(node, name, module, file) for node in scope.imports.get(name, [])]
    if name not in scope.bound:
        sources = [(_package(star, module, file), _source(star, file)) for star in scope.stars]
        found += [f"{package}.{name}" for package, source in sources if _binds(source, name)]
    stands_for = {".".join([other, *more]) for other in found} - {target}
    return {target}.union(*(origins(other, depth + 1) for other in stands_for))


def _imported(node: Import, name: str, module: str, file: Path) -> str:
    """What ``name`` is short for after an import in ``module``."""
    alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
    if isinstance(node, ast.Import):
        return alias.name if alias.asname else name
    return f"{_package(node, module, file)}.{alias.name}"


def _package(node: ast.ImportFrom, module: str, file: Path) -> str:
    """The absolute name of the module that a ``from … import`` in ``module`` names."""
    if node.level == 0:
        return node.module or ""
    up = node.level - (file.name == "__init__.py")
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _binds(file: Path | None, name: str) -> bool:
    scope = read_scope(file) if file else None
    return scope is not None and name in scope.bound
