import pytest
import torch

from model.kernels.native import packed
from model.kernels.native.packed import Packed, pack, pack_stack
from model.matrix import StoredMatrix
from model.precision import PRECISIONS, Form
from tests.unit.model.test_matrix import STORED

FORMS = [name for name in PRECISIONS if name != "auto"]


def _tensors(weight: Packed) -> list[torch.Tensor]:
    return [part for part in (weight.values, weight.scales, weight.offset) if part is not None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_pieces_give_what_the_whole_gives(
    stored: StoredMatrix, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(stored, form)
    monkeypatch.setattr(packed, "PIECE_VALUES", 1)
    assert all(map(torch.equal, _tensors(pack(stored, form)), _tensors(whole)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_stacked_matrices_lie_behind_each_other(stored: StoredMatrix, form: Form) -> None:
    one, two = pack(stored, form), pack_stack([stored, stored], form)
    assert two.num_columns % packed.PANEL == 0
    assert two.num_columns >= 2 * one.num_columns
    for part, both in zip(_tensors(one), _tensors(two), strict=True):
        assert torch.equal(torch.cat((part, part)), both)
