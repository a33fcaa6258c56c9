"""Products with weights: one matrix, one a head, and a SwiGLU, in every form."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from model.kernels.base import Kernels
from model.kernels.plain import TorchKernels
from model.matrix import StoredMatrix
from model.precision import Form
from tests.unit.model.kernels.cases import (
    BF16_TOLERANCE,
    assert_near,
    held,
    random,
    stored_blocks,
    stored_matrix,
)

FORMS = get_args(Form)
FLOAT_FORMS = ("float32", "bfloat16", "fp8")
SIZES = ((64, 128), (33, 50), (2, 3), (100, 31), (65, 257), (160, 200), (300, 130))
"""(F, D): whole panels; F beside 32 and 64; D that 4 does not divide; FP8 blocks of 128 cut short."""
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
INT8_MLP_TOLERANCE = 5e-3
"""An inner value that the last bit of silu moves over a rounding border is off by one of 127 codes."""
INT8_ERROR = 2e-2
"""What rounding weights and activations to 127 codes costs a sum, in units of the largest one."""


@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize("form", FLOAT_FORMS)
@pytest.mark.parametrize(("num_columns", "width"), SIZES)
def test_matrix_gives_the_product(
    kernels: Kernels, num_columns: int, width: int, form: Form, num_rows: int
) -> None:
    stored = stored_matrix(num_columns, width, seed=1)
    x = random(num_rows, width, seed=2)
    assert_near(kernels.pack(stored, form)(x), x.double() @ held(stored, form).T)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("form", FLOAT_FORMS)
def test_matrix_of_any_stored_type_gives_the_product(
    kernels: Kernels, form: Form, dtype: torch.dtype
) -> None:
    stored = stored_matrix(160, 200, seed=3, dtype=dtype)
    x = random(9, 200, seed=4)
    assert_near(kernels.pack(stored, form)(x), x.double() @ held(stored, form).T)


@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize(("num_columns", "width"), [*SIZES, (70, 2500)])
def test_int8_product_is_that_of_torch_bit_for_bit(
    kernels: Kernels, num_columns: int, width: int, num_rows: int
) -> None:
    """Sums of codes are whole numbers, so there is one right answer; 2500 terms pass what float32 counts."""
    stored = stored_matrix(num_columns, width, seed=5)
    x = random(num_rows, width, seed=6)
    got, expected = (k.pack(stored, "int8")(x) for k in (kernels, TorchKernels()))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_int8_product_is_near_the_exact_one(kernels: Kernels, dtype: torch.dtype) -> None:
    stored = stored_matrix(160, 200, seed=7, dtype=dtype)
    x = random(9, 200, seed=8)
    expected = x.double() @ held(stored, "float32").T
    assert_near(kernels.pack(stored, "int8")(x), expected, tolerance=INT8_ERROR)


def test_int8_row_of_zeros_gives_zeros(kernels: Kernels) -> None:
    weight = random(70, 30, seed=9)
    weight[3] = 0
    x = random(3, 30, seed=10)
    x[1] = 0
    got = kernels.pack(StoredMatrix(values_FD=weight), "int8")(x)
    assert got[1].abs().max() == 0
    assert got[:, 3].abs().max() == 0
    assert got[0].abs().max() > 0


@pytest.mark.parametrize("block", [32, 64, 128])
def test_fp8_blocks_of_whole_panels_are_kept_exactly(kernels: Kernels, block: int) -> None:
    stored = stored_blocks(random(200, 150, seed=11), block=block)
    x = random(5, 150, seed=12)
    assert_near(kernels.pack(stored, "fp8")(x), x.double() @ held(stored, "fp8").T)


@pytest.mark.parametrize("block", [16, 48])
def test_other_fp8_blocks_may_be_rounded_to_bfloat16(kernels: Kernels, block: int) -> None:
    stored = stored_blocks(random(200, 150, seed=13), block=block)
    x = random(5, 150, seed=14)
    expected = x.double() @ held(stored, "fp8").T
    assert_near(kernels.pack(stored, "fp8")(x), expected, tolerance=BF16_TOLERANCE)


def test_every_fp8_value_is_decoded(kernels: Kernels) -> None:
    """The 254 finite codes, subnormals and both zeros among them."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    stored = StoredMatrix(values_FD=values[:, None].contiguous(), scale_inv=torch.full((2, 1), 0.5))
    got = kernels.pack(stored, "fp8")(torch.ones(1, 1))
    assert torch.equal(got[0], values.to(torch.float32) * 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_no_rows(kernels: Kernels, form: Form) -> None:
    assert kernels.pack(stored_matrix(33, 50, seed=15), form)(torch.zeros(0, 50)).shape == (0, 33)


@pytest.mark.parametrize("form", FORMS)
def test_matrix_takes_rows_of_a_wider_tensor(kernels: Kernels, form: Form) -> None:
    matrix, wide = kernels.pack(stored_matrix(33, 50, seed=16), form), random(9, 80, seed=17)
    assert torch.equal(matrix(wide[:, 20:70]), matrix(wide[:, 20:70].contiguous()))


@pytest.mark.parametrize("form", FORMS)
def test_matrix_takes_transposed_rows(kernels: Kernels, form: Form) -> None:
    matrix, x = kernels.pack(stored_matrix(33, 50, seed=18), form), random(50, 9, seed=19).t()
    assert torch.equal(matrix(x), matrix(x.contiguous()))


@pytest.mark.parametrize(
    ("form", "bytes_per_value"), [("float32", 4), ("bfloat16", 2), ("fp8", 1), ("int8", 1)]
)
def test_matrix_holds_the_bytes_of_its_form(kernels: Kernels, form: Form, bytes_per_value: int) -> None:
    """Factors add less than 4 %: of INT8 8 bytes a column of 256, of FP8 4 bytes a block."""
    num_bytes = kernels.pack(stored_matrix(128, 256, seed=20), form).num_bytes
    assert 1 <= num_bytes / (128 * 256 * bytes_per_value) <= 1.04


def _head_weights(weights_HFD: Tensor, form: Form) -> Tensor:
    return weights_HFD.double() if form == "float32" else weights_HFD.bfloat16().double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 32, 16), (3, 40, 24), (5, 33, 130)], ids=str)
def test_heads_give_their_own_products(kernels: Kernels, shape: tuple[int, int, int], form: Form) -> None:
    weights, x = random(*shape, seed=21), random(7, shape[0], shape[2], seed=22)
    expected = torch.einsum("rhd,hfd->rhf", x.double(), _head_weights(weights, form))
    assert_near(kernels.pack_heads(weights, form)(x), expected)


def test_heads_take_the_front_of_wider_rows_and_transposed_weights(kernels: Kernels) -> None:
    """As attention does: the nope part of queries, and kv_b_proj's key half."""
    weights, x = random(3, 24, 40, seed=23).transpose(1, 2), random(7, 3, 32, seed=24)
    heads = kernels.pack_heads(weights, "float32")
    assert torch.equal(heads(x[..., :24]), heads(x[..., :24].contiguous()))
    assert_near(heads(x[..., :24]), torch.einsum("rhd,hfd->rhf", x[..., :24].double(), weights.double()))


@pytest.mark.parametrize("forms", [*((form,) * 3 for form in FORMS), ("fp8", "bfloat16", "float32")])
def test_joined_matrices_are_the_matrices(kernels: Kernels, forms: tuple[Form, ...]) -> None:
    """Outputs that fill no panel stand beside each other; different forms stay apart."""
    parts = [stored_matrix(width, 100, seed=40 + width) for width in (33, 130, 2)]
    joined, x = kernels.pack_joined(parts, forms), random(9, 100, seed=41)
    apart = [kernels.pack(part, form) for part, form in zip(parts, forms, strict=True)]
    for got, matrix in zip(joined(x), apart, strict=True):
        assert torch.equal(got, matrix(x))
    assert joined.num_bytes == sum(matrix.num_bytes for matrix in apart)


def _mlp_parts(width: int, hidden: int, *, seed: int) -> tuple[StoredMatrix, StoredMatrix, StoredMatrix]:
    gate, up = (stored_matrix(width, hidden, seed=seed + i) for i in range(2))
    return gate, up, stored_matrix(hidden, width, seed=seed + 2)


@pytest.mark.parametrize("form", FLOAT_FORMS)
@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (24, 48), (33, 50), (130, 260)])
def test_mlp_is_a_swiglu(kernels: Kernels, width: int, hidden: int, form: Form) -> None:
    parts, x = _mlp_parts(width, hidden, seed=25), random(13, hidden, seed=28)
    gate, up, down = (held(part, form) for part in parts)
    inner = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    assert_near(kernels.pack_mlp(*parts, form)(x), inner @ down.T)


@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (24, 48), (33, 50), (130, 260)])
def test_int8_mlp_is_near_that_of_torch(kernels: Kernels, width: int, hidden: int) -> None:
    parts, x = _mlp_parts(width, hidden, seed=29), random(13, hidden, seed=32)
    got, expected = (k.pack_mlp(*parts, "int8")(x) for k in (kernels, TorchKernels()))
    assert_near(got, expected, tolerance=INT8_MLP_TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_mlp_holds_three_matrices(kernels: Kernels, form: Form) -> None:
    parts = _mlp_parts(64, 128, seed=33)
    apart = sum(kernels.pack(part, form).num_bytes for part in parts)
    assert kernels.pack_mlp(*parts, form).num_bytes == apart


def test_silu_far_from_zero_is_finite(kernels: Kernels) -> None:
    """Gates of -200 and 200: exp overflows on one side."""
    one = StoredMatrix(values_FD=torch.ones(2, 1))
    mlp = kernels.pack_mlp(one, one, StoredMatrix(values_FD=torch.eye(2)), "float32")
    got = mlp(torch.tensor([[-200.0], [200.0]]))
    assert got[0].abs().max() < 1e-30
    assert got[1].tolist() == [40000.0, 40000.0]


@pytest.mark.parametrize("num_rows", [0, 1, 13, 70])
@pytest.mark.parametrize("form", FORMS)
def test_mlp_that_was_begun_gives_the_bits_of_one_that_is_waited_for(
    kernels: Kernels, form: Form, num_rows: int
) -> None:
    mlp, x = kernels.pack_mlp(*_mlp_parts(33, 50, seed=34), form), random(num_rows, 50, seed=37)
    assert torch.equal(mlp.begin(x).result(), mlp(x))
