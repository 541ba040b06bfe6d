"""Reads what a class or function accepts from its source, without importing it.

Importing torch takes seconds, and a typo in ``optim.lr`` should be refused in a tenth of one. The
reader knows plain modules, classes, functions and dataclasses; at the first thing it is not sure
of (a decorator, a metaclass, a name bound twice or at run time) it says that it does not know.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from ddptrain.sources import (
    Definition,
    find_assigned,
    find_definition,
    locate,
    names_bound_by,
    read_scope,
)

HARMLESS_BASES = {"object", "Generic", "Protocol", "ABC"}
NO_TEXT = {"None", "int", "float", "complex", "bool", "bytes", "dict", "Mapping", "Callable"}
MADE_OF = {"Optional", "Union", "Sequence", "Iterable", "list", "tuple", "set"}
"""What an annotation may put around those of the texts themselves."""
EXTRAS = {"transformers": "huggingface", "datasets": "huggingface"}
"""Packages that come with an extra of ddptrain's."""


@dataclass(frozen=True)
class Signature:
    """Keyword arguments by name with their annotation; which are required, which default to None;
    whether any other will do; and the texts that an argument may be, or hold, where there are no
    others."""

    annotations: dict[str, str | None]
    required: frozenset[str]
    default_none: frozenset[str] = frozenset()
    open_ended: bool = False
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Absent(Exception):
    """A name that is certainly not there; ``others`` are those that are, to suggest from."""

    def __init__(
        self, message: str, name: str = "", prefix: str = "", others: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.name = name
        self.prefix = prefix
        self.others = list(others)


def read_signature(target: str) -> Signature | None:
    """The signature of a dotted name, or None if unsure. Raises ``Absent``."""
    module, file, rest = locate(target)
    if module is None:
        root = target.partition(".")[0]
        remedy = "go to the one that it is in"
        if root in EXTRAS:
            remedy = f"pip install 'ddptrain[{EXTRAS[root]}]'"
        raise Absent(
            f"no module {root!r} for {target!r}, neither installed nor in this folder; {remedy}"
        )
    if file is None:
        return None
    if not rest:
        raise Absent(f"{target} is a module; name a class or function in it")
    scope = read_scope(file)
    if scope is None:
        return None
    if rest[0] not in scope.bound and not scope.binds_more and not scope.stars:
        raise Absent(f"no {rest[0]!r} in {file}", rest[0], f"{module}.", tuple(scope.bound))
    found = find_definition(file, rest[0])
    if found is None or len(rest) > 2:
        return None
    return _signature(*found) if len(rest) == 1 else _of_class_method(*found, rest[1])


def _signature(definition: Definition, file: Path) -> Signature | None:
    if isinstance(definition, ast.FunctionDef):
        return (
            None if definition.decorator_list else _of_function(definition, file, skip_first=False)
        )
    lineage = _lineage(definition, file)
    if lineage is None:
        return None
    for class_, its_file in lineage:
        made = [name for statement in class_.body for name in names_bound_by(statement)]
        if "__new__" in made or made.count("__init__") > 1:
            return None
        own = [s for s in class_.body if getattr(s, "name", None) == "__init__"]
        if own and isinstance(own[0], ast.FunctionDef):
            node = own[0]
            return None if node.decorator_list else _of_function(node, its_file, skip_first=True)
        if "__init__" in made:
            return None
        if class_.decorator_list:
            return _of_dataclass(lineage)
    return None


def _of_class_method(definition: Definition, file: Path, name: str) -> Signature | None:
    made = [statement for statement in definition.body if name in names_bound_by(statement)]
    if len(made) != 1 or not isinstance(made[0], ast.FunctionDef):
        return None
    plain = [ast.unparse(decorator) for decorator in made[0].decorator_list] == ["classmethod"]
    known = isinstance(definition, ast.ClassDef) and _lineage(definition, file) is not None
    return _of_function(made[0], file, skip_first=True) if plain and known else None


def _lineage(definition: ast.ClassDef, file: Path) -> list[tuple[ast.ClassDef, Path]] | None:
    """A class and those it derives from, first base first; None if any is not plain."""
    if definition.keywords or len(definition.bases) > 1:
        return None
    if any(not _is_dataclass(d, file) for d in definition.decorator_list):
        return None
    lineage = [(definition, file)]
    for base in definition.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        text = ast.unparse(name).rpartition(".")[2]
        if text in HARMLESS_BASES:
            continue
        found = _base(name, file)
        if found is None or not isinstance(found[0], ast.ClassDef):
            return None
        above = _lineage(found[0], found[1])
        if above is None:
            return None
        lineage += above
    return lineage


def _base(name: ast.expr, file: Path) -> tuple[Definition, Path] | None:
    """The definition of a base class that is written as a name or as ``package.module.Name``."""
    if isinstance(name, ast.Name):
        return find_definition(file, name.id)
    scope, parts = read_scope(file), ast.unparse(name).split(".")
    imported = scope.plain.get(parts[0]) if scope and scope.bound.get(parts[0]) == 1 else None
    if isinstance(imported, ast.Import):
        alias = next(a for a in imported.names if (a.asname or a.name.split(".")[0]) == parts[0])
        prefix = alias.name if alias.asname else parts[0]
    elif isinstance(imported, ast.ImportFrom) and imported.level == 0:
        alias = next(a for a in imported.names if (a.asname or a.name) == parts[0])
        prefix = f"{imported.module}.{alias.name}"
    else:
        return None
    _, source, rest = locate(".".join([prefix, *parts[1:]]))
    return find_definition(source, rest[0]) if source and len(rest) == 1 else None


def _of_function(node: ast.FunctionDef, file: Path, skip_first: bool) -> Signature:
    positional = [*node.args.posonlyargs, *node.args.args]
    with_default = positional[len(positional) - len(node.args.defaults) :]
    defaults = dict(zip((a.arg for a in with_default), node.args.defaults, strict=True))
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if default is not None:
            defaults[argument.arg] = default
    arguments = [*positional[skip_first:], *node.args.kwonlyargs]
    return Signature(
        {a.arg: ast.unparse(a.annotation) if a.annotation else None for a in arguments},
        frozenset(a.arg for a in arguments) - defaults.keys(),
        frozenset(name for name, default in defaults.items() if ast.unparse(default) == "None"),
        open_ended=node.args.kwarg is not None,
        choices={a.arg: texts for a in arguments if (texts := _choices(a.annotation, file))},
    )


def _choices(annotation: ast.expr | None, file: Path) -> tuple[str, ...]:
    """The texts that an annotation with ``Literal`` allows; empty if it may allow any."""
    texts: list[str] = []
    parts = [(annotation, file)]
    for part, its_file in parts:
        name = ast.unparse(part.value if isinstance(part, ast.Subscript) else part) if part else ""
        name = name.rpartition(".")[2]
        inside = part.slice if isinstance(part, ast.Subscript) else None
        members = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if name == "Literal":
            texts += [m.value for m in members if _is_text(m)]  # type: ignore[union-attr]
        elif name in MADE_OF:
            parts += [(member, its_file) for member in members]
        elif isinstance(part, ast.BinOp):
            parts += [(part.left, its_file), (part.right, its_file)]
        elif isinstance(part, ast.Name) and (found := find_assigned(its_file, part.id)):
            parts.append(found)
        elif name not in NO_TEXT:
            return ()  # str, or what may be text for all that is known
    return tuple(texts)


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_dataclass(decorator: ast.expr, file: Path) -> bool:
    """Whether it is ``dataclasses.dataclass``, with options that leave ``__init__`` alone."""
    call = decorator if isinstance(decorator, ast.Call) else None
    if call and (call.args or any(k.arg == "init" or k.arg is None for k in call.keywords)):
        return False
    text, scope = ast.unparse(call.func if call else decorator), read_scope(file)
    origin = scope.plain.get(text.partition(".")[0]) if scope else None
    if isinstance(origin, ast.ImportFrom):
        return text == "dataclass" and origin.module == "dataclasses"
    return text == "dataclasses.dataclass" and isinstance(origin, ast.Import)


def _of_dataclass(lineage: list[tuple[ast.ClassDef, Path]]) -> Signature | None:
    annotations: dict[str, str | None] = {}
    required: set[str] = set()
    for class_, _ in reversed(lineage):
        if not class_.decorator_list:
            continue  # what a class that is no dataclass annotates is no field
        for node in class_.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            annotation = ast.unparse(node.annotation)
            if isinstance(node.value, ast.Call) or "KW_ONLY" in annotation:
                return None  # field(…) may leave a field out of __init__
            if "ClassVar" in annotation:
                continue
            annotations[node.target.id] = annotation
            required.discard(node.target.id)
            if node.value is None:
                required.add(node.target.id)
    return Signature(annotations, frozenset(required))
