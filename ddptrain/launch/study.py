"""An Optuna study of a sweep: which values are tried next, and which trials are given up.

All that it knows is in a journal in the sweep's folder, and what a trial draws comes from its
number: so a sweep that was killed goes on with the trials that it would have had.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.utils import instantiate
from optuna import create_study, load_study, logging
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from ddptrain.compose import parse
from ddptrain.errors import Refused
from ddptrain.launch.trial import Judge, Outcome, run_of

JOURNAL = "study.log"
OWNER = "sweep"
"""The attribute of a trial that says which sweep is to finish it: a database may hold several's."""
Launch = Callable[..., Sequence[Any]]


def search(
    settings: dict[str, Any], launch: Launch, folder: Path, arguments: list[str], maximizes: bool
) -> None:
    """Run the trials of a sweep, first those that it was interrupted in; write down the best.

    ``launch`` is a Hydra launcher's; what came of a trial is read where it was left.
    """
    logging.set_verbosity(logging.WARNING)
    ranges = [f"{key}={value}" for key, value in (settings["params"] or {}).items()]
    overrides = parse([*ranges, *arguments])
    space = {str(o.key_or_group): distribution(o) for o in overrides if o.is_sweep_override()}
    keys = {str(o.key_or_group): str(o.get_key_element()) for o in overrides}
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    by_mode = StudyDirection.MAXIMIZE if maximizes else StudyDirection.MINIMIZE
    wanted = settings["direction"]
    study = create_study(
        storage=_storage(settings, folder),
        study_name=settings["study_name"],
        pruner=settings["pruner"],
        direction=by_mode if wanted is None else StudyDirection[str(wanted).upper()],
        load_if_exists=True,
    )

    def run(trials: list[tuple[int, dict[str, Any]]]) -> None:
        chosen = [[*fixed, *(f"{keys[k]}={v}" for k, v in p.items())] for _, p in trials]
        ended = launch(chosen, initial_job_idx=trials[0][0])
        for (number, _), job in zip(trials, ended, strict=True):
            _ = job.return_value  # raises what kept the trial from telling how it ended
            _tell(study, number, Outcome.read(run_of(folder, number)))

    owner = str(folder) if settings["storage"] else None
    left = _of_sweep(study, owner, TrialState.RUNNING)
    for batch in _consecutive([(trial.number, trial.params) for trial in left]):
        run(batch)
    while (done := len(_of_sweep(study, owner))) < settings["n_trials"]:
        asked = []
        for number in range(done, min(done + settings["n_jobs"], settings["n_trials"])):
            study.sampler = _sampler(settings["sampler"], number)
            trial = study.ask(space)
            trial.set_user_attr(OWNER, owner)
            asked.append((trial.number, trial.params))
        for batch in _consecutive(asked):
            run(batch)
    _write_best(study, folder)


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
        start, stop, step = _number(value.start), _number(value.stop), _number(value.step)
        last = start + (math.ceil((stop - start) / step) - 1) * step  # its end is not of it
        if isinstance(value.start, int) and isinstance(value.step, int):
            return IntDistribution(int(start), int(last), step=int(step))
        return FloatDistribution(start, last, step=step)
    if override.is_discrete_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise Refused(f"{override.input_line}: expected values, a range or an interval")


def _number(value: float | None) -> float:
    assert value is not None  # Hydra's parser sees to that
    return float(value)


def _storage(settings: Any, folder: Path) -> str | BaseStorage:
    if settings["storage"] is not None:
        return str(settings["storage"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its being experimental
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def _sampler(configured: BaseSampler | partial[BaseSampler], number: int) -> BaseSampler:
    if not isinstance(configured, partial):
        return configured
    if "seed" not in inspect.signature(configured.func).parameters:
        return configured()
    key = f"{configured.keywords.get('seed')}:{number}".encode()
    return configured(seed=int.from_bytes(sha256(key).digest()[:4], "little"))


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
    if outcome is not None and outcome.status == "pruned":
        study.tell(number, state=TrialState.PRUNED)
    elif outcome is None or outcome.status == "failed" or outcome.value is None:
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, outcome.value)


def _write_best(study: Study, folder: Path) -> None:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if done:
        best = study.best_trial
        told = {"number": best.number, "value": best.value, "params": dict(best.params)}
        (folder / "best.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
