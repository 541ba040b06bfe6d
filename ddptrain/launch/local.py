"""Starts the ranks of this machine through torch's elastic launcher, and tells how they ended."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ddptrain.config import Config
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from ddptrain.run_directory import RunDirectory


def count_ranks(config: Config) -> int:
    """``launch.nproc_per_node``, with ``auto`` taken as one rank per GPU, one without GPUs."""
    wanted = config.launch.nproc_per_node
    if wanted != "auto":
        return int(wanted)
    import torch

    return max(1, torch.cuda.device_count()) if config.train.device.name != "cpu" else 1


def launch_ranks(run: RunDirectory, config: Config, ranks: int) -> int:
    """Run ``ranks`` workers on the stored config to their end; return the exit code.

    The error of the rank that failed first is the last thing printed.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=config.launch.max_restarts,
        monitor_interval=0.1,
    )
    command = [sys.executable, "-m", "ddptrain", "worker", str(run.path)]
    try:
        elastic_launch(launch, entrypoint=command[0])(*command[1:])
    except ChildFailedError as error:
        return _tell(error, run)
    return EXIT_COMPLETED


def _tell(error: ChildFailedError, run: RunDirectory) -> int:
    """Print the first failure, last; return the exit code that it stands for."""
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        print(message["extraInfo"]["py_callstack"], file=sys.stderr)
    else:
        log = next(Path(run.logs).glob(f"rank-{rank}.*"), run.logs)
        name = failure.signal_name()
        how = f"was killed by {name}" if failure.exitcode < 0 else f"exited {failure.exitcode}"
        print(f"rank {rank}: {how}, without a word; its log: {log}", file=sys.stderr)
    known = (EXIT_REFUSED, EXIT_STOPPED)
    return failure.exitcode if failure.exitcode in known else EXIT_FAILED
