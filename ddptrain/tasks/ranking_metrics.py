"""Metrics of rankings, over the items of each group (a user, a query), wherever these are.

torchmetrics' own take an item with a score of 0 or less for irrelevant (MRR), leave ties to the
order of a sort, and compute in float32, group by group.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric


class Ranking(Metric):
    """Keeps scores (N,), targets (N,) and group numbers (N,) of a split; a mean over its groups.

    A target says how relevant an item is, 0 for not at all. A group may be spread over
    micro-batches and ranks. One without a relevant item counts as 0. A score that is NaN makes the
    value NaN, for it is neither before nor after another.
    """

    scores: list[Tensor]
    targets: list[Tensor]
    groups: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for state in ("scores", "targets", "groups"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor, groups: Tensor) -> None:
        self.scores.append(scores.flatten())
        self.targets.append(targets.flatten())
        self.groups.append(groups.flatten())

    def compute(self) -> Tensor:
        # On the CPU, which adds up in one order.
        groups: Tensor = torch.unique(torch.cat(self.groups).cpu(), return_inverse=True)[1]
        scores, targets = torch.cat(self.scores).cpu(), torch.cat(self.targets).cpu()
        if scores.isnan().any():
            return torch.tensor(torch.nan, dtype=torch.float64)
        return self.of_groups(scores.double(), targets.double(), groups).mean()

    @abstractmethod
    def of_groups(self, scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """The value of each group; groups are numbered from 0."""


def first_ranks(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """The rank, from 1, of each group's best relevant item; infinity if it has none.

    Of equal scores the irrelevant ones come first: a model gains nothing by ties.
    """
    is_relevant = targets > 0
    best = scores.new_full((int(groups.max()) + 1,), -torch.inf)
    best = best.scatter_reduce(0, groups[is_relevant], scores[is_relevant], "amax")
    is_before = ~is_relevant & (scores >= best[groups])
    ranks = 1 + torch.zeros_like(best).index_add(0, groups, is_before.double())
    has_some = torch.zeros_like(best, dtype=torch.bool).index_fill(0, groups[is_relevant], True)
    return ranks.where(has_some, torch.inf)


class MRR(Ranking):
    """1 ÷ the rank of the best relevant item."""

    def of_groups(self, scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        return 1 / first_ranks(scores, targets, groups)


class HitRate(Ranking):
    """Whether a relevant item is among the first ``k``."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def of_groups(self, scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        return (first_ranks(scores, targets, groups) <= self.k).double()


class NDCG(Ranking):
    """Σ target ÷ log₂(1 + rank) over the first ``k``, by that of the best order.

    (Järvelin & Kekäläinen 2002.) Items of equal score share the mean of their places' weights, as
    in scikit-learn (McSherry & Najork 2008).
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def of_groups(self, scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        gain = self._gain(scores, targets, groups)
        best = self._gain(targets, targets, groups)
        return torch.where(best > 0, gain / best, 0.0)

    def _gain(self, scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        order = scores.argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        scores, targets, groups = scores[order], targets[order], groups[order]
        sizes = groups.bincount()
        place = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[groups]
        weight = torch.where(place < self.k, 1 / (place.double() + 2).log2(), 0.0)
        is_new = (scores[1:] != scores[:-1]) | (groups[1:] != groups[:-1])
        tie = torch.cat([is_new.new_zeros(1), is_new]).cumsum(0)
        shared = weight.new_zeros(int(tie[-1]) + 1).index_add(0, tie, weight) / tie.bincount()
        return weight.new_zeros(len(sizes)).index_add(0, groups, targets * shared[tie])


def first_ranks_of_rows(scores: Tensor, relevant: Tensor, is_answer: Tensor) -> Tensor:
    """What ``first_ranks`` gives where each group is a row, whole: float64, shape (B,).

    ``scores``, and ``relevant`` and ``is_answer``, bool, have shape (B, items); what is relevant is
    an answer, and of what is none the score does not count. A row with a score that is NaN gives
    NaN.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    ranks = 1 + (is_answer & ~relevant & (scores >= best)).sum(1).double()
    ranks = ranks.where(relevant.any(1), torch.inf)
    return ranks.masked_fill((is_answer & scores.isnan()).any(1), torch.nan)


def gains_of_rows(scores: Tensor, relevant: Tensor, is_answer: Tensor, k: int) -> Tensor:
    """What ``NDCG(k)`` gives for each row, as ``first_ranks_of_rows`` takes them: float64, (B,)."""
    weights = 1 / (torch.arange(k, dtype=torch.float64) + 2).log2()
    up_to = functional.pad(weights.cumsum(0), (1, 0)).to(scores.device)
    items, found = scores.shape[1], relevant.sum(1)
    own = scores.masked_fill(~relevant, -torch.inf).topk(int(found.max())).values
    ordered = scores.masked_fill(~is_answer, -torch.inf).sort(dim=1).values
    above = items - torch.searchsorted(ordered, own, right=True)
    with_ties = items - torch.searchsorted(ordered, own)
    with_ties = with_ties.minimum(is_answer.sum(1, keepdim=True))  # -∞ is also what is no answer
    shared = (up_to[with_ties.clamp(max=k)] - up_to[above.clamp(max=k)]) / (with_ties - above)
    is_own = torch.arange(own.shape[1], device=own.device) < found.unsqueeze(1)
    gains = shared.where(is_own, 0.0).sum(1)
    gains = torch.where(relevant.any(1), gains / up_to[found.clamp(max=k)], 0.0)
    return gains.masked_fill((is_answer & scores.isnan()).any(1), torch.nan)
