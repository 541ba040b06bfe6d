"""What one does with a finished run: evaluate it, export its weights, look at what it writes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.saved import OPTIMIZER
from ddptrain.config import Config
from ddptrain.data.fetch import Fetcher
from ddptrain.errors import EXIT_COMPLETED, Refused
from ddptrain.evaluate import Evaluation
from ddptrain.launch.worker import TIMEOUT
from ddptrain.optim.average import put_averages
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.parts import build_autocast, build_checkpoints, build_source, build_task
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import model_tensors, unshared
from ddptrain.tasks.language_model import LanguageModel
from ddptrain.tasks.restarts import Restarts
from ddptrain.tasks.task import Task


def evaluate(run: RunDirectory, config: Config, which: str, last: bool, split: str | None) -> int:
    """Print the metrics of a checkpoint over a split as JSON; on several ranks under torchrun."""
    split = split_of(config, run, split)
    place = Place.from_environment()
    ranks = Ranks(place, choose_device(config.train.device.name, place), TIMEOUT)
    task, step = load(run, config, which, ranks, last)
    evaluation = Evaluation(
        task,
        Fetcher(build_source(config, split), ranks.device, config.data.workers),
        ranks,
        build_autocast(config.train.precision, ranks.device),
    )
    metrics = {f"{split}/{name}": value for name, value in evaluation.run().items()}
    if ranks.is_first:
        print(json.dumps({"step": step, **metrics}))
    ranks.leave()
    return EXIT_COMPLETED


def export(run: RunDirectory, config: Config, which: str, last: bool, output: Path | None) -> int:
    """Write parameters and buffers of a checkpoint to one file, and print its name."""
    file = output or run.export
    ranks = Ranks(Place(), choose_device("cpu", Place()), TIMEOUT)
    task, step = load(run, config, which, ranks, last)
    save_file(unshared(model_tensors(task)), file, metadata={"format": "pt", "step": str(step)})
    print(file)
    return EXIT_COMPLETED


def sample(
    run: RunDirectory, config: Config, which: str, last: bool, prompt: str, length: int
) -> int:
    """Print text that the run's language model continues ``prompt`` with."""
    device = choose_device(config.train.device.name, Place())
    task, _ = load(run, config, which, Ranks(Place(), device, TIMEOUT), last)
    if not isinstance(task, LanguageModel):
        raise Refused(f"{run.path}: its task is {type(task).__name__}, which writes no text")
    task.eval()
    print(task.continue_text(prompt, length))
    return EXIT_COMPLETED


def split_of(config: Config, run: RunDirectory, wanted: str | None) -> str:
    """The split that is wanted; test, or else val, if none is. Raises ``Refused``."""
    split = wanted or ("test" if config.data.test is not None else "val")
    if getattr(config.data, split) is None:
        raise Refused(f"--split {split}: data.{split} is not set in {run.config}")
    return split


def load(
    run: RunDirectory, config: Config, which: str, ranks: Ranks, last: bool
) -> tuple[Task, int]:
    """Build a run's task and load a checkpoint of it: "latest", "best" or a step's number.

    Where weights were averaged it has the averages, or the ``last`` step's if that is wanted; of
    several restarts it is the best.
    """
    checkpoints = build_checkpoints(config, run)
    # One choice for all ranks: the run may be saving at this moment.
    step = ranks.from_first(_find(checkpoints, which, run) if ranks.is_first else None)
    task = build_task(config, ranks.device)
    saved = checkpoints.read(step)
    saved.put_back(task, None)
    if config.train.average.kind is not None and not last:
        put_averages(task, saved.tensors(OPTIMIZER))
    return (task.best if isinstance(task, Restarts) else task), step


def _find(checkpoints: Checkpoints, which: str, run: RunDirectory) -> int:
    if which == "latest":
        if (newest := checkpoints.newest()) is None:
            where = checkpoints.store.medium.where("")
            raise Refused(f"{where}: no checkpoint yet; train the run until it has saved one")
        return newest.step
    steps = checkpoints.store.steps()
    step = checkpoints.best_step() if which == "best" else int(which) if which.isdecimal() else None
    if step not in steps:
        raise Refused(
            f"--checkpoint {which}: {run.path} has {', '.join(map(str, steps)) or 'none'}; "
            "say latest, best (where an evaluation was saved) or one of these steps"
        )
    return step
