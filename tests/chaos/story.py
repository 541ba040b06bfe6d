"""A story from its seed: which faults at which moments, told to the end and judged."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Sequence
from random import Random

from chaos.checks import problems
from chaos.operator import Fault, Moment, Operator, StoryFailed
from chaos.setting import Setting
from chaos.trace import work

STARTING_SECONDS = 8.0
"""About how long a start takes until its first step; faults hit that as well."""


def a_moment(random: Random, steps_between: int) -> Moment:
    """Mostly after some new steps and within the next ones; sometimes in the midst of a start."""
    if random.random() < 0.25:
        return Moment(None, random.uniform(0.0, STARTING_SECONDS))
    return Moment(random.randint(1, steps_between), random.uniform(0.0, 0.1))


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
        pauses = [random.expovariate(1 / mean_seconds) for _ in faults]
        by_time = [(f, Moment(None, s)) for f, s in zip(faults, pauses, strict=True)]
        return Operator(setting, deque(by_time), random)
    plan = [(fault, a_moment(random, steps_between)) for fault in faults[:-1]]
    ending = Moment(setting.steps, random.uniform(0.0, 1.0))
    return Operator(setting, deque([*plan, *((f, ending) for f in faults[-1:])]), random)


def tell(story: Operator) -> None:
    """Run a story and check how it ends. Raises ``StoryFailed`` with all there is to repeat it."""
    try:
        story.run()
        found = problems(story)
    except StoryFailed as failure:
        raise StoryFailed(f"{failure}\n{account(story)}") from None
    if found:
        raise StoryFailed("\n".join([*found, account(story)]))
    print(account(story))


def account(story: Operator) -> str:
    """What happened: commands, starts with their ends, faults with their moments."""
    lines = [shlex.join(command) for command in story.setting.commands()]
    did = work(story.trace.attempts)
    took = (story.starts[-1].ended or time.monotonic()) - story.starts[0].began
    lines.append(
        f"{did.lost_least} to {did.lost_most} steps lost, {did.starts - 1} restarts, "
        f"{max(0.0, took - did.counted_seconds):.1f} of {took:.1f} s lost"
    )
    for start in story.starts:
        code = "running" if start.code is None else f"exit {start.code}"
        lines.append(f"start {start.number}: {code}, {start.output}")
        for event in story.events:
            if event.start == start.number:
                after = event.at - start.began
                lines.append(
                    f"  {after:6.2f} s, step {event.frontier}: {event.kind} ({event.moment})"
                )
    return "\n".join(lines)
