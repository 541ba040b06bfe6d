"""What a `_target_` accepts, read from its source without importing it.

Importing torch takes seconds, and a typo in ``optim.lr`` should be refused in a tenth of one. What
cannot be read this way (C extensions, names made at run time) is left to the import itself.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ddptrain.errors import Refused

SIMPLE_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "None": type(None),
}


@dataclass(frozen=True)
class Signature:
    """Keyword arguments by name with their annotation, those required, and whether any will do."""

    annotations: dict[str, str | None]
    required: frozenset[str]
    open_ended: bool = False


def check_arguments(path: str, node: dict[str, object], supplied: set[str]) -> None:
    """Refuse arguments that the target at config key ``path`` does not take, or misses.

    ``supplied`` are the arguments that the framework adds. Raises ``Refused`` with one line.
    """
    target = str(node["_target_"])
    signature = _find(path, target)
    if signature is None or "_args_" in node:
        return
    given = {str(k) for k in node if not str(k).startswith("_") or k in signature.annotations}
    given -= {"_target_", "_partial_", "_recursive_", "_convert_"}
    for name in sorted(given - set(signature.annotations)):
        if signature.open_ended:
            break
        raise Refused(
            f"unknown key {path}.{name}: {target} takes no such argument"
            + suggest(name, [n for n in signature.annotations if n not in supplied], f"{path}.")
        )
    missing = signature.required - given - supplied
    if missing and not node.get("_partial_"):
        raise Refused(f"{path}.{min(missing)}: {target} needs it; set it in the config")
    for name in given & set(signature.annotations):
        _check_type(f"{path}.{name}", signature.annotations[name], node[name])


def suggest(name: str, candidates: list[str], prefix: str = "") -> str:
    """Return "; did you mean …?" for the nearest candidate, or what there is to choose from."""
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; there is {', '.join(sorted(candidates))}" if candidates else ""


def _check_type(key: str, annotation: str | None, value: object) -> None:
    names = [part.strip() for part in annotation.split("|")] if annotation else []
    if not names or any(name not in SIMPLE_TYPES for name in names):
        return
    if isinstance(value, bool) and "bool" not in names:
        allowed = False
    else:
        allowed = any(isinstance(value, SIMPLE_TYPES[name]) for name in names)
    if not allowed:
        raise Refused(f"{key}: expected {annotation}, got {value!r}")


def _find(path: str, target: str) -> Signature | None:
    """Follow a dotted name to its definition. Raises ``Refused`` if it certainly is not there."""
    module, file, rest = _locate_module(target)
    if file is None:
        if module is None:
            raise Refused(
                f"{path}._target_: no module {target.split('.')[0]!r} for {target!r}, neither "
                "installed nor in the folder you started from"
            )
        return None
    if not rest:
        raise Refused(f"{path}._target_: {target} is a module; name a class or function in it")
    found = _definition(file, rest[0], depth=0)
    if found is None:
        names = _public_names(file)
        if names and rest[0] not in names:
            raise Refused(
                f"{path}._target_: no {rest[0]!r} in {file}" + suggest(rest[0], names, f"{module}.")
            )
        return None
    definition, where = found
    for name in rest[1:]:
        inner = [n for n in definition.body if getattr(n, "name", None) == name]
        if not inner or not isinstance(inner[0], ast.ClassDef | ast.FunctionDef):
            return None
        definition = inner[0]
    return _signature(definition, where, method=len(rest) > 1)


def _locate_module(target: str) -> tuple[str | None, Path | None, list[str]]:
    """Split a dotted name into its longest module, that module's file, and the rest."""
    parts = target.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return None, None, parts
    if spec.origin is None or not spec.origin.endswith(".py"):
        folders = list(spec.submodule_search_locations or [])
        if not folders:
            return parts[0], None, parts[1:]
        file = Path(folders[0]) / "__init__.py"
    else:
        file = Path(spec.origin)
    taken = 1
    while file.name == "__init__.py" and taken < len(parts):
        inside = file.parent / parts[taken]
        if inside.with_suffix(".py").is_file():
            file = inside.with_suffix(".py")
        elif inside.is_dir():
            file = inside / "__init__.py"
        else:
            break
        taken += 1
    return ".".join(parts[:taken]), file if file.is_file() else None, parts[taken:]


@cache
def _parse(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return None


def _public_names(file: Path) -> list[str] | None:
    """The names a module defines, or None where it may make some at run time."""
    tree = _parse(file)
    names: list[str] = []
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name == "__getattr__":
                return None
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            if any(alias.name == "*" for alias in node.names):
                return None
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            return None
    return names if tree else None


def _definition(
    file: Path, name: str, depth: int
) -> tuple[ast.ClassDef | ast.FunctionDef, Path] | None:
    tree = _parse(file)
    if tree is None or depth > 8:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, file
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if alias.name != "*" and (alias.asname or alias.name) != name:
                continue
            source = _import_source(node, file)
            wanted = name if alias.name == "*" else alias.name
            found = _definition(source, wanted, depth + 1) if source else None
            if found:
                return found
    return None


def _import_source(node: ast.ImportFrom, file: Path) -> Path | None:
    if node.level == 0:
        return _locate_module(node.module or "")[1]
    folder = file.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    base = folder.joinpath(*(node.module or "").split("."))
    choices = (base.with_suffix(".py"), base / "__init__.py")
    return next((choice for choice in choices if choice.is_file()), None)


def _signature(
    definition: ast.ClassDef | ast.FunctionDef, file: Path, method: bool = False
) -> Signature | None:
    if isinstance(definition, ast.FunctionDef):
        return _of_function(definition, skip_first=method)
    if any("dataclass" in ast.unparse(d) for d in definition.decorator_list):
        return _of_dataclass(definition, file)
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__new__"):
            return _of_function(node, skip_first=True)
    for base in definition.bases:
        found = _definition(file, ast.unparse(base), 0) if isinstance(base, ast.Name) else None
        if found:
            return _signature(*found)
    return None


def _of_function(node: ast.FunctionDef, skip_first: bool) -> Signature:
    positional = [*node.args.posonlyargs, *node.args.args]
    optional = {a.arg for a in positional[len(positional) - len(node.args.defaults) :]}
    optional |= {
        a.arg
        for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if default is not None
    }
    arguments = [*positional[skip_first:], *node.args.kwonlyargs]
    return Signature(
        {a.arg: ast.unparse(a.annotation) if a.annotation else None for a in arguments},
        frozenset(a.arg for a in arguments) - optional,
        open_ended=node.args.kwarg is not None,
    )


def _of_dataclass(definition: ast.ClassDef, file: Path) -> Signature | None:
    annotations: dict[str, str | None] = {}
    required: set[str] = set()
    for base in definition.bases:
        found = _definition(file, ast.unparse(base), 0)
        inherited = _signature(*found) if found else None
        if inherited is None:
            return None
        annotations |= inherited.annotations
        required |= inherited.required
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            if annotation.startswith("ClassVar"):
                continue
            annotations[node.target.id] = annotation
            required.discard(node.target.id)
            if node.value is None:
                required.add(node.target.id)
    return Signature(annotations, frozenset(required))
