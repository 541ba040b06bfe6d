"""Starts a run once: in its directory, which is made for it, here or on the nodes of a job."""

from __future__ import annotations

from ddptrain.claim import launching
from ddptrain.config import Config
from ddptrain.errors import EXIT_FAILED, EXIT_REFUSED, TrainingError
from ddptrain.launch.allocation import Allocation
from ddptrain.launch.local import count_ranks, launch_ranks
from ddptrain.launch.slurm import launch_on
from ddptrain.observe.phases import Phases
from ddptrain.place import Place
from ddptrain.resilience.preemption import listen
from ddptrain.rules import check_world_size
from ddptrain.run_directory import RunDirectory, check_launch, open_directory


def start(config: Config, overrides: list[str], rerun_of: str | None = None) -> int:
    """Start the ranks of one run, here or on the nodes of a job, and wait for them."""
    phases = Phases()
    allocation = Allocation.here()
    if allocation is not None:
        allocation.find_itself(config)
    check_launch(config)
    if allocation is None or config.launch.nproc_per_node != "auto":
        nodes = 1 if allocation is None else allocation.nodes
        check_world_size(config, nodes * count_ranks(config))
    run = open_directory(config, overrides, rerun_of)
    with launching(run.path):  # who does not get the run leaves it to the launch that has it
        code = EXIT_FAILED
        try:
            code = _launch(run, config, allocation, overrides, phases)
        except TrainingError as error:
            code = error.exit_code
            raise
        finally:
            if code == EXIT_REFUSED:
                run.leave_no_trace()
    return code


def _launch(
    run: RunDirectory,
    config: Config,
    allocation: Allocation | None,
    overrides: list[str],
    phases: Phases,
) -> int:
    if allocation is not None:
        return launch_on(allocation, run, config)
    ranks = count_ranks(config)
    if ranks > 1 or config.launch.max_restarts:
        run.launch(config)
        return launch_ranks(run, config, ranks)
    from ddptrain.launch.worker import run_rank

    stop_request = listen(Place())
    return run_rank(config, Place(), phases, overrides=overrides, stop_request=stop_request)
