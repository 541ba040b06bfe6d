"""What a trial's job asks of Slurm: what ``slurm`` says of the cluster, in submitit's words."""

from __future__ import annotations

import json

from omegaconf import DictConfig

from ddptrain.errors import Refused
from ddptrain.overrides import override


def wanted(settings: DictConfig, slurm: DictConfig) -> list[str]:
    """What ``hydra/launcher=slurm`` asks for beyond what its file takes over from ``slurm``."""
    if not str(settings.launcher.get("_target_")).endswith(".SlurmLauncher"):
        return []
    if slurm.nodes > 1:
        raise Refused(
            f"slurm.nodes={slurm.nodes}: a trial of hydra/launcher=slurm has one node; for more, "
            "slurm/sweep.sbatch starts a grid as an array of jobs"
        )
    lines = []
    if settings.launcher.timeout_min is None:
        lines += [f"hydra.launcher.timeout_min={minutes(slurm.time or '1:00:00')}"]
    for option in slurm.sbatch:
        if not str(option).startswith("--"):
            raise Refused(f"slurm.sbatch: {option}: for a sweep's jobs, write it as --option=value")
        key, _, value = str(option)[2:].partition("=")
        lines.append(override(f"++hydra.launcher.additional_parameters.{key}", value or "true"))
    if slurm.srun:
        lines.append(f"++hydra.launcher.srun_args={json.dumps(list(slurm.srun))}")
    return lines


def check_time(text: str | None) -> None:
    """Refuse a bare number: to Slurm it is minutes, and YAML makes one of 12:00:00."""
    if str(text).isdecimal():
        raise Refused(
            f"slurm.time={text}: expected hours:minutes:seconds; in a file put it in quotes, "
            'time: "12:00:00", for YAML takes it for a number otherwise'
        )


def minutes(text: str) -> int:
    """A time as Slurm reads it: minutes:seconds, hours:…, days-hours. Raises ``Refused``."""
    check_time(text)
    days, dash, rest = str(text).rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if dash:
            hours, minute, second = [*parts, 0, 0][:3]
        elif len(parts) == 3:
            hours, minute, second = parts
        else:
            hours, (minute, second) = 0, [*parts, 0][:2]
        return max(1, 1440 * int(days or 0) + 60 * hours + minute + (second > 0))
    except ValueError:
        raise Refused(f"slurm.time={text}: expected a time of Slurm's, such as 12:00:00") from None
