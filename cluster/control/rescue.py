"""Rescue: who takes the experts whose last replica was lost, until their home is back. A pure decision."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from workers.expert.types import Place


def plan_rescue(orphans: Sequence[Place], survivors: Mapping[str, Iterable[Place]]) -> Mapping[Place, str]:
    """Orphan -> the survivor that takes it: the one with fewest experts in that layer, then in all.

    Worked example: survivor a holds experts 0 and 1 of layer 1, survivor b holds expert 2. Of the orphans
    3, 4 and 5 the first goes to b, the second to a (both hold two, a comes first), the third to b.

    Args:
        orphans: places that nobody holds; their order decides.
        survivors: worker -> places that it holds or is to hold; empty = nobody can take anything.
    """
    if not survivors:
        return {}
    in_layer = Counter((worker_id, layer) for worker_id, places in survivors.items() for layer, _ in places)
    in_all = Counter({worker_id: len(set(places)) for worker_id, places in survivors.items()})
    homes: dict[Place, str] = {}
    for place in orphans:
        layer_idx = place[0]
        chosen = min(survivors, key=lambda worker: (in_layer[worker, layer_idx], in_all[worker]))
        homes[place] = chosen
        in_layer[chosen, layer_idx] += 1
        in_all[chosen] += 1
    return homes
