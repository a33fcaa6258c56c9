"""Scoring: logits at every position of a prompt, with the choices behind them. What `moray logits` shows.

T tokens, V vocabulary, K top-k, U = min(index_topk, T) selected positions, L layers.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch, make_batch
from model.config import ModelConfig
from model.transformer import Transformer
from wire.errors import Overloaded
from workers.attention.cache import PagedCache
from workers.attention.moe import Experts
from workers.attention.pages import PageAllocator


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """A prompt to score."""

    token_ids: tuple[int, ...]
    chunk_tokens: int
    """Tokens of one prefill chunk, >= 1."""


class ChoiceTrace:
    """Collects the gate's and the indexer's choices; a `model.batch.Trace`."""

    def __init__(self) -> None:
        self._gates: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._indexes: dict[int, list[Tensor]] = defaultdict(list)

    def on_gate(self, layer_idx: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Keeps a layer's experts, sorted by id."""
        sorted_TK, order_TK = ids_TK.sort(dim=-1)
        self._gates[layer_idx].append((sorted_TK.int().cpu(), weights_TK.gather(1, order_TK).float().cpu()))

    def on_index(self, layer_idx: int, span_idx: int, ids_RU: Tensor) -> None:
        """Keeps a layer's selected positions."""
        self._indexes[layer_idx].append(ids_RU.int().cpu())

    def tensors(self, config: ModelConfig, *, num_tokens: int) -> dict[str, Tensor]:
        """expert_ids and expert_weights (L_moe, T, K), indexer_ids (L, T, U) padded with -1."""
        width = min(config.index_topk, num_tokens)
        gates = [self._gates[layer_idx] for layer_idx in config.moe_layer_ids]
        indexes = [self._indexes[layer_idx] for layer_idx in range(config.num_hidden_layers)]
        tensors = {
            "indexer_ids": torch.stack([torch.cat([_pad(ids, width) for ids in parts]) for parts in indexes])
        }
        if gates:
            tensors["expert_ids"] = torch.stack([torch.cat([ids for ids, _ in parts]) for parts in gates])
            tensors["expert_weights"] = torch.stack([torch.cat([w for _, w in parts]) for parts in gates])
        return tensors


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores prompts between two steps of an engine, in pages that are free again afterwards."""

    transformer: Transformer
    cache: PagedCache
    pages: PageAllocator
    experts: Experts

    def score(self, spec: ScoreSpec) -> dict[str, Tensor]:
        """The tensors of `score_prompt`.

        Raises:
            Overloaded: the pages do not suffice now.
            MorayError: an expert worker could not be reached in time.
        """
        num_tokens = len(spec.token_ids)
        if not self.pages.can_reserve(num_tokens):
            num_pages = self.pages.num_available
            raise Overloaded(f"{num_pages} free pages do not hold the prompt; try later")
        pages = self.pages.reserve(spec, num_tokens=num_tokens)
        try:
            return score_prompt(
                spec, transformer=self.transformer, cache=self.cache, pages=pages, experts=self.experts
            )
        finally:
            self.pages.release(spec)


def score_prompt(
    spec: ScoreSpec, *, transformer: Transformer, cache: PagedCache, pages: Sequence[int], experts: Experts
) -> dict[str, Tensor]:
    """The tensors of `moray logits` for one prompt.

    Args:
        spec: prompt and chunk length.
        transformer: the model.
        cache: where its rows go.
        pages: pages enough for the prompt, owned by the caller.
        experts: the routed experts.

    Returns:
        logits (T, V) float32, expert_ids (L_moe, T, K) int32, expert_weights (L_moe, T, K) float32,
        indexer_ids (L, T, U) int32 and, with an MTP layer, mtp_logits (T - 1, V) float32.
    """
    config = transformer.config
    num_tokens = len(spec.token_ids)
    trace = ChoiceTrace()
    hidden = []
    for batch in _chunks(spec.token_ids, spec.chunk_tokens):
        experts.begin_step("prefill")
        hidden.append(transformer.forward(batch, cache.view(batch, [pages]), experts, trace))
    hidden_TD = torch.cat(hidden)
    tensors = {"logits": transformer.logits(hidden_TD).cpu(), **trace.tensors(config, num_tokens=num_tokens)}
    if config.num_nextn_predict_layers:
        parts = [torch.empty(0, config.vocab_size)]
        for batch in _chunks(spec.token_ids[1:], spec.chunk_tokens):
            experts.begin_step("prefill")
            first = batch.spans[0].first_position
            rows_TD = hidden_TD[first : first + batch.num_rows]
            parts.append(transformer.mtp_logits(batch, rows_TD, cache.view(batch, [pages]), experts).cpu())
        tensors["mtp_logits"] = torch.cat(parts)
    return tensors


def _chunks(token_ids: Sequence[int], chunk_tokens: int) -> list[Batch]:
    return [
        make_batch([token_ids[begin : begin + chunk_tokens]], first_positions=[begin])
        for begin in range(0, len(token_ids), chunk_tokens)
    ]


def _pad(ids_RU: Tensor, width: int) -> Tensor:
    padded = ids_RU.new_full((ids_RU.shape[0], width), -1)
    padded[:, : ids_RU.shape[1]] = ids_RU
    return padded
