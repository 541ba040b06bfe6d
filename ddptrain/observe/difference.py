"""Finds where two runs parted: the first step that differs, and what differed first in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddptrain.compose import flatten, to_plain
from ddptrain.observe.loggers import read_json_lines
from ddptrain.run_directory import RunDirectory, changes

Record = dict[str, Any]
ROUNDING = 1e-4
"""Gradient norms closer than this may differ by rounding alone."""


def circumstances(first: RunDirectory, second: RunDirectory) -> Iterator[str]:
    """Tell what differs in config, code, versions, data and ranks, whatever came of it."""
    configs = [flatten(to_plain(run.load())) for run in (first, second)]
    own = ("run.dir", "run.name", "run.resume")
    for line in changes(*({k: v for k, v in c.items() if k not in own} for c in configs)):
        yield f"config: {line}"
    origins = [flatten(run.provenance()) for run in (first, second)]
    code = ("versions.", "git_commit", "git_changes_sha256")
    for line in changes(*({k: v for k, v in o.items() if k.startswith(code)} for o in origins)):
        yield f"code: {line}"
    data = [flatten(_read_json(run.data)) for run in (first, second)]
    if all(data):
        yield from (f"data: {line}" for line in changes(*data))
    ranks = [run.outcome().get("world_size") for run in (first, second)]
    if None not in ranks and ranks[0] != ranks[1]:
        yield f"ranks: {ranks[0]} → {ranks[1]}"


def parting(first: RunDirectory, second: RunDirectory) -> str | None:
    """Tell the first step in which two runs are known to differ, and how; None if in none."""
    one, other = Fingerprints.read(first), Fingerprints.read(second)
    if one is not None and other is not None:
        return one.parting(other)
    lines = [{(r["step"], r["split"]): r for r in read_json_lines(run.metrics)}
             for run in (first, second)]  # fmt: skip
    timing = {"samples_per_second"}
    for key in (key for key in lines[0] if key in lines[1]):
        pair = [{k: v for k, v in of_run[key].items() if k not in timing} for of_run in lines]
        if told := changes(*pair):
            return f"step {key[0]}, {key[1]}: {told[0]}; {_advice(first, second)}"
    results = [run.outcome() for run in (first, second)]
    ends = [{k: r[k] for k in ("step", "weights_sha256")} for r in results if r]
    if len(ends) == 2 and ends[0] != ends[1]:
        return f"at the end: {'; '.join(changes(*ends))}; {_advice(first, second)}"
    return None


def known(first: RunDirectory, second: RunDirectory) -> str:
    """Say how far two runs that do not differ are known to be the same."""
    one, other = Fingerprints.read(first), Fingerprints.read(second)
    ends = [run.outcome() for run in (first, second)]
    finished = all(ends) and ends[0]["step"] == ends[1]["step"]
    weights = f"the same weights after step {ends[0]['step']}" if finished else ""
    if one is None or other is None:
        return f"{weights or 'no difference found'}; {_advice(first, second)}"
    common = one.steps.keys() & other.steps.keys()
    return f"{len(common)} recorded steps are equal" + (f", and {weights}" if weights else "")


def _advice(first: RunDirectory, second: RunDirectory) -> str:
    without = [str(run.path) for run in (first, second) if not run.fingerprints.exists()]
    return f"no fingerprints in {', '.join(without)}: log.fingerprint_every=1 records every step"


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


@dataclass(frozen=True)
class Fingerprints:
    """What a run recorded of its steps."""

    header: Record
    steps: dict[int, Record]

    @staticmethod
    def read(run: RunDirectory) -> Fingerprints | None:
        """The fingerprints of ``run``; None if it recorded none."""
        header, *records = read_json_lines(run.fingerprints) or [{}]
        if "tensors" not in header:
            return None
        return Fingerprints(header, {record["step"]: record for record in records})

    def parting(self, other: Fingerprints) -> str | None:
        for names in ("parameters", "tensors"):
            if odd := sorted(set(self.header[names]) ^ set(other.header[names])):
                return f"from the start: other {names}: {_shown(odd)}"
        before = max(self.header["step"], other.header["step"])
        if self.header["step"] == other.header["step"] and (odd := self._odd(other, None)):
            return f"before step {before + 1}: other weights: {_shown(odd)}"
        for step in sorted(self.steps.keys() & other.steps.keys()):
            if what := self._difference(other, step):
                return f"step {step}: {what}{_gap(before, step)}"
            before = step
        return None

    def _difference(self, other: Fingerprints, step: int) -> str | None:
        """The first link that differs in the chain of samples, batch, gradient and weights."""
        mine, its = self.steps[step], other.steps[step]
        if mine["samples"] != its["samples"]:
            return "the data differs first: it takes other samples"
        if mine["batch"] != its["batch"]:
            return "the data differs first: the same samples with other contents"
        if odd := _unequal(self.header["parameters"], mine["gradients"], its["gradients"]):
            apart = max(map(_apart, mine["norms"], its["norms"]))
            hint = ", which may be rounding" if apart < ROUNDING else ""
            return (
                f"the gradient differs first: {_shown(odd)}; norms of a parameter's gradient are "
                f"up to {apart:.1e} apart{hint}"
            )
        if odd := self._odd(other, step):
            return f"the weights differ first, after equal gradients: {_shown(odd)}"
        return None

    def _odd(self, other: Fingerprints, step: int | None) -> list[str]:
        """The tensors that differ after ``step``, or before the first recorded one."""
        mine, its = (r.header if step is None else r.steps[step] for r in (self, other))
        return _unequal(self.header["tensors"], mine["weights"], its["weights"])


def _gap(before: int, step: int) -> str:
    if step - before == 1:
        return ""
    return (
        f"; nothing is recorded of the steps {before + 1} to {step - 1}, where it may have begun: "
        "log.fingerprint_every=1 records every step"
    )


def _apart(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))


def _unequal(names: list[str], one: list[str], other: list[str]) -> list[str]:
    return [n for n, left, right in zip(names, one, other, strict=True) if left != right]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
