"""The loops that ddptrain is compared with; run one as ``torchrun … loops.py LOOP CASE``."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from cases import BATCH_PER_RANK, HORIZON, LEARNING_RATE, Data, Timed
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler


def form_group() -> None:
    """Form the process group; after a restart, on keys of its own in the agent's store.

    Without that torch 2.13 often reads the addresses of the ranks that have died, and waits 30 s.
    """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0":
        dist.init_process_group("gloo")
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prefixed = dist.PrefixStore(attempt, store)
    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world_size)


def hand(case: str) -> None:
    """A hand-tuned DDP loop with nothing in it but training: no logging, no checks."""
    form_group()
    model = nn.parallel.DistributedDataParallel(
        Timed(case), gradient_as_bucket_view=True, static_graph=True
    )
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    data = Data(case)
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    loader = DataLoader(data, BATCH_PER_RANK[case], sampler=sampler, drop_last=True)

    def batches() -> Iterator[Any]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    for step, (inputs, targets) in zip(range(HORIZON), batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / HORIZON))
        loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    dist.destroy_process_group()


def accelerate(case: str) -> None:
    """Accelerate's documented loop, with the same DDP options, clipping and TensorBoard."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import ProjectConfiguration

    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(
            cpu=True,
            log_with="tensorboard",
            project_config=ProjectConfiguration(folder),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=True)
            ],
        )
        accelerator.init_trackers("benchmark")
        model = Timed(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        # The scheduler is stepped once per process and step: its horizon is in those units.
        horizon = HORIZON * accelerator.num_processes
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, horizon)
        loader = DataLoader(Data(case), BATCH_PER_RANK[case], shuffle=True, drop_last=True)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        step = 0
        while step < HORIZON:
            for inputs, targets in loader:
                loss = model(inputs, targets)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if step % 50 == 0:
                    accelerator.log({"loss": loss.item()}, step=step)
                if step == HORIZON:
                    break
        accelerator.end_training()


def lightning(case: str) -> None:
    """Lightning's Trainer, with the same DDP options, clipping, schedule and TensorBoard."""
    import lightning as pl
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.strategies import DDPStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.timed = Timed(case)

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.timed(*batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HORIZON)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(gradient_as_bucket_view=True, static_graph=True),
            max_steps=HORIZON,
            max_epochs=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=50,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(Data(case), BATCH_PER_RANK[case], shuffle=True, drop_last=True)
        trainer.fit(Module(), loader)


if __name__ == "__main__":
    {"hand": hand, "accelerate": accelerate, "lightning": lightning}[sys.argv[1]](sys.argv[2])
