"""A tool of your own: a function with type hints and a docstring, which the model reads.

    cd examples
    appo train tiny steps=1 prompts_per_step=4 eval.questions=16 tools.enabled=[own_tool:calculator]

The tag is the name of the function, unless it has a `name`: the tiny model writes `<python>` and
knows no other tag.
"""

import ast
import operator

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculator(expression: str) -> str:
    """Work out sums, differences and products of numbers."""
    return str(value(ast.parse(expression, mode="eval").body))


def value(node: ast.expr) -> int:
    """The value of an expression; ValueError for anything but numbers, +, - and *."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -value(inner)
        case ast.BinOp(left=left, op=sign, right=right):
            return OPERATORS[type(sign)](value(left), value(right))
    raise ValueError("only numbers, +, - and *")  # the model reads this as the result


calculator.name = "python"
