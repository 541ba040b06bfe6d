"""What the ranks of a run agree on before they build anything: the config, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ddptrain.claim import Claim
from ddptrain.config import Config, Resume, flatten, to_plain
from ddptrain.files import replace_text
from ddptrain.origin import loaded_code, versions
from ddptrain.parallel.ranks import Ranks
from ddptrain.run_directory import RunDirectory, open_directory

RUN_KEY, BEGUN_KEY = "ddptrain/run.dir", "ddptrain/begun"


def agree_on_code(config: Config, ranks: Ranks) -> None:
    """Refuse ranks of other versions or with other code, before they do anything together.

    The user's modules are imported first: what they import in turn is compared, too.
    """
    if ranks.world_size == 1:
        return
    ranks.agree(versions(), "has other versions than", "install the same on all nodes")
    import_targets(config)  # who builds one that cannot be imported says what is wrong
    agree_on_loaded(ranks)


def agree_on_loaded(ranks: Ranks) -> None:
    """Refuse ranks that have other code in the modules that they have both imported."""
    remedy = "start all ranks from copies of one folder that are alike"
    ranks.agree(loaded_code(), "runs other code than", remedy, shared_only=True)


def agree_on_config(config: Config, ranks: Ranks) -> None:
    """Refuse ranks that were started with another config."""
    remedy = "start all ranks with the same arguments"
    ranks.agree(common(config), "was started with another config than", remedy)


def import_targets(config: Config) -> list[str]:
    """Import the modules that a config names; return what is wrong with those that cannot be."""
    wrong = []
    for name in sorted(set(_targets(to_plain(config)))):
        parts, why = name.split(".")[:-1], ""
        while parts:  # it may be a class within a class
            try:
                import_module(".".join(parts))
                break
            except (Exception, SystemExit) as error:
                is_class = isinstance(error, ModuleNotFoundError) and error.name == ".".join(parts)
                told = " ".join(str(error).split())
                why = why or ("" if is_class else f"{name}: {type(error).__name__}: {told}")
            parts.pop()
        if why or not parts:
            wrong.append(why or f"{name}: there is no module {name.split('.')[0]}")
    return wrong


def _targets(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(target := node.get("_target_"), str):
            yield target
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def common(config: Config) -> dict[str, Any]:
    """What must be alike on all ranks: more than is computed, for logging is a collective too."""
    own = ("run.", "launch.nproc_per_node", "launch.max_restarts", "launch.interface",
           "launch.timeout", "launch.bind_cpus", "data.workers")  # fmt: skip
    return {k: v for k, v in flatten(to_plain(config)).items() if not k.startswith(own)}


def agree_on_directory(
    config: Config, ranks: Ranks, overrides: list[str]
) -> tuple[RunDirectory, Claim]:
    """Let rank 0 create or open the run's directory; after a restart it is the same one.

    The store of the agent outlives the ranks, so that a run without ``run.dir`` finds itself.
    """
    claim: Claim | None = None
    if ranks.is_first:
        store = ranks.store
        if store is not None and store.check([RUN_KEY]):
            config.run.dir = store.get(RUN_KEY).decode()
        if store is not None and store.check([BEGUN_KEY]):
            config.run.resume = Resume.auto  # it was held against what there is
        run = open_directory(config, overrides)
        claim = Claim(run.path)
        claim.take()
        if store is not None:
            store.set(RUN_KEY, str(run.path))
        told = str(run.path), claim.token, run.identity.read_text()
    path, token, identity = ranks.from_first(told if claim else None)
    run = RunDirectory(Path(path), identity)
    if ranks.place.local_rank == 0 and RunDirectory(run.path).known_identity() != identity:
        run.path.mkdir(parents=True, exist_ok=True)  # on the file system that this node sees
        replace_text(run.identity, identity)
    return run, claim or Claim(run.path, token)


def tell_of_beginning(ranks: Ranks) -> None:
    """Let later starts of this launch go on from whatever is there by then."""
    if ranks.is_first and ranks.store is not None:
        ranks.store.set(BEGUN_KEY, "1")
