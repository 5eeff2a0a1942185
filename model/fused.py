"""The blocks of `layers.py` as export writes them: equal outside of training, in a third of the operations.

What a user's tower costs is not its arithmetic (0.2 million products) but its operations: each takes ONNX Runtime about
0.7 us, and twice that with cold caches, as it runs once a request.
"""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import (
    AttentionPooling,
    GatedCrossAttention,
    GatedHeads,
    HeadLinear,
    Inputs,
    Tables,
    wide,
)
from model.networks import Network

NOTHING = 1e-27  # the weight of padding: beside any entry it vanishes, among padding alone it is all there is
WIDEST = 40.0  # spread of attention logits: the least weight is exp(-40) = 4e-18, far above NOTHING


def fused(network: Network) -> Network:
    """A copy of a network with every block replaced that has an equal here."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_children()):
        equal: nn.Module | None = None
        if isinstance(module, Inputs):
            equal = FusedInputs.of(module, cast(Tables, network.tables))
        elif isinstance(module, GatedHeads) and module.w1 is not None and module.v is not None:
            equal = FusedHeads(module)
        elif isinstance(module, GatedCrossAttention) and all(isinstance(m, nn.Linear) for m in module.user_parts):
            equal = FusedCross(module)
        if equal is not None:
            setattr(network, name, equal)
    return network


# --- inputs ----------------------------------------------------------------------------------------------------------


class FusedInputs(nn.Module):
    """`Inputs` as one gather and one product for all fields of one size of embedding.

    Every pooling is a weighted mean, sum_t w_t e_t / sum_t w_t. An attention's w = exp(<q, e> + r_age) is a factor of
    the row times one of the column, because an age is a column's distance from the end. So tables hold w e and w side
    by side, `member` holds what is the column's, and their product pools all fields at once. Row MISSING weighs
    NOTHING: a list without entries still is that row, as is a single value.
    """

    order: Tensor | None  # (D,) where each float stands among the groups', where there are several

    def __init__(self, inputs: Inputs, tables: Tables) -> None:
        super().__init__()
        sizes = sorted(set(inputs.sizes))
        groups = [[k for k, other in enumerate(inputs.sizes) if other == size] for size in sizes]
        self.groups = nn.ModuleList(_Group(inputs, tables, fields, whole=len(sizes) == 1) for fields in groups)
        floats = torch.split(torch.arange(inputs.size), inputs.sizes)
        found = torch.cat([floats[k] for fields in groups for k in fields])
        self.register_buffer("order", found.argsort() if len(sizes) > 1 else None)

    @classmethod
    def of(cls, inputs: Inputs, tables: Tables) -> FusedInputs | None:
        """None where an attention is so sharp that its weights do not fit float32 beside those of padding."""
        for pool, place in zip(map(_attention, inputs.pools), inputs.places, strict=True):
            if pool is not None and _spread(pool, _weight(tables, place)) > WIDEST:
                return None
        return cls(inputs, tables)

    def forward(self, tables: Tables, x: Tensor) -> Tensor:  # (b, width) -> (b, D)
        parts = [group(x) for group in self.groups]
        return parts[0] if self.order is None else torch.cat(parts, dim=1)[:, self.order]


class _Group(nn.Module):
    """The fields whose embeddings have one size."""

    columns: Tensor | None  # (w,) of x, where it is not all of them
    offsets: Tensor  # (w,) int32: where the table of each column begins in `weight`
    member: Tensor | None  # (F, w): what a column weighs in a field, 0 where it is another's; none where each has one

    def __init__(self, inputs: Inputs, tables: Tables, fields: list[int], *, whole: bool) -> None:
        super().__init__()
        columns = torch.split(torch.arange(sum(inputs.lengths)), inputs.lengths)
        spans = [columns[k] for k in fields]
        keys = [(inputs.places[k], _attention(inputs.pools[k])) for k in fields]
        parts = {(place, pool): _weighted(_weight(tables, place), pool) for place, pool in keys}
        begins = dict(zip(parts, accumulate(map(len, parts.values()), initial=0), strict=False))
        aged = [None if pool is None or pool.age is None else _by_age(pool.age) for _, pool in keys]
        member = [torch.ones(len(span)) if age is None else age for span, age in zip(spans, aged, strict=True)]
        offsets = [torch.full((len(span),), begins[key]) for key, span in zip(keys, spans, strict=True)]
        single = all(len(span) == 1 for span in spans)
        weight = torch.cat([_weight(tables, place) for place, _ in parts] if single else list(parts.values()))
        self.weight = nn.Parameter(weight)  # (rows, size), or with w (rows, size + 1)
        self.register_buffer("columns", None if whole else torch.cat(spans))
        self.register_buffer("offsets", torch.cat(offsets).int())
        pooled = None if single else torch.block_diag(*member)  # type: ignore[no-untyped-call]
        self.register_buffer("member", pooled)

    def forward(self, x: Tensor) -> Tensor:  # (b, width) -> (b, F size)
        x = x if self.columns is None else x[:, self.columns]
        found = functional.embedding(x + self.offsets, self.weight)
        if self.member is None:
            return found.flatten(1)
        total = self.member @ found  # (b, F, size + 1)
        return (total[..., :-1] / total[..., -1:]).flatten(1)


def _attention(pool: nn.Module) -> AttentionPooling | None:
    return pool if isinstance(pool, AttentionPooling) else None


def _weight(tables: Tables, place: int) -> Tensor:
    return cast(nn.Embedding, tables[place]).weight.detach()


def _weighted(table: Tensor, pool: AttentionPooling | None) -> Tensor:
    """(rows, size + 1): w e and w for each row e of a table."""
    table = table.double()
    weight = torch.ones(len(table), dtype=torch.double)
    if pool is not None:
        logits = table @ pool.query.detach().double()
        weight = (logits - logits.max()).exp()
    weight[0] = NOTHING
    return torch.cat([table * weight[:, None], weight[:, None]], dim=1).float()


def _by_age(age: Tensor) -> Tensor:
    """(length,): exp(r_age) of each column, the largest of them 1."""
    age = age.detach().double().flip(0)
    return (age - age.max()).exp().float()


def _spread(pool: AttentionPooling, table: Tensor) -> float:
    """How far apart the logits of two entries can be."""
    logits = [table.double() @ pool.query.detach().double(), *([] if pool.age is None else [pool.age.detach()])]
    return float(sum(part.max() - part.min() for part in logits))


# --- heads -----------------------------------------------------------------------------------------------------------


class FusedHeads(nn.Module):
    """`GatedHeads` with both gates. W1, V and U are one product; a unit that is always 1 holds the next one's bias."""

    def __init__(self, plain: GatedHeads) -> None:
        super().__init__()
        w1, v = cast(nn.Linear, plain.w1), cast(nn.Linear, plain.v)
        heads, self.sizes = plain.heads, [w1.out_features // plain.heads + 1, v.out_features // plain.heads]
        looks = [_by_head(w1, heads), _one(heads, w1.in_features), _by_head(v, heads)]
        if plain.u is not None:
            looks.append(_by_head(plain.u, heads))
            self.sizes.append(self.sizes[1])
        self.looks = nn.Parameter(torch.cat([weight for weight, _ in looks], dim=2))  # (H, D, gate + 1 + d [+ d])
        self.bias = nn.Parameter(torch.cat([bias for _, bias in looks], dim=2))  # (H, 1, gate + 1 + d [+ d])
        gate = _with_bias(plain.w2)  # (H, gate + 1, D or fields)
        self.gate = nn.Parameter(gate if plain.spread is None else gate[..., plain.spread])
        self.norm = copy.deepcopy(plain.norm)
        for parameter in self.norm.parameters():
            parameter.data *= 2  # g is twice a sigmoid
        first = [(plain.first.weight.detach(), plain.first.bias.detach()), _one(heads, w1.in_features)]
        self.first = HeadLinear(heads, w1.in_features, plain.first.weight.shape[2] + 1)
        self.first.weight.data = torch.cat([weight for weight, _ in first], dim=2)
        self.first.bias.data = torch.cat([bias for _, bias in first], dim=2)
        self.second = nn.Parameter(_with_bias(plain.second))

    def forward(self, x: Tensor) -> Tensor:  # (b, D) -> (b, H, d)
        inner, out, *path = torch.split(x @ self.looks + self.bias, self.sizes, dim=2)  # (H, b, gate + 1), (H, b, d)
        h = self.norm(x) * (inner.relu() @ self.gate).sigmoid()  # (H, b, D)
        e: Tensor = self.first(h).relu() @ self.second * out.sigmoid()  # (H, b, d)
        return (e + path[0] if path else e).transpose(0, 1)


def _by_head(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Weight (H, in, k) and bias (H, 1, k) of a map to H heads of k side by side."""
    weight = linear.weight.detach().view(heads, -1, linear.in_features).transpose(1, 2)
    if linear.bias is None:
        return weight, weight.new_zeros(heads, 1, weight.shape[2])
    return weight, linear.bias.detach().view(heads, 1, -1)


def _one(heads: int, size: int) -> tuple[Tensor, Tensor]:
    """The same of a unit that is 1 whatever comes in."""
    return torch.zeros(heads, size, 1), torch.ones(heads, 1, 1)


def _with_bias(linear: HeadLinear) -> Tensor:
    """(H, in + 1, out): for inputs whose last unit is 1."""
    return torch.cat([linear.weight.detach(), linear.bias.detach()], dim=1)


# --- gated cross-attention -------------------------------------------------------------------------------------------


class FusedCross(nn.Module):
    """The user's side of `GatedCrossAttention` as one product; the item's, which no request computes, as it was."""

    def __init__(self, plain: GatedCrossAttention) -> None:
        super().__init__()
        self.plain = plain
        parts = [cast(nn.Linear, part) for part in plain.user_parts]
        self.weight = nn.Parameter(torch.stack([part.weight.detach().T for part in parts]))  # (4, d, d): V G A B
        self.bias = nn.Parameter(parts[1].bias.detach().clone())

    def user(self, e: Tensor) -> Tensor:  # (b, Hu, d) -> (b, 5 Hu d): E V G A B
        e = wide(e).unsqueeze(1)
        v, g, looks = torch.split(e @ self.weight, [1, 1, 2], dim=1)
        return torch.cat([e, v, (g + self.bias).sigmoid(), looks], dim=1).flatten(1)

    def item(self, e: Tensor, *bias: Tensor) -> Tensor:
        return self.plain.item(e, *bias)
