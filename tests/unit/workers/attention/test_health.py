"""The verdict on an attention worker."""

from typing import Any

import pytest

from wire.errors import InternalError, WorkerLost
from workers.attention.health import HealthRules, Signs, Verdict, judge

RULES = HealthRules(probe_s=10, stuck_s=20, hopeless_s=80)
LOST = WorkerLost("expert-0 is gone")
BROKEN = InternalError("engine step: boom")


def test_healthy_worker_has_no_trouble() -> None:
    assert judge(Signs(), RULES) == Verdict(trouble="", needs_restart=False)


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ({"is_leaving": True}, "leaving"),
        ({"has_table": False}, "no routing table"),
        ({"has_experts": False}, "no expert worker"),
        ({"step_s": 20.5}, "a step has not ended for more than 20 s"),
        ({"probe_error": LOST, "num_failed_probes": 99}, "WorkerLost: expert-0 is gone"),
        ({"probe_error": BROKEN, "num_failed_probes": 2}, "InternalError: engine step: boom"),
    ],
)
def test_worker_that_may_mend_is_not_ready_and_is_not_replaced(signs: dict[str, Any], said: str) -> None:
    verdict = judge(Signs(**signs), RULES)
    assert said in verdict.trouble
    assert not verdict.needs_restart


@pytest.mark.parametrize(
    "signs",
    [
        {"is_engine_alive": False},
        {"step_s": 80.5},
        {"probe_error": BROKEN, "num_failed_probes": 3},
    ],
)
def test_worker_that_only_another_process_mends_says_so(signs: dict[str, Any]) -> None:
    verdict = judge(Signs(**signs), RULES)
    assert verdict.trouble
    assert verdict.needs_restart


def test_engine_that_ended_is_named_before_anything_that_follows_from_it() -> None:
    signs = Signs(is_engine_alive=False, step_s=99, has_table=False, is_leaving=True)
    assert "engine" in judge(signs, RULES).trouble
