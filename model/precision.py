"""How weights are held in memory, and which of them in which form.

Arithmetic is float32 everywhere but with INT8 weights, which multiply rows of two INT8 parts (15 bits a
value). INT8 are routed experts, 97 % of the weights of the 671B model, and the output heads: their rounding
leaves the choices of experts and positions mostly alone, that of the other matrices does not
(docs/precision.md).

| precision  | routed experts                     | output heads  | the other matrices            |
|------------|------------------------------------|---------------|-------------------------------|
| `auto`     | as the checkpoint stores them      | as stored     | as stored                     |
| `float32`  | float32                            | float32       | float32                       |
| `bfloat16` | bfloat16                           | bfloat16      | bfloat16                      |
| `fp8`      | FP8 blocks                         | as the others | FP8 blocks as stored, or BF16 |
| `int8`     | INT8, one factor an output channel | INT8          | FP8 blocks as stored, or BF16 |

The gate, the indexer's head weights and the norms are float32 in each.
"""

from typing import Literal

Precision = Literal["auto", "float32", "bfloat16", "fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16", "fp8", "int8")

Form = Literal["float32", "bfloat16", "fp8", "int8"]
"""How one matrix is held."""


def expert_form(precision: Precision, *, stored: Form) -> Form:
    """The form of a routed expert's matrices, of what the checkpoint stores."""
    return stored if precision == "auto" else precision


def head_form(precision: Precision, *, stored: Form) -> Form:
    """The form of an output head: INT8 as routed experts, since no choice follows it that could flip."""
    return "int8" if precision == "int8" else matrix_form(precision, stored=stored)


def matrix_form(precision: Precision, *, stored: Form) -> Form:
    """The form of another matrix, of what the checkpoint stores.

    Example: precision int8 holds a matrix that is stored in FP8 as FP8, one stored in BF16 as BF16.
    """
    if precision == "auto":
        return stored
    if precision == "float32":
        return "float32"
    return "fp8" if stored == "fp8" and precision != "bfloat16" else "bfloat16"
