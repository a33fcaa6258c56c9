"""From one placement to another in steps: each small, the best first, each leaving a placement that serves.

A slot that changes its expert is a change. Changes that need each other go together: where expert a leaves
its only home for b, a must have come to another slot by then. The smallest such set is a bundle. Bundles
fill steps up to a number of bytes; after every step each expert has a replica, so undoing a step is
activating the placement before it.

Worked example: two workers of one slot hold a and b, and exchange them. Neither change can go first: one
bundle of two. With a third worker that holds a second a, and gets b instead, that change can go first and
alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.placement import Placement
from workers.expert.types import Slot


@dataclass(frozen=True, kw_only=True)
class Change:
    """A slot that gets another expert, its first one, or none."""

    worker_id: str
    layer_idx: int
    slot_idx: int
    old_expert_idx: int | None
    new_expert_idx: int | None
    num_bytes: int
    """Weights that the worker must receive; 0 when it holds the new expert in another slot."""


@dataclass(frozen=True, kw_only=True)
class MoveStep:
    """What is loaded before the next placement is activated."""

    changes: tuple[Change, ...]
    num_bytes: int
    placement: Placement
    """In force after the step; every expert that had a replica has one."""


def changes_between(current: Placement, candidate: Placement, *, bytes_per_expert: int) -> list[Change]:
    """Every slot whose expert differs, by worker, layer and slot."""
    changes = []
    for worker_id in dict.fromkeys([*current, *candidate]):
        old, new = _experts(current.get(worker_id, ())), _experts(candidate.get(worker_id, ()))
        held = {(layer_idx, expert_idx) for (layer_idx, _), expert_idx in old.items()}
        for layer_idx, slot_idx in sorted(old.keys() | new.keys()):
            before, after = old.get((layer_idx, slot_idx)), new.get((layer_idx, slot_idx))
            if before != after:
                is_here = after is None or (layer_idx, after) in held
                changes.append(
                    Change(
                        worker_id=worker_id,
                        layer_idx=layer_idx,
                        slot_idx=slot_idx,
                        old_expert_idx=before,
                        new_expert_idx=after,
                        num_bytes=0 if is_here else bytes_per_expert,
                    )
                )
    return changes


def plan_steps(
    current: Placement,
    candidate: Placement,
    changes: Sequence[Change],
    *,
    gain_of: Callable[[Change], float],
    step_bytes: int,
) -> tuple[MoveStep, ...]:
    """The changes in steps that end in the candidate.

    Args:
        current: the placement in force.
        candidate: where the last step leads.
        changes: all changes between them.
        gain_of: what a change is worth by itself, in any unit.
        step_bytes: most bytes of a step; a bundle larger than that is a step of its own.
    """
    by_gain = sorted(changes, key=gain_of, reverse=True)
    bundles = sorted(plan_bundles(current, by_gain), key=lambda bundle: _worth(bundle, gain_of), reverse=True)
    # Which changes need each other depends on what was done before: bundle again in the order found.
    ordered = plan_bundles(current, [change for bundle in bundles for change in bundle])
    steps: list[MoveStep] = []
    placement = dict(current)
    for group in _packed(ordered, step_bytes):
        placement = _after(placement, group)
        num_bytes = sum(change.num_bytes for change in group)
        steps.append(MoveStep(changes=tuple(group), num_bytes=num_bytes, placement=placement))
    if steps:
        last = steps[-1]
        steps[-1] = MoveStep(changes=last.changes, num_bytes=last.num_bytes, placement=candidate)
    return tuple(steps)


def plan_bundles(current: Placement, changes: Sequence[Change]) -> list[list[Change]]:
    """The changes in sets that can be done one after the other; the first change left leads each set.

    Args:
        current: the placement in force before the first.
        changes: all changes to a placement that holds every expert.
    """
    num_replicas: Counter[tuple[int, int | None]] = Counter(
        (slot.layer_idx, slot.expert_idx) for slots in current.values() for slot in slots
    )
    coming: dict[tuple[int, int | None], list[Change]] = {}
    for change in reversed(changes):
        coming.setdefault((change.layer_idx, change.new_expert_idx), []).append(change)
    done: set[Change] = set()
    bundles = []
    for change in changes:
        bundle = []
        waiting = [] if change in done else [change]
        while waiting:
            next_change = waiting.pop()
            done.add(next_change)
            bundle.append(next_change)
            old = (next_change.layer_idx, next_change.old_expert_idx)
            num_replicas[next_change.layer_idx, next_change.new_expert_idx] += 1
            num_replicas[old] -= 1
            if next_change.old_expert_idx is not None and num_replicas[old] < 1:
                waiting.append(_next_coming(coming[old], done))
        if bundle:
            bundles.append(bundle)
    return bundles


def _next_coming(coming: list[Change], done: set[Change]) -> Change:
    """The first change left that brings the expert; `coming` holds the best last."""
    while coming[-1] in done:
        coming.pop()
    return coming.pop()


def _worth(bundle: Sequence[Change], gain_of: Callable[[Change], float]) -> float:
    return sum(map(gain_of, bundle)) / max(sum(change.num_bytes for change in bundle), 1)


def _packed(bundles: Sequence[Sequence[Change]], step_bytes: int) -> list[list[Change]]:
    groups: list[list[Change]] = []
    num_bytes = 0
    for bundle in bundles:
        more = sum(change.num_bytes for change in bundle)
        if not groups or num_bytes + more > step_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1] += bundle
        num_bytes += more
    return groups


def _after(placement: Placement, changes: Sequence[Change]) -> dict[str, tuple[Slot, ...]]:
    after = dict(placement)
    by_worker: dict[str, list[Change]] = {}
    for change in changes:
        by_worker.setdefault(change.worker_id, []).append(change)
    for worker_id, own in by_worker.items():
        experts = _experts(after.get(worker_id, ()))
        for change in own:
            experts.pop((change.layer_idx, change.slot_idx), None)
            if change.new_expert_idx is not None:
                experts[change.layer_idx, change.slot_idx] = change.new_expert_idx
        after[worker_id] = tuple(
            Slot(layer_idx, slot_idx, expert_idx)
            for (layer_idx, slot_idx), expert_idx in sorted(experts.items())
        )
    return after


def _experts(slots: Sequence[Slot]) -> dict[tuple[int, int], int]:
    return {(slot.layer_idx, slot.slot_idx): slot.expert_idx for slot in slots}
