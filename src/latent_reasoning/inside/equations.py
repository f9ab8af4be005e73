"""The values that a row's own equations state, and what would follow from another value.

A step such as `<<(4+2)%7=6>>` or `<<48/2=24>>` has an expression and a result. Where each equation
uses the result before, the row is a *chain*: from another value of result m, its own remaining
operations give a counterfactual answer.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from latent_reasoning.data.numbers import equal, read_number
from latent_reasoning.data.rows import Row

_LITERAL = re.compile(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)(?![\w.])")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Equation:
    """An equation: `(4+2)%7`, the text of its result and its value."""

    expression: str
    result: str
    value: Fraction

    def uses_of(self, value: Fraction) -> list[tuple[int, int]]:
        """Where the expression holds a number of this value."""
        found = _LITERAL.finditer(self.expression)
        return [match.span() for match in found if Fraction(match.group()) == value]


def read_equations(row: Row) -> tuple[Equation, ...]:
    """The equations of a row's steps; none where a step is no equation or does not hold."""
    equations = []
    for step in row.steps or ():
        expression, mark, result = (
            step.strip().removeprefix("<<").removesuffix(">>").rpartition("=")
        )
        value, computed = read_number(result), evaluate(expression) if mark else None
        if value is None or computed is None or not equal(value, computed):
            return ()
        equations.append(Equation(expression, result.strip(), value))
    return tuple(equations)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of numbers and `+ - * / // %`; None for anything else."""
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(node.value if type(node.value) is int else repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no arithmetic")


def is_chain(equations: Sequence[Equation]) -> bool:
    """Whether each equation holds the result before exactly once, so that its place is certain."""
    uses = (after.uses_of(before.value) for before, after in pairwise(equations))
    return bool(equations) and all(len(found) == 1 for found in uses)


def counterfactual(equations: Sequence[Equation], m: int, value: Fraction) -> Fraction | None:
    """The answer of a chain if its result m (from 1) were `value`; None where there is none."""
    for before, after in pairwise(equations[m - 1 :]):
        ((start, end),) = after.uses_of(before.value)
        text = f"{after.expression[:start]}({value.numerator}/{value.denominator})"
        changed = evaluate(text + after.expression[end:])
        if changed is None:
            return None
        value = changed
    return value
