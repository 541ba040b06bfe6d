"""An Optuna study of a sweep: which values are tried next, and which trials are given up.

All that it knows is in a journal in the sweep's folder, and what a trial draws comes from its
number: so a sweep that was killed goes on with the trials that it would have had.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.utils import get_class, instantiate
from optuna import create_study, load_study, logging
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from ddptrain.errors import Refused
from ddptrain.launch.trial import FOLDER, Judge, Outcome, computing, run_of
from ddptrain.overrides import parse

JOURNAL = "study.log"
OWNER = "sweep"
"""The attribute of a trial that says which sweep is to finish it: a database may hold several's."""
GIVEN = "given"
"""The attribute of a study that has what all trials of a sweep have in common."""
EXHAUSTED = "exhausted"
"""The attribute of a study whose sampler has drawn all that there is."""
IN_SEQUENCE = (GridSampler, QMCSampler)
"""What these draw goes by how many trials there are already, and by one seed for all of them."""
Launch = Callable[..., Sequence[Any]]


def search(
    settings: dict[str, Any], launch: Launch, folder: Path, arguments: list[str], maximizes: bool
) -> None:
    """Run the trials of a sweep, first those that it was interrupted in; write down the best.

    ``launch`` is a Hydra launcher's; what came of a trial is read where it was left.
    """
    overrides = parse(arguments)
    space = {str(o.key_or_group): distribution(o) for o in overrides if o.is_sweep_override()}
    keys = {str(o.key_or_group): str(o.get_key_element()) for o in overrides}
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    study = _open(settings, folder, maximizes)
    owner = str(folder) if settings["storage"] else None
    _check_given(study, owner, folder, computing(fixed), sorted(space))

    def run(trials: list[tuple[int, dict[str, Any]]]) -> None:
        chosen = [[*fixed, *(f"{keys[k]}={v}" for k, v in p.items())] for _, p in trials]
        ended = launch(chosen, initial_job_idx=trials[0][0])
        for (number, _), job in zip(trials, ended, strict=True):
            _ = job.return_value  # raises what kept the trial from telling how it ended
            _tell(study, number, Outcome.read(run_of(folder, number)))

    left = _of_sweep(study, owner, TrialState.RUNNING)
    for batch in _consecutive([(trial.number, trial.params) for trial in left]):
        run(batch)
    count, at_once = settings["n_trials"], settings["n_jobs"]
    while (done := len(_of_sweep(study, owner))) < count and EXHAUSTED not in study.user_attrs:
        asked = []
        for number in range(done, min(done + at_once, count)):
            study.sampler = _sampler(settings["sampler"], number)
            trial = _ask(study, space, folder)
            trial.set_user_attr(OWNER, owner)
            asked.append((trial.number, trial.params))
        for batch in _consecutive(asked):
            run(batch)
    _write_best(study, owner, folder)


def judge_of(settings: Any, folder: Path, number: int) -> Judge | None:
    """What gives up a trial that does not do well, from the sweep's settings; None if nothing."""
    if settings["pruner"] is None:
        return None
    pruner: BasePruner = instantiate(settings["pruner"])
    name = settings["study_name"]
    study = load_study(storage=_storage(settings, folder), study_name=name, pruner=pruner)
    trial = Trial(study, study.trials[number]._trial_id)
    reported = set(study.trials[number].intermediate_values)

    def judge(step: int, value: float) -> bool:
        if step not in reported:
            trial.report(value, step)
            reported.add(step)
        return trial.should_prune()

    return judge


def distribution(override: Override) -> BaseDistribution:
    """The values that an override of a sweep names. Raises ``Refused``."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, is_log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log)
        return FloatDistribution(_number(low), _number(high), log=is_log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = [float(number) for number in value.range()]
        low, high, step = min(numbers), max(numbers), abs(_number(value.step))
        if isinstance(value.start, int) and isinstance(value.step, int):
            return IntDistribution(int(low), int(high), step=int(step))
        return FloatDistribution(low, high, step=step)
    if override.is_discrete_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise Refused(f"{override.input_line}: expected values, a range or an interval")


def _number(value: float | None) -> float:
    assert value is not None  # Hydra's parser sees to that
    return float(value)


def _storage(settings: Any, folder: Path) -> BaseStorage:
    if (url := settings["storage"]) is not None:
        try:
            return get_storage(str(url))
        except Exception as error:  # of SQLAlchemy, of a database's driver, or its being missing
            why = str(error).splitlines()[0]
            raise Refused(f"hydra.sweeper.storage={url}: {why}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its being experimental
        try:
            return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        except ValueError as error:
            raise Refused(f"{folder / JOURNAL} is damaged: {error}") from None


def _mend(journal: Path) -> None:
    """Take away the line that a full disk, or the end of the machine, left unfinished."""
    if journal.exists():
        content = journal.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)


def _check_given(
    study: Study, owner: str | None, folder: Path, fixed: list[str], keys: list[str]
) -> None:
    """Refuse to go on with what would not be compared with what there is."""
    name, given = f"{GIVEN} {owner or ''}".strip(), {"fixed": fixed, "keys": keys}
    before = study.user_attrs.get(name, given)
    if before != given:
        lines = [*before["fixed"], *(f"{key}=…" for key in before["keys"])]
        told = f"{folder} holds another search, of {' '.join(lines)}"
        raise Refused(f"{told}; name another {FOLDER}")
    study.set_user_attr(name, given)


def _open(settings: dict[str, Any], folder: Path, maximizes: bool) -> Study:
    """The study of a sweep, new or as it was left. Raises ``Refused`` on settings that are none."""
    for key in ("n_trials", "n_jobs"):
        if not isinstance(count := settings[key], int) or count < 1:
            raise Refused(f"hydra.sweeper.{key}: expected a number above 0, got {count!r}")
    logging.set_verbosity(logging.WARNING)
    direction = _direction(settings["direction"], maximizes)
    _mend(folder / JOURNAL)
    pruner, sampler = instantiate(settings["pruner"]), _sampler(settings["sampler"], 0)
    study = create_study(
        storage=_storage(settings, folder),
        study_name=settings["study_name"],
        sampler=sampler,
        pruner=pruner,
        direction=direction,
        load_if_exists=True,
    )
    if study.direction is not direction:
        told = f"{folder} holds a search that is to {study.direction.name.lower()}"
        raise Refused(f"{told}, not to {direction.name.lower()}; name another {FOLDER}")
    return study


def _direction(wanted: str | None, maximizes: bool) -> StudyDirection:
    known = {"maximize": StudyDirection.MAXIMIZE, "minimize": StudyDirection.MINIMIZE}
    if wanted is None:
        return known["maximize" if maximizes else "minimize"]
    if str(wanted) not in known:
        raise Refused(f"hydra.sweeper.direction: expected {' or '.join(known)}, got {wanted!r}")
    return known[str(wanted)]


def _ask(study: Study, space: dict[str, BaseDistribution], folder: Path) -> Trial:
    try:
        return study.ask(space)
    except ValueError as error:  # of a range that is not what it was
        raise Refused(f"{folder} holds another search: {error}; name another {FOLDER}") from None


def _sampler(configured: Any, number: int) -> BaseSampler:
    """That of one trial, whose draws do not depend on what was drawn before it."""
    named = str((configured or {}).get("_target_"))
    try:
        sampler = get_class(named)
    except (ImportError, ValueError) as error:
        raise Refused(f"hydra.sweeper.sampler._target_={named}: {error}") from None
    if "seed" not in inspect.signature(sampler).parameters:
        return cast("BaseSampler", instantiate(configured))
    seed = configured.get("seed") or 0
    if not issubclass(sampler, IN_SEQUENCE):
        seed = int.from_bytes(sha256(f"{seed}:{number}".encode()).digest()[:4], "little")
    return cast("BaseSampler", instantiate(configured, seed=seed))


def _of_sweep(study: Study, owner: str | None, *states: TrialState) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=states or None)
    return [trial for trial in trials if trial.user_attrs.get(OWNER) == owner]


def _consecutive(asked: list[tuple[int, dict[str, Any]]]) -> list[list[tuple[int, dict[str, Any]]]]:
    """In parts whose numbers follow each other, as launchers count; others may use the study."""
    parts: list[list[tuple[int, dict[str, Any]]]] = []
    for one in asked:
        if parts and parts[-1][-1][0] + 1 == one[0]:
            parts[-1].append(one)
        else:
            parts.append([one])
    return parts


def _tell(study: Study, number: int, outcome: Outcome | None) -> None:
    state, value = TrialState.FAIL, None
    if outcome is not None and outcome.status == "pruned":
        state = TrialState.PRUNED
    elif outcome is not None and outcome.status == "completed" and outcome.value is not None:
        state, value = TrialState.COMPLETE, outcome.value
    try:
        study.tell(number, value, state)
    except RuntimeError:  # a sampler that has nothing left asks to stop a loop, which is ours here
        if not study.trials[number].state.is_finished():
            raise
        study.set_user_attr(EXHAUSTED, True)


def _write_best(study: Study, owner: str | None, folder: Path) -> None:
    done = _of_sweep(study, owner, TrialState.COMPLETE)
    if valued := [(trial.value, trial) for trial in done if trial.value is not None]:
        choose = max if study.direction is StudyDirection.MAXIMIZE else min
        value, best = choose(valued, key=lambda each: each[0])
        told = {"number": best.number, "value": value, "params": dict(best.params)}
        (folder / "best.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
