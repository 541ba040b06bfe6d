"""A story from its seed: which faults at which moments, told to the end and judged."""

from __future__ import annotations

import json
import shlex
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from chaos.checks import problems
from chaos.events import Fault, Moment
from chaos.operator import Operator, StoryFailed
from chaos.setting import Setting
from chaos.trace import work

AnySetting = TypeVar("AnySetting", bound=Setting)

SEED = 20261124
"""Of all that is random in the test suite."""
STARTING_SECONDS = 8.0
"""About how long a start takes until its first step; faults hit that as well."""


def a_moment(random: Random, steps_between: int) -> Moment:
    """Mostly after some new steps and within the next ones; sometimes in the midst of a start."""
    if random.random() < 0.25:
        return Moment(None, random.uniform(0.0, STARTING_SECONDS))
    return Moment(random.randint(1, steps_between), random.uniform(0.0, 0.1))


def pauses_at_random(seed: int, count: int, mean_seconds: float) -> list[float]:
    """Seconds before each of some faults that know nothing of each other, but for their mean."""
    random = Random(seed)
    drawn = [random.expovariate(1.0) for _ in range(count)]
    return [mean_seconds * each * count / sum(drawn) for each in drawn]


def at_random(
    faults: Sequence[Fault],
    setting: Setting,
    seed: int,
    steps_between: int = 12,
    mean_seconds: float | None = None,
) -> Operator:
    """A story with these faults in this order, at moments that ``seed`` decides.

    The last comes while the run ends. With ``mean_seconds`` they come at any time, so far apart on
    average, as what hits a machine does.
    """
    random = Random(seed)
    if mean_seconds is not None:
        pauses = pauses_at_random(seed, len(faults), mean_seconds)
        by_time = [(f, Moment(None, s, by_clock=True)) for f, s in zip(faults, pauses, strict=True)]
        return Operator(setting, deque(by_time), seed)
    plan = [(fault, a_moment(random, steps_between)) for fault in faults[:-1]]
    ending = Moment(setting.steps, random.uniform(0.0, 1.0))
    return Operator(setting, deque([*plan, *((f, ending) for f in faults[-1:])]), seed)


def in_turn(setting: Setting, *faults: tuple[Fault, int]) -> Operator:
    """A story in which each fault comes so many steps after the one before."""
    plan = deque((fault, Moment(steps, 0.0)) for fault, steps in faults)
    return Operator(setting, plan, SEED)


def short_run(folder: Path, of: type[AnySetting], **more: Any) -> AnySetting:
    """The run of the stories in the test suite: all the same, so that one undisturbed is enough."""
    return of(folder, steps=50, workers=1, **more)


def tell(story: Operator) -> Operator:
    """Run a story, check how it ends, and return it.

    Raises ``StoryFailed`` with all there is to repeat it.
    """
    try:
        story.run()
        found = problems(story)
    except StoryFailed as failure:
        raise StoryFailed(f"{failure}\n{account(story)}") from None
    if found:
        raise StoryFailed("\n".join([*found, account(story)]))
    print(account(story))
    return story


def account(story: Operator) -> str:
    """What happened: commands, starts with their ends, faults with their moments."""
    lines = [f"seed {story.seed}", *map(shlex.join, story.setting.commands()), ledger(story)]
    for start in story.starts:
        code = "running" if start.code is None else f"exit {start.code}"
        lines.append(f"start {start.number}: {code}, {start.output}")
        for event in story.events:
            if event.start == start.number:
                after = event.at - start.began
                again = "–" if event.regained is None else f"{event.regained:.1f} s"
                lines.append(
                    f"  {after:6.2f} s, step {event.frontier}: {event.kind}, "
                    f"{event.lost} steps lost, further after {again} ({event.moment})"
                )
    for doom in story.dooms:
        if doom.took is not None:
            lines.append(f"gone after {doom.took:.1f} s of {doom.seconds:g}: {doom.kind}")
    return "\n".join(lines)


def ledger(story: Operator) -> str:
    """What the faults have cost: as the run itself says, and as its ranks' notes do."""
    did = work(story.trace.attempts)
    took = (story.starts[-1].ended or time.monotonic()) - story.starts[0].began
    file = story.setting.run / "result.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    told = ", ".join(f"{key} {result.get(key)}" for key in ("lost_steps", "restarts"))
    return (
        f"result.json: {told}; the ranks' notes: {did.lost_least} to {did.lost_most} steps lost, "
        f"{did.starts - 1} restarts, {max(0.0, took - did.counted_seconds):.1f} of {took:.1f} s "
        "lost"
    )
