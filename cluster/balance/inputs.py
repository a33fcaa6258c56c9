"""What `moray balance` accepts: every refusal names the option, what was wanted and what was given.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.balance.types import EMPTY, Floats, Ints
from wire.errors import ConfigError
from wire.phases import PHASES, Phase


def check_loads(loads: npt.NDArray[Any]) -> Floats:
    """(L, E) the loads as float64.

    Raises:
        ConfigError: they are not two-dimensional numbers, finite and >= 0.
    """
    if loads.ndim != 2 or not loads.size or loads.dtype.kind not in "iuf":
        given = f"shape {loads.shape} of {loads.dtype}"
        raise ConfigError(field="--loads", wanted="numbers of shape (layers, experts)", given=given)
    loads_LE = loads.astype(np.float64)
    bad = np.argwhere(~np.isfinite(loads_LE) | (loads_LE < 0))
    if len(bad):
        layer, expert = (int(index) for index in bad[0])
        given = f"{loads_LE[layer, expert]} for layer {layer}, expert {expert} ({len(bad)} such)"
        raise ConfigError(field="--loads", wanted="finite loads >= 0", given=given)
    return loads_LE


def check_phase_loads(loads: npt.NDArray[Any]) -> Mapping[Phase, Floats]:
    """Phase -> (L, E) loads as float64.

    Raises:
        ConfigError: they are not numbers (2, L, E), finite and >= 0.
    """
    if loads.ndim != 3 or len(loads) != len(PHASES):
        wanted = "numbers of shape (2, layers, experts) with --by-phase"
        raise ConfigError(field="--loads", wanted=wanted, given=f"shape {loads.shape}")
    return {phase: check_loads(loads_LE) for phase, loads_LE in zip(PHASES, loads, strict=True)}


def phases_from_list(phases: object) -> list[Phase]:
    """The phase of each worker of an earlier plan; none where it was one for both.

    Raises:
        ConfigError: it is no list of phases.
    """
    known = {phase: phase for phase in PHASES}
    if not isinstance(phases, list) or not set(map(str, phases)) <= set(known):
        raise _refusal(f"phases out of {', '.join(PHASES)}, one for each worker", repr(phases)[:80])
    return [known[phase] for phase in phases]


def check_capacity(num_experts: int, *, num_workers: int, num_nodes: int, num_slots: int) -> None:
    """Checks that the workers divide over the nodes and hold every expert.

    Raises:
        ConfigError: they do not, or a worker has more slots than there are experts.
    """
    if num_workers % num_nodes:
        wanted = f"a divisor of --workers {num_workers}: nodes have as many workers each"
        raise ConfigError(field="--nodes", wanted=wanted, given=str(num_nodes))
    least = -(-num_experts // num_workers)
    if num_slots < least:
        wanted = f"at least {least}: {num_workers} workers must hold {num_experts} experts in every layer"
        raise ConfigError(field="--slots", wanted=wanted, given=str(num_slots))
    if num_slots > num_experts:
        wanted = f"at most {num_experts}: a worker holds an expert once"
        raise ConfigError(field="--slots", wanted=wanted, given=str(num_slots))


def check_groups(num_experts: int, *, num_groups: int, num_nodes: int, num_slots: int) -> None:
    """Checks groups that will stay together on nodes.

    Raises:
        ConfigError: they are not alike, or a worker has more slots than its node has experts.
    """
    if num_experts % num_groups:
        wanted = f"a divisor of the {num_experts} experts: groups are alike"
        raise ConfigError(field="--groups", wanted=wanted, given=str(num_groups))
    if num_slots > num_experts // num_nodes:
        wanted = f"at most {num_experts // num_nodes}: the experts that stay on one of {num_nodes} nodes"
        raise ConfigError(field="--slots", wanted=wanted, given=str(num_slots))


def plan_from_lists(
    phy2log: object, *, num_layers: int, num_experts: int, fleet_shape: tuple[int, int]
) -> Ints:
    """(L, W, X) an earlier plan, written as the expert in every slot.

    It may be of more or fewer workers with as many slots each: those beyond are left out, those it lacks
    are empty.

    Args:
        phy2log: a list of slots for every layer.
        num_layers: layers of the loads.
        num_experts: experts of the loads.
        fleet_shape: workers, and slots of each.

    Raises:
        ConfigError: it is not a plan of these layers, experts and slots.
    """
    num_workers, num_slots = fleet_shape
    if not (isinstance(phy2log, Sequence) and all(isinstance(layer, Sequence) for layer in phy2log)):
        raise _refusal('{"phy2log": [[expert in every slot], one list per layer]}', type(phy2log).__name__)
    if len(phy2log) != num_layers:
        raise _refusal(f"{num_layers} layers, as the loads have", str(len(phy2log)))
    lengths = {len(layer) for layer in phy2log}
    if len(lengths) != 1 or min(lengths) % num_slots or not min(lengths):
        raise _refusal(f"as many slots in every layer, {num_slots} for each worker", str(sorted(lengths)))
    experts = [expert for layer in phy2log for expert in layer]
    bad = [expert for expert in experts if type(expert) is not int or not 0 <= expert < num_experts]
    if bad:
        raise _refusal(f"experts 0 to {num_experts - 1}", f"{bad[0]!r} ({len(bad)} such)")
    plan_LWX = np.array(experts, dtype=np.int64).reshape(num_layers, -1, num_slots)[:, :num_workers]
    lacking = num_workers - plan_LWX.shape[1]
    return np.pad(plan_LWX, ((0, 0), (0, lacking), (0, 0)), constant_values=EMPTY)


def _refusal(wanted: str, given: str) -> ConfigError:
    return ConfigError(field="--previous", wanted=wanted, given=given)
