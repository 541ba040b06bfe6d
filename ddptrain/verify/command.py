"""`ddptrain verify`: starts the ranks once, waits for their report, and shows it."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch
import yaml

from ddptrain.config import Config, Device, to_plain
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, TrainingError
from ddptrain.launch.agent import DDPTRAIN, Asked, start_ranks
from ddptrain.launch.local import print_failure
from ddptrain.run_directory import RunDirectory
from ddptrain.verify.rank import ORDER, REPORT

WORDS = 4000
"""Characters of what a rank that died without a word had printed."""


def verify(config: Config, world_sizes: list[int], steps: int) -> int:
    """Run the trials in a folder that is gone afterwards; return the exit code."""
    ranks = max(world_sizes)
    if config.train.device is Device.auto:
        enough = torch.cuda.device_count() >= ranks
        config.train.device = Device.cuda if enough else Device.cpu
    order = {"steps": steps, "world_sizes": world_sizes, "compiles": config.train.compile}
    # Hooks cannot look into a compiled model; and nothing must be pruned, shown or compared here.
    config.train.compile = False
    config.checkpoint.keep_last, config.checkpoint.keep_best = steps + 1, 0
    config.run.dir = config.checkpoint.dir = None
    with TemporaryDirectory(prefix="ddptrain-verify-") as name:
        folder = Path(name)
        (folder / ORDER).write_text(yaml.safe_dump({**order, "config": to_plain(config)}))
        try:
            failure = start_ranks([*DDPTRAIN, "verify-rank", name], ranks, folder / "output")
        except Asked as asked:
            raise TrainingError(f"{asked}: not verified to the end") from None
        finally:
            for memory in RunDirectory(folder / "run").memories():
                rmtree(memory, ignore_errors=True)
        file = folder / REPORT
        if failure is not None and not file.exists():
            return print_failure(failure, _last_words(folder))
        report = json.loads(file.read_text())
    print(report["text"])
    return EXIT_COMPLETED if report["holds"] else EXIT_FAILED


def _last_words(folder: Path) -> str:
    """What the ranks wrote to stderr, for want of a message."""
    files = sorted((folder / "output").rglob("stderr.log"))
    return (
        "".join(file.read_text(errors="replace")[-WORDS:] for file in files).strip() or "nor output"
    )
