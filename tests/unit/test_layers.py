"""The blocks of the networks against loops in float64, and the promises that their docstrings make."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.errors import SpecError
from model.features import FeatureSpec, Field
from model.layers import (
    PATH_GAIN,
    SCALE_RANGE,
    AttentionPooling,
    GatedCrossAttention,
    GatedHeads,
    HeadLinear,
    Inputs,
    LightSE,
    MaximumSimilarity,
    MeanPooling,
    Tables,
    attended_similarity,
    dot_similarity,
    dropped,
    start_alike,
    unit,
)

HISTORY = Field(name="history", side="user", kind="sequence", dim=4, length=5, pooling="attention", shares="item_id")
TAGS = Field(name="tags", side="item", kind="multi", dim=3, length=4, vocabulary=(1, 2, 3))
SPEC = FeatureSpec(
    (
        HISTORY,
        Field(name="age", side="user", kind="numeric", dim=2, edges=(20.0, 40.0)),
        Field(name="hour", side="context", kind="categorical", dim=2, vocabulary=(0, 1, 2)),
        Field(name="item_id", side="item", kind="categorical", dim=4, vocabulary=tuple(range(10, 16))),
        TAGS,
    ),
    "int",
    "int",
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_are_the_embeddings_side_by_side_with_lists_pooled_over_their_entries() -> None:
    tables = Tables(SPEC)
    ids, tags = tables[tables.owners.index("item_id")].weight, tables[tables.owners.index("tags")].weight
    inputs = Inputs(SPEC, "item", tables)
    x = inputs(tables, torch.tensor([[3, 2, 4, 0, 0], [1, 4, 4, 2, 3]], dtype=torch.int32))
    expected = [torch.cat([ids[3], tags[[2, 4]].mean(0)]), torch.cat([ids[1], tags[[4, 4, 2, 3]].mean(0)])]
    torch.testing.assert_close(x, torch.stack(expected))
    assert inputs.size == x.shape[1] == 7


def test_an_empty_list_reads_row_missing() -> None:
    tables = Tables(SPEC)
    for tower, place in (("item", slice(4, 7)), ("user", slice(0, 4))):
        owner = tables.owners.index("tags" if tower == "item" else "item_id")
        width = SPEC.item_width if tower == "item" else SPEC.user_width
        x = Inputs(SPEC, tower, tables)(tables, torch.zeros(1, width, dtype=torch.int32))
        torch.testing.assert_close(x[0, place], tables[owner].weight[0])


def test_a_field_that_shares_a_table_reads_its_owner_s_parameter() -> None:
    tables = Tables(SPEC)
    assert tables.owners == ["age", "hour", "item_id", "tags"]
    user, item = Inputs(SPEC, "user", tables), Inputs(SPEC, "item", tables)
    history = user(tables, torch.tensor([[5, 0, 0, 0, 0, 1, 1]]))[:, :4]
    torch.testing.assert_close(history, item(tables, torch.tensor([[5, 2, 0, 0, 0]]))[:, :4])


@pytest.mark.parametrize("pool", [MeanPooling(), AttentionPooling(HISTORY, 4), AttentionPooling(TAGS, 4)])
def test_pooling_starts_as_the_mean_of_entries_and_padding_has_no_influence(pool: nn.Module) -> None:
    e = torch.randn(2, 5, 4)
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    pooled = pool(e, mask)
    torch.testing.assert_close(pooled, torch.stack([e[0, [0, 1, 3]].mean(0), e[1, 0]]))
    torch.testing.assert_close(pool(e.masked_fill(~mask.unsqueeze(2), 1e9), mask), pooled)


def test_attention_weighs_by_query_and_by_age_counted_from_the_last_entry() -> None:
    pool = AttentionPooling(HISTORY, 4)
    nn.init.normal_(pool.query)
    assert pool.age is not None
    nn.init.normal_(pool.age)
    e, mask = torch.randn(1, 5, 4), torch.tensor([[False, False, True, True, True]])
    weights = torch.stack([(e[0, t] @ pool.query + pool.age[4 - t]).exp() for t in range(2, 5)])
    torch.testing.assert_close(pool(e, mask)[0], weights / weights.sum() @ e[0, 2:])


def test_field_dropout_hides_the_context_alone_and_only_in_training() -> None:
    tables = Tables(SPEC)
    inputs = Inputs(SPEC, "user", tables, field_dropout=0.5)
    x = torch.tensor([[2, 3, 0, 0, 0, 1, 2]]).expand(200, -1)
    hour = tables[tables.owners.index("hour")].weight
    hidden = (inputs(tables, x)[:, -2:] == hour[0]).all(dim=1)
    assert 60 < hidden.sum() < 140
    assert (inputs(tables, x)[:, :-2] == inputs(tables, x)[0, :-2]).all()
    inputs.eval()
    assert (inputs(tables, x)[:, -2:] == hour[2]).all()


def test_dropped_units_are_zero_and_the_others_keep_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 400, requires_grad=True)
    found = dropped(x, 0.3)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert found.mean().item() == pytest.approx(1, abs=0.01)
    (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope, found.detach())


def test_a_tower_without_fields_is_refused() -> None:
    spec = FeatureSpec((TAGS,), "int", "int")
    with pytest.raises(SpecError, match="the user tower has no fields"):
        Inputs(spec, "user", Tables(spec))


def test_light_se_adds_to_each_field_its_share_of_a_softmax_over_fields() -> None:
    sizes = [2, 4, 3]
    se, x = LightSE(sizes).double(), torch.randn(5, 9, dtype=torch.double)
    for row, found in zip(x, se(x), strict=True):
        fields = row.split(sizes)
        logits = se.w.weight @ torch.stack([field.mean() for field in fields])
        weights = [math.exp(one) / sum(map(math.exp, logits.tolist())) for one in logits.tolist()]
        expected = torch.cat([field + field * weight for field, weight in zip(fields, weights, strict=True)])
        torch.testing.assert_close(found, expected)


# --- gated heads -----------------------------------------------------------------------------------------------------


def test_head_linear_is_one_linear_map_for_each_head() -> None:
    layer, x = HeadLinear(3, 5, 2), torch.randn(3, 7, 5)
    expected = [x[p] @ layer.weight[p] + layer.bias[p] for p in range(3)]
    torch.testing.assert_close(layer(x), torch.stack(expected))


def gated_heads(input_gate: str, output_gate: bool = True, path: bool = False) -> GatedHeads:
    torch.manual_seed(0)
    return GatedHeads(
        [2, 4, 3], heads=3, dim=5, hidden=6, gate_hidden=4, input_gate=input_gate, output_gate=output_gate, path=path
    )


@pytest.mark.parametrize("input_gate", ["units", "fields", "off"])
@pytest.mark.parametrize("output_gate", [True, False])
@pytest.mark.parametrize("path", [True, False])
def test_gated_heads_follow_their_equations(input_gate: str, output_gate: bool, path: bool) -> None:
    heads, x = gated_heads(input_gate, output_gate, path), torch.randn(4, 9)
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    found = heads(x)
    assert found.shape == (4, 3, 5)
    normed = heads.norm(x)
    for p in range(3):
        h = normed
        if heads.w1 is not None:
            inner = heads.w1(x)[:, 4 * p : 4 * p + 4].relu()
            gate = 2 * (inner @ heads.w2.weight[p] + heads.w2.bias[p]).sigmoid()
            h = h * (gate if input_gate == "units" else gate[:, [0, 0, 1, 1, 1, 1, 2, 2, 2]])
        e = (h @ heads.first.weight[p] + heads.first.bias[p]).relu() @ heads.second.weight[p] + heads.second.bias[p]
        if heads.v is not None:
            e = e * heads.v(x)[:, 5 * p : 5 * p + 5].sigmoid()
        if heads.u is not None:
            e = e + x @ heads.u.weight[5 * p : 5 * p + 5].T
        torch.testing.assert_close(found[:, p], e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("input_gate", ["units", "fields"])
def test_the_input_gate_is_one_at_the_start(input_gate: str) -> None:
    gated, plain, x = gated_heads(input_gate), gated_heads("off"), torch.randn(4, 9)
    shared = {name: value for name, value in gated.state_dict().items() if not name.startswith("w")}
    plain.load_state_dict(shared)
    torch.testing.assert_close(gated(x), plain(x))


def test_paths_start_as_one_projection_of_what_both_sides_read() -> None:
    tables = Tables(SPEC)
    user, item = Inputs(SPEC, "user", tables), Inputs(SPEC, "item", tables)
    paths = nn.Linear(user.size, 24, bias=False), nn.Linear(item.size, 24, bias=False)
    start_alike(user, item, paths)
    x, y = torch.randn(5, user.size), torch.randn(6, item.size)
    common = [(u, i) for u in SPEC.user_fields for i in SPEC.item_fields if SPEC.table_of(u) == SPEC.table_of(i)]
    assert common
    expected = torch.zeros(5, 6)
    for u, i in common:
        left = torch.split(x, user.sizes, dim=1)[user.fields.index(u)]
        expected += left @ torch.split(y, item.sizes, dim=1)[item.fields.index(i)].T
    torch.testing.assert_close(paths[0](x) @ paths[1](y).T, PATH_GAIN**2 * expected, rtol=1e-4, atol=1e-4)


# --- similarity ------------------------------------------------------------------------------------------------------


def cross_attention_oracle(user: np.ndarray, e: np.ndarray, v: np.ndarray, g: np.ndarray) -> np.ndarray:
    """One pair by loops: user (5, Hu, d), item parts (Hi, d) -> cosines (Hu, Hi)."""
    eu, vu, gu, a, b = user
    hu, hi, d = len(eu), len(e), e.shape[1]
    looks = np.array([[a[p] @ e[q] for q in range(hi)] for p in range(hu)]) / math.sqrt(d)
    seen = np.array([[b[p] @ e[q] for q in range(hi)] for p in range(hu)]) / math.sqrt(d)
    users, items = [], []
    for p in range(hu):
        weight = np.exp(looks[p]) / np.exp(looks[p]).sum()
        users.append(eu[p] + gu[p] * sum(weight[q] * v[q] for q in range(hi)))
    for q in range(hi):
        weight = np.exp(seen[:, q]) / np.exp(seen[:, q]).sum()
        items.append(e[q] + g[q] * sum(weight[p] * vu[p] for p in range(hu)))
    return np.array([[x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for y in items] for x in users])


def random_parts(b: int = 2, n: int = 3, hu: int = 3, hi: int = 2, d: int = 4) -> tuple[Tensor, ...]:
    user = torch.randn(b, 5, hu, d, dtype=torch.float64)
    return user, *(torch.randn(b, n, hi, d, dtype=torch.float64) for _ in range(3))


def test_attended_similarity_equals_loops_over_pairs_and_heads() -> None:
    user, e, v, g = random_parts()
    found = attended_similarity(user, e, v, g)
    assert found.shape == (2, 3, 3, 2)
    for b in range(2):
        for n in range(3):
            expected = cross_attention_oracle(user[b].numpy(), e[b, n].numpy(), v[b, n].numpy(), g[b, n].numpy())
            np.testing.assert_allclose(found[b, n].numpy(), expected, rtol=1e-10)


def test_gradients_of_attended_similarity_are_those_of_finite_differences() -> None:
    parts = [part.requires_grad_() for part in random_parts(b=1, n=2, hu=2, hi=2, d=3)]
    assert torch.autograd.gradcheck(attended_similarity, parts)


def test_zero_vectors_have_similarity_zero_and_finite_gradients() -> None:
    user, *item = (torch.zeros_like(part).float().requires_grad_() for part in random_parts())
    similarity = attended_similarity(user, *item)
    assert not similarity.any()
    similarity.sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in (user, *item))


def test_dot_similarity_is_the_product_of_every_pair_of_heads() -> None:
    user, item = torch.randn(2, 3, 4), torch.randn(2, 5, 2, 4)
    torch.testing.assert_close(dot_similarity(user, item), torch.einsum("bpd,bnqd->bnpq", user, item))


def test_closed_gates_leave_maximum_similarity_of_the_heads() -> None:
    cross = GatedCrossAttention(4, direction="both", tied_values=False)
    for part in (cross.user_parts[1], cross.item_parts[1]):
        nn.init.constant_(part.bias, -1e4)
    eu, ei = torch.randn(2, 3, 4), torch.randn(10, 2, 4)
    user, item = cross.user(eu).view(2, 5, 3, 4), cross.item(ei).view(2, 5, 3, 2, 4)
    found = attended_similarity(user, *item.unbind(2))
    torch.testing.assert_close(found, dot_similarity(unit(eu), unit(ei.view(2, 5, 2, 4))))


@pytest.mark.parametrize(("direction", "closed"), [("user", "item"), ("item", "user")])
def test_one_direction_closes_the_other_side_s_gate(direction: str, closed: str) -> None:
    cross = GatedCrossAttention(4, direction=direction, tied_values=False)
    e = torch.randn(2, 3, 4)
    records = {"user": cross.user(e).view(2, 5, 3, 4), "item": cross.item(e).view(2, 3, 3, 4)}
    assert not records.pop(closed)[:, 2].any()
    assert records.popitem()[1][:, 2].all()


def test_an_item_s_bias_is_the_last_number_of_its_record() -> None:
    cross, e, bias = (
        GatedCrossAttention(4, direction="both", tied_values=False),
        torch.randn(2, 3, 4),
        torch.randn(2, 1),
    )
    torch.testing.assert_close(cross.item(e, bias), torch.cat([cross.item(e), bias], dim=1))


def test_tied_values_are_the_head_vectors() -> None:
    cross, e = GatedCrossAttention(4, direction="both", tied_values=True), torch.randn(2, 3, 4)
    record = cross.item(e).view(2, 3, 3, 4)
    torch.testing.assert_close(record[:, 1], record[:, 0])


def test_unit_divides_by_the_floor_where_the_norm_is_smaller() -> None:
    tiny = torch.tensor([[3e-8, 4e-8], [3.0, 4.0]])
    torch.testing.assert_close(unit(tiny), torch.tensor([[0.03, 0.04], [0.6, 0.8]]))


def test_maximum_similarity_sums_the_best_of_each_user_head() -> None:
    layer = MaximumSimilarity(user_heads=2)
    assert layer.scale().item() == pytest.approx(5)
    similarity = torch.tensor([[[[0.1, 0.9, -1.0], [-0.5, -0.2, -0.3]]]])
    assert layer(similarity).item() == pytest.approx(5 * (0.9 - 0.2))


@pytest.mark.parametrize(("theta", "bound"), [(-50.0, SCALE_RANGE[0]), (50.0, SCALE_RANGE[1])])
def test_the_temperature_stays_in_range_and_can_come_back(theta: float, bound: float) -> None:
    layer = MaximumSimilarity(user_heads=4)
    nn.init.constant_(layer.theta, theta)
    scale = layer.scale()
    assert scale.item() == pytest.approx(bound, rel=1e-4)
    scale.backward()
    assert layer.theta.grad is not None
    assert layer.theta.grad != 0
