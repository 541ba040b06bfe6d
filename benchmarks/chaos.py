"""Hundreds of faults at random moments: what they cost, and whether every run ended the same.

``PYTHONPATH=tests python benchmarks/chaos.py --faults 200 --seed 1``: a Markdown table by kind of
fault, and JSON with every fault. Exits with 1 if a run did not end as an undisturbed one does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos import hangs
from chaos.checks import undisturbed, work_of
from chaos.kinds import named, needs_workers
from chaos.operator import Event, Fault, Operator, StoryFailed
from chaos.setting import LAUNCHERS, Setting
from chaos.story import at_random, tell


@dataclass
class Told:
    """A story that is over."""

    seed: int
    ranks: int
    launcher: str
    workers: int
    events: list[dict[str, Any]]
    starts: int
    seconds: float
    counted_seconds: float
    lost_steps: int
    problem: str


def lost(story: Operator, event: Event) -> int:
    """The finished steps that were done again on account of a fault."""
    until = event.at + (event.regained or 0.0)
    begun = [step for a in story.trace.attempts for step, t in a.begun if event.at < t < until]
    return sum(step < event.frontier for step in begun)


def one_story(faults: list[Fault], seed: int, options: argparse.Namespace) -> Told:
    """Tell one story; its folder is kept if it went wrong."""
    random = Random(seed)
    ranks, launcher = random.choice(options.ranks), random.choice(options.launchers)
    workers = random.choice(options.workers) or int(needs_workers(faults))
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    setting = Setting(
        folder, ranks, options.steps, workers, launcher, overrides=tuple(hangs.OVERRIDES)
    )
    story = at_random(faults, setting, seed, max(2, int(1.8 * options.steps / len(faults))))
    undisturbed(ranks, options.steps, workers, setting.overrides)
    began = time.monotonic()
    problem = ""
    try:
        tell(story)
    except StoryFailed as failure:
        problem = str(failure)
        print(f"\nstory {seed} went wrong, see {folder}:\n{failure}\n", file=sys.stderr)
    did = work_of(story)
    ended = story.starts[-1].ended or time.monotonic()
    events = [{**asdict(e), "at": e.at - began, "lost": lost(story, e)} for e in story.events]
    if not problem:
        shutil.rmtree(folder)
    return Told(
        seed, ranks, launcher, workers, events, len(story.starts), ended - began,
        did.counted_seconds, did.lost_least, problem,
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
    return "\n".join([*rows, "", totals(stories)])


def totals(stories: list[Told]) -> str:
    faults = sum(len(story.events) for story in stories)
    wall = sum(story.seconds for story in stories)
    counted = sum(story.counted_seconds for story in stories)
    wrong = [story.seed for story in stories if story.problem]
    return (
        f"{faults} faults in {len(stories)} runs, started {sum(s.starts for s in stories)} times "
        f"by the operator; {sum(s.lost_steps for s in stories)} steps lost, "
        f"{wall - counted:.0f} of {wall:.0f} s lost, goodput {counted / max(wall, 1e-9):.0%}; "
        f"{len(stories) - len(wrong)} runs ended with the bits of an undisturbed one"
        + (f", {len(wrong)} did not: seeds {wrong}" if wrong else "")
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], help="parts of names; none means all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    parser.add_argument("--steps", type=int, default=150, help="steps of a run")
    parser.add_argument("--faults-of-a-run", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("chaos.json"))
    return parser.parse_args()


def main() -> int:
    options = parse()
    kinds = named(*options.kinds)
    random = Random(options.seed)
    print(f"seed {options.seed}; {len(kinds)} kinds; {options.faults} faults", flush=True)
    deck: list[Fault] = []
    stories: list[Told] = []
    while (left := options.faults - sum(len(story.events) for story in stories)) > 0:
        size = min(left, options.faults_of_a_run)
        while len(deck) < size:
            deck += random.sample(kinds, len(kinds))
        faults, deck = deck[:size], deck[size:]
        stories.append(one_story(faults, random.randrange(10**6), options))
        options.json.write_text(json.dumps([asdict(story) for story in stories], indent=1))
        print(totals(stories), flush=True)
    print(f"\n{table(stories)}")
    return int(any(story.problem for story in stories))


if __name__ == "__main__":
    sys.exit(main())
