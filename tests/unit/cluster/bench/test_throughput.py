"""What a precision makes of a checkpoint's weights, as the bounds take it."""

import pytest

from cluster.bench.throughput import stored_forms
from cluster.bench.work import Forms
from model.checkpoint import Checkpoint
from model.precision import Precision
from tests.reference_data import checkpoint_dir


@pytest.mark.parametrize(
    ("shape", "dtype", "forms"),
    [
        ("default", "auto", Forms(experts="bfloat16", head="bfloat16", others="bfloat16")),
        ("default", "int8", Forms(experts="int8", head="int8", others="bfloat16")),
        ("fp8", "auto", Forms(experts="fp8", head="bfloat16", others="fp8")),
        ("fp8", "int8", Forms(experts="int8", head="int8", others="fp8")),
        ("fp8", "float32", Forms(experts="float32", head="float32", others="float32")),
    ],
)
def test_forms_are_those_that_the_weights_are_held_in(shape: str, dtype: Precision, forms: Forms) -> None:
    assert stored_forms(Checkpoint.open(checkpoint_dir(shape)), dtype) == forms
