"""Score padded lists with a torch network: each distinct item is embedded once, pairs are scored in chunks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.networks import Network
from model.sampling import Lists

ROWS = 4096  # rows embedded at a time
PAIRS = 1 << 15  # pairs scored at a time: their item records stay near the cache


def score_network(network: Network, users: np.ndarray, items: np.ndarray, lists: Lists) -> np.ndarray:
    """Scores (L, n) float32 in evaluation mode; the mode is put back afterwards.

    users: (L, user width) int32; items: (I, item width) int32 of the whole catalogue; lists.item indexes it.
    """
    training = network.training
    network.eval()
    with torch.no_grad():
        distinct, place = np.unique(lists.item, return_inverse=True)
        item = _embed(network, "item", items[distinct])
        user = _embed(network, "user", users)
        scores = _score_chunks(network, user, item, place.reshape(lists.item.shape))
    network.train(training)
    return scores


def _embed(network: Network, tower: str, rows: np.ndarray) -> Tensor:
    device = next(network.parameters()).device
    run = getattr(network, tower)
    parts = [run(torch.from_numpy(rows[at : at + ROWS]).to(device)) for at in range(0, max(len(rows), 1), ROWS)]
    return torch.cat(parts)


def _score_chunks(network: Network, user: Tensor, item: Tensor, place: np.ndarray) -> np.ndarray:
    step = max(1, PAIRS // place.shape[1])
    scores = np.empty(place.shape, dtype=np.float32)
    for at in range(0, len(place), step):
        chosen = torch.from_numpy(place[at : at + step]).to(user.device)
        scores[at : at + step] = network.score_lists(user[at : at + step], item, chosen).float().cpu().numpy()
    return scores
