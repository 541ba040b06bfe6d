"""What the trainer costs over a hand-tuned loop: ms per step, memory, time to the first step.

    python benchmarks/overhead.py --rounds 7 --picture docs/overhead.png

Each round trains every case with every contender in turn, on two ranks with one thread each, so
that a machine that slows down slows all of them. Figures are medians over rounds; ratios are taken
within a round, then their median.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cases import BATCH_PER_RANK, LEARNING_RATE, STEPS

HERE = Path(__file__).resolve().parent
WINDOW = 20
WARM_UP = 20
RANKS = 2
Measures = dict[str, float]


def command(contender: str, case: str, folder: Path) -> list[str]:
    """The command that trains ``case`` with ``contender``."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(RANKS)]
    if contender != "ddptrain":
        return [*torchrun, str(HERE / "loops.py"), contender, case]
    return [
        *torchrun,
        "-m",
        "ddptrain",
        f"run.dir={folder / 'run'}",
        f"task={{_target_:cases.task,case:{case}}}",
        f"data.train={{_target_:cases.Data,case:{case}}}",
        f"train.max_steps={STEPS[case]}",
        f"train.global_batch_size={RANKS * BATCH_PER_RANK[case]}",
        f"train.micro_batch_size={BATCH_PER_RANK[case]}",
        f"optim.lr={LEARNING_RATE}",
        "log.every_steps=50",
        "train.device=cpu",
    ]


def measure(contender: str, case: str) -> Measures:
    """Train once; return ms per step, peak memory of rank 0 and seconds to the first step's end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "report.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "BENCHMARK_REPORT": str(report),
            "PYTHONPATH": str(HERE),
        }
        began = time.time()
        done = subprocess.run(
            command(contender, case, folder),
            cwd=HERE,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{contender} {case} failed:\n{done.stderr}")
        told: dict[str, Any] = json.loads(report.read_text())
    times = told["forwards"][WARM_UP : STEPS[case]]
    windows = [
        1000 * (times[i + WINDOW] - times[i]) / WINDOW
        for i in range(0, len(times) - WINDOW, WINDOW)
    ]
    return {
        "ms": median(windows),
        "peak_mb": told["peak_mb"],
        "start_s": told["first_step_done"] - began,
    }


def table(results: dict[tuple[str, str], list[Measures]], contenders: list[str]) -> str:
    """A Markdown table: medians, and in brackets the median ratio to the hand-tuned loop."""
    lines = ["| | " + " | ".join(contenders) + " |", "|---" * (len(contenders) + 1) + "|"]
    rows = [("ms", "ms per step", ".2f"), ("peak_mb", "peak MB of rank 0", ".0f")]
    rows.append(("start_s", "s to the first step", ".1f"))
    for key, label, form in rows:
        for case in sorted({case for _, case in results}, key=list(STEPS).index):
            cells = []
            for contender in contenders:
                own = [m[key] for m in results[contender, case]]
                base = [m[key] for m in results["hand", case]]
                ratio = median(a / b for a, b in zip(own, base, strict=True))
                cells.append(f"{median(own):{form}} ({ratio:.2f})")
            lines.append(f"| {case.upper()}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(
    results: dict[tuple[str, str], list[Measures]], contenders: list[str], picture: Path
) -> None:
    """Bars of the ratio of ms per step to the hand-tuned loop, by case."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    cases = sorted({case for _, case in results}, key=list(STEPS).index)
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--contenders", nargs="+", help="default: all that are installed")
    parser.add_argument("--picture", type=Path, help="write a bar chart to this file")
    given = parser.parse_args()
    rivals = [n for n in ("accelerate", "lightning") if importlib.util.find_spec(n)]
    contenders = given.contenders or ["hand", "ddptrain", *rivals]
    results: dict[tuple[str, str], list[Measures]] = {}
    for round_number in range(given.rounds):
        for case in given.cases:
            # Start each round with another contender: none always runs after the same one.
            turn = round_number % len(contenders)
            for contender in contenders[turn:] + contenders[:turn]:
                results.setdefault((contender, case), []).append(measure(contender, case))
        print(f"\nafter round {round_number + 1}\n{table(results, contenders)}", flush=True)
    if given.picture:
        draw(results, contenders, given.picture)


if __name__ == "__main__":
    main()
