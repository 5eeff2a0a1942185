"""Every network in NETWORKS: shapes, batch invariance, gradients, learning; the same in torch, ONNX and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from kernel.record import RecordLayout
from kernel.reference import score
from model.errors import SpecError
from model.export import OPSET
from model.features import FeatureSpec, Field
from model.losses import Labels, softmax
from model.networks import COLD, DAT, LR, NETWORKS, IntTower, Network, RankTower, TwoTower
from model.regularisers import Batch, category_alignment, contrast, mimic

SPEC = FeatureSpec(
    (
        Field(name="user_id", side="user", kind="categorical", dim=8, vocabulary=tuple("abcdef"), values="string"),
        Field(name="history", side="user", kind="sequence", dim=8, length=4, pooling="attention", shares="item_id"),
        Field(name="age", side="user", kind="numeric", dim=4, edges=(20.0, 30.0, 40.0)),
        Field(name="hour", side="context", kind="categorical", dim=4, vocabulary=(0, 1, 2)),
        Field(name="item_id", side="item", kind="categorical", dim=8, vocabulary=tuple(range(30))),
        Field(name="tags", side="item", kind="multi", dim=4, length=3, vocabulary=(7, 8, 9)),
        Field(name="price", side="item", kind="numeric", dim=4, edges=(1.0, 2.0)),
    ),
    "string",
    "int",
)
SMALL: dict[str, dict[str, Any]] = {
    "ranktower": {"dim": 8, "hidden": 16, "gate_hidden": 4},
    "dat": {"dim": 8, "hidden": [16]},
    "cold": {"hidden": [16, 8]},
    "inttower": {"dim": 8, "hidden": [16, 12]},
}
SWITCHES: list[dict[str, Any]] = [
    {"item_bias": False},
    {"input_gate": "fields"},
    {"input_gate": "off", "output_gate": False},
    {"cross_attention": False},
    {"cross_attention": False, "item_bias": False, "user_heads": 1, "item_heads": 8},
    {"direction": "user"},
    {"direction": "item"},
    {"tied_values": True},
    {"tied_values": True, "direction": "item", "user_heads": 8, "item_heads": 1},
    {"user_heads": 2, "item_heads": 3},
]
LR_OF = {"cold": 0.005, "inttower": 0.005}  # scores without a bound overshoot where cosines cannot
VARIANTS = [(name, {}) for name in NETWORKS] + [("ranktower", options) for options in SWITCHES]
VARIANTS += [("two_tower", {"item_bias": False, "hidden": []})]
VARIANTS += [("dat", {"item_bias": False, "scaled": False, "mimic": 0, "align": 0, "hidden": []})]
VARIANTS += [("inttower", {"user_heads": 1, "item_heads": 3, "hidden": [9, 8, 7], "item_bias": True, "cir": 0})]

FOR_A_KERNEL = [(name, options) for name, options in VARIANTS if name != "cold"]


def network(name: str, **options: Any) -> Network:
    torch.manual_seed(0)
    dropout = {} if name == "lr" else {"dropout": 0.0}  # tests compare two passes of one network
    return NETWORKS[name](SPEC, **{**dropout, **SMALL.get(name, {}), **options})


def rows(tower: str, count: int, seed: int = 0) -> Tensor:
    """(count, width) int32 of valid indices; the first row is missing everywhere."""
    rng = np.random.default_rng(seed)
    fields = SPEC.user_fields if tower == "user" else SPEC.item_fields
    columns = [rng.integers(0, SPEC.owner(field).size, (count, field.length)) for field in fields]
    matrix = np.concatenate(columns, axis=1).astype(np.int32)
    matrix[0] = 0
    return torch.from_numpy(matrix)


def lists(net: Network, b: int = 4, n: int = 6) -> tuple[Tensor, Tensor]:
    """Records (b, Ru) and (b, n, Ri)."""
    return net.user(rows("user", b)), net.item(rows("item", b * n)).view(b, n, -1)


def train(net: Network, user: Tensor, item: Tensor, grade: Tensor, steps: int, lr: float = 0.02) -> Tensor:
    """Scores (b, n) after so many steps of multi-positive softmax."""
    everywhere = torch.ones_like(grade, dtype=torch.bool)
    labels = Labels(grade, torch.zeros(grade.shape), everywhere)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        softmax(score_lists(net, user, item), labels, everywhere).backward()
        optimizer.step()
    return score_lists(net, user, item).detach()


def score_lists(net: Network, user: Tensor, item: Tensor) -> Tensor:
    return net.score(net.user(user), net.item(item.flatten(0, 1)).unflatten(0, item.shape[:2]))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_records_and_scores_have_the_shapes_that_the_head_names(name: str, options: dict[str, Any]) -> None:
    net = network(name, **options)
    head = net.head()
    user, item = lists(net)
    assert user.shape == (4, head.user_size)
    assert item.shape == (4, 6, head.item_size)
    assert net.score(user, item).shape == (4, 6)
    assert user.dtype == item.dtype == torch.float32
    assert torch.equal(net.user(rows("user", 4).long()), user)


@pytest.mark.parametrize(("name", "options"), FOR_A_KERNEL)
def test_scores_equal_those_of_the_numpy_reference(name: str, options: dict[str, Any]) -> None:
    net = network(name, **options).eval()
    with torch.no_grad():
        user, item = lists(net)
        found = net.score(user, item).numpy()
    for row in range(len(user)):
        expected = score(net.head(), user[row].numpy(), item[row].numpy())
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_batch_equals_its_rows_one_by_one(name: str, options: dict[str, Any]) -> None:
    net = network(name, **options).eval()
    for tower in ("user", "item"):
        batch = rows(tower, 9)
        alone = [getattr(net, tower)(batch[i, None]) for i in range(9)]
        torch.testing.assert_close(torch.cat(alone), getattr(net, tower)(batch))
    user, item = lists(net)
    alone = [net.score(user[i, None], item[i, None, j, None]) for i in range(4) for j in range(6)]
    torch.testing.assert_close(torch.cat(alone).view(4, 6), net.score(user, item))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any]) -> None:
    net = network(name, **options)
    user, item, grade = rows("user", 8), rows("item", 48).view(8, 6, -1), torch.eye(8, 6).int()
    train(net, user, item, grade, steps=2)  # what starts at zero hides what lies below it
    net.zero_grad()
    score_lists(net, user, item).square().sum().backward()
    for place, parameter in net.named_parameters():
        assert parameter.grad is not None, place
        assert parameter.grad.any(), place
        assert parameter.grad.isfinite().all(), place


@pytest.mark.parametrize("name", NETWORKS)
def test_it_overfits_a_tiny_set_of_lists(name: str) -> None:
    user, item = rows("user", 6, seed=1), rows("item", 8, seed=1).expand(6, 8, -1)
    liked_by_all = torch.arange(8) % 4 == 1
    own = torch.eye(6, 8).roll(1, dims=1).bool()
    grade = (liked_by_all.expand(6, 8) if name == "lr" else own).int()
    scores = train(network(name), user, item, grade, steps=60, lr=LR_OF.get(name, 0.02))
    worst, best = scores.masked_fill(grade == 0, 99).amin(dim=1), scores.masked_fill(grade > 0, -99).amax(dim=1)
    assert (worst > best).all()


class Towers(nn.Module):
    """Both towers as one graph: tracing is what takes the time."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.user(user), self.net.item(item)


@pytest.mark.filterwarnings("ignore")  # the exporter deprecates its own internals
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_equals_onnx_runtime_for_any_batch(name: str) -> None:
    net = network(name)
    train(net, rows("user", 8), rows("item", 48).view(8, 6, -1), torch.eye(8, 6).int(), steps=3)
    net.eval()
    batches = ({0: torch.export.Dim("users")}, {0: torch.export.Dim("items")})
    program = torch.onnx.export(
        Towers(net),
        (rows("user", 2), rows("item", 2)),
        input_names=["user", "item"],
        dynamic_shapes=batches,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for users, items in ((1, 33), (2, 1), (33, 2)):
        user, item = rows("user", users, seed=1), rows("item", items, seed=2)
        found = session.run(None, {"user": user.numpy(), "item": item.numpy()})
        with torch.no_grad():
            expected = net.user(user), net.item(item)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_autocast_gives_float32_records_and_nearly_the_same_scores(name: str) -> None:
    net = network(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        user, item = lists(net)
        found = net.score(user, item)
        found.sum().backward()
    assert user.dtype == item.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, net.score(*lists(net)), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_can_be_saved_without_shared_memory_and_read_back(name: str) -> None:
    net = network(name)
    save(net.state_dict())
    other = network(name)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.user(rows("user", 3)), net.user(rows("user", 3)))


def test_lr_is_a_sum_of_one_weight_for_each_field() -> None:
    net = network("lr")
    assert isinstance(net, LR)
    item_id, tags, price = (net.tables[net.tables.owners.index(name)].weight for name in ("item_id", "tags", "price"))
    one = net.item(torch.tensor([[5, 2, 3, 0, 1]]))
    torch.testing.assert_close(one[0, 1], (item_id[5] + tags[[2, 3]].mean(0) + price[1]).squeeze())
    user, item = lists(net)
    torch.testing.assert_close(net.score(user, item), user[:, :1] + item[..., 1])


def test_two_tower_scores_are_gamma_times_a_cosine() -> None:
    net = network("two_tower", item_bias=False)
    assert isinstance(net, TwoTower)
    user, item = lists(net)
    cosine = torch.cosine_similarity(user.unsqueeze(1), item, dim=2)
    torch.testing.assert_close(net.score(user, item), net.head().scale * cosine)


@pytest.mark.parametrize("name", ["two_tower", "dat", "ranktower"])
def test_the_item_bias_starts_at_zero_and_is_added_to_the_score(name: str) -> None:
    net = network(name)
    user, item = lists(net)
    assert not item[..., -1].any()
    shifted = torch.cat([item[..., :-1], torch.full((4, 6, 1), 2.5)], dim=2)
    torch.testing.assert_close(net.score(user, shifted), net.score(user, item) + 2.5)


def test_scores_start_wide_enough_to_pass_a_margin_of_one() -> None:
    for heads in (1, 2, 4, 8):
        head = network("ranktower", user_heads=heads, item_heads=heads).head()
        assert head.scale * heads == pytest.approx(10)


def test_the_head_follows_the_learned_temperature() -> None:
    net = network("ranktower")
    assert net.similarity is not None
    nn.init.constant_(net.similarity.theta, 0.0)
    assert net.head().scale == 1.0


def test_evaluation_mode_is_deterministic_and_training_mode_drops() -> None:
    for name in ("two_tower", "dat", "inttower", "cold", "ranktower"):
        net, x = network(name, dropout=0.5, field_dropout=0.5), rows("user", 20)
        assert not torch.equal(net.user(x), net.user(x))
        net.eval()
        assert torch.equal(net.user(x), net.user(x))


def test_inttower_adds_the_best_raw_dots_of_every_user_layer() -> None:
    net = network("inttower", user_heads=2, item_heads=3)
    assert isinstance(net, IntTower)
    user, item = rows("user", 4), rows("item", 4)
    with torch.no_grad():
        layers = net.user_layers(net.user_inputs(net.tables, user))
        last = net.item_layers(net.item_inputs(net.tables, item))[-1]
        v = net.item_fe(last).view(4, 3, 8)
        expected = torch.zeros(4, 4)
        for h, fe in zip(layers, net.user_fe, strict=True):
            u = fe(h).view(4, 2, 8)
            expected += torch.einsum("bpd,nqd->bnpq", u, v).amax(dim=3).sum(dim=2)
        found = net.score(net.user(user), net.item(item).expand(4, -1, -1))
    torch.testing.assert_close(found, expected)
    assert net.head().user_heads == len(layers) * 2
    assert net.head().scale == 1.0


def test_dat_reads_a_vector_of_its_own_for_every_id() -> None:
    net = network("dat")
    assert isinstance(net, DAT)
    x, y = rows("user", 1, seed=4).repeat(2, 1), rows("item", 1, seed=4).repeat(2, 1)
    user_id, item_id = (SPEC.columns(tower)[f"{tower}_id"].start for tower in ("user", "item"))  # type: ignore[arg-type]
    x[:, user_id], y[:, item_id] = torch.tensor([2, 3]), torch.tensor([4, 5])
    torch.testing.assert_close(net.user_augmented(x), net.user_augmented.vectors.weight[[2, 3]])
    torch.testing.assert_close(net.item_augmented(y), net.item_augmented.vectors.weight[[4, 5]])
    before = net.user(x).detach()
    net.user_augmented.vectors.weight.data[3] += 1.0
    changed = (net.user(x) != before).any(dim=1)
    assert changed.tolist() == [False, True]


# --- COLD ------------------------------------------------------------------------------------------------------------


def cold_in_numpy(net: COLD, user: Tensor, item: Tensor) -> np.ndarray:
    """Scores (n,) of one user and n items from their fields, in float64: user (8 8 4 4), item (8 4 4), see SPEC."""
    w = {name: value.double().numpy() for name, value in net.state_dict().items()}
    item_64 = item.double().numpy()
    user_64 = np.broadcast_to(user.double().numpy(), (len(item), len(user)))
    fields = [*np.split(user_64, [8, 16, 20], axis=1), *np.split(item_64, [8, 12], axis=1)]
    groups = [*fields, fields[1] * fields[4]]  # history * item_id, which share a table
    x = np.concatenate(groups, axis=1)
    gate = 1 / (1 + np.exp(-(x @ w["se.weight"].T + w["se.bias"])))  # (n, 8)
    h = np.concatenate(
        [
            (part - part.mean(axis=1, keepdims=True))
            / np.sqrt(part.var(axis=1, keepdims=True) + 1e-5)
            * w[f"{norm}.weight"]
            + w[f"{norm}.bias"]
            for norm, part in (("norm", x[:, :40]), ("cross_norm", x[:, 40:]))
        ],
        axis=1,
    )
    h = np.concatenate(
        [part * gate[:, [k]] for k, part in enumerate(np.split(h, [8, 16, 20, 24, 32, 36, 40], axis=1))], axis=1
    )
    for layer in (0, 2):
        h = np.maximum(h @ w[f"mlp.{layer}.weight"].T + w[f"mlp.{layer}.bias"], 0)
    return np.asarray((h @ w["mlp.4.weight"].T + w["mlp.4.bias"])[:, 0])


def test_cold_gates_its_groups_and_runs_one_network_over_them() -> None:
    net = network("cold")
    assert isinstance(net, COLD)
    assert net.groups == ["user_id", "history", "age", "hour", "item_id", "tags", "price", "history*item_id"]
    train(net, rows("user", 8), rows("item", 48).view(8, 6, -1), torch.eye(8, 6).int(), steps=3)
    net.eval()
    with torch.no_grad():
        user, item = lists(net)
        found = net.score(user, item)
    for row in range(4):
        np.testing.assert_allclose(found[row], cold_in_numpy(net, user[row], item[row]), rtol=1e-4, atol=1e-5)


def test_cold_crosses_the_ids_where_no_fields_share_a_table() -> None:
    fields = [field for field in SPEC.fields if field.name in ("user_id", "item_id", "price")]
    net = NETWORKS["cold"](FeatureSpec(tuple(fields), "string", "int"))
    assert isinstance(net, COLD)
    assert net.groups == ["user_id", "item_id", "price", "user_id*item_id"]


def test_cold_keeps_the_groups_that_are_named_and_records_hold_no_others() -> None:
    net = network("cold", groups=["price", "history*item_id", "user_id", "age*tags"])
    assert isinstance(net, COLD)
    assert net.groups == ["user_id", "price", "history*item_id", "age*tags"]
    assert (net.head().user_size, net.head().item_size) == (8 + 8 + 4, 8 + 4 + 4)  # without hour; all of the item
    user, item = rows("user", 3, seed=5), rows("item", 3, seed=5)
    scores = net.score(net.user(user), net.item(item).expand(3, -1, -1))
    fields = {
        name: net.user_inputs(net.tables, user)[:, span] for name, span in (("id", slice(8)), ("age", slice(16, 20)))
    }
    torch.testing.assert_close(net.user(user)[:, :8], fields["id"])
    torch.testing.assert_close(net.user(user)[:, 16:], fields["age"])
    other = user.clone()
    other[:, SPEC.columns("user")["hour"]] = 1
    torch.testing.assert_close(net.score(net.user(other), net.item(item).expand(3, -1, -1)), scores)
    changed = user.clone()
    changed[:, SPEC.columns("user")["age"]] = (user[:, SPEC.columns("user")["age"]] + 1) % 5
    assert not torch.equal(net.score(net.user(changed), net.item(item).expand(3, -1, -1)), scores)


def test_cold_remembers_the_mean_gate_of_each_group_while_training() -> None:
    net = network("cold")
    nn.init.zeros_(net.get_submodule("se").weight)  # type: ignore[arg-type]
    nn.init.constant_(net.get_submodule("se").bias, 3.0)  # type: ignore[arg-type]
    records = lists(net)
    net.eval()
    net.score(*records)
    assert set(net.importance().values()) == {0.5}
    net.train()
    for _ in range(800):
        net.score(*records)
    assert list(net.importance()) == net.groups  # type: ignore[comparison-overlap]
    assert list(net.importance().values()) == pytest.approx([1 / (1 + np.exp(-3.0))] * 8, abs=1e-3)
    assert network("ranktower").importance() == {}


# --- what a network adds to the loss ---------------------------------------------------------------------------------


def batch_of(net: Network, b: int = 5, n: int = 4) -> Batch:
    """b lists over 12 distinct items; each list's first entry is positive, the last entry of list 0 is padding."""
    users, items = rows("user", b, seed=1), rows("item", 12, seed=2)
    place = torch.from_numpy(np.random.default_rng(3).integers(0, 12, (b, n)))
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[0, -1] = False
    positive = torch.zeros(b, n, dtype=torch.bool)
    positive[:, 0] = True
    return Batch(users, items, net.user(users), net.item(items), place, positive, mask)


def gradients(net: Network) -> set[str]:
    """The parameters that the network's own term moves, by the first part of their name."""
    net.zero_grad()
    own = net.regulariser(batch_of(net))
    assert own is not None
    own.backward()  # type: ignore[no-untyped-call]
    moved = [name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    return {name.partition(".")[0] for name in moved}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lr", {}),
        ("two_tower", {}),
        ("ranktower", {}),
        ("cold", {}),
        ("dat", {"mimic": 0, "align": 0}),
        ("inttower", {"cir": 0}),
    ],
)
def test_a_network_without_a_term_of_its_own_adds_none(name: str, options: dict[str, Any]) -> None:
    net = network(name, **options)
    assert net.regulariser(batch_of(net)) is None


def test_dat_s_mimic_term_moves_the_augmented_vectors_alone() -> None:
    assert gradients(network("dat", align=0)) == {"user_augmented", "item_augmented"}
    net = network("dat", align=0, mimic=0.25)
    assert isinstance(net, DAT)
    batch = batch_of(net)
    users, items = batch.pairs()
    a_u, a_v = net.user_augmented(batch.users)[users], net.item_augmented(batch.items)[items]
    p_u, p_v = batch.user[users], batch.item[items, :-1]
    own = net.regulariser(batch)
    assert own is not None
    torch.testing.assert_close(own, 0.25 * (mimic(a_u, p_v) + mimic(a_v, p_u)))


def test_dat_s_alignment_moves_the_item_side_alone_and_reads_the_category_that_is_named() -> None:
    assert gradients(network("dat", mimic=0)) == {"tables", "item_mlp", "item_augmented"}
    net = network("dat", mimic=0, align=2.0, category="tags", categories=3)
    assert isinstance(net, DAT)
    batch = batch_of(net)
    tags = batch.items[:, SPEC.columns("item")["tags"].start]
    own = net.regulariser(batch)
    assert own is not None
    torch.testing.assert_close(own, 2.0 * category_alignment(batch.item[:, :-1], tags, most=3))
    assert own > 0


def test_inttower_s_term_contrasts_the_last_layers_of_users_and_the_items_that_they_took() -> None:
    assert gradients(network("inttower")) == {"tables", "user_inputs", "user_layers", "item_layers"}
    net = network("inttower", cir=0.5, tau=0.2)
    assert isinstance(net, IntTower)
    batch = batch_of(net)
    users, items = batch.pairs()
    likes = torch.zeros(5, 12, dtype=torch.bool)
    likes[users, items] = True
    liked = likes.any(dim=0)
    user = net.user_layers(net.user_inputs(net.tables, batch.users))[-1]
    item = net.item_layers(net.item_inputs(net.tables, batch.items))[-1]
    own = net.regulariser(batch)
    assert own is not None
    torch.testing.assert_close(own, 0.5 * contrast(user, item[liked], likes[:, liked], tau=0.2))


@pytest.mark.parametrize("name", ["dat", "inttower"])
def test_a_batch_without_a_positive_costs_nothing(name: str) -> None:
    net = network(name, **({"align": 0} if name == "dat" else {}))
    batch = batch_of(net)
    own = net.regulariser(batch._replace(positive=torch.zeros_like(batch.positive)))
    assert own is not None
    assert own == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"user_heads": 0}, "user_heads is 0"),
        ({"dim": -1}, "dim is -1"),
        ({"input_gate": "some"}, "input_gate is 'some': use one of units, fields, off"),
        ({"direction": "left"}, "direction is 'left': use one of both, user, item"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        RankTower(SPEC, **options)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("two_tower", {"hidden": 64}, "hidden is 64: it must list the widths"),
        ("dat", {"hidden": [64, 0]}, "hidden is 0: it must be a whole number of at least 1"),
        ("dat", {"mimic": -1}, "mimic is -1: it must be a number of at least 0"),
        ("dat", {"align": "much"}, "align is much: it must be a number"),
        ("dat", {"categories": 0}, "categories is 0"),
        ("dat", {"category": "price"}, "category is 'price': use one of tags, or give align 0"),
        ("dat", {"dim": 2.5}, "dim is 2.5"),
        ("inttower", {"hidden": []}, "hidden is .*: it must list the widths of at least 1 layers"),
        ("inttower", {"user_heads": 0}, "user_heads is 0"),
        ("inttower", {"item_heads": -1}, "item_heads is -1"),
        ("inttower", {"cir": float("nan")}, "cir is nan"),
        ("inttower", {"tau": 0}, "tau is 0: it must be a number above 0"),
        ("inttower", {"dropout": 1.0}, "dropout is 1.0"),
        ("cold", {"groups": "price"}, "groups is 'price': give a list"),
        ("cold", {"groups": []}, "groups is .*: give a list of fields and products, or leave it out"),
        ("cold", {"groups": ["user_id", "colour"]}, "groups has 'colour': use fields .*age, history"),
        ("cold", {"groups": ["user_id*tags"]}, "groups has 'user_id.tags': use fields .* of equal dim"),
        ("cold", {"groups": ["age", "price", "age"]}, "groups has 'age' 2 times: keep one"),
        ("cold", {"groups": ["age"]}, "groups names no item field: name one, or a product with one"),
        ("cold", {"hidden": "wide"}, "hidden is wide"),
    ],
)
def test_a_wrong_option_of_the_rivals_is_named(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        network(name, **options)


def test_dat_without_ids_or_categories_says_what_to_do() -> None:
    without_user = FeatureSpec(SPEC.fields[1:], "string", "int")
    with pytest.raises(SpecError, match="keeps a vector for each user id, and 'user_id' is no user field: declare it"):
        DAT(without_user)
    without_tags = FeatureSpec(tuple(field for field in SPEC.fields if field.name != "tags"), "string", "int")
    with pytest.raises(SpecError, match="items have no categorical or multi-valued field, or give align 0"):
        DAT(without_tags, category="tags")
    for options in ({}, {"align": 0}):
        assert DAT(without_tags, **options).category is None


def with_author(values: int) -> FeatureSpec:
    """SPEC, of 30 items and 3 tags, with an author before the tags."""
    author = Field(name="author", side="item", kind="categorical", dim=4, vocabulary=tuple(range(values)))
    return FeatureSpec((*SPEC.fields[:5], author, *SPEC.fields[5:]), "string", "int")


@pytest.mark.parametrize(("values", "chosen"), [(1, "tags"), (2, "author"), (3, "author"), (4, "tags"), (30, "tags")])
def test_dat_aligns_the_first_field_whose_categories_gather_items(values: int, chosen: str) -> None:
    spec = with_author(values)
    assert DAT(spec).category == spec.columns("item")[chosen].start


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("ranktower", {"user_heads": 33}, "user_heads of this network come to 33, and at most 32 can be served"),
        ("ranktower", {"item_heads": 17}, "item_heads of this network come to 17, and at most 16 can be served"),
        ("two_tower", {"dim": 1025}, "dim of this network come to 1025, and at most 1024 can be served"),
        ("inttower", {"user_heads": 11}, "user_heads of this network come to 33"),
    ],
)
def test_a_network_that_no_kernel_serves_is_refused_before_it_is_trained(
    name: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SpecError, match=complaint):
        NETWORKS[name](SPEC, **options)  # type: ignore[arg-type]


def test_the_largest_network_that_can_be_served_is_built() -> None:
    head = RankTower(SPEC, user_heads=32, item_heads=16, dim=1024, hidden=8).head()
    assert RecordLayout(head, "f16").stride > 0
