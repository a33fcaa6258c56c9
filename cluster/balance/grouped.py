"""A plan that keeps every group of experts on one node: tokens that choose few groups cross to few nodes.

First groups go to nodes, then every node is a problem of its own: its workers and its groups' experts. A
layer is as fast as its hottest node, so in the others nothing moves that need not.

Letters: L layers, E logical experts, G groups of experts, N nodes, W workers, X slots of one worker in one
layer, R rows
here: one for each layer and node, with the experts and workers of that node.
"""

from dataclasses import dataclass

import numpy as np

from cluster.balance.change import Goal, change
from cluster.balance.groups import (
    ROUNDING,
    exchange_groups,
    match_groups,
    node_loads,
    nodes_in_force,
    plan_groups,
)
from cluster.balance.homes import FIRST_AIM, NEXT_AIM, level, mend, normalise
from cluster.balance.scratch import plan_from_scratch
from cluster.balance.types import EMPTY, Fleet, Floats, Ints


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The workers by node, and the groups that are to stay together."""

    num_nodes: int
    """Divides the workers; the workers of a node follow each other."""
    num_workers: int
    num_slots: int
    num_groups: int
    """A multiple of `num_nodes`; divides the experts, those of a group follow each other."""

    @property
    def node_fleet(self) -> Fleet:
        """The workers of one node."""
        return Fleet(num_slots=self.num_slots, domain_W=np.arange(self.num_workers // self.num_nodes))


def can_group(*, num_experts: int, num_groups: int, num_nodes: int) -> bool:
    """Whether groups can stay together: they are alike, and every node gets as many."""
    return num_groups > 0 and num_groups % num_nodes == 0 and num_experts % num_groups == 0


def plan_grouped(loads_LE: Floats, nodes: Nodes, *, previous_LWX: Ints | None = None) -> Ints:
    """(L, W, X) the expert in every slot, every group on one node.

    Args:
        loads_LE: (L, E) load of every expert, >= 0.
        nodes: the workers; the slots of a node hold the experts of its groups.
        previous_LWX: (L, W, X) the plan in force; slots may be empty, groups apart. None for none.
    """
    loads_LE = normalise(loads_LE)
    load_LG = loads_LE.reshape(len(loads_LE), nodes.num_groups, -1).sum(axis=2)
    first_LG = plan_groups(load_LG, num_nodes=nodes.num_nodes)
    view = _NodeView.of(loads_LE, first_LG, nodes)
    sketch = plan_from_scratch(view.loads_RE, nodes.node_fleet)
    limit_R = _hottest(sketch.most_L, nodes)
    if previous_LWX is None:
        return view.join(level(view.loads_RE, sketch, view.aim(limit_R, FIRST_AIM), nodes.node_fleet))
    node_LG = _next_nodes(load_LG, first_LG, previous_LWX, nodes, num_experts=loads_LE.shape[1])
    return _replan(_NodeView.of(loads_LE, node_LG, nodes), limit_R, previous_LWX)


def _hottest(values_R: Floats, nodes: Nodes) -> Floats:
    """(R,) the largest value of each row's layer."""
    return np.repeat(values_R.reshape(-1, nodes.num_nodes).max(axis=1), nodes.num_nodes)


def _next_nodes(
    load_LG: Floats, first_LG: Ints, previous_LWX: Ints, nodes: Nodes, *, num_experts: int
) -> Ints:
    """(L, G) nodes no hotter than those of a plan from scratch, few groups moved."""
    num_nodes = nodes.num_nodes
    before_LG = nodes_in_force(
        previous_LWX, num_groups=nodes.num_groups, num_nodes=num_nodes, num_experts=num_experts
    )
    limit_L = node_loads(load_LG, first_LG, num_nodes=num_nodes).max(axis=1)
    next_LG = exchange_groups(load_LG, before_LG, limit_L, num_nodes=num_nodes)
    most_L = node_loads(load_LG, next_LG, num_nodes=num_nodes).max(axis=1)
    # Where exchanges do not get there: the groups as from scratch, the nodes named so that most stay.
    is_on_first_LNG = first_LG[:, None] == np.arange(num_nodes)[:, None]
    is_on_before_LNG = before_LG[:, None] == np.arange(num_nodes)[:, None]
    shared_LNN = (is_on_before_LNG[:, :, None] & is_on_first_LNG[:, None]).sum(axis=3)
    renamed_LG = np.take_along_axis(match_groups(shared_LNN), first_LG, axis=1)
    return np.where((most_L <= limit_L * (1 + ROUNDING))[:, None], next_LG, renamed_LG)


def _replan(view: "_NodeView", limit_R: Floats, previous_LWX: Ints) -> Ints:
    fleet = view.nodes.node_fleet
    mended_RWX = mend(view.loads_RE, view.split(previous_LWX), fleet)
    sketch = plan_from_scratch(view.loads_RE, fleet)
    limit_R = np.maximum(limit_R, _hottest(sketch.most_L, view.nodes))
    goal = Goal(limit_R, view.aim(limit_R, NEXT_AIM))
    return view.join(change(view.loads_RE, mended_RWX, sketch, goal, fleet))


@dataclass(frozen=True, kw_only=True)
class _NodeView:
    """Every node of every layer as a problem of its own; experts are numbered within their node."""

    nodes: Nodes
    expert_RE: Ints
    """(R, E) the expert behind each number of a node."""
    loads_RE: Floats

    @classmethod
    def of(cls, loads_LE: Floats, node_LG: Ints, nodes: Nodes) -> "_NodeView":
        """The view of loads when the groups are on these nodes."""
        num_layers, num_experts = loads_LE.shape
        node_LE = np.repeat(node_LG, num_experts // nodes.num_groups, axis=1)
        expert_LE = np.argsort(node_LE, axis=1, kind="stable")
        shape = (num_layers * nodes.num_nodes, num_experts // nodes.num_nodes)
        loads_RE = np.take_along_axis(loads_LE, expert_LE, axis=1).reshape(shape)
        return cls(nodes=nodes, expert_RE=expert_LE.reshape(shape), loads_RE=loads_RE)

    def aim(self, limit_R: Floats, part: float) -> Floats:
        """(R,) the load to level down to: between the hottest node's mean and the limit."""
        mean_R = self.loads_RE.sum(axis=1) / self.nodes.node_fleet.num_workers
        hottest_R = _hottest(mean_R, self.nodes)
        return hottest_R + (limit_R - hottest_R) * part

    def split(self, plan_LWX: Ints) -> Ints:
        """(R, W, X) a plan by node; slots with experts of other nodes are empty."""
        num_rows, num_here = self.expert_RE.shape
        number_RE = np.full((num_rows, num_here * self.nodes.num_nodes), EMPTY)
        np.put_along_axis(number_RE, self.expert_RE, np.arange(num_here)[None], axis=1)
        plan_RWX = plan_LWX.reshape(num_rows, -1, plan_LWX.shape[2])
        found_RWX = number_RE[np.arange(num_rows)[:, None, None], np.maximum(plan_RWX, 0)]
        return np.where(plan_RWX == EMPTY, EMPTY, found_RWX)

    def join(self, plan_RWX: Ints) -> Ints:
        """(L, W, X) the plan of all workers."""
        rows = np.arange(len(plan_RWX))[:, None, None]
        expert_RWX = np.where(plan_RWX == EMPTY, EMPTY, self.expert_RE[rows, np.maximum(plan_RWX, 0)])
        return expert_RWX.reshape(-1, self.nodes.num_workers, plan_RWX.shape[2])
