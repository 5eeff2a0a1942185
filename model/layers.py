"""The blocks of a network: index rows -> field embeddings -> head vectors -> records -> one score per pair.

The published slides name the blocks and give the last layer; what is inside each block is our own design where its
docstring says so. Shapes: b rows or lists, n items a list, D floats of input, H heads (Hu user, Hi item) of d floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernel.reference import NORM_FLOOR
from model.errors import SpecError
from model.features import MISSING, FeatureSpec, Field, Tower

Direction = Literal["both", "user", "item"]
InputGate = Literal["units", "fields", "off"]

EMBEDDING_STD = 0.1
GATE_BIAS = -2.5  # a cross-attention gate starts at 0.08: the model starts as gated heads + maximum similarity
PATH_GAIN = 3.0  # a linear path starts louder than the perceptron beside it
FIRST_SPREAD = 10.0  # scores start within +-10, wide enough to pass a Rankmax margin of 1
SCALE_RANGE = (0.05, 100.0)


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider: norms, softmaxes and scores never run in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-6) over the last dimension, as every other part of the project divides."""
    return wide(x) / _norm(wide(x), keepdim=True)


def choose(option: str, value: str, allowed: object) -> None:
    """Raise SpecError unless value is one of a Literal's."""
    if value not in get_args(allowed):
        raise SpecError(f"network option {option} is {value!r}: use one of {', '.join(get_args(allowed))}")


# --- inputs ----------------------------------------------------------------------------------------------------------


class Tables(nn.ModuleList):
    """One embedding table per field that owns one. A network has one set: a history reads the item tower's table."""

    def __init__(self, spec: FeatureSpec, *, dim: int | None = None) -> None:
        owners = [field for field in spec.fields if field.shares is None]
        super().__init__(nn.Embedding(field.size, dim or field.dim) for field in owners)
        self.owners = [field.name for field in owners]
        self.dim = dim  # None: each field's own
        for weight in self.parameters():
            nn.init.normal_(weight, std=EMBEDDING_STD)


class MeanPooling(nn.Module):
    """Mean of the entries that are not padding."""

    def forward(self, e: Tensor, mask: Tensor) -> Tensor:  # (b, T, dim), (b, T) -> (b, dim)
        weight = mask.to(e.dtype) / mask.sum(dim=1, keepdim=True)
        return (e * weight.unsqueeze(2)).sum(dim=1)


class AttentionPooling(nn.Module):
    """Entries weighted by softmax_t(<q, e_t> + r_age); age 0 is the last column, where a sequence ends. Our own design.

    q and r are zero at the start, where this is the mean. Only a sequence has ages, a set of tags has none.
    """

    def __init__(self, field: Field, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))
        self.age = nn.Parameter(torch.zeros(field.length)) if field.kind == "sequence" else None

    def forward(self, e: Tensor, mask: Tensor) -> Tensor:  # (b, T, dim), (b, T) -> (b, dim)
        return (e * self.weights(e, mask).unsqueeze(2)).sum(dim=1)

    def weights(self, e: Tensor, mask: Tensor) -> Tensor:  # (b, T, dim), (b, T) -> (b, T)
        logits = wide(e @ self.query)
        if self.age is not None:
            logits = logits + self.age.flip(0)
        return logits.masked_fill(~mask, -math.inf).softmax(dim=1)  # no row is all padding, see Inputs


class Inputs(nn.Module):
    """Index rows (b, width) of one tower -> its field embeddings side by side (b, D), one per field.

    A list without entries reads row MISSING of its table, like any other absent value. `field_dropout` makes the
    context of a request missing at random in training, so that the tower also learns to do without it.
    """

    def __init__(
        self, spec: FeatureSpec, tower: Tower, tables: Tables, *, dropout: float = 0.0, field_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fields = spec.tower_fields(tower)
        if not self.fields:
            raise SpecError(f"the {tower} tower has no fields: declare at least one of side {tower}, such as the id")
        self.lengths = [field.length for field in self.fields]
        self.places = [tables.owners.index(spec.table_of(field)) for field in self.fields]
        self.sizes = [tables.dim or field.dim for field in self.fields]
        self.size = sum(self.sizes)
        self.pools = nn.ModuleList(
            AttentionPooling(field, size) if field.pooling == "attention" and field.is_list else MeanPooling()
            for field, size in zip(self.fields, self.sizes, strict=True)
        )
        for option, share in (("dropout", dropout), ("field_dropout", field_dropout)):
            if not 0 <= share < 1:
                raise SpecError(f"network option {option} is {share}: it is a share from 0 to below 1")
        self.dropout = dropout
        self.field_dropout = field_dropout

    def forward(self, tables: Tables, x: Tensor) -> Tensor:
        parts = []
        indices = torch.split(x, self.lengths, dim=1)  # (b, length) each
        for field, place, pool, index in zip(self.fields, self.places, self.pools, indices, strict=True):
            if self.training and self.field_dropout and field.side == "context":
                kept = torch.rand(len(x), 1, device=x.device) >= self.field_dropout
                index = torch.where(kept, index, MISSING)
            e = tables[place](index)  # (b, length, dim)
            parts.append(pool(e, _entries(index)).unsqueeze(1) if field.is_list else e)
        x = torch.cat(parts, dim=2).squeeze(1)
        return dropped(x, self.dropout) if self.training and self.dropout else x


def dropped(x: Tensor, share: float) -> Tensor:
    """Dropout, as functional.dropout, in a third of its time on a CPU: the generator for yes and no is a slow one."""
    return x * ((torch.rand_like(x) >= share) / (1 - share))


def _entries(index: Tensor) -> Tensor:
    """Which entries of (b, T) count: all but padding; of an empty list the first, which is MISSING."""
    mask = index != MISSING
    empty = ~mask.any(dim=1, keepdim=True)
    return torch.cat([mask[:, :1] | empty, mask[:, 1:]], dim=1)


class LightSE(nn.Module):
    """E + E * softmax(W mean(E)): one weight per field, from the mean of each field; Li et al., CIKM 2022."""

    members: Tensor  # (D, M) 1/size where a unit belongs to a field: x @ members are the fields' means
    spread: Tensor  # (D,) the field of each unit

    def __init__(self, sizes: Sequence[int]) -> None:  # floats of each field in x
        super().__init__()
        spread = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        members = functional.one_hot(spread, len(sizes)) / torch.tensor(sizes)
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.w = nn.Linear(len(sizes), len(sizes), bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (b, D) -> (b, D)
        weights = wide(self.w(x @ self.members)).softmax(dim=1)  # (b, M)
        return x + x * weights[:, self.spread]


# --- multi-head gated network ----------------------------------------------------------------------------------------


class HeadLinear(nn.Module):
    """A linear map for each head, as one batched product: (H, b, in) -> (H, b, out)."""

    def __init__(self, heads: int, size: int, out: int) -> None:
        super().__init__()
        bound = size**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(heads, size, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class GatedHeads(nn.Module):
    """Multi-Head Gated Network: inputs x (b, D) -> H head vectors (b, H, d), each with parameters of its own.

    Our own equations, per head p:
        g_p = 2 sigmoid(W2_p relu(W1_p x) + b_p)                  W2 = b = 0 at the start, so g = 1
        E_p = MLP_p(LayerNorm(x) * g_p) * sigmoid(V_p x + c_p) + U_p x
    `input_gate` is one g per unit of x, one per field, or off; `output_gate` switches the sigmoid, `path` U_p x.
    """

    def __init__(
        self,
        sizes: Sequence[int],  # floats of each field in x
        *,
        heads: int,
        dim: int,
        hidden: int,
        gate_hidden: int,
        input_gate: InputGate,
        output_gate: bool,
        path: bool = False,
    ) -> None:
        super().__init__()
        choose("input_gate", input_gate, InputGate)
        size = sum(sizes)
        self.heads = heads
        self.norm = nn.LayerNorm(size)
        self.w1 = nn.Linear(size, heads * gate_hidden) if input_gate != "off" else None
        if self.w1 is not None:
            self.w2 = HeadLinear(heads, gate_hidden, size if input_gate == "units" else len(sizes))
            nn.init.zeros_(self.w2.weight)
            nn.init.zeros_(self.w2.bias)
        spread = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))  # (D,) the field of each unit
        self.spread: Tensor | None
        self.register_buffer("spread", spread if input_gate == "fields" else None, persistent=False)
        self.first = HeadLinear(heads, size, hidden)
        self.second = HeadLinear(heads, hidden, dim)
        self.v = nn.Linear(size, heads * dim) if output_gate else None
        self.u = nn.Linear(size, heads * dim, bias=False) if path else None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(x)
        if self.w1 is None:
            h = h.expand(self.heads, -1, -1)  # (H, b, D)
        else:
            gate = self.w2(self._split(self.w1(x)).relu()).sigmoid()  # (H, b, D or fields), half of g
            h = 2 * h * (gate if self.spread is None else gate[..., self.spread])
        e: Tensor = self.second(self.first(h).relu())  # (H, b, d)
        if self.v is not None:
            e = e * self._split(self.v(x)).sigmoid()
        if self.u is not None:
            e = e + self._split(self.u(x))
        return e.transpose(0, 1)

    def _split(self, x: Tensor) -> Tensor:  # (b, H * k) -> (H, b, k)
        return x.view(x.shape[0], self.heads, -1).transpose(0, 1)


def start_alike(user: Inputs, item: Inputs, paths: tuple[nn.Linear, nn.Linear]) -> None:
    """Let the linear paths of both sides start as one projection of what they read from one table. Our own.

    paths: maps of the user's and the item's inputs. A field that reads no table of the other side starts at zero. With
    as many units on both sides, and no fewer than an embedding's, the dot product of what they yield is that of the
    embeddings, such as a history's and an item's: a perceptron takes long to find it.
    """
    spans = [torch.split(torch.arange(side.size), side.sizes) for side in (user, item)]
    for path in paths:
        nn.init.zeros_(path.weight)
    shared = sorted(set(user.places) & set(item.places))
    with torch.no_grad():
        for place in shared:
            size = next(size for size, other in zip(item.sizes, item.places, strict=True) if other == place)
            most = max(path.out_features for path in paths)
            block = nn.init.orthogonal_(torch.empty(most, size), gain=PATH_GAIN)
            for side, path, span in zip((user, item), paths, spans, strict=True):
                for units in (units for units, other in zip(span, side.places, strict=True) if other == place):
                    path.weight[:, units] = block[: path.out_features]


# --- gated cross-attention -------------------------------------------------------------------------------------------


class _Gate(nn.Linear):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        nn.init.constant_(self.bias, GATE_BIAS)

    def forward(self, e: Tensor) -> Tensor:
        return functional.linear(e, self.weight, self.bias).sigmoid()


class _Zeros(nn.Module):
    def forward(self, e: Tensor) -> Tensor:
        return torch.zeros_like(e)


class GatedCrossAttention(nn.Module):
    """What each side pre-computes so that attention over the Hu x Hi head vectors needs no weights per pair.

    Our own design: every bilinear weight is folded into the user's side, and an item caches three matrices.
        user   E   V = E Wv    G = sigmoid(E Wg + b)     A = E Wa   B = E Wb
        item   E   V = E Wv'   G = sigmoid(E Wg' + b')
    `direction` "user" lets only user heads look at item heads (the item's gate is 0), "item" the reverse, and then the
    parts that nobody reads are zeros; `tied_values` is V = E. The record keeps its layout, so one head serves them all.
    """

    def __init__(self, dim: int, *, direction: Direction, tied_values: bool) -> None:
        super().__init__()
        choose("direction", direction, Direction)
        user_looks, item_looks = direction != "item", direction != "user"

        def linear(used: bool) -> nn.Module:
            return nn.Linear(dim, dim, bias=False) if used else _Zeros()

        def value(used: bool) -> nn.Module:
            return nn.Identity() if used and tied_values else linear(used)

        def gate(used: bool) -> nn.Module:
            return _Gate(dim) if used else _Zeros()

        self.user_parts = nn.ModuleList([value(item_looks), gate(user_looks), linear(user_looks), linear(item_looks)])
        self.item_parts = nn.ModuleList([value(user_looks), gate(item_looks)])

    def user(self, e: Tensor) -> Tensor:  # (b, Hu, d) -> (b, 5 Hu d): E V G A B
        return _record(e, self.user_parts)

    def item(self, e: Tensor, *bias: Tensor) -> Tensor:  # (b, Hi, d), (b, 1) or none -> (b, 3 Hi d [+ 1]): E V G b
        return _record(e, self.item_parts, *bias)


def _record(e: Tensor, parts: nn.ModuleList, *more: Tensor) -> Tensor:
    e = e.contiguous()  # once, not by each part
    return torch.cat([wide(e).flatten(1), *(wide(part(e)).flatten(1) for part in parts), *more], dim=1)


def dot_similarity(user: Tensor, item: Tensor) -> Tensor:
    """<u_p, i_q>: user (b, Hu, d), item (b, n, Hi, d) -> (b, n, Hu, Hi)."""
    b, n, hi, d = item.shape
    dots = user @ item.reshape(b, n * hi, d).transpose(1, 2)  # (b, Hu, n Hi)
    return dots.view(b, -1, n, hi).transpose(1, 2)


def attended_similarity(user: Tensor, e: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Cosines of attended head vectors: user (b, 5, Hu, d), item parts e, v, g (b, n, Hi, d) -> (b, n, Hu, Hi).

        P = softmax_q(A Ei^T / sqrt d)      Eu' = Eu + Gu * (P Vi)          user head p looks at item heads
        R = softmax_p(B Ei^T / sqrt d)      Ei' = Ei + Gi * (R^T Vu)        item head q looks at user heads

    All that one user meets (A, B and Vu) multiplies the list's n Hi item vectors at once; only P Vi and the cosines
    are products per pair. Dots are divided by norms: no third copy of the (b, n, H, d) vectors is made.
    """
    b, n, hi, d = e.shape
    eu, vu, gu, _, _ = user.unbind(1)
    looks, seen = dot_similarity(user[:, 3:].flatten(1, 2) / math.sqrt(d), e).chunk(2, dim=2)  # A and B, (b, n, Hu, Hi)
    p, r = looks.softmax(dim=3), seen.softmax(dim=2)
    user_looks = p @ v  # (b, n, Hu, d)
    item_looks = r.transpose(2, 3).reshape(b, n * hi, -1) @ vu  # (b, n Hi, d)
    user_attended = torch.addcmul(eu.unsqueeze(1), gu.unsqueeze(1), user_looks)
    item_attended = torch.addcmul(e, g, item_looks.view_as(e))
    norms = _norm(user_attended).unsqueeze(3) * _norm(item_attended).unsqueeze(2)  # (b, n, Hu, Hi)
    return user_attended @ item_attended.transpose(2, 3) / norms


def _norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    return norm.clamp_min(NORM_FLOOR)


# --- maximum similarity ----------------------------------------------------------------------------------------------


class MaximumSimilarity(nn.Module):
    """s = (1/tau) sum_p max_q similarity_pq, with one parameter: 1/tau = exp(theta), clamped to SCALE_RANGE.

    The clamp passes its gradient straight through, so that theta can come back from a bound.
    """

    def __init__(self, user_heads: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(math.log(FIRST_SPREAD / user_heads)))

    def scale(self) -> Tensor:
        low, high = SCALE_RANGE
        bounded = self.theta.clamp(math.log(low), math.log(high))
        return (self.theta + (bounded - self.theta).detach()).exp()

    def forward(self, similarity: Tensor) -> Tensor:  # (b, n, Hu, Hi) -> (b, n)
        return self.scale() * similarity.amax(dim=3).sum(dim=2)
