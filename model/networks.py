"""The networks: each turns index rows into records (`user`, `item`) and pairs of records into scores (`score`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernel.head import ITEM_PARTS, USER_PARTS, HeadKind, HeadSpec
from kernel.record import MAX_DIM, MAX_ITEM_HEADS, MAX_USER_HEADS
from model.errors import SpecError
from model.features import FeatureSpec, Field
from model.features import Tower as TowerName
from model.layers import (
    EMBEDDING_STD,
    Direction,
    GatedCrossAttention,
    GatedHeads,
    InputGate,
    Inputs,
    LightSE,
    MaximumSimilarity,
    Tables,
    attended_similarity,
    dot_similarity,
    start_alike,
    unit,
    wide,
)
from model.native import best_similarity, takes
from model.regularisers import Batch, category_alignment, contrast, mimic

SERVED = {"user_heads": MAX_USER_HEADS, "item_heads": MAX_ITEM_HEADS, "dim": MAX_DIM}  # the most that a kernel scores
CATEGORY_ITEMS = 10  # by default, a category that DAT aligns holds so many items on average


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
            _check_count(option, value)
            if kind != "onnx" and value > SERVED[option]:
                raise SpecError(
                    f"{option} of this network come to {value}, and at most {SERVED[option]} can be served: give fewer"
                )
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

    def score_lists(self, user: Tensor, items: Tensor, chosen: Tensor) -> Tensor:
        """`score` of the items (m, Ri) that each user's list names, chosen (b, n) int64 -> (b, n).

        Native code does it where it can, and then no item's record is copied for each of its lists.
        """
        if not takes(self.kind, user, items):
            return self.score(user, functional.embedding(chosen, items))
        best, bias = best_similarity(self.head(), user, items, chosen)
        if self.similarity is not None:
            best = self.similarity.scale() * best
        return best + bias if self.item_bias else best

    def regulariser(self, batch: Batch) -> Tensor | None:
        """A term of the network's own that training adds to the loss; None where it has none."""
        return None

    def importance(self) -> dict[str, float]:
        """How much each group of features counts, from 0 to 1, for a network that weighs them; written every epoch."""
        return {}


def _check_count(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(f"network option {option} is {value}: it must be a whole number of at least 1")


def _check_weight(option: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise SpecError(f"network option {option} is {value}: it must be a number of at least 0, 0 turns it off")


def _check_hidden(hidden: object, *, least: int) -> None:
    if not isinstance(hidden, (list, tuple)) or len(hidden) < least:
        raise SpecError(f"network option hidden is {hidden}: it must list the widths of at least {least} layers")
    for width in hidden:
        _check_count("hidden", width)


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
    """Two towers and gamma * cos (Huang et al., CIKM 2013); its sigmoid is monotone and lives in the calibration.

    `path` adds a linear map of the inputs to each tower, as RankTower has it: our own, and off.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        dim: int = 32,
        hidden: Sequence[int] = (128, 64),
        item_bias: bool = True,
        path: bool = False,
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
        self.user_path = nn.Linear(self.user_inputs.size, dim, bias=False) if path else None
        self.item_path = nn.Linear(self.item_inputs.size, dim, bias=False) if path else None
        if self.user_path is not None and self.item_path is not None:
            start_alike(self.user_inputs, self.item_inputs, (self.user_path, self.item_path))

    def user(self, x: Tensor) -> Tensor:
        x = self.user_inputs(self.tables, x)
        return unit(self.user_mlp(x) if self.user_path is None else self.user_mlp(x) + self.user_path(x))

    def item(self, x: Tensor) -> Tensor:
        x = self.item_inputs(self.tables, x)
        record = unit(self.item_mlp(x) if self.item_path is None else self.item_mlp(x) + self.item_path(x))
        return record if self.bias is None else torch.cat([record, self.bias(x)], dim=1)


def _mlp(size: int, hidden: Sequence[int], out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(size), *_relus(size, hidden, out))


def _relus(size: int, hidden: Sequence[int], out: int) -> list[nn.Module]:
    _check_hidden(hidden, least=0)
    layers: list[nn.Module] = []
    for before, after in pairwise([size, *hidden]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return [*layers, nn.Linear([size, *hidden][-1], out)]


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
        path: bool = True,
        cross_attention: bool = True,
        direction: Direction = "both",
        tied_values: bool = False,
        item_bias: bool = True,
        dropout: float = 0.1,
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
                path=path,
            )

        self.user_heads = gated(self.user_inputs, user_heads)
        self.item_heads = gated(self.item_inputs, item_heads)
        if self.user_heads.u is not None and self.item_heads.u is not None:
            start_alike(self.user_inputs, self.item_inputs, (self.user_heads.u, self.item_heads.u))
        self.cross = GatedCrossAttention(dim, direction=direction, tied_values=tied_values) if cross_attention else None
        self.bias = Bias(self.item_inputs.size) if item_bias else None

    def user(self, x: Tensor) -> Tensor:
        e = self.user_heads(self.user_inputs(self.tables, x))  # (b, Hu, d)
        return unit(e).flatten(1) if self.cross is None else self.cross.user(e)

    def item(self, x: Tensor) -> Tensor:
        x = self.item_inputs(self.tables, x)  # (b, D)
        e = self.item_heads(x)  # (b, Hi, d)
        bias = [] if self.bias is None else [self.bias(x)]
        return torch.cat([unit(e).flatten(1), *bias], dim=1) if self.cross is None else self.cross.item(e, *bias)


class DAT(Network):
    """Dual augmented two-tower (Yu et al., DLP-KDD 2021): every user and item id has a vector a beside its fields.

    a_u learns to be what the items that user took look like, the mean of |a_u - p_v|^2 over positive pairs, a_v the
    reverse, and p stands still in it; item vectors of different categories are drawn to one covariance. Published are
    the two towers with unit vectors and both terms with their weights. Ours: the scale and the item bias that TwoTower
    has (unit dots span [-1, 1], too little for a margin; `scaled` and `item_bias` turn them off), and the choice of
    categories: the field `category`, by default the first categorical or multi-valued one of the item whose values hold
    ten items each on average, for few gather items in a batch otherwise; of several values the first counts. Without
    such a field nothing is aligned.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        dim: int = 32,
        hidden: Sequence[int] = (256, 128),
        mimic: float = 0.5,
        align: float = 1.0,
        category: str | None = None,
        categories: int = 10,
        scaled: bool = True,
        item_bias: bool = True,
        dropout: float = 0.2,
        field_dropout: float = 0.0,
    ) -> None:
        super().__init__("maxsim", user_heads=1, item_heads=1, dim=dim, item_bias=item_bias, scaled=scaled)
        _check_weight("mimic", mimic)
        _check_weight("align", align)
        _check_count("categories", categories)
        self.tables = Tables(spec)
        self.user_inputs = Inputs(spec, "user", self.tables, dropout=dropout, field_dropout=field_dropout)
        self.item_inputs = Inputs(spec, "item", self.tables, dropout=dropout)
        self.user_augmented = Augmented(spec, "user", dim)
        self.item_augmented = Augmented(spec, "item", dim)
        self.user_mlp = _mlp(self.user_inputs.size + dim, hidden, dim)
        self.item_mlp = _mlp(self.item_inputs.size + dim, hidden, dim)
        self.bias = Bias(self.item_inputs.size) if item_bias else None
        self.mimic, self.align, self.categories = mimic, align, categories
        self.category = _category_column(spec, category) if align else None

    def user(self, x: Tensor) -> Tensor:
        return unit(self.user_mlp(torch.cat([self.user_inputs(self.tables, x), self.user_augmented(x)], dim=1)))

    def item(self, x: Tensor) -> Tensor:
        fields = self.item_inputs(self.tables, x)
        record = unit(self.item_mlp(torch.cat([fields, self.item_augmented(x)], dim=1)))
        return record if self.bias is None else torch.cat([record, self.bias(fields)], dim=1)

    def regulariser(self, batch: Batch) -> Tensor | None:
        p_v = batch.item[:, : self.item_shape[2]]  # (m, d), without the bias
        terms = []
        if self.mimic:
            users, items = batch.pairs()
            a_u = self.user_augmented(batch.users)[users]
            a_v = self.item_augmented(batch.items)[items]
            terms += [self.mimic * mimic(a_u, p_v[items]), self.mimic * mimic(a_v, batch.user[users])]
        if self.category is not None:
            terms.append(self.align * category_alignment(p_v, batch.items[:, self.category], most=self.categories))
        return torch.stack(terms).sum() if terms else None


class Augmented(nn.Module):
    """One trained vector per id of a side: index rows (b, width) -> (b, d)."""

    def __init__(self, spec: FeatureSpec, tower: TowerName, dim: int) -> None:
        super().__init__()
        name = spec.user_id_name if tower == "user" else spec.item_id_name
        if name not in spec.columns(tower):
            raise SpecError(
                f"this network keeps a vector for each {tower} id, and {name!r} is no {tower} field: declare it as one"
            )
        field = next(field for field in spec.tower_fields(tower) if field.name == name)
        self.column = spec.columns(tower)[name].start
        self.vectors = nn.Embedding(spec.owner(field).size, dim)
        nn.init.normal_(self.vectors.weight, std=EMBEDDING_STD)

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.vectors(x[:, self.column])
        return vectors


def _category_column(spec: FeatureSpec, name: str | None) -> int | None:
    """The column of an item's category: of the field of that name, else of the first that is coarse enough, if any."""
    fields = {f.name: f for f in spec.item_fields if f.kind in ("categorical", "multi") and f.name != spec.item_id_name}
    if name is not None and name not in fields:
        known = f"use one of {', '.join(fields)}" if fields else "items have no categorical or multi-valued field"
        raise SpecError(f"network option category is {name!r}: {known}, or give align 0")
    if name is None:
        items = _values(spec, next(f for f in spec.item_fields if f.name == spec.item_id_name))
        name = next((n for n, f in fields.items() if 2 <= _values(spec, f) <= items / CATEGORY_ITEMS), None)
    return None if name is None else spec.columns("item")[name].start


def _values(spec: FeatureSpec, field: Field) -> int:
    return len(spec.owner(field).vocabulary)


class IntTower(Network):
    """Towers that meet at every layer (Li et al., CIKM 2022): light-SE, the FE block, and the CIR term.

    The FE block maps each layer h_l of the user's tower to Hu vectors and the item's last layer to Hi vectors:
        s = sum_l sum_p max_q <u_lp, v_q>        raw dots
    which is `maxsim` with layers x Hu user vectors (32 can be served). CIR draws the last layers of a user and an
    item that it took together: InfoNCE at `tau` among the batch's other positives. Published are the blocks, widths,
    raw dots and tau; ours are Hu, Hi and d, the layer norm of the inputs, CIR's weight, its rivals (so that it costs a
    pass of few items), and the item bias, off at first, for raw dots can tell popular items.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        user_heads: int = 4,
        item_heads: int = 4,
        dim: int = 32,
        hidden: Sequence[int] = (300, 300, 128),
        cir: float = 0.1,
        tau: float = 0.07,
        item_bias: bool = False,
        dropout: float = 0.2,
        field_dropout: float = 0.0,
    ) -> None:
        _check_hidden(hidden, least=1)
        _check_count("user_heads", user_heads)
        heads = len(hidden) * user_heads
        super().__init__("maxsim", user_heads=heads, item_heads=item_heads, dim=dim, item_bias=item_bias, scaled=False)
        _check_weight("cir", cir)
        if not isinstance(tau, (int, float)) or not 0 < tau < math.inf:
            raise SpecError(f"network option tau is {tau}: it must be a number above 0")
        self.tables = Tables(spec)
        self.user_inputs = Inputs(spec, "user", self.tables, dropout=dropout, field_dropout=field_dropout)
        self.item_inputs = Inputs(spec, "item", self.tables, dropout=dropout)
        self.user_layers = Layers(self.user_inputs.sizes, hidden)
        self.item_layers = Layers(self.item_inputs.sizes, hidden)
        self.user_fe = nn.ModuleList(nn.Linear(width, user_heads * dim) for width in hidden)
        self.item_fe = nn.Linear(hidden[-1], item_heads * dim)
        self.bias = Bias(self.item_inputs.size) if item_bias else None
        self.cir, self.tau = cir, tau

    def user(self, x: Tensor) -> Tensor:
        layers = self.user_layers(self.user_inputs(self.tables, x))
        return wide(torch.cat([fe(h) for fe, h in zip(self.user_fe, layers, strict=True)], dim=1))

    def item(self, x: Tensor) -> Tensor:
        x = self.item_inputs(self.tables, x)
        record = wide(self.item_fe(self.item_layers(x)[-1]))
        return record if self.bias is None else torch.cat([record, self.bias(x)], dim=1)

    def regulariser(self, batch: Batch) -> Tensor | None:
        if not self.cir:
            return None
        users, items = batch.pairs()
        liked, place = items.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # (k,) rows of batch.items
        likes = batch.mask.new_zeros(len(batch.users), len(liked))
        likes[users, place] = True
        user = self.user_layers(self.user_inputs(self.tables, batch.users))[-1]
        item = self.item_layers(self.item_inputs(self.tables, batch.items[liked]))[-1]
        return self.cir * contrast(user, item, likes, tau=self.tau)


class Layers(nn.Module):
    """Fields weighed by light-SE, then a tower that gives every layer's output: (b, D) -> [(b, width) each]."""

    def __init__(self, sizes: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        self.se = LightSE(sizes)
        self.norm = nn.LayerNorm(sum(sizes))
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise([sum(sizes), *hidden]))

    def forward(self, x: Tensor) -> list[Tensor]:
        h: Tensor = self.norm(self.se(x))
        outputs = []
        for layer in self.layers:
            h = layer(h).relu()
            outputs.append(h)
        return outputs


class COLD(Network):
    """One network over user, item and cross features of a pair (Wang et al., DLP-KDD 2020), served as `head.onnx`.

    Records are embeddings; all else runs per pair, where v_1..v_M are the groups' embeddings, x all side by side:
        s = sigmoid(W x + b)        one weight per group (the SE block)
        z = MLP(norm(x) * s)        norm: LayerNorm of the fields, and of the products, each by itself
    The paper keeps the K groups of largest mean weight and trains again: `importance` gives the means, the option
    `groups` names those to keep. A group is a field, or `user field*item field`, the product of two embeddings of one
    size. Published are the block, the widths and the selection; ours are the products, in place of crosses made by hand
    (by default of fields that share a table, such as history*item_id, else of the ids), and the layer norms: products
    of embeddings are small, and one norm of all would keep them so.
    """

    gate_mean: Tensor  # (M,) of s over the last 100 training batches or so

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        groups: Sequence[str] | None = None,
        hidden: Sequence[int] = (1024, 512, 256, 128, 64),
        dropout: float = 0.2,
        field_dropout: float = 0.0,
    ) -> None:
        chosen = Groups(spec, groups)
        super().__init__(
            "onnx",
            user_heads=len(chosen.units["user"]),
            item_heads=len(chosen.units["item"]),
            dim=1,
            item_bias=False,
            scaled=False,
        )
        self.groups = chosen.names
        self.tables = Tables(spec)
        self.user_inputs = Inputs(spec, "user", self.tables, dropout=dropout, field_dropout=field_dropout)
        self.item_inputs = Inputs(spec, "item", self.tables, dropout=dropout)
        self.units = Places(user=chosen.units["user"], item=chosen.units["item"])
        self.alone = Places(user=chosen.alone["user"], item=chosen.alone["item"])
        self.crossed = Places(user=chosen.crossed["user"], item=chosen.crossed["item"])
        size = sum(chosen.sizes)
        self.spread: Tensor
        spread = torch.repeat_interleave(torch.arange(len(chosen.names)), torch.tensor(chosen.sizes))
        self.register_buffer("spread", spread, persistent=False)  # (D,) the group of each unit of x
        self.register_buffer("gate_mean", torch.full((len(chosen.names),), 0.5))
        self.se = nn.Linear(size, len(chosen.names))
        crosses = len(chosen.crossed["user"])
        self.norm = nn.LayerNorm(size - crosses)
        self.cross_norm = nn.LayerNorm(crosses) if crosses else None
        self.mlp = nn.Sequential(*_relus(size, hidden, 1))

    def user(self, x: Tensor) -> Tensor:
        return wide(self.user_inputs(self.tables, x)[:, self.units.user])

    def item(self, x: Tensor) -> Tensor:
        return wide(self.item_inputs(self.tables, x)[:, self.units.item])

    def score(self, user: Tensor, item: Tensor) -> Tensor:
        b, n, _ = item.shape
        with torch.autocast(user.device.type, enabled=False):
            user, item = wide(user).unsqueeze(1), wide(item)
            crosses = user[..., self.crossed.user] * item[..., self.crossed.item]
            fields = torch.cat([user[..., self.alone.user].expand(b, n, -1), item[..., self.alone.item]], dim=2)
            gate = self.se(torch.cat([fields, crosses], dim=2)).sigmoid()  # (b, n, M)
            if self.training:
                self.gate_mean.lerp_(gate.detach().mean(dim=(0, 1)), 0.01)
            normed = self.norm(fields)
            if self.cross_norm is not None:
                normed = torch.cat([normed, self.cross_norm(crosses)], dim=2)
            scores: Tensor = self.mlp(normed * gate[..., self.spread]).squeeze(2)
            return scores

    def importance(self) -> dict[str, float]:
        return dict(zip(self.groups, self.gate_mean.tolist(), strict=True))


class Places(nn.Module):
    """Where units lie on either side, moved with the network and not saved."""

    user: Tensor  # (u,) long
    item: Tensor  # (i,) long

    def __init__(self, *, user: Sequence[int], item: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("user", torch.tensor(user, dtype=torch.long), persistent=False)
        self.register_buffer("item", torch.tensor(item, dtype=torch.long), persistent=False)


class Groups:
    """COLD's groups of features, in the order of x: fields of the user, fields of the item, products of both."""

    def __init__(self, spec: FeatureSpec, wanted: Sequence[str] | None) -> None:
        fields = {tower: {field.name: field for field in spec.tower_fields(tower)} for tower in get_args(TowerName)}
        pairs = [(u, i) for u in spec.user_fields for i in spec.item_fields if u.dim == i.dim]
        crosses = {f"{u.name}*{i.name}": (u, i) for u, i in pairs}
        if wanted is None:
            shared = [name for name, (u, i) in crosses.items() if spec.table_of(u) == spec.table_of(i)]
            ids = f"{spec.user_id_name}*{spec.item_id_name}"
            products = shared or [name for name in crosses if name == ids]
            wanted = [*fields["user"], *fields["item"], *products]
        self._check(wanted, {*fields["user"], *fields["item"]}, set(crosses))
        crossed = {name: pair for name, pair in crosses.items() if name in wanted}
        single = {tower: [name for name in known if name in wanted] for tower, known in fields.items()}
        self.names = [*single["user"], *single["item"], *crossed]
        self.sizes = [fields[tower][name].dim for tower in fields for name in single[tower]]
        self.sizes += [u.dim for u, _ in crossed.values()]
        self.units: dict[str, list[int]] = {}  # a record's units among those of the tower's inputs
        self.alone: dict[str, list[int]] = {}  # of a record: the fields that are groups, one after the other
        self.crossed: dict[str, list[int]] = {}  # of a record: the factors of the products
        for side, (tower, known) in enumerate(fields.items()):
            factors = [pair[side].name for pair in crossed.values()]
            kept = [name for name in known if name in single[tower] or name in factors]
            if not kept:
                raise SpecError(f"network option groups names no {tower} field: name one, or a product with one")
            inputs, record = _spans(known.values()), _spans(known[name] for name in kept)
            self.units[tower] = [unit for name in kept for unit in inputs[name]]
            self.alone[tower] = [unit for name in single[tower] for unit in record[name]]
            self.crossed[tower] = [unit for name in factors for unit in record[name]]

    @staticmethod
    def _check(wanted: object, fields: set[str], crosses: set[str]) -> None:
        if not isinstance(wanted, (list, tuple)) or not wanted:
            raise SpecError(f"network option groups is {wanted!r}: give a list of fields and products, or leave it out")
        for name in wanted:
            if name not in fields | crosses:
                known = ", ".join(sorted(fields))
                raise SpecError(
                    f"network option groups has {name!r}: use fields ({known}) or user field*item field of equal dim"
                )
            if wanted.count(name) > 1:
                raise SpecError(f"network option groups has {name!r} {wanted.count(name)} times: keep one")


def _spans(fields: Iterable[Field]) -> dict[str, range]:
    """The units of each field, laid side by side."""
    spans, start = {}, 0
    for field in fields:
        spans[field.name] = range(start, start + field.dim)
        start += field.dim
    return spans


NETWORKS: dict[str, type[Network]] = {
    "lr": LR,
    "two_tower": TwoTower,
    "dat": DAT,
    "cold": COLD,
    "inttower": IntTower,
    "ranktower": RankTower,
}
