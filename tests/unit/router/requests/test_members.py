"""A snapshot becomes a view of the workers that can be used, and of what is missing."""

import dataclasses

import pytest

from router.requests.members import ClusterView, view_of
from wire.proto import control_pb2

MODEL = control_pb2.ModelInfo(
    name="toy",
    path="/m",
    fingerprint="f",
    vocab_tokens=9,
    max_context_tokens=8,
    bos_token_id=0,
    eos_token_id=1,
)


def member(name, role, **changes):
    values = {"worker_id": name, "role": role, "address": f"{name}:1", "is_ready": True, "incarnation": 1}
    return control_pb2.Member(**{**values, **changes})


def snapshot(*members, model=True, table=True, waiting_for=""):
    return control_pb2.ClusterSnapshot(
        version=4,
        model=MODEL if model else None,
        table=control_pb2.RoutingTable(version=1) if table else None,
        members=members,
        page_tokens=64,
        waiting_for=waiting_for,
    )


PREFILL = member("p", control_pb2.ROLE_PREFILL)
DECODE = member("d", control_pb2.ROLE_DECODE, num_pages=7)
BOTH = member("b", control_pb2.ROLE_BOTH)
EXPERT = member("e", control_pb2.ROLE_EXPERT)


def names(workers):
    return [worker.worker_id for worker in workers]


def test_workers_are_sorted_by_role_and_id():
    view = view_of(snapshot(PREFILL, EXPERT, DECODE, BOTH))
    assert names(view.prefill) == ["b", "p"]
    assert names(view.decode) == ["b", "d"]
    assert view.decode[1].num_pages == 7
    assert view.model.name == "toy"
    assert view.is_ready


@pytest.mark.parametrize(
    "unusable",
    [
        member("d", control_pb2.ROLE_DECODE, is_ready=False),
        member("d", control_pb2.ROLE_DECODE, address=""),
    ],
)
def test_worker_that_is_not_ready_is_present_but_not_used(unusable):
    view = view_of(snapshot(PREFILL, unusable))
    assert view.decode == ()
    assert view.present == ("d#1", "p#1")
    assert view.waiting_for == "a decode worker"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (snapshot(PREFILL, DECODE, model=False), "the model"),
        (snapshot(PREFILL, DECODE, table=False), "a routing table with every expert"),
        (snapshot(DECODE), "a prefill worker"),
        (snapshot(EXPERT), "a prefill worker, a decode worker"),
        (snapshot(DECODE, waiting_for="1 of 2 prefill"), "a prefill worker (controller: 1 of 2 prefill)"),
        (snapshot(BOTH), ""),
        (snapshot(BOTH, waiting_for="a second expert worker"), ""),
    ],
)
def test_view_says_what_it_waits_for(given, missing):
    view = view_of(given)
    assert view.waiting_for == missing
    assert view.is_ready == (not missing)


def test_view_before_any_snapshot_is_not_ready():
    assert not ClusterView().is_ready
    assert "first snapshot" in ClusterView().waiting_for


def test_view_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        view_of(snapshot(BOTH)).version = 5


def test_restarted_worker_has_another_key():
    keys = {
        view_of(snapshot(member("b", control_pb2.ROLE_BOTH, incarnation=n))).decode[0].key for n in (1, 2)
    }
    assert keys == {"b#1", "b#2"}
