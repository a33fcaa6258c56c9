import pytest
import torch

from model.config import YarnConfig
from model.rope import (
    RopeTable,
    inverse_frequencies,
    rope_table,
    rotate_half_split,
    rotate_interleaved,
)
from tests.reference_data import unit_parameters, unit_tensors


@pytest.mark.parametrize("name", ["real", "none", "small", "odd"])
def test_yarn_tables_equal_the_golden(name: str) -> None:
    units, given = unit_tensors(), unit_parameters()[f"yarn.{name}"]
    yarn = YarnConfig(
        factor=given["rope_factor"],
        original_max_position_embeddings=given["original_seq_len"],
        beta_fast=given["beta_fast"],
        beta_slow=given["beta_slow"],
    )
    frequencies = inverse_frequencies(
        given["qk_rope_head_dim"], theta=given["rope_theta"], yarn=None if name == "none" else yarn
    )
    torch.testing.assert_close(frequencies, units[f"yarn.{name}.inv_freq"], rtol=1e-6, atol=0)
    table = rope_table(units[f"yarn.{name}.positions"], frequencies)
    torch.testing.assert_close(table.cos_TP, units[f"yarn.{name}.cos"], rtol=0, atol=1e-6)
    torch.testing.assert_close(table.sin_TP, units[f"yarn.{name}.sin"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rotate", "name"), [(rotate_interleaved, "interleaved"), (rotate_half_split, "half_split")]
)
def test_rotation_equals_the_golden(rotate, name: str) -> None:
    units = unit_tensors()
    table = RopeTable(cos_TP=units["rope.cos"], sin_TP=units["rope.sin"])
    got = rotate(units["rope.x"][0], table)
    torch.testing.assert_close(got, units[f"rope.{name}"][0], rtol=1e-6, atol=1e-6)


def test_scale_is_on_both_tables() -> None:
    table = rope_table(torch.tensor([0]), torch.tensor([1.0]), scale=0.5)
    assert (table.cos_TP.item(), table.sin_TP.item()) == (0.5, 0.0)
