"""Runs under torchrun: the weights of models of transformers, in one go and resumed, by example."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from several_ranks import resumed_and_not

from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place

SHORT = ["parallel.reduction=exact", "log.tensorboard=false", "train.micro_batch_size=8"]
SHORT += ["train.global_batch_size=16"]
SMALL = {
    "reviews": ["model.config.hidden_size=16", "model.config.intermediate_size=16"],
    "notes": ["model.config.n_embd=16"],
}


def hashes(ranks: Ranks, folder: Path) -> dict[str, list[str]]:
    return {
        name: resumed_and_not(
            compose([f"experiment={name}", *SHORT, *small]), ranks, folder, middle=1, last=3
        )
        for name, small in SMALL.items()
    }


if __name__ == "__main__":
    file = Path(sys.argv[1])
    ranks = Ranks(Place.from_environment(), torch.device("cpu"), TIMEOUT)
    found = hashes(ranks, file.parent)
    if ranks.is_first:
        file.write_text(json.dumps(found))
    ranks.leave()
