"""The networks: each turns index rows into records (`user`, `item`) and pairs of records into scores (`score`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kernel.head import ITEM_PARTS, USER_PARTS, HeadKind, HeadSpec
from model.errors import SpecError
from model.features import FeatureSpec
from model.layers import (
    Direction,
    GatedCrossAttention,
    GatedHeads,
    InputGate,
    Inputs,
    MaximumSimilarity,
    Tables,
    attended_similarity,
    dot_similarity,
    unit,
    wide,
)


class Network(nn.Module):
    """What all networks have: records of one shape, and a score that `kernel` computes in the same way online.

    user: (b, user width) int32 or int64 -> (b, Ru) float32; item: (b, item width) -> (b, Ri) float32;
    score: (b, Ru), (b, n, Ri) -> (b, n) float32, logits.
    """

    def __init__(
        self, kind: HeadKind, *, user_heads: int, item_heads: int, dim: int, item_bias: bool, scaled: bool = True
    ) -> None:
        super().__init__()
        for option, value in (("user_heads", user_heads), ("item_heads", item_heads), ("dim", dim)):
            if value < 1:
                raise SpecError(f"network option {option} is {value}: it must be at least 1")
        self.kind = kind
        self.user_shape = (USER_PARTS[kind], user_heads, dim)
        self.item_shape = (ITEM_PARTS[kind], item_heads, dim)
        self.item_bias = item_bias
        self.similarity = MaximumSimilarity(user_heads) if scaled else None  # None: the scale is 1

    def user(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def item(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def head(self) -> HeadSpec:
        """The head that serves this network as it is now."""
        _, user_heads, dim = self.user_shape
        scale = 1.0 if self.similarity is None else float(self.similarity.scale().detach())
        return HeadSpec(
            kind=self.kind,
            user_heads=user_heads,
            item_heads=self.item_shape[1],
            dim=dim,
            scale=scale,
            item_bias=self.item_bias,
        )

    def score(self, user: Tensor, item: Tensor) -> Tensor:
        parts, heads, dim = self.item_shape
        with torch.autocast(user.device.type, enabled=False):
            records = torch.split(wide(item), [heads * dim] * parts + [1] * self.item_bias, dim=-1)
            vectors = [record.reshape(*item.shape[:2], heads, dim) for record in records[:parts]]  # each (b, n, Hi, d)
            users = wide(user).view(-1, *self.user_shape)  # (b, parts, Hu, d)
            if self.kind == "cross_attention":
                similarity = attended_similarity(users, *vectors)
            else:
                similarity = dot_similarity(users[:, 0], *vectors)
            best = similarity.amax(dim=3).sum(dim=2) if self.similarity is None else self.similarity(similarity)
            return best + records[-1].squeeze(-1) if self.item_bias else best


class Bias(nn.Module):
    """One scalar per item, added to its scores: sums of cosines express popularity badly. Zero at the start."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:  # (b, D) -> (b, 1)
        return wide(self.linear(self.norm(x)))


class LR(Network):
    """Logistic regression: the sum of one weight per field value of user and item. One head of 2-vectors, raw dot:
    (sum_u + b, 1) . (1, sum_i)."""

    def __init__(self, spec: FeatureSpec, *, field_dropout: float = 0.0) -> None:
        super().__init__("maxsim", user_heads=1, item_heads=1, dim=2, item_bias=False, scaled=False)
        self.tables = Tables(spec, dim=1)
        self.user_inputs = Inputs(spec, "user", self.tables, field_dropout=field_dropout)
        self.item_inputs = Inputs(spec, "item", self.tables)
        self.intercept = nn.Parameter(torch.zeros(1))

    def user(self, x: Tensor) -> Tensor:
        total = self.user_inputs(self.tables, x).sum(dim=1, keepdim=True) + self.intercept
        return torch.cat([total, torch.ones_like(total)], dim=1)

    def item(self, x: Tensor) -> Tensor:
        total = self.item_inputs(self.tables, x).sum(dim=1, keepdim=True)
        return torch.cat([torch.ones_like(total), total], dim=1)


class TwoTower(Network):
    """Two towers and gamma * cos (Huang et al., CIKM 2013); its sigmoid is monotone and lives in the calibration."""

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        dim: int = 32,
        hidden: Sequence[int] = (128, 64),
        item_bias: bool = True,
        dropout: float = 0.2,
        field_dropout: float = 0.0,
    ) -> None:
        super().__init__("maxsim", user_heads=1, item_heads=1, dim=dim, item_bias=item_bias)
        self.tables = Tables(spec)
        self.user_inputs = Inputs(spec, "user", self.tables, dropout=dropout, field_dropout=field_dropout)
        self.item_inputs = Inputs(spec, "item", self.tables, dropout=dropout)
        self.user_mlp = _mlp(self.user_inputs.size, hidden, dim)
        self.item_mlp = _mlp(self.item_inputs.size, hidden, dim)
        self.bias = Bias(self.item_inputs.size) if item_bias else None

    def user(self, x: Tensor) -> Tensor:
        return unit(self.user_mlp(self.user_inputs(self.tables, x)))

    def item(self, x: Tensor) -> Tensor:
        x = self.item_inputs(self.tables, x)
        record = unit(self.item_mlp(x))
        return record if self.bias is None else torch.cat([record, self.bias(x)], dim=1)


def _mlp(size: int, hidden: Sequence[int], out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(size)]
    for before, after in pairwise([size, *hidden]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear([size, *hidden][-1], out))


class RankTower(Network):
    """Gated heads per side -> gated cross-attention -> maximum similarity (Yan & Li, arXiv 2407.12385).

    Without cross-attention the records are unit vectors and the head is `maxsim`.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        user_heads: int = 4,
        item_heads: int = 4,
        dim: int = 32,
        hidden: int = 64,
        gate_hidden: int = 16,
        input_gate: InputGate = "units",
        output_gate: bool = True,
        cross_attention: bool = True,
        direction: Direction = "both",
        tied_values: bool = False,
        item_bias: bool = True,
        dropout: float = 0.3,
        field_dropout: float = 0.0,
    ) -> None:
        kind: HeadKind = "cross_attention" if cross_attention else "maxsim"
        super().__init__(kind, user_heads=user_heads, item_heads=item_heads, dim=dim, item_bias=item_bias)
        self.tables = Tables(spec)
        self.user_inputs = Inputs(spec, "user", self.tables, dropout=dropout, field_dropout=field_dropout)
        self.item_inputs = Inputs(spec, "item", self.tables, dropout=dropout)

        def gated(inputs: Inputs, heads: int) -> GatedHeads:
            return GatedHeads(
                inputs.sizes,
                heads=heads,
                dim=dim,
                hidden=hidden,
                gate_hidden=gate_hidden,
                input_gate=input_gate,
                output_gate=output_gate,
            )

        self.user_heads = gated(self.user_inputs, user_heads)
        self.item_heads = gated(self.item_inputs, item_heads)
        self.cross = GatedCrossAttention(dim, direction=direction, tied_values=tied_values) if cross_attention else None
        self.bias = Bias(self.item_inputs.size) if item_bias else None

    def user(self, x: Tensor) -> Tensor:
        e = self.user_heads(self.user_inputs(self.tables, x))  # (b, Hu, d)
        return unit(e).flatten(1) if self.cross is None else self.cross.user(e)

    def item(self, x: Tensor) -> Tensor:
        x = self.item_inputs(self.tables, x)  # (b, D)
        e = self.item_heads(x)  # (b, Hi, d)
        record = unit(e).flatten(1) if self.cross is None else self.cross.item(e)
        return record if self.bias is None else torch.cat([record, self.bias(x)], dim=1)


NETWORKS: dict[str, type[Network]] = {"lr": LR, "two_tower": TwoTower, "ranktower": RankTower}
