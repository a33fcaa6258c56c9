"""The work of a step, against numbers counted by hand for a small architecture.

Weights of SMALL_CONFIG that every row meets: attention with the indexer's keys 2,816 a layer, the dense
layer's MLP 4,608, the MoE layer's gate 256 and shared expert 1,536: 12,032 in all. The head has 1,280, each
routed expert 1,536; a row needs two of eight. For one position, attention multiplies 72 numbers absorbed and
40 expanded, and reads 20 cached ones. Five positions are selected.
"""

import pytest

from cluster.bench.limits import MachineLimits
from cluster.bench.work import Forms, StepWork, Work, count_step
from model.config import ModelConfig
from model.precision import Form
from model.sizes import hf_config
from tests.unit.model.harness import SMALL_CONFIG

SMALL = ModelConfig.from_hf(SMALL_CONFIG)
FLOAT32 = Forms(experts="float32", head="float32", others="float32")
NUM_OTHERS = 12_032 + 1_280
"""Weights outside of the routed experts, no indexer but its keys."""
NUM_INDEXER = 2 * (2 * 8 * 16 + 2 * 32)
"""Its queries and head weights, in two layers."""
EXPERT = 1_536


def decode(*positions: int, forms: Forms = FLOAT32) -> Work:
    return step(*positions, forms=forms).total


def step(*positions: int, forms: Forms = FLOAT32) -> StepWork:
    return count_step(SMALL, forms, positions=positions, num_scored=len(positions), is_prompt=False)


def test_decode_row_within_the_selection_is_counted() -> None:
    work = decode(2)
    attention = 2 * 3 * 72
    assert work.float32_flops == 2 * (NUM_OTHERS + attention + 2 * EXPERT)
    assert work.int8_ops == 0
    assert work.num_bytes == 4 * (NUM_OTHERS + 2 * EXPERT + 2 * 3 * 20)


def test_decode_row_beyond_the_selection_counts_the_indexer() -> None:
    work = decode(9)
    attention, keys = 2 * 5 * 72, 2 * 10 * 2 * 8
    assert work.float32_flops == 2 * (NUM_OTHERS + attention + NUM_INDEXER + keys + 2 * EXPERT)
    assert work.num_bytes == 4 * (NUM_OTHERS + NUM_INDEXER + 2 * EXPERT + 2 * (5 * 20 + 10 * 8))


@pytest.mark.parametrize(("position", "has_indexer"), [(4, False), (5, True)])
def test_indexer_begins_where_more_is_visible_than_selected(position: int, has_indexer: bool) -> None:
    last = decode(position).num_bytes - decode(position - 1).num_bytes
    assert (last > 4 * NUM_INDEXER) is has_indexer


def test_attention_beyond_the_selection_grows_by_the_indexer_alone() -> None:
    near, far = decode(9), decode(1009)
    assert far.float32_flops - near.float32_flops == 2 * 2 * 1000 * 2 * 8
    assert far.num_bytes - near.num_bytes == 4 * 2 * 1000 * 8


def test_rows_of_a_step_share_weights_and_read_their_own_cache() -> None:
    alone, together = decode(2), decode(2, 2)
    assert together.float32_flops == 2 * alone.float32_flops
    num_experts = 8 * (1 - 0.75**2)
    assert together.num_bytes == pytest.approx(4 * (NUM_OTHERS + num_experts * EXPERT + 2 * 2 * 3 * 20))


def test_prompt_rows_are_expanded_and_read_the_cache_once() -> None:
    work = count_step(SMALL, FLOAT32, positions=range(7), num_scored=1, is_prompt=True).total
    attention = 2 * ((1 + 2 + 3 + 4 + 5) * 40 + 2 * 5 * 72)
    indexer = 2 * NUM_INDEXER + 2 * (6 + 7) * 2 * 8
    assert work.float32_flops == 2 * (7 * 12_032 + 1_280 + attention + indexer + 7 * 2 * EXPERT)
    num_experts = 8 * (1 - 0.75**7)
    num_floats = NUM_OTHERS + NUM_INDEXER + num_experts * EXPERT + 2 * (5 * 20 + 7 * 8)
    assert work.num_bytes == pytest.approx(4 * num_floats)


def test_chunk_without_scored_rows_leaves_out_the_heads_arithmetic() -> None:
    scored, silent = (
        count_step(SMALL, FLOAT32, positions=range(3), num_scored=n, is_prompt=True).total for n in (1, 0)
    )
    assert scored.float32_flops - silent.float32_flops == 2 * 1_280


def test_int8_experts_move_their_operations() -> None:
    floats, integers = decode(2), decode(2, forms=Forms(experts="int8", head="float32", others="float32"))
    assert integers.int8_ops == 2 * 2 * EXPERT
    assert integers.float32_flops + integers.int8_ops == floats.float32_flops
    assert floats.num_bytes - integers.num_bytes == 3 * 2 * EXPERT


@pytest.mark.parametrize(("form", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("fp8", 1), ("int8", 1)])
def test_form_of_experts_decides_their_bytes_only(form: Form, num_bytes: int) -> None:
    work = decode(2, forms=Forms(experts=form, head="float32", others="float32"))
    assert work.num_bytes == num_bytes * 2 * EXPERT + 4 * (NUM_OTHERS + 2 * 3 * 20)


@pytest.mark.parametrize(("form", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("fp8", 1)])
def test_form_of_the_other_matrices_leaves_the_cache_in_float32(form: Form, num_bytes: int) -> None:
    work = decode(9, forms=Forms(experts="int8", head=form, others=form))
    others = num_bytes * (NUM_OTHERS + NUM_INDEXER)
    assert work.num_bytes == others + 2 * EXPERT + 4 * 2 * (5 * 20 + 10 * 8)


@pytest.mark.parametrize(("num_rows", "num_experts"), [(1, 8), (8, 42.0), (32, 63.1)])
def test_distinct_experts_are_those_of_the_example(num_rows: int, num_experts: float) -> None:
    """64 experts, 8 a row; one byte of difference a weight counts the experts that are read."""
    config = ModelConfig.from_hf(hf_config("bench-1b", dtype="float32"))
    wide, narrow = (
        count_step(
            config,
            Forms(experts=form, head="float32", others="float32"),
            positions=[0] * num_rows,
            num_scored=num_rows,
            is_prompt=False,
        )
        for form in ("bfloat16", "fp8")
    )
    of_one_expert = 11 * 3 * 1024 * 384
    assert (wide.experts.num_bytes - narrow.experts.num_bytes) / of_one_expert == pytest.approx(
        num_experts, abs=0.05
    )


LIMITS = MachineLimits(memory_bytes_per_s=100, float32_flops_per_s=10, int8_ops_per_s=40)


@pytest.mark.parametrize(("num_bytes", "bound_s"), [(40, 0.5), (900, 9.0)])
def test_bound_of_a_phase_is_the_longer_of_arithmetic_and_memory(num_bytes: float, bound_s: float) -> None:
    assert Work(float32_flops=3, int8_ops=8, num_bytes=num_bytes).bound_s(LIMITS) == pytest.approx(bound_s)


def test_phases_of_a_step_add_up_and_overlap_only_in_the_looser_bound() -> None:
    """Two phases of arithmetic, two of memory: 2 + 1 + 5 + 3 s one after another, 8 s of memory at once."""
    work = StepWork(
        matrices=Work(float32_flops=20, num_bytes=0),
        attention=Work(float32_flops=10, num_bytes=0),
        experts=Work(int8_ops=4, num_bytes=500),
        head=Work(int8_ops=4, num_bytes=300),
    )
    assert work.bound_s(LIMITS) == pytest.approx(11)
    assert work.overlapped_bound_s(LIMITS) == pytest.approx(8)


def test_phases_hold_what_the_step_takes() -> None:
    work = step(2, forms=Forms(experts="int8", head="bfloat16", others="float32"))
    assert work.experts == Work(int8_ops=2 * 2 * EXPERT, num_bytes=2 * EXPERT)
    assert work.head == Work(float32_flops=2 * 1_280, num_bytes=2 * 1_280)
    assert work.attention == Work(float32_flops=2 * 2 * 3 * 72, num_bytes=4 * 2 * 3 * 20)
    assert work.matrices == Work(float32_flops=2 * 12_032, num_bytes=4 * 12_032)
