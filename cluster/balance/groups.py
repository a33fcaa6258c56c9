"""Which node gets which groups of experts, so that the experts of a group stay on one node.

Worked example: four groups with loads 5, 4, 2, 1 on two nodes of two: 5 goes to node 0, 4 to node 1, 2 to
node 1 (4 is less than 5), 1 to node 0: both carry 6. With loads 5, 4, 1, 2 next, they carry 7 and 5;
exchanging 5 for 4 mends it.

Letters: L layers, G groups of experts, N nodes, E logical experts, W workers, X slots of one worker in one
layer.
"""

import numpy as np

from cluster.balance.measure import count_held
from cluster.balance.types import Floats, Ints

ROUNDING = 1e-9


def plan_groups(load_LG: Floats, *, num_nodes: int) -> Ints:
    """(L, G) node of every group, from nothing: the heaviest first, each to the lightest node with room.

    Args:
        load_LG: (L, G) load of every group.
        num_nodes: nodes; divides the number of groups, and each gets as many.
    """
    num_layers, num_groups = load_LG.shape
    layers = np.arange(num_layers)
    node_LG = np.zeros((num_layers, num_groups), dtype=np.int64)
    node_load_LN = np.zeros((num_layers, num_nodes))
    num_free_LN = np.full((num_layers, num_nodes), num_groups // num_nodes)
    for group_L in np.argsort(-load_LG, axis=1, kind="stable").T:
        node_L = np.where(num_free_LN > 0, node_load_LN, np.inf).argmin(axis=1)
        node_LG[layers, group_L] = node_L
        node_load_LN[layers, node_L] += load_LG[layers, group_L]
        num_free_LN[layers, node_L] -= 1
    return exchange_groups(load_LG, node_LG, np.zeros(num_layers), num_nodes=num_nodes)


def exchange_groups(load_LG: Floats, node_LG: Ints, limit_L: Floats, *, num_nodes: int) -> Ints:
    """(L, G) the nodes after exchanges of groups, until no node carries more than the limit or none helps.

    Args:
        load_LG: (L, G) load of every group.
        node_LG: (L, G) node of every group.
        limit_L: (L,) load of a node that is low enough.
        num_nodes: nodes.
    """
    node_LG = node_LG.copy()
    layer_R = np.arange(len(node_LG))
    for _ in range(load_LG.shape[1] ** 2):
        load_RN = node_loads(load_LG[layer_R], node_LG[layer_R], num_nodes=num_nodes)
        layer_R = layer_R[load_RN.max(axis=1, initial=0.0) > limit_L[layer_R] * (1 + ROUNDING)]
        if not len(layer_R):
            break
        layer_R = layer_R[_exchange_once(load_LG, node_LG, layer_R, num_nodes=num_nodes)]
    return node_LG


def node_loads(load_LG: Floats, node_LG: Ints, *, num_nodes: int) -> Floats:
    """(L, N) load of every node."""
    is_on_LNG = node_LG[:, None] == np.arange(num_nodes)[:, None]
    load_LN: Floats = np.where(is_on_LNG, load_LG[:, None], 0.0).sum(axis=2)
    return load_LN


def _exchange_once(load_LG: Floats, node_LG: Ints, layer_R: Ints, *, num_nodes: int) -> Ints:
    """Does the best exchange of the hottest node in each of some layers; the rows in which one helped."""
    load_RG, node_RG = load_LG[layer_R], node_LG[layer_R]
    load_RN = node_loads(load_RG, node_RG, num_nodes=num_nodes)
    most_R = load_RN.max(axis=1)
    is_hot_RG = node_RG == load_RN.argmax(axis=1)[:, None]
    shift_RGG = load_RG[:, :, None] - load_RG[:, None]
    other_RGG = np.take_along_axis(load_RN, node_RG, axis=1)[:, None] + shift_RGG
    after_RGG = np.maximum(most_R[:, None, None] - shift_RGG, other_RGG)
    after_RGG = np.where(is_hot_RG[:, :, None] & ~is_hot_RG[:, None], after_RGG, np.inf)
    flat = after_RGG.reshape(len(layer_R), -1)
    rows = np.flatnonzero(flat.min(axis=1, initial=np.inf) < most_R * (1 - ROUNDING))
    one, other = np.unravel_index(flat[rows].argmin(axis=1), after_RGG.shape[1:])
    node_LG[layer_R[rows], one], node_LG[layer_R[rows], other] = node_RG[rows, other], node_RG[rows, one]
    return rows


def nodes_in_force(plan_LWX: Ints, *, num_groups: int, num_nodes: int, num_experts: int) -> Ints:
    """(L, G) node of every group in a plan: the one that holds most of its copies and has room.

    Args:
        plan_LWX: (L, W, X) the plan; the workers of a node follow each other.
        num_groups: groups; experts of a group follow each other.
        num_nodes: nodes.
        num_experts: experts.
    """
    held_LWE = count_held(plan_LWX, num_experts)
    shape = (len(plan_LWX), num_nodes, held_LWE.shape[1] // num_nodes, num_groups, num_experts // num_groups)
    return match_groups(held_LWE.reshape(shape).sum(axis=(2, 4)))


def match_groups(overlap_LNG: Ints) -> Ints:
    """(L, G) a node for every group, as many for each, the largest overlaps first."""
    num_layers, num_nodes, num_groups = overlap_LNG.shape
    layers = np.arange(num_layers)
    overlap_LNG = overlap_LNG.copy()
    node_LG = np.zeros((num_layers, num_groups), dtype=np.int64)
    num_free_LN = np.full((num_layers, num_nodes), num_groups // num_nodes)
    for _ in range(num_groups):
        best_L = overlap_LNG.reshape(num_layers, -1).argmax(axis=1)
        node_L, group_L = np.unravel_index(best_L, (num_nodes, num_groups))
        node_LG[layers, group_L] = node_L
        num_free_LN[layers, node_L] -= 1
        overlap_LNG[layers, :, group_L] = -1
        overlap_LNG[num_free_LN == 0] = -1
    return node_LG
