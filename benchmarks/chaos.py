"""Hundreds of faults at random moments: what they cost, and whether every run ended the same.

``python benchmarks/chaos.py --faults 200 --seed 1``: a Markdown table by kind of fault, and JSON
with every fault. Every fourth run is of two nodes. Exits with 1 if a run did not end as an
undisturbed one does. ``--mean-seconds 60 --faults 25`` is one run with faults at any time, so far
apart on average, for its goodput: seconds of steps that counted ÷ all seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos import hangs, kinds, machine, network
from chaos.checks import undisturbed, work_of
from chaos.events import Fault
from chaos.operator import StoryFailed
from chaos.setting import LAUNCHERS, Setting
from chaos.story import at_random, tell

STEP_SECONDS = 0.2
"""Of a run whose faults are minutes apart: long enough that few steps make many minutes."""
REST_OF_A_STEP = 0.04
"""What a step takes beside that."""
SECONDS_OF_A_FAULT = 5.0
"""About what one costs."""


@dataclass
class Told:
    """A story that is over."""

    seed: int
    ranks: int
    launcher: str
    workers: int
    events: list[dict[str, Any]]
    dooms: list[dict[str, Any]]
    starts: int
    seconds: float
    counted_seconds: float
    lost_steps: int
    problem: str


@contextmanager
def the_setting(
    faults: list[Fault], two_nodes: bool, seed: int, options: argparse.Namespace
) -> Iterator[Setting]:
    """A run, with what its faults need of the machine; its folder is kept if it went wrong."""
    random = Random(seed)
    ranks, launcher = random.choice(options.ranks), random.choice(options.launchers)
    workers = random.choice(options.workers) or int(kinds.needs_workers(faults))
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    steps = steps_of_a_run(len(faults), options)
    common: dict[str, Any] = {"steps": steps, "workers": workers}
    common["disturbing"] = hangs.OVERRIDES
    if options.mean_seconds is not None:
        common["disturbing"] += (f"task.seconds={STEP_SECONDS}",)
    with ExitStack() as stack:
        if two_nodes:
            nodes = network.TwoNodes(folder, **common)
            stack.enter_context(nodes.network())
            yield nodes
        else:
            if machine.preload_unavailable() is None:
                common["variables"] = machine.preloaded(folder)
            if machine.disk_unavailable() is None:
                small = machine.SmallMachine(folder, ranks, launcher=launcher, **common)
                stack.enter_context(small.disks())
                setting: Setting = small
            else:
                setting = Setting(folder, ranks, launcher=launcher, **common)
            if machine.memory_unavailable() is None:
                stack.enter_context(machine.small_memory())
            yield setting
    shutil.rmtree(folder)


def steps_of_a_run(faults: int, options: argparse.Namespace) -> int:
    """Given, or as many as it takes until all faults have come, and some."""
    mean: float | None = options.mean_seconds
    if mean is None:
        return int(options.steps)
    seconds = faults * (mean - SECONDS_OF_A_FAULT) + mean / 2
    return int(seconds / (STEP_SECONDS + REST_OF_A_STEP))


def one_story(faults: list[Fault], two_nodes: bool, seed: int, options: argparse.Namespace) -> Told:
    """Tell one story."""
    try:
        with the_setting(faults, two_nodes, seed, options) as setting:
            told = tell_it(faults, setting, seed, options)
            if told.problem:
                raise StoryFailed(told.problem)
    except StoryFailed as failure:
        print(f"\nstory {seed} went wrong, see {setting.folder}:\n{failure}\n", file=sys.stderr)
    return told


def tell_it(faults: list[Fault], setting: Setting, seed: int, options: argparse.Namespace) -> Told:
    """Tell a story; return what came of it."""
    between = max(2, int(1.8 * setting.steps / len(faults)))
    story = at_random(faults, setting, seed, between, options.mean_seconds)
    undisturbed(setting)  # not within the seconds of the story
    began = time.monotonic()
    problem = ""
    try:
        with redirect_stdout(None):
            tell(story)
    except StoryFailed as failure:
        problem = str(failure)
    did = work_of(story)
    ended = story.starts[-1].ended or time.monotonic()
    events = [{**asdict(e), "at": e.at - began} for e in story.events]
    dooms = [{"kind": d.kind, "seconds": d.seconds, "took": d.took} for d in story.dooms]
    return Told(
        seed, setting.ranks, setting.launcher, setting.workers, events, dooms, len(story.starts),
        ended - began, did.counted_seconds, did.lost_least, problem,
    )  # fmt: skip


def table(stories: list[Told]) -> str:
    """A row for each kind of fault, and the totals."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for story in stories:
        for event in story.events:
            by_kind[event["kind"]].append(event)
    rows = [
        "| fault | times | steps lost, mean | most | seconds until regained, median | most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, events in sorted(by_kind.items()):
        steps = [event["lost"] for event in events]
        seconds = [event["regained"] for event in events if event["regained"] is not None]
        took = f"{median(seconds):.1f} | {max(seconds):.1f}" if seconds else "– | –"
        mean = sum(steps) / len(steps)
        rows.append(f"| {kind} | {len(events)} | {mean:.1f} | {max(steps)} | {took} |")
    return "\n".join([*rows, *times(stories), "", totals(stories)])


def times(stories: list[Told]) -> list[str]:
    """For each kind after which processes must be gone in time, the seconds that it took."""
    took: dict[tuple[str, float], list[float]] = defaultdict(list)
    for story in stories:
        for doom in story.dooms:
            if doom["took"] is not None:
                took[doom["kind"], doom["seconds"]].append(doom["took"])
    rows = ["", "| fault | seconds until its processes are gone, median | most | allowed |",
            "|---|---:|---:|---:|"]  # fmt: skip
    for (kind, allowed), seconds in sorted(took.items()):
        rows.append(f"| {kind} | {median(seconds):.1f} | {max(seconds):.1f} | {allowed:g} |")
    return rows if took else []


def totals(stories: list[Told]) -> str:
    faults = sum(len(story.events) for story in stories)
    wall = sum(story.seconds for story in stories)
    counted = sum(story.counted_seconds for story in stories)
    wrong = [story.seed for story in stories if story.problem]
    return (
        f"{faults} faults in {len(stories)} runs, {wall / max(1, faults):.1f} s between faults "
        f"in the mean, started {sum(s.starts for s in stories)} times "
        f"by the operator; {sum(s.lost_steps for s in stories)} steps lost, "
        f"{wall - counted:.0f} of {wall:.0f} s lost, goodput {counted / max(wall, 1e-9):.1%}; "
        f"{len(stories) - len(wrong)} runs ended with the bits of an undisturbed one"
        + (f", {len(wrong)} did not: seeds {wrong}" if wrong else "")
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], help="parts of names; none means all")
    parser.add_argument("--mean-seconds", type=float, help="one run, with faults at any time")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    parser.add_argument("--steps", type=int, default=150, help="steps of a run")
    parser.add_argument("--faults-of-a-run", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("chaos.json"))
    options = parser.parse_args()
    if options.mean_seconds is not None:
        options.faults_of_a_run = options.faults
    return options


class Deck:
    """Faults of some kinds in a random order, each kind as often as any other."""

    def __init__(self, of: list[Fault], random: Random) -> None:
        self.of, self.random = of, random
        self.left: list[Fault] = []

    def draw(self, count: int) -> list[Fault]:
        while len(self.left) < count:
            self.left += self.random.sample(self.of, len(self.of))
        drawn, self.left = self.left[:count], self.left[count:]
        return drawn


def main() -> int:
    options = parse()
    random = Random(options.seed)
    one_node = Deck(kinds.named(*options.kinds), random)
    two_nodes = Deck([] if options.kinds else kinds.ON_TWO_NODES, random)
    print(f"seed {options.seed}; {options.faults} faults of {len(one_node.of)} kinds on one node, "
          f"{len(two_nodes.of)} on two", flush=True)  # fmt: skip
    for reason in kinds.left_out():
        print(f"left out: {reason}", flush=True)
    stories: list[Told] = []
    while (left := options.faults - sum(len(story.events) for story in stories)) > 0:
        is_of_two = options.mean_seconds is None and len(stories) % 4 == 3 and bool(two_nodes.of)
        size = min(left, options.faults_of_a_run // (2 if is_of_two else 1))
        faults = (two_nodes if is_of_two else one_node).draw(size)
        stories.append(one_story(faults, is_of_two, random.randrange(10**6), options))
        options.json.write_text(json.dumps([asdict(story) for story in stories], indent=1))
        print(totals(stories), flush=True)
        if options.mean_seconds is not None:
            break  # it may have ended before its last faults
    print(f"\n{table(stories)}")
    return int(any(story.problem for story in stories))


if __name__ == "__main__":
    sys.exit(main())
