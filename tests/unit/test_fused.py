"""What export writes in place of the blocks of the networks equals them, and falls back where it could not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.features import FeatureSpec, Field, Tower
from model.fused import WIDEST, FusedCross, FusedHeads, FusedInputs, fused
from model.layers import GatedCrossAttention, GatedHeads, Inputs, Tables
from model.networks import RankTower

SPEC = FeatureSpec(
    (
        Field(name="history", side="user", kind="sequence", dim=4, length=5, pooling="attention", shares="item_id"),
        Field(name="age", side="user", kind="numeric", dim=2, edges=(20.0, 40.0)),
        Field(name="tastes", side="user", kind="multi", length=3, vocabulary=(7, 8)),
        Field(name="liked", side="user", kind="multi", length=2, pooling="attention", shares="tastes"),
        Field(name="hour", side="context", kind="categorical", dim=2, vocabulary=(0, 1, 2)),
        Field(name="item_id", side="item", kind="categorical", dim=4, vocabulary=tuple(range(10, 16))),
        Field(name="tags", side="item", kind="multi", dim=3, length=4, vocabulary=(1, 2, 3)),
        Field(name="shops", side="item", kind="multi", length=3, pooling="attention", vocabulary=(1,)),
    ),
    "int",
    "int",
)
EQUAL: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def rows(spec: FeatureSpec, tower: Tower, count: int = 200) -> Tensor:
    """Index rows with padding anywhere, some of nothing else."""
    sizes = [spec.owner(field).size for field in spec.tower_fields(tower) for _ in range(field.length)]
    x = torch.stack([torch.randint(0, size, (count,)) for size in sizes], dim=1).int()
    x[torch.rand(x.shape) < 0.4] = 0
    x[:20] = 0
    return x


@pytest.mark.parametrize("tower", ["user", "item"])
@pytest.mark.parametrize("dim", [4, None])
def test_inputs(tower: Tower, dim: int | None) -> None:
    """Both poolings, with ages and without, shared tables, embeddings of one size and of several."""
    spec = FeatureSpec(tuple(replace(field, dim=dim or field.dim) for field in SPEC.fields), "int", "int")
    tables = Tables(spec)
    inputs = shaken(Inputs(spec, tower, tables))
    assert isinstance(inputs, Inputs)
    shaken(tables)
    equal = FusedInputs.of(inputs, tables)
    assert equal is not None
    assert len(equal.groups) == len(set(inputs.sizes))
    x = rows(spec, tower)
    torch.testing.assert_close(equal(tables, x), inputs(tables, x), **EQUAL)


def test_attention_too_sharp_for_float32_stays_as_it_was() -> None:
    network = RankTower(SPEC)
    pool: Any = network.user_inputs.pools[0]
    nn.init.constant_(pool.age, 0.0)
    pool.age.data[2] = WIDEST - 1
    kept: Any = fused(network)
    assert isinstance(kept.user_inputs, FusedInputs)
    pool.age.data[2] = WIDEST + 1
    kept = fused(network)
    assert isinstance(kept.user_inputs, Inputs)
    assert isinstance(kept.item_inputs, FusedInputs)


def test_the_weakest_entry_outweighs_padding() -> None:
    """At the sharpest attention that is fused, alone among padding."""
    spec = FeatureSpec((replace(SPEC.fields[0], length=30), SPEC.fields[5]), "int", "int")
    tables = Tables(spec)
    inputs = Inputs(spec, "user", tables).eval()
    pool: Any = inputs.pools[0]
    pool.age.data = torch.linspace(WIDEST - 0.5, 0, 30)
    nn.init.normal_(tables[0].weight, std=3)
    equal = FusedInputs.of(inputs, tables)
    assert equal is not None
    x = torch.zeros(30, 30, dtype=torch.int32)
    x[range(30), range(30)] = 3
    torch.testing.assert_close(equal(tables, x), inputs(tables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_gate", ["units", "fields"])
@pytest.mark.parametrize("path", [True, False])
def test_heads(input_gate: Any, path: bool) -> None:
    plain = GatedHeads(
        [2, 4, 3], heads=3, dim=5, hidden=6, gate_hidden=4, input_gate=input_gate, output_gate=True, path=path
    )
    shaken(plain)
    x = torch.randn(7, 9)
    torch.testing.assert_close(FusedHeads(plain)(x), plain(x), **EQUAL)


def test_cross_attention() -> None:
    plain = GatedCrossAttention(6, direction="both", tied_values=False)
    shaken(plain)
    e = torch.randn(7, 3, 6)
    torch.testing.assert_close(FusedCross(plain).user(e), plain.user(e), **EQUAL)
    torch.testing.assert_close(FusedCross(plain).item(e), plain.item(e), **EQUAL)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_attention": False},
        {"path": False},
        {"input_gate": "fields", "tied_values": True},
        {"input_gate": "off", "output_gate": False, "direction": "item"},
    ],
)
def test_a_network_keeps_its_records_whatever_can_be_replaced(options: dict[str, Any]) -> None:
    network = RankTower(SPEC, **options)
    shaken(network)
    equal: Any = fused(network)
    for tower in ("user", "item"):
        x = rows(SPEC, "user" if tower == "user" else "item")
        torch.testing.assert_close(getattr(equal, tower)(x), getattr(network, tower)(x), **EQUAL)
    assert isinstance(equal.user_heads, FusedHeads) == (options.get("input_gate") != "off")
    assert isinstance(network.user_inputs, Inputs), "the network itself stays as it was"
