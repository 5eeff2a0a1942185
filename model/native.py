"""Scores of lists by the native kernel as a torch function with a gradient: float32 records on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernel.head import HeadKind, HeadSpec
from kernel.training import available, differentiate_lists, score_lists


def takes(kind: HeadKind, user: Tensor, items: Tensor) -> bool:
    """Whether native code scores these records: float32 on the CPU, no graph of their own, and the extension there."""
    plain = all(part.dtype == torch.float32 and part.device.type == "cpu" for part in (user, items))
    return plain and kind != "onnx" and available()


def best_similarity(head: HeadSpec, user: Tensor, items: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """sum_p max_q of the similarity, and the items' biases, (b, n) each; biases are (0, 0) for a head without.

    user: (b, Ru); items: (m, Ri); chosen: (b, n) int64, rows of items.
    """
    scores, biases = _BestSimilarity.apply(user, items, chosen, head)  # type: ignore[no-untyped-call]
    return scores, biases


class _BestSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, user: Tensor, items: Tensor, chosen: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor]:
        user, items, chosen = (part.detach().contiguous() for part in (user, items, chosen))
        ctx.save_for_backward(user, items, chosen)
        ctx.head = head
        scores, biases = score_lists(head, user.numpy(), items.numpy(), chosen.numpy(), torch.get_num_threads())
        return torch.from_numpy(scores), torch.from_numpy(biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scores: Tensor, of_biases: Tensor) -> tuple[Tensor, Tensor, None, None]:
        users, items, chosen = (part.numpy() for part in ctx.saved_tensors)
        of_scores, of_biases = of_scores.contiguous(), of_biases.contiguous()
        of_user, of_items = differentiate_lists(
            ctx.head, users, items, chosen, of_scores.numpy(), of_biases.numpy(), torch.get_num_threads()
        )
        return torch.from_numpy(of_user), torch.from_numpy(of_items), None, None
