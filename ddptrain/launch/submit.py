"""`ddptrain submit`: writes the batch script of a run, with a copy of its code, and submits it."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

from ddptrain.config import Config, SlurmConfig
from ddptrain.errors import EXIT_COMPLETED, Refused, TrainingError
from ddptrain.files import make_new, replace_text
from ddptrain.launch.allocation import ask
from ddptrain.launch.resources import check_time
from ddptrain.overrides import override
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.screen import say, short
from ddptrain.snapshot import CODE, copy_code


def submit(config: Config, overrides: list[str], dry_run: bool) -> int:
    """Submit a run as a job of Slurm, or only print its script; return the exit code.

    The job comes back to the run's directory whenever it is started, and runs the code as it is
    now, whatever becomes of the folder meanwhile.
    """
    check_time(config.slurm.time)
    if dry_run:
        somewhere = f"runs/{config.run.name}/<time>-<letters>"
        run = RunDirectory(Path(config.run.dir or somewhere).absolute())
        print(script(config, overrides, run, run.path / "code" / "<time>-<letters>"), end="")
        return EXIT_COMPLETED
    ask("sbatch", "--version")
    run = open_directory(config, overrides)
    code = make_new(run.path / "code")
    for name in copy_code(code):
        say(f"ddptrain: {name} is too large to be copied with the code: read it by its path")
    run.logs.mkdir(exist_ok=True)
    file = run.path / "job.sbatch"
    replace_text(file, script(config, overrides, run, code))
    try:
        job = ask("sbatch", "--parsable", str(file), of_job=False).strip().partition(";")[0]
    except TrainingError as error:
        run.leave_no_trace()
        raise Refused(str(error)) from None
    print(
        f"job          {job}\nrun          {short(run.path)}\n"
        f"output       tail -F {quote(f'{short(run.logs)}/slurm-{job}.out')}\n"
        f"end it       scancel {job}"
    )
    return EXIT_COMPLETED


def script(config: Config, overrides: list[str], run: RunDirectory, code: Path) -> str:
    """The batch script of a run whose code lies in ``code``."""
    slurm = config.slurm
    python = slurm.python or sys.executable
    arguments = " ".join(map(quote, [*overrides, override("run.dir", run.path)]))
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(slurm, str(config.run.name), run)),
        *slurm.setup,
        "set -euo pipefail",
        f"export {CODE}={quote(str(code))}",
        f'export PYTHONSAFEPATH=1 PYTHONPATH="${CODE}${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"exec {quote(python)} -m ddptrain train {arguments}",
    ]
    return "\n".join(lines) + "\n"


def _options(slurm: SlurmConfig, name: str, run: RunDirectory) -> list[str]:
    wanted = {
        "job-name": name,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory,
        "chdir": Path.cwd(),
        "output": run.logs / "slurm-%j.out",
        "open-mode": "append",
    }
    given = [
        f"--{option}={quote(str(value))}" for option, value in wanted.items() if value is not None
    ]
    return [*given, "--requeue", *slurm.sbatch]
