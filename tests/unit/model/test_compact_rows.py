"""Compact cache rows: what they keep, and that they are read with the same bits by everyone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import make_batch
from model.cache_layout import CacheLayout
from model.compact_rows import CompactForm, CompactRows, CompactView, RowCodec

FORMS: tuple[CompactForm, ...] = ("bfloat16", "fp8")
V3 = CacheLayout(latent=512, rope=64, index=128)
SMALL = CacheLayout(latent=200, rope=6, index=8, key_form="int8")


def random_rows(layout: CacheLayout, num_rows: int, *, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(num_rows, layout.width, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize(("form", "num_bytes"), [("bfloat16", 1664), ("fp8", 1168)])
def test_bytes_of_a_row_of_v3(form: CompactForm, num_bytes: int) -> None:
    assert RowCodec(V3, form).row_bytes == num_bytes


@pytest.mark.parametrize("layout", [V3, SMALL], ids=["v3", "small"])
@pytest.mark.parametrize(("form", "share"), [("bfloat16", 2**-8), ("fp8", 2**-4)])
def test_error_of_a_value_is_bounded(form: CompactForm, share: float, layout: CacheLayout) -> None:
    """BF16 has 8 bits, E4M3 4; E4M3 values far below a group's largest have a floor."""
    codec, rows_TW = RowCodec(layout, form), random_rows(layout, 64, seed=1)
    got_TW = codec.decode(codec.encode(rows_TW))
    latent_end, rope_end = layout.latent, layout.key_begin
    floor = 2**-10 * 2 * float(rows_TW[:, :latent_end].abs().max()) / 448
    assert torch.allclose(got_TW[:, :latent_end], rows_TW[:, :latent_end], rtol=share, atol=floor)
    assert torch.allclose(got_TW[:, latent_end:rope_end], rows_TW[:, latent_end:rope_end], rtol=2**-8, atol=0)
    assert torch.equal(got_TW[:, rope_end:], rows_TW[:, rope_end:]), "the indexer's keys are kept as they are"


@given(seed=st.integers(0, 999), exponent=st.integers(-60, 30), num_rows=st.integers(1, 5))
@pytest.mark.parametrize("form", FORMS)
def test_decoded_rows_encode_to_the_same_values(
    form: CompactForm, seed: int, exponent: int, num_rows: int
) -> None:
    codec = RowCodec(V3, form)
    once_TW = codec.decode(codec.encode(random_rows(V3, num_rows, seed=seed, size=2.0**exponent)))
    assert torch.equal(codec.decode(codec.encode(once_TW)), once_TW)


@given(seed=st.integers(0, 99))
@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_a_row_depend_on_nothing_but_the_row(form: CompactForm, seed: int) -> None:
    codec, rows_TW = RowCodec(V3, form), random_rows(V3, 6, seed=seed)
    together = codec.encode(rows_TW)
    assert torch.equal(together, torch.cat([codec.encode(row_TW[None]) for row_TW in rows_TW]))


@pytest.mark.parametrize("form", FORMS)
def test_extremes_survive(form: CompactForm) -> None:
    rows_TW = torch.zeros(4, V3.width)
    rows_TW[1, :512] = 448.0
    rows_TW[2, :512] = torch.finfo(torch.bfloat16).max / 2
    rows_TW[3, 0] = -1.0
    codec = RowCodec(V3, form)
    got_TW = codec.decode(codec.encode(rows_TW))
    assert torch.isfinite(got_TW).all()
    for row in (0, 1, 3):
        assert torch.equal(got_TW[row], rows_TW[row])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_reads_its_own_rows_as_later_steps_do(form: CompactForm) -> None:
    """Two sequences, the second step adds to both; every read has the bits of the stored form."""
    codec = RowCodec(V3, form)
    bytes_LNB = torch.zeros(2, 16, codec.row_bytes, dtype=torch.uint8)
    store = CompactRows(layout=V3, codec=codec, bytes_LNB=bytes_LNB)
    ids_S = [torch.tensor([10, 11, 2, 3, 4]), torch.tensor([0, 1, 14])]
    steps = [([3, 2], [0, 0]), ([2, 1], [3, 2])]
    rows = {(layer, step): random_rows(V3, sum(steps[step][0]), seed=7 * layer + step)
            for layer in range(2) for step in range(2)}  # fmt: skip
    seen: dict[int, list[torch.Tensor]] = {}
    for step, (counts, firsts) in enumerate(steps):
        batch = make_batch([[0] * n for n in counts], first_positions=firsts)
        context = tuple(ids[: span.context_tokens] for ids, span in zip(ids_S, batch.spans, strict=True))
        view = CompactView(store, batch, context)
        for layer_idx in range(2):
            layer = view.layer(layer_idx)
            layer.append(rows[layer_idx, step])
            assert layer.on_stored is not None
            layer.on_stored()
            assert layer.on_read is not None
            for read_S in layer.context_S:
                # All rows of a sequence, as a dense step reads them, or a selection that names rows twice.
                layer.on_read(read_S if step else torch.stack([read_S, read_S.flip(0)]))
            seen[layer_idx] = [layer.rows_NW[read_S].clone() for read_S in layer.context_S]
    for layer_idx in range(2):
        first, second = (rows[layer_idx, step] for step in range(2))
        wanted = [torch.cat([first[:3], second[:2]]), torch.cat([first[3:], second[2:]])]
        for got_SW, rows_SW in zip(seen[layer_idx], wanted, strict=True):
            assert torch.equal(got_SW, codec.decode(codec.encode(rows_SW)))
