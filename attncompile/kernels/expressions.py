"""The language in which launch arguments and grids are written: what TensorRT's symbolic expressions can say.

    expression := term (("+" | "-") term)*
    term       := atom (("*" | "//") atom)*
    atom       := integer | symbol | ("cdiv" | "min" | "max") "(" expression "," expression ")" | "(" expression ")"
    symbol     := name | name "[" integer "]"

Numbers are integers of 64 bits. ``query[1]`` is the size of axis 1 of the tensor ``query``. There is no remainder and
no unary minus. ``a // b`` and ``cdiv(a, b)`` (rounded up) need a >= 0 and b > 0, so that no two languages differ.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce

from attncompile.core.errors import AttncompileError

LONGEST = 4000
"""Characters of the longest text that is read."""
DEEPEST = 100
"""How deep parentheses, calls and chains of operators may nest."""

_OPERATORS: Mapping[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//"}
_FUNCTIONS = ("cdiv", "min", "max")
_BINDS = {"+": 1, "-": 1, "*": 2, "//": 2}
_LARGEST = 2**63 - 1


class BadExpression(AttncompileError):
    """An expression cannot be read, or has no value for the symbols that were given."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A number that is not negative."""

    value: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """``NQ``, or ``query[1]``: the size of one axis of a tensor."""

    name: str


@dataclass(frozen=True, slots=True)
class Binary:
    """``operator`` is one of ``+ - * // cdiv min max``."""

    operator: str
    left: Expression
    right: Expression


Expression = Literal | Symbol | Binary


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Read ``text``. Raises ``BadExpression`` saying what is not in the language."""
    if len(text) > LONGEST:
        raise BadExpression(f"an expression of {len(text)} characters is longer than {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _read(tree.body, text, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refused(text, "it cannot be read") from None


def _read(node: ast.expr, text: str, depth: int) -> Expression:
    if depth > DEEPEST:
        raise _refused(text, f"it is nested more than {DEEPEST} deep")
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            if value > _LARGEST:
                raise _refused(text, f"{value} has more than 64 bits")
            return Literal(value)
        case ast.Name(id=name):
            return Symbol(name)
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(axis))) if not isinstance(axis, bool):
            return Symbol(f"{name}[{axis}]")
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            sign = _OPERATORS[type(operator)]
            return Binary(sign, _read(left, text, depth + 1), _read(right, text, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _FUNCTIONS:
            return Binary(name, _read(left, text, depth + 1), _read(right, text, depth + 1))
    raise _refused(text, f"'{ast.unparse(node)}' is not in the language")


def _refused(text: str, reason: str) -> BadExpression:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return BadExpression(
        f"expression '{shown}': {reason}", "there are integers, names, + - * //, cdiv(a, b), min(a, b) and max(a, b)"
    )


def evaluate(expression: Expression | str, symbols: Mapping[str, int]) -> int:
    """The value of ``expression``, exact. Raises ``BadExpression``: an unknown symbol, a division without sense."""
    tree = parse(expression) if isinstance(expression, str) else expression
    match tree:
        case Literal(value):
            return value
        case Symbol(name):
            if name not in symbols:
                raise BadExpression(f"'{name}' is not known", f"known are: {', '.join(sorted(symbols)) or 'none'}")
            return int(symbols[name])
        case Binary(operator, left, right):
            return _apply(operator, evaluate(left, symbols), evaluate(right, symbols), tree)


def _apply(operator: str, left: int, right: int, tree: Expression) -> int:
    if operator in ("//", "cdiv") and (right <= 0 or left < 0):
        raise BadExpression(f"'{text(tree)}': {left} {operator} {right} needs a numerator >= 0 and a divisor > 0")
    return _VALUES[operator](left, right)


_VALUES: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "//": lambda a, b: a // b,
    "cdiv": lambda a, b: (a + b - 1) // b, "min": min, "max": max,
}  # fmt: skip


def text(expression: Expression) -> str:
    """``expression`` as ``parse`` reads it back, with no more parentheses than needed."""
    match expression:
        case Literal(value):
            return str(value)
        case Symbol(name):
            return name
        case Binary(operator, left, right) if operator in _BINDS:
            # Operators of equal strength are read from the left, so a right side of that strength keeps its brackets.
            return f"{_inside(left, _BINDS[operator])} {operator} {_inside(right, _BINDS[operator] + 1)}"
        case Binary(operator, left, right):
            return f"{operator}({text(left)}, {text(right)})"


def _inside(expression: Expression, strength: int) -> str:
    loose = isinstance(expression, Binary) and _BINDS.get(expression.operator, 3) < strength
    return f"({text(expression)})" if loose else text(expression)


def symbols_of(expression: Expression) -> Iterator[str]:
    """Names of the symbols in ``expression``, from the left, repeated where they are."""
    match expression:
        case Symbol(name):
            yield name
        case Binary(_, left, right):
            yield from symbols_of(left)
            yield from symbols_of(right)


def substitute(expression: Expression, table: Mapping[str, Expression]) -> Expression:
    """``expression`` with every symbol of ``table`` replaced, folded."""
    match expression:
        case Symbol(name):
            return table.get(name, expression)
        case Binary(operator, left, right):
            return fold(Binary(operator, substitute(left, table), substitute(right, table)))
    return expression


def fold(expression: Expression) -> Expression:
    """The same value, with what is known computed and a number beside ``+``, ``*``, ``min``, ``max`` on the right:
    TensorRT has no number times expression. What would raise when evaluated, or be negative, stays as it is.
    """
    if not isinstance(expression, Binary):
        return expression
    operator, left, right = expression.operator, fold(expression.left), fold(expression.right)
    if isinstance(left, Literal) and isinstance(right, Literal):
        if operator in ("//", "cdiv") and right.value == 0:
            return Binary(operator, left, right)
        value = _VALUES[operator](left.value, right.value)
        return Literal(value) if value >= 0 else Binary(operator, left, right)
    if isinstance(left, Literal) and operator in ("+", "*", "min", "max"):
        left, right = right, left
    if isinstance(right, Literal):
        if right.value == {"+": 0, "-": 0, "*": 1}.get(operator):
            return left
        if operator == "*" and right.value == 0:
            return right
        if isinstance(left, Binary) and isinstance(left.right, Literal) and operator == left.operator in ("+", "*"):
            return fold(Binary(operator, left.left, _folded(operator, left.right, right)))
    if operator == "*" and isinstance(left, Binary) and left.operator == "*" and isinstance(left.right, Literal):
        return Binary("*", Binary("*", left.left, right), left.right)  # a * 8 * b: the number goes last
    return Binary(operator, left, right)


def _folded(operator: str, left: Literal, right: Literal) -> Literal:
    return Literal(_VALUES[operator](left.value, right.value))


def product(factors: list[Expression]) -> Expression:
    """All of them multiplied, folded; 1 for none."""
    one: Expression = Literal(1)
    return reduce(lambda a, b: fold(Binary("*", a, b)), factors, one)
