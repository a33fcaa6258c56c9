"""One step of the model: the rows of some sequences, and a new token for each that has no more to compute."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from model.batch import Batch, CacheView, make_batch
from model.transformer import Transformer
from wire.frames import Array
from wire.metrics import Metrics
from workers.attention.cache import PagedCache
from workers.attention.moe import Experts
from workers.attention.sampler import sample_tokens
from workers.attention.scheduler import split_step
from workers.attention.types import CacheRows, Phase, SequenceState, Source

Running = Sequence[tuple[SequenceState, int]]
"""(sequence, tokens to compute, >= 1) of one step."""


@dataclass(frozen=True, kw_only=True)
class StepRunner:
    """Runs steps on the engine's thread; changes nothing of a sequence but `num_cached_tokens`."""

    transformer: Transformer
    cache: PagedCache
    experts: Experts
    micro_batches: int
    """Parts of a step that take turns, at most."""
    metrics: Metrics

    def run(self, running: Running) -> list[tuple[SequenceState, tuple[int, ...]]]:
        """Computes one step; the sequences that got new tokens, with them, in the order of `running`.

        Raises:
            MorayError: an expert worker could not be reached in time, or another failure of the step.
        """
        began_s = time.perf_counter()
        num_rows = [num_tokens for _, num_tokens in running]
        parts = split_step(num_rows, micro_batches=self.micro_batches)
        self.experts.begin_step()
        hidden_TD = torch.cat(
            self.transformer.forward_all(
                [self._micro_batch(running[begin:end]) for begin, end in parts], self.experts
            )
        )
        for sequence, num_tokens in running:
            self._advance(sequence, num_tokens)
        ends = accumulate(num_rows)
        ready = [(end, s) for end, (s, _) in zip(ends, running, strict=True) if s.num_pending_tokens == 0]
        tokens: list[int] = []
        if ready:
            last_rows = torch.tensor([end - 1 for end, _ in ready], device=hidden_TD.device)
            tokens = sample_tokens(
                self.transformer.logits(hidden_TD[last_rows]),
                [sequence.spec.sampling for _, sequence in ready],
                positions=[sequence.sampling_position for _, sequence in ready],
            )
        self.metrics.histogram("step_seconds").observe(time.perf_counter() - began_s)
        self.metrics.histogram("step_tokens").observe(sum(num_rows))
        return [(sequence, (token_id,)) for (_, sequence), token_id in zip(ready, tokens, strict=True)]

    def _micro_batch(self, running: Running) -> tuple[Batch, CacheView]:
        batch = make_batch(
            [
                s.token_ids[s.num_cached_tokens : s.num_cached_tokens + num_tokens]
                for s, num_tokens in running
            ],
            first_positions=[s.num_cached_tokens for s, _ in running],
            prompt_tokens=[s.spec.num_prompt_tokens for s, _ in running],
        )
        return batch, self.cache.view(batch, [s.pages for s, _ in running])

    def _advance(self, sequence: SequenceState, num_tokens: int) -> None:
        """Counts computed rows and hands them on when another worker wants them."""
        begin = sequence.num_cached_tokens
        sequence.num_cached_tokens += num_tokens
        phase = "decode" if sequence.phase is Phase.DECODE else "prefill"
        self.metrics.counter("tokens_total", phase=phase).inc(num_tokens)
        self.give_rows(sequence, begin=begin)

    def give_rows(self, sequence: SequenceState, *, begin: int) -> None:
        """Hands the cached rows from `begin` on to the worker that wants them, if one does."""
        if sequence.spec.source is Source.PREFILL_ONLY:
            flat_T = self.cache.flat_rows(sequence.pages, begin=begin, end=sequence.num_cached_tokens)
            for layer_idx in range(self.transformer.config.num_hidden_layers):
                rows_TW: Array = self.cache.read(layer_idx, flat_T).cpu().numpy()
                sequence.sink(CacheRows(layer_idx, begin, rows_TW))
