"""Optuna as Hydra's sweeper: Hydra looks for plugins in ``hydra_plugins`` alone, and imports all.

So nothing slow is imported here; what it does is in ``ddptrain.launch.study``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Has trials run that Optuna chooses; conf/hydra/sweeper/optuna.yaml has its settings."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher that runs trials."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run all trials. Raises ``Refused`` on ranges that cannot be searched."""
        from ddptrain.launch.study import search

        assert self.launcher is not None
        folder = Path(str(self.config.hydra.sweep.dir))
        maximizes = str(self.config.checkpoint.mode) in ("max", "Direction.max")
        search(self.settings, self.launcher.launch, folder, list(arguments), maximizes)
