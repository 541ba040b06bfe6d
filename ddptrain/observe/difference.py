"""Finds where two runs parted: the first step that differs, and what differed first in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddptrain.config import flatten, to_plain
from ddptrain.errors import Refused
from ddptrain.files import read_json
from ddptrain.observe.loggers import read_json_lines
from ddptrain.origin import origin
from ddptrain.run_directory import RunDirectory
from ddptrain.stored import changes

Record = dict[str, Any]
ROUNDING = 1e-4
"""Gradient norms closer than this may differ by rounding alone."""
HOW = "log.fingerprint_every=1 records every step"


def since(run: RunDirectory, data: dict[str, Any] | None = None) -> list[str]:
    """What has changed since ``run``, as far as can be told: code, versions, and ``data`` if given.

    ``data`` has a digest by split, as a run notes them.
    """
    now, provenance = origin(), run.provenance()
    then = {key: provenance.get(key, {}) for key in now}
    different = changes(flatten(then), flatten(now))
    if now["git_commit"] is None:
        different.append("the folder is in no git repository: what differs in code cannot be told")
    if data is not None and (before := read_json(run.data)):
        of_splits = {name: before.get(name, {}) for name in data}
        different += [f"data.{line}" for line in changes(flatten(of_splits), flatten(data))]
    return different


def circumstances(first: RunDirectory, second: RunDirectory) -> Iterator[str]:
    """Tell what differs in config, code, versions, data and ranks, whatever came of it."""
    configs = [flatten(to_plain(run.load())) for run in (first, second)]
    own = ("run.dir", "run.name", "run.resume")
    for line in changes(*({k: v for k, v in c.items() if k not in own} for c in configs)):
        yield f"config: {line}"
    origins = [flatten(run.provenance()) for run in (first, second)]
    code = ("versions.", "git_commit", "git_changes.")
    for line in changes(*({k: v for k, v in o.items() if k.startswith(code)} for o in origins)):
        yield f"code: {line}"
    data = [flatten(read_json(run.data)) for run in (first, second)]
    if all(data):
        yield from (f"data: {line}" for line in changes(*data))
    ranks = [run.outcome().get("world_size") for run in (first, second)]
    if None not in ranks and ranks[0] != ranks[1]:
        yield f"ranks: {ranks[0]} → {ranks[1]}"


def compare(first: RunDirectory, second: RunDirectory) -> tuple[bool, str]:
    """Whether two runs did the same as far as is recorded, and what tells.

    Raises ``Refused`` if nothing that they recorded can be compared.
    """
    one, other = Fingerprints.read(first), Fingerprints.read(second)
    without = [str(run.path) for run, own in ((first, one), (second, other)) if own is None]
    advice = f"; no fingerprints in {', '.join(without)}: {HOW}" if without else ""
    same: list[str] = []
    if one is not None and other is not None:
        if where := one.parting(other):
            return False, where
        if common := one.steps.keys() & other.steps.keys():
            same.append(f"{len(common)} recorded steps are equal")
    lines, its_lines = _lines(first, second)
    for step, split in (key for key in lines if key in its_lines):
        if told := changes(lines[step, split], its_lines[step, split]):
            return False, f"step {step}, {split}: {told[0]}{advice}"
    if not same and (in_both := lines.keys() & its_lines.keys()):
        same.append(f"{len(in_both)} lines of metrics are equal")
    ends = [run.outcome() for run in (first, second)]
    if all(ends) and ends[0]["step"] == ends[1]["step"]:
        if ends[0]["weights_sha256"] != ends[1]["weights_sha256"]:
            return False, f"other weights after step {ends[0]['step']}, at the end{advice}"
        same.append(f"the same weights after step {ends[0]['step']}")
    if not same:
        raise Refused(f"{first.path} and {second.path} recorded nothing of one step; {HOW}")
    return True, f"the same: {', and '.join(same)}{advice}"


Lines = dict[tuple[int, str], Record]


def _lines(first: RunDirectory, second: RunDirectory) -> tuple[Lines, Lines]:
    """What both runs logged and can be compared: a training line is a mean over an interval."""
    runs = first, second
    alike = len({run.load().log.every_steps for run in runs}) == 1
    incidental = {"samples_per_second", "noise_scale"}
    one, other = (
        {
            (line["step"], line["split"]): {k: v for k, v in line.items() if k not in incidental}
            for line in read_json_lines(run.metrics)
            if {"step", "split"} <= line.keys() and (alike or line["split"] != "train")
        }
        for run in runs
    )
    return one, other


@dataclass(frozen=True)
class Fingerprints:
    """What a run recorded of its steps."""

    header: Record
    steps: dict[int, Record]

    @staticmethod
    def read(run: RunDirectory) -> Fingerprints | None:
        """The fingerprints of ``run``; None if it recorded none. Damaged lines are left out."""
        header, *records = read_json_lines(run.fingerprints) or [{}]
        if not header.keys() >= {"step", "parameters", "tensors", "weights"}:
            return None
        links = {"step", "samples", "batch", "gradients", "norms", "weights"}
        return Fingerprints(header, {r["step"]: r for r in records if r.keys() >= links})

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
        if odd := self._unequal(other, "parameters", mine["gradients"], its["gradients"]):
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
        return self._unequal(other, "tensors", mine["weights"], its["weights"])

    def _unequal(
        self, other: Fingerprints, names: str, one: list[str], its: list[str]
    ) -> list[str]:
        """The names whose hashes differ, in this run's order."""
        hashes = dict(zip(other.header[names], its, strict=True))
        mine = zip(self.header[names], one, strict=True)
        return [name for name, hash_ in mine if hashes[name] != hash_]


def _gap(before: int, step: int) -> str:
    if step - before == 1:
        return ""
    between = f"the steps {before + 1} to {step - 1}"
    return f"; nothing is recorded of {between}, where it may have begun: {HOW}"


def _apart(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
