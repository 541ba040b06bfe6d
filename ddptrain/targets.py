"""Refuses what a `_target_` certainly does not accept, before anything of it is imported."""

from __future__ import annotations

from omegaconf import MISSING

from ddptrain.errors import Refused
from ddptrain.nearest import suggest
from ddptrain.signatures import Absent, read_signature
from ddptrain.sources import origins

OBJECTIVE = "ddptrain.tasks.objective.Objective"
SIMPLE_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "None": type(None),
}


def check_arguments(path: str, node: dict[str, object], supplied: set[str]) -> None:
    """Refuse arguments that the target at config key ``path`` does not take, or misses.

    ``supplied`` are the arguments that the framework adds. Raises ``Refused`` with one line.
    """
    target = str(node["_target_"])
    try:
        signature = read_signature(target)
    except Absent as absent:
        hint = suggest(absent.name, absent.others, absent.prefix) if absent.others else ""
        raise Refused(f"{path}._target_: {absent}{hint}") from None
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
    if (unwanted := supplied - set(signature.annotations)) and not signature.open_ended:
        name = min(unwanted)
        raise Refused(f"{name}: {target} takes no {name}; leave it out, or let {path} take it")
    missing = signature.required - given - supplied
    if missing and not node.get("_partial_"):
        raise Refused(f"{path}.{min(missing)}: {target} needs it; set it in the config")
    for name in given & set(signature.annotations):
        value = node[name]
        if value == MISSING or isinstance(value, dict):
            continue  # told to be missing later; or built from its own target
        if value is None and name in signature.default_none:
            continue
        if name in signature.choices:
            _check_choice(f"{path}.{name}", target, signature.choices[name], value)
        _check_type(f"{path}.{name}", signature.annotations[name], node[name])


def check_objective(path: str, node: dict[str, object]) -> None:
    """Refuse what an objective's function could not be called with. Raises ``Refused``.

    The one target whose config has names of two places that must be alike: ``parameters`` are
    arguments of ``function``, and ``constraints`` are of parameters.
    """
    if OBJECTIVE not in origins(str(node["_target_"])):
        return
    function, parameters, constraints = (
        value if isinstance(value := node.get(key), dict) else {}
        for key in ("function", "parameters", "constraints")
    )
    for name in sorted(constraints.keys() - parameters.keys()):
        raise Refused(
            f"unknown key {path}.constraints.{name}: {path}.parameters has no such name"
            + suggest(name, list(parameters), f"{path}.constraints.")
        )
    if function.get("_partial_"):
        signature = read_signature(str(function["_target_"]))
        supplied = {"batch"} & set(signature.annotations if signature else ())
        call = {k: v for k, v in function.items() if k != "_partial_"}
        check_arguments(f"{path}.parameters", call | parameters, supplied)


def _check_choice(key: str, target: str, choices: tuple[str, ...], value: object) -> None:
    """Refuse a text, alone or in a list, that is none of those that the target knows."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and text not in choices:
            raise Refused(f"{key}: {target} knows no {text!r}" + suggest(text, list(choices)))


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
