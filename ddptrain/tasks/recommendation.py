"""Recommendation: which further items a user will have to do with, by those that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.errors import Refused
from ddptrain.tasks.metrics import choose, make
from ddptrain.tasks.task import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Name = Literal["hit_rate", "ndcg", "mrr"]
LossName = Literal["softmax", "bpr"]
Samples = dict[str, Tensor]


class Recommendation(Task):
    """Ranks an item that a user has before those that the user is not known to have.

    A batch is what ``ddptrain.data.feedback.Feedback`` gives: in training ``user``, ``item`` and
    ``weight``, (B,), ``known``, bool, (B, items), and maybe ``negatives``, (B, N); in an evaluation
    ``user``, (B,), ``relevant`` and ``known``, bool, (B, items). ``model(user, known)`` gives the
    scores of all items, (B, items); with ``candidates``, (B, C), as a third argument, those of
    these, (B, C). Without ``negatives`` all items that are not known are negatives. ``softmax``
    takes the cross-entropy of the item among its negatives, ``bpr`` the mean over them of −log σ of
    what the item is before each (Rendle et al., *BPR: Bayesian Personalized Ranking from Implicit
    Feedback*, UAI 2009).

    ``metrics`` are names, of the first ``k`` (but for ``mrr``, which has no end), or mappings of
    names to other torchmetrics. Those that have names are means over samples, of which each is
    another user. The others are updated with scores, float32, targets 0 or 1 and the numbers of
    users, one for each user and item that is not known, (N,), and may keep as many of each. Raises
    ``Refused`` for a name that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossName = "softmax",
        k: int = 10,
        metrics: Sequence[Name | Mapping[str, Metric]] = ("hit_rate", "ndcg", "mrr"),
    ) -> None:
        super().__init__()
        if loss not in get_args(LossName):
            raise Refused(f"loss: expected one of {', '.join(get_args(LossName))}, got {loss!r}")
        if k < 1:
            raise Refused(f"k: expected a number of items above 0, got {k}")
        self.model = model
        self.loss = loss
        self.k = k
        self.chosen = choose(metrics, get_args(Name))

    def forward(self, batch: Samples) -> Loss:
        if "relevant" in batch:
            return self._of_held_out(self.model(batch["user"], batch["known"]), batch)
        user, known, item = batch["user"], batch["known"], batch["item"].unsqueeze(1)
        if "negatives" in batch:
            scores = self.model(user, known, torch.cat([item, batch["negatives"]], dim=1))
            losses = self._losses(scores[:, 0], scores[:, 1:])
        else:
            scores = self.model(user, known)
            others = scores.masked_fill(known.scatter(1, item, value=True), -torch.inf)
            losses = self._losses(scores.gather(1, item).squeeze(1), others)
        return Loss((losses * batch["weight"]).sum(), len(losses))

    def _of_held_out(self, scores: Tensor, batch: Samples) -> Loss:
        """Of ``scores``, (B, items), each relevant item among all neither relevant nor known."""
        relevant = batch["relevant"]
        others = scores.masked_fill(batch["known"] | relevant, -torch.inf)
        losses = self._losses(scores[relevant], others[relevant.nonzero()[:, 0]])
        return Loss(losses.sum(), len(losses))

    def _losses(self, scores: Tensor, others: Tensor) -> Tensor:
        """Of items with ``scores`` (P,) among ``others`` (P, N), of which -∞ is none; (P,)."""
        scores, others = scores.float().unsqueeze(1), others.float()
        if self.loss == "softmax":
            return torch.cat([scores, others], dim=1).log_softmax(1)[:, 0].neg()
        count = (others > -torch.inf).sum(1).clamp(min=1)
        return functional.softplus(others - scores).sum(1) / count

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.mean import Mean

        return super().metrics() | make(self.chosen, lambda _: Mean())

    def update(self, metrics: dict[str, Metric], batch: Samples) -> None:
        user, known, relevant = batch["user"], batch["known"], batch["relevant"]
        scores = self.model(user, known).float()
        self.update_loss(metrics, self._of_held_out(scores, batch))
        is_answer = ~known
        relevant = relevant & is_answer
        count = is_answer.any(1).sum()
        for name in (name for name, own in self.chosen.items() if own is None):
            of_users = self._of_users(name, scores, relevant, is_answer)
            metrics[name].update(of_users.sum(), count)
        if others := [metrics[name] for name, own in self.chosen.items() if own is not None]:
            users = user.unsqueeze(1).expand_as(known)[is_answer]
            # The same tensors for each metric, which are then gathered from the ranks once.
            ranked = scores[is_answer], relevant[is_answer].long(), users
            for metric in others:
                metric.update(*ranked)

    def _of_users(self, name: str, scores: Tensor, relevant: Tensor, is_answer: Tensor) -> Tensor:
        """A metric of each user, float64, (B,); 0 of one who has no item to be found."""
        from ddptrain.tasks.ranking_metrics import first_ranks_of_rows, gains_of_rows

        if name == "ndcg":
            return gains_of_rows(scores, relevant, is_answer, self.k)
        ranks = first_ranks_of_rows(scores, relevant, is_answer)
        if name == "mrr":
            return 1 / ranks
        return (ranks <= self.k).double().where(~ranks.isnan(), torch.nan)
