"""What a user reads: a line for each check, then for each culprit what, why and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What breaks the law, how it shows, and the remedy."""

    culprit: str
    where: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.culprit} breaks the law: {self.where}\n"
            f"  why:     {self.why}\n"
            f"  remedy:  {self.remedy}"
        )


@dataclass(frozen=True)
class Check:
    """One thing that must hold; ``holds`` is None if it could not be tried."""

    what: str
    figure: str
    holds: bool | None
    findings: tuple[Finding, ...] = ()


def holds(checks: list[Check]) -> bool:
    return all(check.holds is not False for check in checks)


def text(heading: str, checks: list[Check]) -> str:
    """All of it; of several findings about one culprit the first, which the others follow from."""
    width = max(len(check.what) for check in checks)
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [f"{words[c.holds]:6}  {c.what:{width}}  {c.figure}" for c in checks]
    of_culprits: dict[str, Finding] = {}
    for finding in (finding for check in checks for finding in check.findings):
        of_culprits.setdefault(finding.culprit, finding)
    return "\n\n".join([heading, "\n".join(lines), *map(str, of_culprits.values())])


def short(distance: float) -> str:
    """A relative difference, as far as it matters."""
    return f"{distance:.0e}" if distance else "0"
