"""Where a step's time goes: the model's weights and kernels, each behind a stopwatch of its part."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

from model.kernels.base import Kernels
from model.weights import AttentionWeights, LayerWeights, ModelWeights

Part = Literal["attention", "indexer", "gate", "experts", "norms", "head"]

PARTS: tuple[Part, ...] = ("attention", "indexer", "gate", "experts", "norms", "head")

PART_OF_KERNEL: dict[str, Part] = {
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "rotate_queries": "attention",
    "store_rows": "attention",
    "attend_expanded": "attention",
    "attend_absorbed": "attention",
    "rotate_index_queries": "indexer",
    "index_scores": "indexer",
    "select_positions": "indexer",
    "choose_experts": "gate",
    "expert_sums": "experts",
}
"""The kernels that steps call."""

_Run = TypeVar("_Run", bound=Callable[..., Any])


class StepClock:
    """Seconds spent in each part since it was made; what is not counted is Python and small tensors."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.marks: list[tuple[float, dict[str, float]]] = []
        """Moments that somebody wanted to know of, and the seconds counted until then."""

    def mark(self, now_s: float) -> None:
        """Notes this moment, as `time.perf_counter` has it."""
        self.marks.append((now_s, dict(self.seconds)))

    def timed(self, part: Part, run: _Run) -> _Run:
        """The same function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            result = run(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - began_s
            return result

        return cast("_Run", counted)

    def time_kernels(self, kernels: Kernels) -> Kernels:
        """The same kernels, counted."""
        return cast("Kernels", _TimedKernels(kernels, self))

    def time_weights(self, weights: ModelWeights) -> ModelWeights:
        """The same main layers and head, counted; the MTP layer is left as it is."""
        return replace(
            weights,
            layers=tuple(self._time_layer(layer) for layer in weights.layers),
            head_VD=self.timed("head", weights.head_VD),
        )

    def _time_layer(self, layer: LayerWeights) -> LayerWeights:
        moe = layer.moe
        return replace(
            layer,
            attention=self._time_attention(layer.attention),
            mlp=layer.mlp and self.timed("experts", layer.mlp),
            moe=moe
            and replace(
                moe,
                gate_ED=self.timed("gate", moe.gate_ED),
                shared=self.timed("experts", moe.shared),
            ),
        )

    def _time_attention(self, weights: AttentionWeights) -> AttentionWeights:
        indexer = weights.indexer
        names = ("inputs_FD", "query_b_HQ", "output_DHO")
        timed = {name: self.timed("attention", getattr(weights, name)) for name in names}
        timed_indexer = replace(
            indexer,
            query_JIQ=self.timed("indexer", indexer.query_JIQ),
            head_JD=self.timed("indexer", indexer.head_JD),
        )
        return replace(weights, **timed, indexer=timed_indexer)


class _TimedKernels:
    def __init__(self, kernels: Kernels, clock: StepClock) -> None:
        self._kernels = kernels
        for name, part in PART_OF_KERNEL.items():
            setattr(self, name, clock.timed(part, getattr(kernels, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)
