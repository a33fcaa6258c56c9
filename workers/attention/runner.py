"""One step of the model: the rows of some sequences, and new tokens for each that has no more to compute."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from model.batch import Batch, CacheView, make_batch
from model.transformer import Transformer
from wire import phases
from wire.metrics import Metrics
from workers.attention.cache import PagedCache
from workers.attention.drafter import Speculation
from workers.attention.handover import HandoverView, hand_over, wanted_rows
from workers.attention.logprobs import tell_prompt
from workers.attention.moe import Experts
from workers.attention.sampler import Turn, sample_tokens
from workers.attention.scheduler import StepLimits, split_step
from workers.attention.speculation import accept_drafts
from workers.attention.types import ChosenToken, Key, Phase, SequenceState, Source

Running = Sequence[tuple[SequenceState, int]]
"""(sequence, tokens to compute, >= 1) of one step."""

MAX_LATE_ROWS = 256
"""Rows that the MTP layer may be behind, all sequences together, while nothing is drafted."""

MIN_PLANNED = 0.75
"""Share of a step's sequences that must have the drafts planned, or its time says nothing about them."""

MAX_SENT_ROWS = 512
"""Rows of the MTP layer that are handed to another worker at a time."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What one sequence computes in a step: its next tokens, and drafts of those behind them."""

    sequence: SequenceState
    num_tokens: int
    draft_ids: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft_ids)

    @property
    def token_ids(self) -> list[int]:
        begin = self.sequence.num_cached_tokens
        return [*self.sequence.token_ids[begin : begin + self.num_tokens], *self.draft_ids]

    @property
    def is_ready(self) -> bool:
        """Whether the step gives it a token."""
        return self.num_tokens == self.sequence.num_pending_tokens


@dataclass(frozen=True)
class _DraftPlan:
    """How many tokens a step drafts."""

    num_drafts: int = 0
    """Of each sequence, at most."""
    key_to_num: Mapping[Key, int] = field(default_factory=dict)
    """Of each that decodes."""

    @property
    def is_drafting(self) -> bool:
        return any(self.key_to_num.values())

    def num_drafts_of(self, sequence: SequenceState) -> int:
        return self.key_to_num.get(sequence.spec.key, 0)


_NO_DRAFTS = _DraftPlan()


@dataclass(frozen=True, kw_only=True)
class StepRunner:
    """Runs steps on the engine's thread; of a sequence it changes `num_cached_tokens` and `hidden_rows`."""

    transformer: Transformer
    cache: PagedCache
    experts: Experts
    limits: StepLimits
    metrics: Metrics
    speculation: Speculation | None = None
    """Drafts tokens; None = nothing does."""

    def run(self, running: Running) -> list[tuple[SequenceState, tuple[ChosenToken, ...]]]:
        """Computes one step; the sequences that got new tokens, with them, in the order of `running`.

        Raises:
            MorayError: an expert worker could not be reached in time, or another failure of the step.
        """
        began_s = time.perf_counter()
        self.experts.begin_step(step_phase(running))
        plan = self._plan_drafts(running)
        drafting_s = time.perf_counter()
        step = self._draft(running, plan)
        parts = split_step([rows.num_rows for rows in step], micro_batches=self.limits.micro_batches)
        micro_batches = [self._micro_batch(step[begin:end]) for begin, end in parts]
        hidden_TD = torch.cat(self.transformer.forward_all(micro_batches, self.experts))
        for _, view in micro_batches:
            if isinstance(view, HandoverView):
                view.tell_up_to(self.transformer.config.num_hidden_layers)
        new_tokens = self._choose(step, hidden_TD)
        ready = [(rows.sequence, tokens) for rows, tokens in zip(step, new_tokens, strict=True) if tokens]
        self._advance_all(step, new_tokens, hidden_TD)
        self._finish_prefills(ready)
        ended_s = time.perf_counter()
        self._learn(step, new_tokens, plan, seconds=ended_s - drafting_s)
        self.metrics.histogram("step_seconds").observe(ended_s - began_s)
        self.metrics.histogram("step_tokens").observe(hidden_TD.shape[0])
        return ready

    def _plan_drafts(self, running: Running) -> _DraftPlan:
        """Tokens to draft for each sequence that decodes; the MTP layer has seen all prompts afterwards.

        While nothing is drafted, what is generated waits for the next try; many sequences do not wait so
        long, for running over all of their rows would cost more than the try is worth.
        """
        if self.speculation is None:
            return _NO_DRAFTS
        drafter, policy = self.speculation.drafter, self.speculation.policy
        decoding = [sequence for sequence, _ in running if sequence.phase is Phase.DECODE]
        num_drafts = 0
        if decoding:
            spare_tokens = self.limits.max_step_tokens - sum(num_tokens for _, num_tokens in running)
            most = max(spare_tokens, 0) // len(decoding)
            num_drafts = min(policy.plan_drafts(len(decoding)), most) if most else 0
        drafter.catch_up(
            [s for s, _ in running if s.phase is not Phase.DECODE or s.num_new_tokens == 1], max_rows=1
        )
        each = policy.plan_each(num_drafts, [s.draft_record for s in decoding])
        drafting = [sequence for sequence, num in zip(decoding, each, strict=True) if num]
        resting = [sequence for sequence, num in zip(decoding, each, strict=True) if not num]
        if drafting:
            drafter.catch_up(drafting, max_rows=1 + num_drafts)
        if resting:
            drafter.forget(resting, max_rows=max(MAX_LATE_ROWS // len(decoding), 1))
        key_to_num = {s.spec.key: num for s, num in zip(decoding, each, strict=True)}
        return _DraftPlan(num_drafts, key_to_num)

    def _draft(self, running: Running, plan: _DraftPlan) -> list[_Rows]:
        """The step's rows; drafts fit in its tokens, in the pages and in what may still be generated."""
        if self.speculation is None or not plan.is_drafting:
            return [_Rows(sequence=sequence, num_tokens=num_tokens) for sequence, num_tokens in running]
        budget_tokens = self.limits.max_step_tokens - sum(num_tokens for _, num_tokens in running)
        wanted = []
        for sequence, _ in running:
            most = min(plan.num_drafts_of(sequence), budget_tokens, self._most_drafts(sequence))
            wanted.append(max(most, 0))
            budget_tokens -= wanted[-1]
        drafts = self.speculation.drafter.draft([sequence for sequence, _ in running], wanted)
        return [
            _Rows(sequence=sequence, num_tokens=num_tokens, draft_ids=draft_ids)
            for (sequence, num_tokens), draft_ids in zip(running, drafts, strict=True)
        ]

    def _most_drafts(self, sequence: SequenceState) -> int:
        if sequence.phase is not Phase.DECODE:
            return 0
        free_rows = len(sequence.pages) * self.cache.page_tokens - len(sequence.token_ids)
        return min(free_rows, sequence.spec.max_tokens - sequence.num_new_tokens - 1)

    def _micro_batch(self, step: Sequence[_Rows]) -> tuple[Batch, CacheView]:
        batch = make_batch(
            [rows.token_ids for rows in step],
            first_positions=[rows.sequence.num_cached_tokens for rows in step],
            prompt_tokens=[rows.sequence.spec.num_prompt_tokens for rows in step],
        )
        view = self.cache.view(batch, [rows.sequence.pages for rows in step])
        handed = [
            wanted
            for rows in step
            for wanted in wanted_rows(
                rows.sequence,
                rows.sequence.num_cached_tokens,
                rows.sequence.num_cached_tokens + rows.num_tokens,
            )
        ]
        return batch, HandoverView(view, partial(hand_over, self.cache, handed)) if handed else view

    def _choose(self, step: Sequence[_Rows], hidden_TD: torch.Tensor) -> list[tuple[ChosenToken, ...]]:
        """The new tokens of each sequence, none where there is more to compute."""
        ends = accumulate(rows.num_rows for rows in step)
        ready = [(end, rows) for end, rows in zip(ends, step, strict=True) if rows.is_ready]
        if not ready:
            return [()] * len(step)
        # The row of draft j is chosen as if all drafts before it stood; it is read only if they did.
        chosen = [
            (end - 1 - num_left, rows, len(rows.draft_ids) - num_left)
            for end, rows in ready
            for num_left in reversed(range(1 + len(rows.draft_ids)))
        ]
        last_rows = torch.tensor([row for row, _, _ in chosen], device=hidden_TD.device)
        tokens = iter(
            sample_tokens(
                self.transformer.logits(hidden_TD[last_rows]),
                [
                    Turn(rows.sequence.spec, rows.sequence.token_ids, rows.draft_ids[:num_ahead])
                    for _, rows, num_ahead in chosen
                ],
            )
        )
        return [_accepted(rows, tokens) if rows.is_ready else () for rows in step]

    def _advance_all(
        self, step: Sequence[_Rows], new_tokens: Sequence[tuple[ChosenToken, ...]], hidden_TD: torch.Tensor
    ) -> None:
        begin_row = 0
        for rows, tokens in zip(step, new_tokens, strict=True):
            num_kept = rows.num_tokens + max(len(tokens) - 1, 0)
            if rows.sequence.spec.needs_prompt_rows:
                tell_prompt(
                    rows.sequence,
                    hidden_TD[begin_row : begin_row + rows.num_tokens],
                    begin=rows.sequence.num_cached_tokens,
                    logits_of=self.transformer.logits,
                )
            if self.speculation is not None:
                self.speculation.drafter.keep(
                    rows.sequence,
                    hidden_TD[begin_row : begin_row + num_kept],
                    first_position=rows.sequence.num_cached_tokens,
                )
            self._advance(rows.sequence, num_kept)
            begin_row += rows.num_rows

    def _finish_prefills(self, ready: Sequence[tuple[SequenceState, tuple[ChosenToken, ...]]]) -> None:
        """Hands on the MTP layer's rows of prompts, which are there only when the first new token is."""
        if self.speculation is None:
            return
        ended = [(s, tokens) for s, tokens in ready if s.spec.source is Source.PREFILL_ONLY]
        self.speculation.drafter.finish([s for s, _ in ended], [tokens[0].token_id for _, tokens in ended])
        for sequence, _ in ended:
            for begin in range(0, sequence.num_cached_tokens, MAX_SENT_ROWS):
                end = min(begin + MAX_SENT_ROWS, sequence.num_cached_tokens)
                wanted = wanted_rows(sequence, begin, end)
                hand_over(self.cache, wanted, self.transformer.config.num_hidden_layers)

    def _advance(self, sequence: SequenceState, num_tokens: int) -> None:
        """Counts computed rows."""
        sequence.num_cached_tokens += num_tokens
        phase = "decode" if sequence.phase is Phase.DECODE else "prefill"
        self.metrics.counter("tokens_total", phase=phase).inc(num_tokens)

    def give_rows(self, sequence: SequenceState, *, begin: int) -> None:
        """Hands the cached rows from `begin` on to the worker that wants them, if one does."""
        handed = wanted_rows(sequence, begin, sequence.num_cached_tokens)
        for layer_idx in range(self.transformer.config.num_hidden_layers):
            hand_over(self.cache, handed, layer_idx)

    def _learn(
        self,
        step: Sequence[_Rows],
        new_tokens: Sequence[tuple[ChosenToken, ...]],
        plan: _DraftPlan,
        *,
        seconds: float,
    ) -> None:
        """Counts drafts, and tells the policy of a step in which nearly all sequences decoded as planned."""
        if self.speculation is None:
            return
        for rows, tokens in zip(step, new_tokens, strict=True):
            for position in range(len(rows.draft_ids)):
                outcome = "accepted" if position < len(tokens) - 1 else "rejected"
                self.metrics.counter("drafts_total", position=str(position + 1), outcome=outcome).inc()
            if rows.sequence.phase is Phase.DECODE:
                rows.sequence.draft_record.on_step(len(rows.draft_ids), len(tokens) - 1)
        # Some are at their end, or have just come from another worker.
        is_planned = [len(r.draft_ids) == plan.num_drafts_of(r.sequence) for r in step]
        if all(r.sequence.phase is Phase.DECODE for r in step) and sum(is_planned) >= MIN_PLANNED * len(step):
            accepted = [
                len(tokens) - 1 for tokens, is_so in zip(new_tokens, is_planned, strict=True) if is_so
            ]
            self.speculation.policy.on_step(len(step), plan.num_drafts, seconds=seconds, accepted=accepted)


def step_phase(running: Running) -> phases.Phase:
    """What most rows of a step are for: a worker of role `both` computes prompts and new tokens in one.

    Example: 256 tokens of a prompt and one token of each of 20 sequences are a step of prefill.
    """
    num_decoded = sum(num_tokens for sequence, num_tokens in running if sequence.phase is Phase.DECODE)
    return "decode" if 2 * num_decoded >= sum(num_tokens for _, num_tokens in running) else "prefill"


def _accepted(rows: _Rows, tokens: Iterator[ChosenToken]) -> tuple[ChosenToken, ...]:
    spec = rows.sequence.spec
    chosen = [next(tokens) for _ in range(1 + len(rows.draft_ids))]
    new_ids = accept_drafts(
        rows.draft_ids,
        [token.token_id for token in chosen],
        stop_token_ids=spec.stop_token_ids,
        max_tokens=spec.max_tokens - rows.sequence.num_new_tokens,
    )
    return tuple(chosen[: len(new_ids)])
