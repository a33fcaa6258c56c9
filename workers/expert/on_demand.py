"""Experts that a worker loaded because somebody asked, apart from its slots; a bounded number, the newest."""

import threading
from collections import OrderedDict

from model.matrix import Mlp
from workers.expert.types import Place


class OnDemandExperts:
    """Weights by place; the one that was asked for longest ago goes first. Any thread may call."""

    def __init__(self, max_experts: int) -> None:
        """Makes an empty one.

        Args:
            max_experts: most that are held at the same time, >= 0.
        """
        self._max_experts = max_experts
        self._lock = threading.Lock()
        self._weights: OrderedDict[Place, Mlp] = OrderedDict()

    def find(self, place: Place) -> Mlp | None:
        """The weights of an expert, which is then the newest; None when they are not here."""
        with self._lock:
            weights = self._weights.get(place)
            if weights is not None:
                self._weights.move_to_end(place)
            return weights

    def keep(self, place: Place, weights: Mlp) -> None:
        """Holds an expert from now on, and lets go of the oldest beyond the bound."""
        with self._lock:
            self._weights[place] = weights
            self._weights.move_to_end(place)
            while len(self._weights) > self._max_experts:
                self._weights.popitem(last=False)

    def drop(self, place: Place) -> None:
        """Lets go of an expert, if it is held."""
        with self._lock:
            self._weights.pop(place, None)

    def places(self) -> list[Place]:
        """What is held, oldest first."""
        with self._lock:
            return list(self._weights)
