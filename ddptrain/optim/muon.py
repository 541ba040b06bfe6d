"""Muon for the matrices of a network, AdamW for the rest, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al., *Muon*, 2024), torch's; else AdamW.

    Embeddings and the output layer are matrices that Muon is not meant for: name them in ``rest``,
    patterns of parameters' names. ``lr`` is the rate of both, for Muon's updates are scaled to be
    as large as those of AdamW (Liu et al., *Muon is Scalable for LLM Training*, 2025).
    """

    wants_names = True

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        rest: Sequence[str] = (),
    ) -> None:
        """``params`` are groups of named parameters. Raises ``ValueError`` if none is a matrix."""
        matrices, others = [], []
        for group in params:
            options = {key: value for key, value in group.items() if key != "params"}
            options = {"lr": lr, "weight_decay": weight_decay, **options}
            for_muon = [
                (name, parameter)
                for name, parameter in group["params"]
                if parameter.dim() == 2 and not any(fnmatchcase(name, each) for each in rest)
            ]
            names = {name for name, _ in for_muon}
            for_adamw = [(n, p) for n, p in group["params"] if n not in names]
            matrices += [{**options, "params": for_muon}] if for_muon else []
            others += [{**options, "params": for_adamw}] if for_adamw else []
        if not matrices:
            raise ValueError("Muon: the model has no matrix for it; choose another optimiser")
        muon = torch.optim.Muon(
            matrices, momentum=momentum, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
        )
        parts: list[Optimizer] = [muon]
        if others:
            parts.append(AdamW(others, betas=(betas[0], betas[1]), eps=eps))
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:  # the groups are the same objects, and each parameter is in one part
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
