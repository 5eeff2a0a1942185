"""What a network adds to the training loss beside the loss of its scores: from a batch's vectors to one number."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.features import UNKNOWN
from model.layers import unit, wide


class Batch(NamedTuple):
    """One training step as a network sees it: b lists of n entries over m distinct items."""

    users: Tensor  # (b, user width) int32 index rows
    items: Tensor  # (m, item width) int32 index rows
    user: Tensor  # (b, Ru) records of `users`
    item: Tensor  # (m, Ri) records of `items`
    place: Tensor  # (b, n) long: the row of `items` of each entry
    positive: Tensor  # (b, n) bool: grade > 0, False on padding
    mask: Tensor  # (b, n) bool, False on padding

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The positive pairs: their rows of `users` and of `items`, (p,) long each."""
        row, column = self.positive.nonzero(as_tuple=True)
        return row, self.place[row, column]


def mimic(augmented: Tensor, vector: Tensor) -> Tensor:
    """Mean over positive pairs of |a - p|^2; a, p: (positives, d). 0 without one.

    Yu et al., DLP-KDD 2021: the mean over pairs of (y a + (1 - y) p - p)^2, which is 0 where y = 0; only a has a
    gradient. The square of a vector is read as its squared norm. Ours: negatives do not count in the mean, for there
    are a hundred to a positive here, beside losses that are means over lists.
    """
    return (wide(augmented) - wide(vector).detach()).square().sum() / max(len(augmented), 1)


def category_alignment(vectors: Tensor, category: Tensor, *, most: int) -> Tensor:
    """sum over categories c of |C(largest) - C(c)|_F^2, C being the covariance of a category's items; Yu et al., 2021.

    vectors: (m, d); category: (m,) int table rows, of which missing and unknown count nowhere. A category needs two
    items. At most `most` of a batch count, the largest first: our own bound, a thousand would drown any other term.
    """
    names, counts = category[category > UNKNOWN].unique(return_counts=True)  # type: ignore[no-untyped-call]
    counts, order = counts.sort(descending=True, stable=True)
    names = names[order[counts > 1][:most]]
    covariances = [torch.cov(wide(vectors)[category == name].T) for name in names]
    if len(covariances) < 2:
        return wide(vectors).new_zeros(())
    return torch.stack([(other - covariances[0]).square().sum() for other in covariances[1:]]).sum()


def contrast(user: Tensor, item: Tensor, likes: Tensor, *, tau: float) -> Tensor:
    """InfoNCE: mean over positive pairs (u, v) of -log(e(u, v) / (e(u, v) + sum_w e(u, w))), e = exp(cos / tau).

    user: (b, h); item: (k, h), each liked by somebody; likes: (b, k) bool. w are the items that u does not like: two
    items of one user do not compete. 0 without positive pairs.
    """
    logits = unit(user) @ unit(item).T / tau  # (b, k)
    rivals = logits.masked_fill(likes, -math.inf)
    row, column = likes.nonzero(as_tuple=True)
    own = logits[row, column].unsqueeze(1)  # (p, 1)
    cost = torch.cat([own, rivals[row]], dim=1).logsumexp(dim=1) - own.squeeze(1)
    return cost.sum() / max(len(cost), 1)
