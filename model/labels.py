"""Labels of an exposure: the hard grade from the feedback ladder, and the soft label from predicted rungs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.errors import DataError

LONGEST = 400  # characters of an expression: far above any real one, far below what exhausts the parser

Floats = NDArray[np.float64]

OPERATORS: dict[type[ast.operator], Callable[[Floats, Floats], Floats]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
SIGNS: dict[type[ast.unaryop], Callable[[Floats], Floats]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def grades(feedback: NDArray[np.bool_]) -> NDArray[np.int8]:
    """(n,) grade of each row of feedback (n, rungs), weakest rung first: the highest rung given, 0 for none."""
    height = np.arange(1, feedback.shape[1] + 1, dtype=np.int8)
    return np.asarray(np.max(feedback * height, axis=1, initial=0), np.int8)


def expected_grade(rungs: Sequence[str]) -> str:
    """The soft label of a log that names none: the sum of the rungs, E[grade] where each rung implies those below."""
    return " + ".join(rungs)


@dataclass(frozen=True)
class SoftLabel:
    """An arithmetic expression over the rungs of a ladder, parsed and checked once: `click + 3*cart + 10*buy`."""

    expression: str
    rungs: tuple[str, ...]
    names: frozenset[str] = field(init=False)  # the rungs that the expression reads

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(_names(_parse(self.expression), self)))
        if not self.names:
            raise _mistake(self, "reads no rung of the ladder")

    def __call__(self, predictions: Mapping[str, ArrayLike]) -> NDArray[np.float32]:
        """(n,) float32, never negative, from one array (n,) per rung that the expression reads.

        Below zero counts as zero, since the label is a weight of the distillation loss. Raises DataError where the
        result is not finite.
        """
        absent = sorted(self.names - predictions.keys())
        if absent:
            raise _mistake(self, f"needs predictions of {', '.join(absent)}, given {', '.join(sorted(predictions))}")
        columns = {name: np.asarray(predictions[name], np.float64) for name in self.names}
        with np.errstate(all="ignore"):
            values = np.atleast_1d(_evaluate(_parse(self.expression), columns))
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            at = ", ".join(f"{name}={float(columns[name].flat[wrong[0]]):g}" for name in sorted(self.names))
            raise _mistake(
                self, f"is {values[wrong[0]]} on row {wrong[0]} ({at})", "keep divisors and powers away from zero"
            )
        return np.maximum(values, 0).astype(np.float32)

    @property
    def top(self) -> float:
        """Its value when every rung is certain, which makes a probability of it; 1 where that is no positive number."""
        certain = {name: np.ones(1) for name in self.names}
        with np.errstate(all="ignore"):
            value = float(_evaluate(_parse(self.expression), certain).flat[0])
        return value if 0 < value < np.inf else 1.0

    def of(self, matrix: NDArray[np.floating]) -> NDArray[np.float32]:
        """The same from a matrix (n, rungs) whose columns follow the ladder."""
        return self({name: matrix[:, place] for place, name in enumerate(self.rungs)})


def _parse(expression: str) -> ast.expr:
    if len(expression) > LONGEST:
        raise DataError(f"soft_label has {len(expression)} characters: keep it under {LONGEST}")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"soft_label {expression!r} is not an arithmetic expression ({error}): write one like 'click + 3*cart'"
        ) from error


def _names(node: ast.expr, label: SoftLabel) -> set[str]:
    """The rungs below a node; refuses whatever is not arithmetic over rungs and numbers."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _names(left, label) | _names(right, label)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
            return _names(operand, label)
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < 1e12:
            return set()
        case ast.Name(id=name) if name in label.rungs:
            return {name}
        case ast.Name(id=name):
            raise _mistake(label, f"reads {name!r}, which is not a rung")
    raise _mistake(label, f"holds {ast.unparse(node)!r}", "use rungs, numbers, + - * / ** and parentheses only")


def _evaluate(node: ast.expr, columns: Mapping[str, Floats]) -> Floats:
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_evaluate(left, columns), _evaluate(right, columns))
        case ast.UnaryOp(op=sign, operand=operand):
            return SIGNS[type(sign)](_evaluate(operand, columns))
        case ast.Name(id=name):
            return columns[name]
        case ast.Constant(value=int() | float() as value):
            return np.asarray(value, np.float64)
    raise AssertionError(f"{ast.dump(node)} passed the check of SoftLabel")


def _mistake(label: SoftLabel, problem: str, remedy: str = "") -> DataError:
    remedy = remedy or f"the ladder has {', '.join(label.rungs)}"
    return DataError(f"soft_label {label.expression!r} {problem}: {remedy}")
