from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import DataError
from model.labels import LONGEST, SoftLabel, expected_grade, grades

RUNGS = ("click", "cart", "buy")


def test_the_grade_is_the_highest_rung_given() -> None:
    feedback = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]], bool)
    assert grades(feedback).tolist() == [0, 1, 2, 3, 3]
    assert grades(feedback).dtype == np.int8


def test_no_events_have_no_grades() -> None:
    assert grades(np.zeros((0, 3), bool)).shape == (0,)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_more_feedback_never_lowers_the_grade(rows: list[list[bool]]) -> None:
    feedback = np.array(rows)
    for rung in range(3):
        more = feedback.copy()
        more[:, rung] = True
        assert (grades(more) >= grades(feedback)).all()


def test_a_soft_label_is_the_written_arithmetic() -> None:
    label = SoftLabel("click + 3*cart + 10*buy", RUNGS)
    predictions = {"click": np.array([0.5, 0.1]), "cart": np.array([0.2, 0.0]), "buy": np.array([0.1, 0.01])}
    values = label(predictions)
    np.testing.assert_allclose(values, [2.1, 0.2], rtol=1e-6)
    assert values.dtype == np.float32
    assert label.names == set(RUNGS)
    np.testing.assert_array_equal(label.of(np.column_stack([predictions[rung] for rung in RUNGS])), values)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("click", 0.5),
        ("-(-click)", 0.5),
        ("click * (1 + 3*cart) / 2", 0.4),
        ("click ** 2 + buy", 0.35),
        ("click - 2*buy", 0.3),
        ("buy - click", 0.0),  # below zero counts as zero
        (" click\n", 0.5),
    ],
)
def test_arithmetic_over_rungs_is_understood(expression: str, expected: float) -> None:
    predictions = {"click": np.array([0.5]), "cart": np.array([0.2]), "buy": np.array([0.1])}
    np.testing.assert_allclose(SoftLabel(expression, RUNGS)(predictions), [expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("click + purchase", "'purchase', which is not a rung"),
        ("click +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("3", "reads no rung"),
        ("__import__('os').remove('x')", "holds"),
        ("click.real", "holds 'click.real'"),
        ("[click for click in cart]", "holds"),
        ("click if cart else buy", "holds"),
        ("click and cart", "holds"),
        ("click < cart", "holds"),
        ("click @ cart", "holds"),
        ("click % 2", "holds"),
        ("click + True", "holds 'True'"),
        ("click + 'a'", "holds"),
        ("click + 1j", "holds '1j'"),
        ("click ** 1000000000000000", "holds"),
        ("max(click, cart)", "holds"),
        ("(click := 3)", "holds"),
        ("click; cart", "not an arithmetic expression"),
        ("lambda: click", "holds"),
        ("click + " * 200 + "cart", "characters"),
        ("(" * 300 + "click" + ")" * 50, "not an arithmetic expression"),
        ("click\x00", "not an arithmetic expression"),
    ],
)
def test_anything_but_arithmetic_over_rungs_is_refused(expression: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem.replace("(", r"\(").replace(".", r"\.")):
        SoftLabel(expression, RUNGS)


@given(st.text(alphabet="clickartbuy+-*/() .0123456789'[]_:=<%", max_size=60))
def test_no_text_gives_another_error_than_ours(expression: str) -> None:
    try:
        label = SoftLabel(expression, RUNGS)
        values = label({rung: np.array([0.5, 0.25]) for rung in RUNGS})
    except DataError:
        return
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_the_longest_nest_of_signs_is_still_evaluated() -> None:
    label = SoftLabel("-" * (LONGEST - 6) + "click", RUNGS)
    np.testing.assert_allclose(label({"click": np.array([0.5])}), [0.5])


def test_a_division_by_zero_names_the_row() -> None:
    label = SoftLabel("click / cart", RUNGS)
    with pytest.raises(DataError, match=r"is inf on row 1 \(cart=0, click=0\.5\)"):
        label({"click": np.array([0.5, 0.5]), "cart": np.array([1.0, 0.0])})


def test_a_missing_prediction_is_named() -> None:
    with pytest.raises(DataError, match="needs predictions of buy, given cart, click"):
        SoftLabel("click + buy", RUNGS)({"click": np.array([0.5]), "cart": np.array([0.5])})


@pytest.mark.parametrize(
    ("expression", "top"),
    [("click + 3*cart + 10*buy", 14), ("buy", 1), ("click / (1 - cart)", 1), ("-click", 1), ("2 + 0*buy", 2)],
)
def test_the_top_is_the_value_when_every_rung_is_certain(expression: str, top: float) -> None:
    assert SoftLabel(expression, RUNGS).top == top


def test_rungs_that_the_expression_does_not_read_are_not_needed() -> None:
    np.testing.assert_allclose(SoftLabel("2*buy", RUNGS)({"buy": np.array([0.25])}), [0.5])


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_the_default_label_is_the_expected_grade_of_a_nested_ladder(conditional: list[float]) -> None:
    nested = np.cumprod(conditional)  # P(click) >= P(cart) >= P(buy)
    exactly = nested - np.append(nested[1:], 0.0)
    expected = float(exactly @ [1, 2, 3])
    label = SoftLabel(expected_grade(RUNGS), RUNGS)
    np.testing.assert_allclose(label.of(nested[None, :])[0], expected, rtol=1e-5, atol=1e-7)
