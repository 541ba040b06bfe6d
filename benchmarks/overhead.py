"""What the trainer costs over a hand-tuned loop: ms per step, memory, time to the first step.

    python benchmarks/overhead.py --rounds 3 --picture docs/overhead.png

In each round every contender is started on two ranks with one thread each, and paused when it is
warm. Then they take turns, a second and a half each, the others stopped: whatever slows the machine
slows all of them alike. Figures are medians over turns; ratios are taken within a turn, then their
median. The contender "exact" is ddptrain with parallel.reduction=exact, "unwatched" is ddptrain
without a watchdog, if it is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cases import BATCH_PER_RANK, HORIZON, LEARNING_RATE

HERE = Path(__file__).resolve().parent
RANKS = 2
SLICE_SECONDS = 1.5
SETTLE = 2  # steps at the beginning of a turn that do not count
VARIANTS = {
    "ddptrain": [],
    "exact": ["parallel.reduction=exact"],
    "unwatched": ["resilience.hang_seconds=null"],
}
Measures = dict[str, float]
Results = dict[tuple[str, str], list[Measures]]


def command(contender: str, case: str, folder: Path) -> list[str]:
    """The command that trains ``case`` with ``contender``."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(RANKS)]
    if contender not in VARIANTS:
        return [*torchrun, str(HERE / "loops.py"), contender, case]
    return [
        *torchrun,
        "-m",
        "ddptrain",
        f"run.dir={folder / 'run'}",
        f"task={{_target_:cases.task,case:{case}}}",
        f"data.train={{_target_:cases.Data,case:{case}}}",
        f"train.max_steps={HORIZON}",
        f"train.global_batch_size={RANKS * BATCH_PER_RANK[case]}",
        f"train.micro_batch_size={BATCH_PER_RANK[case]}",
        f"optim.lr={LEARNING_RATE}",
        "log.every_steps=50",
        "train.device=cpu",
        *VARIANTS[contender],
    ]


class Contest:
    """A contender that trains a case, and can be made to pause and to go on."""

    def __init__(self, contender: str, case: str, folder: Path) -> None:
        """Start it, and return when it has paused, warm."""
        folder.mkdir()
        self.folder = folder
        self.slices: list[tuple[float, float]] = []
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "BENCHMARK_FOLDER": str(folder),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),  # of this checkout
        }
        self.began = time.perf_counter()
        with (folder / "output").open("w") as output:
            self.agent = subprocess.Popen(
                command(contender, case, folder),
                cwd=HERE,
                env=environment,
                stdout=output,
                stderr=output,
            )
        self.ranks = [self._wait_for(f"rank-{rank}") for rank in range(RANKS)]
        while not all(_is_paused(rank) for rank in self.ranks):
            time.sleep(0.01)

    def run(self, seconds: float) -> None:
        """Let it train for a while, alone."""
        begin = time.perf_counter()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        self.slices.append((begin, time.perf_counter()))

    def finish(self) -> list[Measures]:
        """End it; return what it measured, by slice."""
        self._signal(signal.SIGCONT)
        os.kill(self.ranks[0], signal.SIGUSR2)
        told = self._wait_for("report")
        whole = {
            "peak_mb": told["peak_mb"],
            "start_s": told["first_step_done"] - self.began,
        }
        return [whole | {"ms": _ms_per_step(told["forwards"], *part)} for part in self.slices]

    def end(self) -> None:
        """End its processes, paused or not."""
        for process in (self.agent.pid, *self.ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.agent.wait()

    def _signal(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            os.kill(rank, number)

    def _wait_for(self, name: str) -> Any:
        file = self.folder / name
        while not file.exists():
            if self.agent.poll() is not None:
                raise SystemExit((self.folder / "output").read_text())
            time.sleep(0.01)
        return json.loads(file.read_text())


def _is_paused(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _ms_per_step(forwards: list[float], begin: float, end: float) -> float:
    inside = [time for time in forwards if begin <= time <= end][SETTLE:]
    return 1000 * (inside[-1] - inside[0]) / (len(inside) - 1)


def measure(case: str, contenders: list[str], slices: int) -> dict[str, list[Measures]]:
    """Train ``case`` with all contenders in turn, a slice of time each, ``slices`` times."""
    with tempfile.TemporaryDirectory() as folder:
        contests: dict[str, Contest] = {}
        try:
            for name in contenders:
                contests[name] = Contest(name, case, Path(folder) / name)
            for turn in range(slices):
                # Another one begins each time: none always runs after the same one.
                first = turn % len(contenders)
                for name in contenders[first:] + contenders[:first]:
                    contests[name].run(SLICE_SECONDS)
            return {name: contest.finish() for name, contest in contests.items()}
        finally:
            for contest in contests.values():
                contest.end()


def table(results: Results, contenders: list[str]) -> str:
    """A Markdown table: medians, and in brackets the median ratio to the hand-tuned loop."""
    lines = ["| | " + " | ".join(contenders) + " |", "|---" * (len(contenders) + 1) + "|"]
    rows = [("ms", "ms per step", ".2f"), ("peak_mb", "peak MB of rank 0", ".0f")]
    rows.append(("start_s", "s to the first step", ".1f"))
    for key, label, form in rows:
        for case in sorted({case for _, case in results}, key=list(BATCH_PER_RANK).index):
            cells = []
            for contender in contenders:
                own = [m[key] for m in results[contender, case]]
                base = [m[key] for m in results["hand", case]]
                ratio = median(a / b for a, b in zip(own, base, strict=True))
                cells.append(f"{median(own):{form}} ({ratio:.2f})")
            lines.append(f"| {case.upper()}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Results, contenders: list[str], picture: Path) -> None:
    """Bars of the ratio of ms per step to the hand-tuned loop, by case."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    cases = sorted({case for _, case in results}, key=list(BATCH_PER_RANK).index)
    width = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        ratios = [
            median(
                a["ms"] / b["ms"]
                for a, b in zip(results[contender, case], results["hand", case], strict=True)
            )
            for case in cases
        ]
        bars = axes.bar([x + i * width for x in range(len(cases))], ratios, width, label=contender)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(cases))], [c.upper() for c in cases])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("time per step ÷ hand-tuned loop")
    axes.legend(fontsize=8, ncols=len(contenders), loc="upper center", bbox_to_anchor=(0.5, 1.18))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is started")
    parser.add_argument("--slices", type=int, default=10, help="turns in a round")
    parser.add_argument("--cases", nargs="+", default=list(BATCH_PER_RANK))
    parser.add_argument("--contenders", nargs="+", help="default: all that are installed")
    parser.add_argument("--picture", type=Path, help="write a bar chart to this file")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave no contender behind, paused
    rivals = [n for n in ("accelerate", "lightning") if importlib.util.find_spec(n)]
    contenders = given.contenders or ["hand", "ddptrain", "exact", *rivals]
    results: Results = {}
    for round_number in range(given.rounds):
        for case in given.cases:
            for name, measures in measure(case, contenders, given.slices).items():
                results.setdefault((name, case), []).extend(measures)
        print(f"\nafter round {round_number + 1}\n{table(results, contenders)}", flush=True)
    if given.picture:
        draw(results, contenders, given.picture)


if __name__ == "__main__":
    main()
