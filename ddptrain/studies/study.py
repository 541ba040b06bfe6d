"""A study in a folder: which runs it has, what each is started with, and what has come of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddptrain.compose import compose
from ddptrain.config import EXECUTION_ONLY, Config
from ddptrain.errors import Refused
from ddptrain.files import read_json, replace_text
from ddptrain.nearest import suggest
from ddptrain.overrides import override, parse
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import short
from ddptrain.stored import differences
from ddptrain.studies.gradient_descent import GRADIENT_DESCENT
from ddptrain.studies.outcome import Made
from ddptrain.studies.plan import Plan, Planned

STUDIES = {plan.name: plan for plan in (GRADIENT_DESCENT,)}
MARK = "study.json"
MOST_RANKS = 4
"""So many micro-batches a step has that takes all samples."""
OWN = (
    "experiment", "model", "task", "run", "restarts",
    "data.train._target_", "data.train.split", "data.val", "train.penalty.of",
)  # fmt: skip
"""What a study decides itself: it would be another one, or could not report on its runs."""
REMEDY = "name another folder with --out"


@dataclass(frozen=True)
class Study:
    """A plan, the folder that its runs are in, and the user's overrides of all of them."""

    plan: Plan
    folder: Path
    overrides: list[str]
    configs: dict[str, Config] = field(default_factory=dict)

    @staticmethod
    def named(
        name: str, folder: Path | None, overrides: list[str], only: Sequence[str] = ()
    ) -> Study:
        """The study of that name. Raises ``Refused`` for a name or overrides that it has not."""
        if name not in STUDIES:
            raise Refused(f"unknown study {name}{suggest(name, sorted(STUDIES))}")
        for given in parse(overrides):
            if any(_touches(str(given.key_or_group), own) for own in OWN):
                raise Refused(
                    f"{given.input_line}: the study {name} has that of its own; "
                    "`ddptrain train` takes any"
                )
        plan = STUDIES[name]
        names = [comparison.name for comparison in plan.comparisons]
        if unknown := [one for one in only if one not in names]:
            raise Refused(f"--only {unknown[0]}: no such comparison{suggest(unknown[0], names)}")
        if only:
            chosen = tuple(each for each in plan.comparisons if each.name in only)
            plan = replace(plan, comparisons=chosen)
        folder = _default(name) if folder is None else folder.expanduser().absolute()
        return Study(plan, folder, overrides)

    def prepare(self) -> None:
        """Make the folder. Raises ``Refused`` if it holds anything else than this study."""
        mark, computed = self.folder / MARK, self._computing()
        try:
            if mark.exists():
                before = read_json(mark)
                if before != computed:
                    told = " ".join([str(before.get("study")), *before.get("overrides", [])])
                    raise Refused(f"{self.folder} holds another study, {told}; {REMEDY}")
                return
            if self.folder.exists() and any(self.folder.iterdir()):
                raise Refused(f"{self.folder} holds something else than a study; {REMEDY}")
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(mark, json.dumps(computed, indent=1) + "\n")
        except OSError as error:
            what = f"{self.folder} cannot be made or written to: {error.strerror}"
            raise Refused(f"{what}; {REMEDY}") from error

    def _computing(self) -> dict[str, object]:
        keys = [line.lstrip("+~") for line in self.overrides]
        changing = [key for key in keys if not key.startswith(EXECUTION_ONLY)]
        return {"study": self.plan.name, "overrides": changing}

    def arguments(self, planned: Planned) -> list[str]:
        """What `ddptrain train` makes the same run with."""
        plan = self.plan
        lines = (*plan.common, *planned.overrides, *plan.execution, *self.overrides)
        return list({line.lstrip("+").partition("=")[0]: line for line in lines}.values())

    def config(self, planned: Planned) -> Config:
        """The config of a run, with its directory, composed once. Raises ``Refused``."""
        if planned.name not in self.configs:
            where = override("run.dir", self.folder / planned.name)
            self.configs[planned.name] = compose([*self.arguments(planned), where])
        return self.configs[planned.name]

    def with_others(self) -> Study:
        """This, and the comparisons whose runs are all there from before: what a report is of."""
        whole, chosen = STUDIES[self.plan.name], {each.name for each in self.plan.comparisons}
        kept = [
            each
            for each in whole.comparisons
            if each.name in chosen or all(self.made(planned).is_over for planned in each.runs)
        ]
        return replace(self, plan=replace(whole, comparisons=tuple(kept)))

    def made(self, planned: Planned) -> Made:
        """What has come of a run by now."""
        run = RunDirectory(self.folder / planned.name)
        return Made(planned, run, self.config(planned), self.arguments(planned))

    def check(self, made: Made) -> None:
        """Refuse a run's directory that holds a run of another config."""
        if made.run.config.exists() and (others := differences(made.run.load(), made.config)):
            told = "; ".join(others)
            raise Refused(f"{made.run.path} holds a run of another config: {told}; {REMEDY}")

    def arguments_of_user(self) -> str:
        """What follows the study's name on the command line, quoted for a shell."""
        name, own = self.plan.name, list(self.overrides)
        if self.folder != _default(name):
            own += ["--out", short(self.folder)]
        if len(self.plan.comparisons) < len(STUDIES[name].comparisons):
            own += [word for each in self.plan.comparisons for word in ("--only", each.name)]
        return "".join(f" {shlex.quote(word)}" for word in own)


def _touches(key: str, own: str) -> bool:
    """Whether an override of ``key`` may change ``own``: they are one, or one is in the other."""
    return f"{own}.".startswith(f"{key}.") or key.startswith(f"{own}.")


def _default(name: str) -> Path:
    return (Path("runs") / name).absolute()
