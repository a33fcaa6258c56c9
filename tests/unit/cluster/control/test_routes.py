"""From holders to a table: slots as held, planned shares where they fit, no expert without a copy."""

import pytest

from cluster.control.routes import build_routes, weigh_copies
from cluster.placement import ExpertShape
from wire.errors import StaleTable
from wire.phases import Phase

SHAPE = ExpertShape(num_experts=2, layer_ids=(0,))
SLOTS = {"expert-2": {(0, 0): 1, (0, 1): 0}, "expert-10": {(0, 1): 3}}
HOLDERS = {(0, 0): ("expert-2",), (0, 1): ("expert-2", "expert-10")}


def test_table_names_workers_in_order_with_their_slots() -> None:
    table = build_routes(weigh_copies(HOLDERS, slots=SLOTS, shares={}), SHAPE, version=5)
    assert (table.version, table.num_experts, table.worker_ids) == (5, 2, ("expert-2", "expert-10"))
    found = {
        (table.worker_ids[r.worker_idx], r.expert_idx): (r.slot_idx, r.share)
        for r in table.layers[0].replicas
    }
    assert found == {
        ("expert-2", 0): (1, 1.0),
        ("expert-2", 1): (0, 0.5),
        ("expert-10", 1): (3, 0.5),
    }


def test_table_names_the_phases_of_its_workers_only() -> None:
    phases: dict[str, Phase] = {"expert-2": "prefill", "expert-10": "decode", "expert-3": "decode"}
    copies = weigh_copies(HOLDERS, slots=SLOTS, shares={})
    table = build_routes(copies, SHAPE, version=5, worker_phases=phases)
    assert table.worker_phases == {"expert-2": "prefill", "expert-10": "decode"}


@pytest.mark.parametrize(
    ("planned", "wanted"),
    [
        ({"expert-2": 0.3, "expert-10": 0.7}, [0.3, 0.7]),
        ({"expert-2": 0.2, "expert-10": 0.2, "expert-4": 0.6}, [0.5, 0.5]),
        ({"expert-2": 1.0}, [0.5, 0.5]),
    ],
    ids=["planned", "a copy is gone", "planned before it had two"],
)
def test_planned_shares_hold_among_the_copies_there_are(
    planned: dict[str, float], wanted: list[float]
) -> None:
    copies = weigh_copies(HOLDERS, slots=SLOTS, shares={(0, 1): planned})
    assert [copy.share for copy in copies[0, 1]] == pytest.approx(wanted)


def test_expert_without_a_copy_is_no_table() -> None:
    copies = weigh_copies({(0, 0): ("expert-2",)}, slots=SLOTS, shares={})
    with pytest.raises(StaleTable, match="expert 1: 0 replicas"):
        build_routes(copies, SHAPE, version=1)
