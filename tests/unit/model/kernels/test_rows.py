"""What happens to rows between products: norms, rotary embedding, and what the cache stores."""

import pytest
import torch
from torch import Tensor

from model.batch import LayerCache
from model.cache_layout import KeyForm
from model.config import INDEXER_NORM_EPS
from model.kernels.base import CacheNorms, Kernels
from model.norms import layer_norm, rms_norm
from model.rope import RopeTable, rotate_front, rotate_interleaved
from tests.reference_data import unit_tensors
from tests.unit.model.kernels.cases import assert_near, cache_of, config, layout_of, random, rope_table

WIDTHS = (32, 36, 100, 1024)
INT8_STEP = 0.5001
"""Half a code, and what float32 adds."""


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_is_its_formula(kernels: Kernels, width: int) -> None:
    x, weight = random(9, width, seed=1) * 3, random(width, seed=2)
    assert_near(kernels.rms_norm(x, weight, eps=1e-6), rms_norm(x.double(), weight.double(), eps=1e-6))


def test_rms_norm_of_tiny_rows_sees_epsilon(kernels: Kernels) -> None:
    x, weight = random(4, 64, seed=3) * 1e-4, torch.ones(64)
    assert_near(kernels.rms_norm(x, weight, eps=1e-6), rms_norm(x.double(), weight.double(), eps=1e-6))


def test_rms_norm_takes_rows_of_a_wider_tensor(kernels: Kernels) -> None:
    wide, weight = random(9, 80, seed=4), random(48, seed=5)
    expected = kernels.rms_norm(wide[:, 8:56].contiguous(), weight, eps=1e-6)
    assert torch.equal(kernels.rms_norm(wide[:, 8:56], weight, eps=1e-6), expected)


def test_rms_norm_equals_the_golden(kernels: Kernels) -> None:
    units = unit_tensors()
    got = kernels.rms_norm(units["rmsnorm.x"].float(), units["rmsnorm.w"], eps=1e-6)
    assert torch.equal(got.bfloat16(), units["rmsnorm.y"])


def test_add_rms_norm_equals_the_golden_of_the_float32_sum(kernels: Kernels) -> None:
    units = unit_tensors()
    x, delta = units["rmsnorm.x"].float(), units["rmsnorm.residual"].float()
    got = kernels.add_rms_norm(x, delta, units["rmsnorm.w"], eps=1e-6)
    assert torch.equal(got.bfloat16(), units["rmsnorm.y_with_residual"])


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_adds_in_place_and_norms_the_sum(kernels: Kernels, width: int) -> None:
    x, delta, weight = random(9, width, seed=6), random(9, width, seed=7), random(width, seed=8)
    total, given_delta = x + delta, delta.clone()
    got = kernels.add_rms_norm(x, delta, weight, eps=1e-6)
    assert torch.equal(x, total)
    assert torch.equal(delta, given_delta)
    assert_near(got, rms_norm(total.double(), weight.double(), eps=1e-6))


def test_add_rms_norm_takes_a_transposed_delta(kernels: Kernels) -> None:
    x, delta, weight = random(50, 64, seed=9), random(64, 50, seed=10).t(), random(64, seed=11)
    expected = rms_norm((x + delta).double(), weight.double(), eps=1e-6)
    assert_near(kernels.add_rms_norm(x, delta, weight, eps=1e-6), expected)


@pytest.mark.parametrize(("nope", "rope"), [(8, 4), (10, 6), (32, 16), (128, 64)])
def test_queries_are_turned_behind_their_nope_part_and_scaled(kernels: Kernels, nope: int, rope: int) -> None:
    model = config(qk_nope_head_dim=nope, qk_rope_head_dim=rope, index_head_dim=64)
    query, table = random(7, 3, nope + rope, seed=12), rope_table(7, rope, seed=13)
    turned = rotate_interleaved(query[..., nope:].double(), table)
    expected = torch.cat((query[..., :nope].double(), turned), dim=-1) * model.softmax_scale
    assert_near(kernels.rotate_queries(query, table, model), expected)


@pytest.mark.parametrize(("width", "rope"), [(8, 4), (16, 16), (24, 6), (128, 64)])
def test_index_queries_are_turned_in_front(kernels: Kernels, width: int, rope: int) -> None:
    query, table = random(7, 3, width, seed=14), rope_table(7, rope, seed=15)
    expected = rotate_front(query.double(), table)
    assert_near(kernels.rotate_index_queries(query, table), expected)


def _norms(latent: int, index: int) -> CacheNorms:
    return CacheNorms(
        latent_C=random(latent, seed=16),
        key_I=random(index, seed=17),
        key_bias_I=random(index, seed=18),
        eps=1e-5,
    )


def _expected_rows(latent_TX: Tensor, key_TI: Tensor, norms: CacheNorms, table: RopeTable) -> Tensor:
    """(T, C + P + I) float64: what a row with a float32 key holds."""
    latent, rope = latent_TX.double().tensor_split((len(norms.latent_C),), dim=-1)
    key = layer_norm(key_TI.double(), norms.key_I.double(), norms.key_bias_I.double(), eps=INDEXER_NORM_EPS)
    parts = (
        rms_norm(latent, norms.latent_C.double(), eps=norms.eps),
        rotate_interleaved(rope[:, None], table)[:, 0],
        rotate_front(key[:, None], table)[:, 0],
    )
    return torch.cat(parts, dim=-1)


def _store(
    kernels: Kernels, key_form: KeyForm, *, latent: int, rope: int, index: int
) -> tuple[LayerCache, Tensor]:
    """A cache of 20 rows, 7 of them stored in any order, and what those should hold."""
    append = torch.tensor([19, 3, 4, 0, 12, 11, 7])
    cached = cache_of(20, layout=layout_of(key_form, latent=latent, rope=rope, index=index), append_T=append)
    norms, table = _norms(latent, index), rope_table(7, rope, seed=19)
    rows, key = random(7, latent + rope, seed=20), random(7, index, seed=21) + 0.5
    kernels.store_rows(rows, key, norms, table, cached)
    return cached, _expected_rows(rows, key, norms, table)


LAYOUTS = ((24, 8, 16), (16, 4, 8), (33, 6, 20), (512, 64, 128))


@pytest.mark.parametrize(("latent", "rope", "index"), LAYOUTS)
def test_stored_rows_are_normed_and_turned(kernels: Kernels, latent: int, rope: int, index: int) -> None:
    cached, expected = _store(kernels, "float32", latent=latent, rope=rope, index=index)
    assert_near(cached.rows_NW[cached.append_T], expected)


@pytest.mark.parametrize(("latent", "rope", "index"), LAYOUTS)
def test_stored_int8_keys_are_within_half_a_code(
    kernels: Kernels, latent: int, rope: int, index: int
) -> None:
    cached, expected = _store(kernels, "int8", latent=latent, rope=rope, index=index)
    rows, begin = cached.rows_NW[cached.append_T], latent + rope
    assert_near(rows[:, :begin], expected[:, :begin])
    codes = rows[:, begin:-1].contiguous().view(torch.uint8).to(torch.float64) - 128
    factor = rows[:, -1:]
    assert_near(factor[:, 0], expected[:, begin:].abs().amax(-1) / 127)
    assert (codes * factor - expected[:, begin:]).abs().max() <= INT8_STEP * factor.max()
    assert codes.abs().amax(-1).tolist() == [127] * 7


@pytest.mark.parametrize("key_form", ["float32", "int8"])
def test_other_rows_of_the_cache_stay(kernels: Kernels, key_form: KeyForm) -> None:
    cached, _ = _store(kernels, key_form, latent=24, rope=8, index=16)
    others = torch.ones(20, dtype=torch.bool)
    others[cached.append_T] = False
    assert torch.equal(cached.rows_NW[others], cache_of(20, layout=cached.layout).rows_NW[others])


@pytest.mark.parametrize("key_form", ["float32", "int8"])
def test_rows_are_stored_from_wider_products(kernels: Kernels, key_form: KeyForm) -> None:
    layout, norms, table = layout_of(key_form), _norms(24, 16), rope_table(5, 8, seed=22)
    wide, wide_key = random(5, 50, seed=23), random(5, 40, seed=24)
    part, key = wide[:, 3:35], wide_key[:, 5:21]
    of_parts, of_copies = (cache_of(5, layout=layout) for _ in range(2))
    kernels.store_rows(part, key, norms, table, of_parts)
    kernels.store_rows(part.contiguous(), key.contiguous(), norms, table, of_copies)
    assert torch.equal(of_parts.rows_NW.view(torch.int32), of_copies.rows_NW.view(torch.int32))
