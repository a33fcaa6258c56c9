"""The greedy of DeepSeek's EPLB, written plainly: what the balancer is compared with.

Groups go to nodes, the heaviest first, each to the lightest node with room. On every node the spare slots
go one by one to the expert whose replicas are heaviest. Replicas go to workers as groups go to nodes. Where
nodes cannot share the groups evenly, all workers are one node and all experts one group.

Letters: L layers, E logical experts, G groups, R rows here: one for each layer and node.

Source: https://github.com/deepseek-ai/EPLB, the algorithm as its README describes it; in torch as there.
"""

import torch
from torch import Tensor


def plan_eplb(
    load_LE: Tensor, *, num_slots: int, num_groups: int, num_nodes: int, num_workers: int
) -> Tensor:
    """(L, num_slots) int64, the expert in every slot, slots ordered by worker.

    Args:
        load_LE: (L, E) float, load of every expert.
        num_slots: slots of a layer over all workers.
        num_groups: groups of experts.
        num_nodes: nodes.
        num_workers: workers.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = load_LE.shape
    load_LG = load_LE.view(num_layers, num_groups, -1).sum(dim=2)
    node_LE = _pack(load_LG, num_nodes).repeat_interleave(num_experts // num_groups, dim=1)
    expert_LE = node_LE.argsort(dim=1, stable=True)
    load_RE = load_LE.gather(1, expert_LE).view(num_layers * num_nodes, -1)
    number_RY, count_RE = _replicate(load_RE, num_slots // num_nodes)
    replica_RY = (load_RE / count_RE).gather(1, number_RY)
    slot_RY = _pack(replica_RY, num_workers // num_nodes).argsort(dim=1, stable=True)
    expert_RE = expert_LE.view(num_layers * num_nodes, -1)
    return expert_RE.gather(1, number_RY.gather(1, slot_RY)).view(num_layers, num_slots)


def _pack(load_RN: Tensor, num_packs: int) -> Tensor:
    """(R, N) the pack of every item; packs hold as many items each."""
    num_rows, num_items = load_RN.shape
    room = num_items // num_packs
    if room == 1:
        return torch.arange(num_items).expand(num_rows, num_items)
    pack_RN = torch.empty_like(load_RN, dtype=torch.int64)
    for row, order in enumerate(load_RN.argsort(dim=1, descending=True).tolist()):
        items = load_RN[row].tolist()
        loads, free = [0.0] * num_packs, [room] * num_packs
        packs = [0] * num_items
        for item in order:
            pack = min((pack for pack in range(num_packs) if free[pack]), key=loads.__getitem__)
            packs[item] = pack
            loads[pack] += items[item]
            free[pack] -= 1
        pack_RN[row] = torch.tensor(packs)
    return pack_RN


def _replicate(load_RE: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """(R, Y) the expert of every replica, and (R, E) replicas of every expert."""
    num_rows, num_experts = load_RE.shape
    rows = torch.arange(num_rows)
    expert_RY = torch.arange(num_slots).repeat(num_rows, 1)
    count_RE = torch.ones_like(load_RE)
    for slot in range(num_experts, num_slots):
        heaviest_R = (load_RE / count_RE).argmax(dim=1)
        expert_RY[:, slot] = heaviest_R
        count_RE[rows, heaviest_R] += 1
    return expert_RY, count_RE
