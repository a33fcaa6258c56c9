"""Dispatches where each phase has workers of its own: the same bits, and the other's copies in need."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.experts.dispatcher import DispatchRules
from router.experts.table import RoutingTable
from tests.unit.router.experts.harness import Choices, choices, plain_combine, random_choices, tables
from tests.unit.router.experts.lab import Answer, lab, partial_of, placed
from wire.errors import WorkerLost
from wire.frames import FLAG_LOAD_MISSING, Frame
from wire.phases import PHASES, Phase

PATIENT = DispatchRules(deadline_s=1e6)
"""No row of lost calls lasts so long."""


@given(
    given_choices=choices(),
    table=tables(num_experts=6, version=3, is_by_phase=True),
    phase=st.sampled_from(PHASES),
    lost=st.integers(0, 15),
)
def test_placements_by_phase_change_no_bit(
    given_choices: Choices, table: RoutingTable, phase: Phase, lost: int
) -> None:
    """Any worker may take the rows of either phase or of none, and any of the first calls are lost."""

    def script(number: int, worker_id: str, frame: Frame) -> Answer:
        return WorkerLost("gone") if lost >> number & 1 else partial_of(frame)

    with lab(script, rules=PATIENT) as it:
        it.adopt(table, phase)
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))


def test_rows_go_to_the_other_phase_when_their_own_worker_is_lost_and_come_back() -> None:
    def script(number: int, worker_id: str, frame: Frame) -> Answer:
        return WorkerLost("gone") if number == 0 else partial_of(frame)

    apart = placed(1, [[0, 1]] * 6, names="ab", worker_phases={"a": "prefill", "b": "decode"})
    rows = random_choices(8)
    with lab(script) as it:
        it.adopt(apart, "prefill")
        assert np.array_equal(it.run(rows), plain_combine(rows))
        it.clock.pass_s(1.0)
        for phase in ("prefill", "prefill", "decode"):
            it.adopt(apart, phase)
            it.run(rows)
    assert it.asked == ["a", "b", "a", "b", "a", "b"]
    assert [bool(frame.flags & FLAG_LOAD_MISSING) for frame in it.frames] == [False] * 6
    assert it.frames[2].tensors[0].shape[0] == 0, "a probe lets it in again"
