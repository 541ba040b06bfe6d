"""Two models that score items for users: by a vector for each user, or by what a user has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.models.mlp import MLP


class Items(nn.Module):
    """A vector and a bias for each item; the tables have dense gradients (``sparse=False``).

    The sums over ranks, the optimisers and ``parallel.reduction=exact`` take nothing else.
    """

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(items, width)
        self.biases = nn.Parameter(torch.zeros(items))
        nn.init.normal_(self.vectors.weight, std=width**-0.5)

    def score(self, users: Tensor, vectors: Tensor, candidates: Tensor | None) -> Tensor:
        """Of users, (B, width), and vectors of all items, (items, width), the products plus biases.

        (B, items), or of ``candidates``, (B, C), those alone: (B, C).
        """
        if candidates is None:
            return users @ vectors.T + self.biases
        chosen = functional.embedding(candidates, vectors)
        biases = functional.embedding(candidates, self.biases.unsqueeze(1))
        return (chosen @ users.unsqueeze(2) + biases).squeeze(2)


class MatrixFactorisation(nn.Module):
    """Scores of all items, (B, items), for users, int64, (B,): products of two vectors, and biases.

    Koren, Bell and Volinsky, *Matrix Factorization Techniques for Recommender Systems*, Computer
    2009. There is no bias of a user, which would move all its scores alike and change no ranking.
    What the users are known to have, (B, items), is in their vectors, and not looked at; of
    ``candidates``, (B, C), the scores are (B, C). ``users`` may be more than there are.
    """

    def __init__(self, users: int, items: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = Items(items, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.users.weight, std=width**-0.5)

    def forward(self, user: Tensor, known: Tensor, candidates: Tensor | None = None) -> Tensor:
        users = self.dropout(self.users(user))
        return self.items.score(users, self.items.vectors.weight, candidates)


class TwoTower(nn.Module):
    """Scores of all items, (B, items), for users who have the items ``known``, bool, (B, items).

    One tower makes a vector of which items a user has, the other one of each item; their product
    and the item's bias are the score (Covington, Adams and Sargin, *Deep Neural Networks for
    YouTube Recommendations*, RecSys 2016). Which user it is, (B,), is not looked at, so it scores
    one that training has not seen. ``dropout`` is of what is known as well. Of ``candidates``,
    (B, C), the scores are (B, C).
    """

    def __init__(
        self, items: int, hidden: Sequence[int] = (64,), width: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.user_tower = nn.Sequential(nn.Dropout(dropout), MLP(items, hidden, width, dropout))
        self.items = Items(items, width)
        self.item_tower = MLP(width, hidden, width, dropout)

    def forward(self, user: Tensor, known: Tensor, candidates: Tensor | None = None) -> Tensor:
        # Of length one, however many there are; none at all is 0.
        has = functional.normalize(known.to(self.items.vectors.weight.dtype), dim=1)
        vectors = self.item_tower(self.items.vectors.weight)
        return self.items.score(self.user_tower(has), vectors, candidates)
