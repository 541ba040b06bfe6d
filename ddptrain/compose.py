"""From command-line overrides to a checked config: Hydra composes, every refusal is one line.

Nothing here imports torch, so that a typo is answered in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_origin, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ddptrain.config import BUILT, GROUPING, Config, flatten
from ddptrain.errors import Refused
from ddptrain.nearest import suggest
from ddptrain.overrides import parse
from ddptrain.rules import check
from ddptrain.snapshot import code_folder, make_importable
from ddptrain.targets import check_arguments, check_objective
from ddptrain.trust import check_targets

PACKAGE = Path(__file__).resolve().parent


def config_trees() -> list[Path]:
    """The built-in Hydra tree, then the user's: `conf/` in the folder they started from."""
    built_in = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())
    own = code_folder() / "conf"
    if not own.is_dir() or own.resolve() == built_in:
        return [built_in]
    for file in own.rglob("*.yaml"):
        if (twin := built_in / file.relative_to(own)).is_file():
            raise Refused(f"{file}: hides the built-in {twin}; give it another name")
    return [built_in, own]


def options(group: str) -> list[str]:
    """The names that a config group offers, such as the experiments."""
    return sorted({file.stem for tree in config_trees() for file in (tree / group).glob("*.yaml")})


def compose(overrides: list[str]) -> Config:
    """Compose and check a config. Raises ``Refused`` with one line that names the key."""
    composed = _composed(overrides)
    experiment = composed.hydra.runtime.choices.get("experiment")
    with _refusing(overrides), open_dict(composed):
        del composed["hydra"]
        _set_whole_sections(composed, overrides)
    if "experiment" in composed:
        raise _headless(experiment)
    config = validate(_resolved(composed))
    config.run.name = config.run.name or experiment or "run"
    return config


def hydra_settings(overrides: list[str]) -> DictConfig:
    """The config with Hydra's settings of a sweep, such as its sweeper's. Raises ``Refused``."""
    alike = [str(o.input_line) for o in parse(overrides) if not o.is_sweep_override()]
    return _composed(alike, sweep=True)


def _composed(overrides: list[str], sweep: bool = False) -> DictConfig:
    make_importable()
    arguments = hydra_arguments(overrides, sweep)
    GlobalHydra.instance().clear()
    with _refusing(overrides), initialize_config_dir(str(config_trees()[0]), version_base="1.3"):
        return hydra_compose("config", arguments, return_hydra_config=True)


@contextmanager
def _refusing(overrides: list[str]) -> Iterator[None]:
    """Have what Hydra does not take told in one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise _refusal(error, experiment_of(overrides)) from None


def hydra_arguments(overrides: list[str], sweep: bool = False) -> list[str]:
    """Overrides as Hydra is to get them: any key is let through, for the schema to judge."""
    trees = config_trees()
    arguments = []
    for override in parse(overrides):
        line = cast("str", override.input_line)
        if override.is_sweep_override() and not sweep:
            raise Refused(f"{line}: several values are a sweep; use `ddptrain train --multirun`")
        if re.match(r"\+*hydra[./]", line):
            if not sweep:
                raise Refused(f"{line}: Hydra's own settings are for `ddptrain train --multirun`")
            arguments.append(line)
            continue
        is_group = any((tree / override.key_or_group).is_dir() for tree in trees)
        if is_group and not _chooses(override):
            continue
        is_section = not override.is_sweep_override() and isinstance(override.value(), dict)
        chosen = is_group and not is_section
        locked = not (chosen or override.is_delete() or override.package is not None)
        arguments.append("++" + line.lstrip("+") if locked else line)
    if len(trees) > 1:
        mine = str(trees[1]).replace("'", "\\'")
        arguments.append(f"hydra.searchpath=['file://{mine}']")
    return arguments


def whole_sections(overrides: list[str]) -> list[str]:
    """The overrides that ``hydra_arguments`` leaves out, for Hydra cannot take them."""
    return [
        cast("str", override.input_line)
        for override in parse(overrides)
        if any((tree / override.key_or_group).is_dir() for tree in config_trees())
        and not _chooses(override)
    ]


def _chooses(override: Override) -> bool:
    """Whether Hydra takes an override of a group: it names files of it, or is a whole section."""
    if override.is_delete() or override.is_sweep_override():
        return True
    value = override.value()
    names = value if isinstance(value, list) else [value]
    return isinstance(value, dict) or all(isinstance(name, str) for name in names)


def _set_whole_sections(composed: DictConfig, overrides: list[str]) -> None:
    """Set what Hydra would not: ``model=null`` leaves a group out, ``train=5`` is refused."""
    for override in parse(whole_sections(overrides)):
        composed[override.key_or_group] = override.value()


def _resolved(composed: DictConfig) -> dict[str, Any]:
    """A nested dict with interpolations replaced. Raises ``Refused`` with the key."""
    for key in flatten(cast("dict[str, Any]", OmegaConf.to_container(composed))):
        try:
            OmegaConf.select(composed, key)
        except OmegaConfBaseException as error:
            raise Refused(f"{key}: {_first_line(error)}") from None
    with _refusing([]):
        return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))


def experiment_of(overrides: list[str]) -> str:
    """The experiment that was asked for, for a message."""
    asked = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("experiment=")]
    return asked[-1] if asked else "?"


def _headless(experiment: str) -> Refused:
    return Refused(
        f"conf/experiment/{experiment}.yaml: expected keys below a first line that says "
        "`# @package _global_`; without it they land under `experiment`"
    )


def validate(plain: dict[str, Any]) -> Config:
    """Turn a nested dict into a typed config. Raises ``Refused`` on the first key that is wrong."""
    check_targets(plain)
    _check_keys(plain, Config, "")
    for path in BUILT:
        node: Any = plain
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            _check_built(path, node, plain)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), plain)
        if missing := sorted(OmegaConf.missing_keys(typed)):
            raise Refused(f"{missing[0]}: not set; say {missing[0]}=<value>")
        config = cast("Config", OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise _refusal(error) from None
    check(config)
    return config


def _check_keys(node: dict[str, Any], schema: type, path: str) -> None:
    hints = get_type_hints(schema)
    for key, value in node.items():
        full = f"{path}{key}"
        if key not in hints:
            siblings = [*hints, "experiment"] if not path else list(hints)
            raise Refused(f"unknown key {full}" + _nearest(full, siblings, path))
        if get_origin(hints[key]) is list and not isinstance(value, list):
            raise Refused(f"{full}: expected a list, got {value!r}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            if not isinstance(value, dict):
                raise Refused(
                    f"{full}: expected a section with "
                    f"{', '.join(get_type_hints(hints[key]))}, got {value!r}"
                )
            _check_keys(value, hints[key], f"{full}.")


def _nearest(full: str, siblings: list[str], path: str) -> str:
    """A sibling that looks alike, else any key of the schema whose last part does."""
    name = full.rpartition(".")[2]
    hint = suggest(name, siblings, path)
    if "did you mean" in hint:
        return hint
    elsewhere = [key for key in _schema_keys(Config) if key.rpartition(".")[2] == name]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else hint


def _schema_keys(schema: type, path: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(f"{path}{name}")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            keys += _schema_keys(hint, f"{path}{name}.")
    return keys


def _check_targets(node: object, path: str, supplied: set[str]) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            check_arguments(path, node, supplied)
        for key, value in node.items():
            _check_targets(value, f"{path}.{key}", set())
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check_targets(value, f"{path}[{i}]", set())


def _check_built(path: str, node: object, plain: dict[str, Any]) -> None:
    """Check what a section that describes an object says of it."""
    if not isinstance(node, dict) or "_target_" not in node:
        got = "" if isinstance(node, dict) else f", got {node!r}"
        raise Refused(f"{path}: expected a section with _target_{got}; {path}._target_: not set")
    supplied = {"optim": {"params"}, "task": {"model"} if plain.get("model") else set()}
    if path == "optim":
        _check_groups(node)
        node = {key: value for key, value in node.items() if key not in GROUPING}
    _check_targets(node, path, supplied.get(path, set()))
    check_objective(path, node)


def _check_groups(optim: dict[str, Any]) -> None:
    """Check the options of parameter groups: the optimiser itself would take any."""
    groups = optim.get("groups") or []
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise Refused(f"optim.groups: expected a list of sections with a match, got {groups!r}")
    for number, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key not in ("match", "frozen")}
        node = {"_target_": optim["_target_"], "_partial_": True, **options}
        check_arguments(f"optim.groups[{number}]", node, {"params"})


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refusal(error: Exception, experiment: str = "?") -> Refused:
    """Say what Hydra or OmegaConf found wrong in one line that names the key."""
    if isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    text = str(error)
    if "@experiment." in text:
        return _headless(experiment)
    if found := re.search(r"Could not find '(.+?)/([^/']+)'", text):
        group, option = found.groups()
        return Refused(f"{group}={option}: no such option" + suggest(option, options(group)))
    if isinstance(error, OmegaConfBaseException):
        message, key = _first_line(error), error.full_key
        if message.endswith("is not in struct"):
            return Refused(f"unknown key {key}")
        if enum := re.search(r"Invalid value '(.+?)', expected one of \[(.+)\]", message):
            return Refused(f"{key}: expected one of {enum[2].lower()}, got {enum[1]!r}")
        if conversion := re.search(
            r"Value '(.*?)'(?: of type '.+?')? (?:could not be|is not a valid).*?"
            r"(Integer|Float|Boolean|bool|int|float|string)",
            message,
        ):
            kind = {"i": "a whole number", "f": "a number", "b": "true or false"}.get(
                conversion[2][0].lower(), "text"
            )
            return Refused(f"{key}: expected {kind}, got {conversion[1]!r}")
        return Refused(f"{key}: {message}" if key else message)
    return Refused(" ".join(text.split()))
