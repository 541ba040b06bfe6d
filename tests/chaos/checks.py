"""What must hold when a story is over: the run is the one that nobody disturbed, and nothing else.

Each check returns what is wrong, a line each.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from re import fullmatch
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from chaos import hangs
from chaos.events import Event
from chaos.operator import Operator
from chaos.processes import wait_for_none
from chaos.setting import Setting
from chaos.trace import Work, work
from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.store import Store

HANGS = tuple(fault.name for fault in hangs.ALL)
RESTART_SECONDS = 25.0
"""A start takes five seconds, on a machine that does nothing else."""
QUIET_SECONDS = 2.5
"""What was left behind by a killed agent has ended after 1.5 s."""


@dataclass(frozen=True)
class Outcome:
    """What a completed run has left."""

    result: dict[str, Any]
    files: dict[str, bytes]
    fingerprints: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    resumed_at: set[int]


def outcome(run: Path, steps: int) -> Outcome:
    """Read a completed run; the files are those of its last checkpoint."""
    store = Store(Disk(run / "checkpoints"))
    names = store.verify(steps)["files"]
    return Outcome(
        json.loads((run / "result.json").read_text()),
        {name: (run / "checkpoints" / f"step-{steps:08d}" / name).read_bytes() for name in names},
        _lines(run / "fingerprints.jsonl"),
        _lines(run / "metrics.jsonl"),
        {start["step"] for start in _lines(run / "attempts.jsonl")},
    )


def undisturbed(setting: Setting) -> Outcome:
    """The same run without a fault, and without the sleep that gives faults time to come.

    One process makes the same bits as any number of them, and is there sooner.
    """
    return _undisturbed(setting.steps, setting.overrides)


@cache
def _undisturbed(steps: int, overrides: tuple[str, ...]) -> Outcome:
    awake = (*overrides, "task.seconds=0")
    setting = Setting(Path(mkdtemp(prefix="calm-")), 1, steps, overrides=awake)
    agents = setting.start(setting.folder / "start.txt")
    for agent in agents:
        if agent.wait():
            raise RuntimeError((setting.folder / "start.txt").read_text()[-4000:])
    found = outcome(setting.run, steps)
    rmtree(setting.folder)
    return found


def problems(story: Operator) -> list[str]:
    """All that is wrong with the run that a story has completed."""
    setting = story.setting
    at_exit = _contents(setting.run)
    found = [f"process {p.pid} is left: {p.command}" for p in wait_for_none(setting.mark, 3.0)]
    time.sleep(QUIET_SECONDS)  # nothing may happen in it
    later = _contents(setting.run)
    changed = sorted(k for k in at_exit.keys() | later.keys() if at_exit.get(k) != later.get(k))
    found += [f"{name} was changed after the run had ended" for name in changed]
    found += leftovers(setting)
    clean = undisturbed(setting)
    there = outcome(setting.run, setting.steps)
    found += [*differences(clean, there), *ledger(story, there.result)]
    return [*found, *story.outlived, *lost_for_nothing(story, there.result), *late(story)]


def _alone(story: Operator) -> list[Event]:
    """The faults that came while no other one had still to be made good."""
    return [
        event
        for event in story.events
        if not any(e is not event and e.at < event.over and event.at < e.over for e in story.events)
    ]


def lost_for_nothing(story: Operator, result: dict[str, Any]) -> list[str]:
    """Steps that were lost although a replica lived."""
    spared = [event for event in _alone(story) if event.spares]
    found = [
        f"{event.kind}: {event.lost} finished steps were done again"
        for event in spared
        if event.lost
    ]
    if len(spared) == len(story.events) and result["lost_steps"]:
        found += [f"result.json: lost_steps {result['lost_steps']}, and a replica always lived"]
    return found


def late(story: Operator) -> list[str]:
    """Hangs that were not ended in time."""
    limit = hangs.LIMIT_SECONDS + RESTART_SECONDS
    return [
        f"{event.kind}: it took {event.regained:.1f} s to go on"
        for event in _alone(story)
        if event.kind in HANGS and event.regained is not None and event.regained > limit
    ]


def differences(clean: Outcome, found: Outcome) -> list[str]:
    """What the disturbed run has otherwise than the undisturbed one."""
    wrong = []
    if found.result["status"] != "completed":
        wrong.append(f"result.json: status {found.result['status']}, not completed")
    for key in ("step", "samples", "metrics", "weights_sha256"):
        if clean.result[key] != found.result[key]:
            wrong.append(f"result.json: {key}: {found.result[key]}, not {clean.result[key]}")
    for name in clean.files.keys() | found.files.keys():
        if clean.files.get(name) != found.files.get(name):
            wrong.append(f"{name} of the last checkpoint: other bits")
    wrong += _differences_of_lines("fingerprints.jsonl", found.fingerprints, clean.fingerprints)
    metrics = (_without_shares(lines, found.resumed_at) for lines in (found.metrics, clean.metrics))
    return [*wrong, *_differences_of_lines("metrics.jsonl", *metrics)]


def _without_shares(lines: list[dict[str, Any]], steps: set[int]) -> list[dict[str, Any]]:
    """The lines, but for what the task logs on those that were due when a rank died.

    Of such a line a rank's share dies with it; loss, rate and norm do not.
    """
    return [
        {k: v for k, v in line.items() if k != "accuracy" or line["step"] not in steps}
        for line in lines
    ]


def _differences_of_lines(
    name: str, lines: list[dict[str, Any]], known: list[dict[str, Any]]
) -> list[str]:
    """The first line that differs; the clean trace has each step once, ascending."""
    for number, (line, expected) in enumerate(zip(lines, known, strict=False), 1):
        if line != expected:
            keys = [k for k in line.keys() | expected.keys() if line.get(k) != expected.get(k)]
            return [f"{name}: line {number}, step {line.get('step')}: {sorted(keys)} differ"]
    if len(lines) != len(known):
        return [f"{name}: {len(lines)} lines, not {len(known)}"]
    return []


def leftovers(setting: Setting) -> list[str]:
    """Temporary files, folders that are no checkpoint, snapshots that nobody needs any more."""
    wrong = [f"{memory} is left" for memory in setting.memories() if memory.exists()]
    for path in setting.run.rglob("*"):
        name = str(path.relative_to(setting.run))
        if path.name.endswith(".tmp") or path.name.startswith((".memory", ".slot")):
            wrong.append(f"{name} is left")
    store = Store(Disk(setting.run / "checkpoints"))
    for folder in store.medium.folders():
        if fullmatch(r"step-\d+", folder) and not store.medium.holds(folder, "manifest.json"):
            wrong.append(f"checkpoints/{folder} has no manifest")
    for step in store.steps():
        try:
            store.verify(step)
        except Exception as error:
            wrong.append(f"a checkpoint that stays is damaged: {error}")
    return wrong


def ledger(story: Operator, result: dict[str, Any]) -> list[str]:
    """Whether ``result.json`` counts restarts and lost steps as the ranks' own notes do."""
    did = work_of(story)
    wrong = []
    if not did.lost_least <= result["lost_steps"] <= did.lost_most:
        seen = f"{did.lost_least} to {did.lost_most}"
        wrong.append(f"result.json: lost_steps {result['lost_steps']}; the traces say {seen}")
    if not did.starts_with_steps - 1 <= result["restarts"] <= did.starts - 1:
        seen = f"{did.starts_with_steps - 1} to {did.starts - 1}"
        wrong.append(f"result.json: restarts {result['restarts']}; the traces say {seen}")
    return wrong


def work_of(story: Operator) -> Work:
    story.trace.update()
    return work(story.trace.attempts)


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, file.read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def _contents(run: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(run)): ((stat := path.lstat()).st_size, stat.st_mtime_ns)
        for path in run.rglob("*")
    }
