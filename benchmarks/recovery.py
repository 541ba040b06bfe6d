"""Seconds from the SIGKILL of a rank until the next optimiser step is done, beside a bare script.

    python benchmarks/recovery.py --rounds 8

ddptrain and the hand-written loop of ``loops.py``, which saves and restores nothing, train the same
model on two ranks under the same torchrun. They take turns: one is killed and measured while the
other is stopped.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from overhead import HERE, command

sys.path.insert(0, str(HERE.parent / "tests"))

from launching import kill_tree, ranks_below, start, tree

RESTARTS = 1000
SETTLE_SECONDS = 3.0


class Contender:
    """A training under torchrun whose ranks are killed again and again."""

    def __init__(self, name: str, case: str, folder: Path) -> None:
        self.name = name
        self.program = "loops.py" if name == "hand" else "ddptrain"
        self.beat = folder / f"{name}-beat"
        line = command(name, case, folder)
        line.insert(line.index("--standalone"), f"--max-restarts={RESTARTS}")
        os.environ["BENCHMARK_BEAT"] = str(self.beat)
        self.agent = start(line, HERE)
        self.wait_for_step(0.0)

    def wait_for_step(self, since: float) -> float:
        """When the first step of a start was done that began after ``since`` (monotonic)."""
        while True:
            assert self.agent.poll() is None, self.agent.communicate()[1]
            text = self.beat.read_text() if self.beat.exists() else ""
            if text.endswith("\n") and float(text.split()[1]) > since:
                return float(text.split()[1])
            time.sleep(0.005)

    @contextmanager
    def awake(self) -> Iterator[None]:
        for process in tree(self.agent.pid):
            os.kill(process, signal.SIGCONT)
        try:
            yield
        finally:
            for process in tree(self.agent.pid):
                os.kill(process, signal.SIGSTOP)

    def recover(self) -> float:
        """Kill a rank; return the seconds until the next step."""
        time.sleep(SETTLE_SECONDS)
        ranks = ranks_below(self.agent.pid, self.program)
        victim = ranks[random.choice(list(ranks))]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        return self.wait_for_step(killed) - killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--case", default="mlp")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds: dict[str, list[float]] = {}
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("hand", "ddptrain"):
                contenders.append(Contender(name, options.case, Path(folder)))
                with contenders[-1].awake():
                    pass
            for _ in range(options.rounds):
                for contender in contenders:
                    with contender.awake():
                        took = contender.recover()
                    seconds.setdefault(contender.name, []).append(took)
                    print(f"{contender.name}: {took:.2f} s", flush=True)
        finally:
            for contender in contenders:
                kill_tree(contender.agent.pid)
                contender.agent.communicate()
    bare, ours = seconds["hand"], seconds["ddptrain"]
    differences = [b - a for a, b in zip(bare, ours, strict=True)]
    print(f"medians: hand {median(bare):.2f} s, ddptrain {median(ours):.2f} s, "
          f"difference {median(differences):.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
