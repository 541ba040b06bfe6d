"""Which module of the Python standard library imports which, as users and items."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache

import numpy as np

from ddptrain.data.feedback import Feedback, Observed, divide
from ddptrain.data.library import library_sources
from ddptrain.data.splits import FRACTIONS
from ddptrain.errors import Refused

FEWEST_ITEMS = 3


class StandardLibraryImports(Feedback):
    """Users are the modules of the standard library, without its tests, items the modules that they
    import, of which the ``most_imported`` count.

    Of ``from package import name`` the item is package.name if there is such a module, else the
    package; a relative import is resolved. Modules that import fewer than three of the items are
    left out. ``conf/data/stdlib_imports.yaml`` has a comment for each option. Raises ``Refused``.
    """

    def __init__(
        self,
        split: str,
        most_imported: int,
        split_by: str = "interaction",
        negatives: int | None = None,
        users: int | None = None,
        items: int | None = None,
    ) -> None:
        if most_imported < FEWEST_ITEMS:
            raise Refused(
                f"most_imported: expected {FEWEST_ITEMS} modules at least, got {most_imported}"
            )
        imports = library_imports()
        counts = Counter(item for imported in imports.values() for item in imported)
        chosen = sorted(counts, key=lambda item: (-counts[item], item))[:most_imported]
        of_users = {module: sorted(imports[module] & {*chosen}) for module in sorted(imports)}
        of_users = {user: has for user, has in of_users.items() if len(has) >= FEWEST_ITEMS}
        item_names = sorted(chosen)
        numbers = {name: number for number, name in enumerate(item_names)}
        users_of = np.repeat(np.arange(len(of_users)), [len(has) for has in of_users.values()])
        items_of = np.array([numbers[item] for has in of_users.values() for item in has])
        where = "the standard library"
        roles = divide(where, split, users_of, items_of, split_by, FRACTIONS)
        weights = np.ones(len(users_of), dtype=np.float32)
        observed = Observed(users_of, items_of, roles, weights, list(of_users), item_names)
        super().__init__(split, where, observed, users, items, negatives)


@cache
def library_imports() -> dict[str, frozenset[str]]:
    """By module, what it imports anywhere in its text; without itself, and ``__future__``."""
    sources = {_module_of(file): (file, source) for file, source in library_sources()}
    return {
        module: frozenset(imports(source, module, file.endswith("__init__.py"), sources.keys()))
        - {module, "__future__"}
        for module, (file, source) in sources.items()
    }


def imports(source: str, module: str, is_package: bool, modules: Collection[str]) -> Iterator[str]:
    """The modules that the text of ``module`` imports, by their full names.

    ``modules`` are those that there are, which tells a module of a package from another name in it.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules else base


def _module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
