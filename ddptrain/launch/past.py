"""What a run has left of one of its steps: on how many ranks it was, and what was noted of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddptrain.checkpoint.progress import Progress
from ddptrain.config import Reduction
from ddptrain.errors import Refused
from ddptrain.observe.faults import noted_faults
from ddptrain.observe.loggers import read_json_lines
from ddptrain.run_directory import RunDirectory

DIFFERENT = "other code, other data, another kind of device, or a machine at fault"
"""Why a replay may not find what a run has found."""


@dataclass(frozen=True)
class Past:
    """A step of ``run``; the line about its fault; where starts began, with how many ranks."""

    run: RunDirectory
    step: int
    noted: dict[str, Any] | None
    starts: list[tuple[int, int]]

    @classmethod
    def read(cls, run: RunDirectory, step: int, stored: list[int]) -> Past:
        """Read it; ``stored`` are the steps of the checkpoints. Raises ``Refused``."""
        faults = noted_faults(run)
        lines = read_json_lines(run.metrics)
        known = [line.get("step", 0) for line in lines] + [line["step"] + 1 for line in faults]
        known += [run.outcome().get("step", 0), Progress(run.memories()[0]).read(), *stored]
        taken = max(known)
        if not 0 <= step <= taken:  # the one after the last may be the one that failed
            raise Refused(f"step {step}: {run.path} is known to have come to step {taken}")
        starts = [(s["step"], s["world_size"]) for s in read_json_lines(run.attempts)]
        noted = [line for line in faults if line["step"] == step]
        return cls(run, step, noted[-1] if noted else None, starts)

    def ranks_at(self, step: int) -> int:
        """The number of ranks that took ``step``: those of the last start that was there."""
        return next((size for begun, size in reversed(self.starts) if begun <= step), 1)

    @property
    def ranks(self) -> str:
        count = self.ranks_at(self.step)
        return f"{count} rank{'s' if count > 1 else ''}"

    def warn(self, reduction: Reduction, since: int, ranks: int) -> Iterator[str]:
        """Say when ``ranks`` that go on from step ``since`` do not give the same last digits."""
        begun = [step for step, _ in self.starts if since < step <= self.step]
        sizes = {self.ranks_at(step) for step in (since, *begun, self.step)}
        if reduction is not Reduction.mean or sizes == {ranks}:
            return
        if len(sizes) > 1:
            counts = ", ".join(map(str, sorted(sizes)))
            yield (
                f"from step {since} on the run had several numbers of ranks ({counts}): with "
                "parallel.reduction=mean its last digits do not come again"
            )
            return
        yield (
            "with parallel.reduction=mean its last digits come again on as many ranks only: "
            f"torchrun --standalone --nproc-per-node {min(sizes)} -m ddptrain "
            f"replay {self.run.path} {self.step}"
        )

    def compare(self, fault: str | None, loss: float | None, is_exact: bool) -> tuple[bool, str]:
        """Whether a replay has found what the run noted, and that in words.

        Where sums are exact the loss has to be the same as well, to the last digit.
        """
        if self.noted is None:
            told = "the run noted nothing wrong with this step"
            return fault is None, told if fault is None else f"{told}: {DIFFERENT}"
        then = self.noted.get("loss")
        what = f"{self.noted.get('fault')}, {self.noted.get('action')}, loss {_number(then)}"
        if fault != self.noted.get("fault"):
            return False, f"the run noted something else ({what}): {DIFFERENT}"
        if loss == then:
            return True, f"the run noted the same ({what})"
        told = f"the run noted the same fault with another loss ({what})"
        return not is_exact, f"{told}: {DIFFERENT}" if is_exact else told


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.6g}"
