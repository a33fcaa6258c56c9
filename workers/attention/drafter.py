"""The drafter: runs the MTP layer over what the main layers computed, and guesses the next tokens.

Row i of the MTP layer takes token i + 1 and the hidden state of position i, and scores token i + 2. Its cache
rows lie in the pages of the sequence, at layer num_hidden_layers, one position behind the main layers'. They
decide nothing but how good the drafts are: rows that are missing cost acceptance, never a token.

Letters: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.batch import make_batch
from model.transformer import Transformer
from workers.attention.cache import PagedCache
from workers.attention.draft_record import DraftRecord
from workers.attention.moe import Experts
from workers.attention.types import SequenceState


class Drafter(Protocol):
    """Guesses tokens; used by the engine's thread, within a step."""

    def keep(self, sequence: SequenceState, hidden_TD: Tensor, *, first_position: int) -> None:
        """Notes the final hidden states of positions that were computed and stand."""

    def catch_up(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        """Leaves none of the sequences with more than max_rows, >= 1, that the next draft must run over."""

    def forget(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        """Drops the rows of sequences that keep more than max_rows, >= 1; drafts are the worse for it."""

    def draft(self, sequences: Sequence[SequenceState], num_drafts: Sequence[int]) -> list[tuple[int, ...]]:
        """At most so many next tokens of each sequence; fewer, or none, where it cannot guess."""

    def finish(self, sequences: Sequence[SequenceState], next_ids: Sequence[int]) -> None:
        """Leaves nothing behind of sequences that go on elsewhere with these tokens."""


class Policy(Protocol):
    """Says how many tokens to draft; `speculation.DraftPolicy` and what tests put in its place."""

    def plan_drafts(self, num_sequences: int) -> int:
        """How many tokens to draft for each of the sequences of a decode step, at most."""

    def plan_each(self, num_drafts: int, records: Sequence[DraftRecord]) -> list[int]:
        """How many of those each sequence gets, by how its drafts did."""

    def on_step(
        self, num_sequences: int, num_drafts: int, *, seconds: float, accepted: Sequence[int]
    ) -> None:
        """Learns from a step of sequences that decoded; `accepted` is of those that got what was planned."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Who drafts tokens, and who says how many."""

    drafter: Drafter
    policy: Policy


class MtpDrafter:
    """Drafts with the checkpoint's MTP layer."""

    def __init__(self, *, transformer: Transformer, cache: PagedCache, experts: Experts) -> None:
        self._transformer = transformer
        self._cache = cache
        self._experts = experts

    def keep(self, sequence: SequenceState, hidden_TD: Tensor, *, first_position: int) -> None:
        """Notes the final hidden states of positions that were computed and stand."""
        # A copy, or a few rows would keep those of the whole step alive.
        sequence.hidden_rows.append(hidden_TD.clone(), first_position=first_position)

    def catch_up(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        """Runs over all but the newest row of sequences that keep more than max_rows, all in one call."""
        late = [s for s in sequences if s.hidden_rows.num_rows > max_rows and _is_current(s)]
        if late:
            self._run(late, [sequence.hidden_rows.num_rows - 1 for sequence in late])

    def forget(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        """Drops all but the newest row of sequences that keep more than max_rows."""
        for sequence in sequences:
            if sequence.hidden_rows.num_rows > max_rows:
                sequence.hidden_rows.keep_newest()

    def draft(self, sequences: Sequence[SequenceState], num_drafts: Sequence[int]) -> list[tuple[int, ...]]:
        """At most so many next tokens of each sequence; none of one whose newest hidden state is not kept."""
        drafts: list[list[int]] = [[] for _ in sequences]
        able = [
            i
            for i, (sequence, wanted) in enumerate(zip(sequences, num_drafts, strict=True))
            if wanted > 0 and sequence.num_pending_tokens == 1 and _is_current(sequence)
        ]
        if not able:
            return [()] * len(sequences)
        chosen = [sequences[i] for i in able]
        hidden_TD = self._run(chosen, [sequence.hidden_rows.num_rows for sequence in chosen])
        while True:
            token_ids = self._transformer.mtp_head(hidden_TD).argmax(-1).tolist()
            for i, token_id in zip(able, token_ids, strict=True):
                drafts[i].append(token_id)
            rows = [row for row, i in enumerate(able) if len(drafts[i]) < num_drafts[i]]
            able = [able[row] for row in rows]
            if not able:
                return [tuple(ids) for ids in drafts]
            hidden_TD = self._go_on([(sequences[i], drafts[i]) for i in able], hidden_TD[rows])

    def finish(self, sequences: Sequence[SequenceState], next_ids: Sequence[int]) -> None:
        """Runs over all rows of sequences, the last of which needs the token that comes next."""
        able = [i for i, sequence in enumerate(sequences) if _is_current(sequence)]
        if able:
            ended = [sequences[i] for i in able]
            num_rows = [sequence.hidden_rows.num_rows for sequence in ended]
            self._run(ended, num_rows, next_ids=[next_ids[i : i + 1] for i in able])

    def _run(
        self,
        sequences: Sequence[SequenceState],
        num_rows: Sequence[int],
        *,
        next_ids: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Takes the oldest kept rows of sequences through the layer; the state of each one's last, (B, D)."""
        nexts = next_ids or [()] * len(sequences)
        firsts = [sequence.hidden_rows.first_position for sequence in sequences]
        token_ids = [
            [*s.token_ids[first + 1 : first + 1 + n], *behind]
            for s, first, n, behind in zip(sequences, firsts, num_rows, nexts, strict=True)
        ]
        hidden_TD = torch.cat([s.hidden_rows.take(n) for s, n in zip(sequences, num_rows, strict=True)])
        out_TD = self._forward(sequences, token_ids, firsts, hidden_TD)
        ends = torch.tensor(num_rows, device=out_TD.device).cumsum(0)
        return out_TD[ends - 1]

    def _go_on(self, drafted: Sequence[tuple[SequenceState, list[int]]], hidden_TD: Tensor) -> Tensor:
        """The layer's states behind one more draft of each sequence, from those before it: (B, D)."""
        sequences = [sequence for sequence, _ in drafted]
        firsts = [len(sequence.token_ids) - 2 + len(draft_ids) for sequence, draft_ids in drafted]
        return self._forward(sequences, [draft_ids[-1:] for _, draft_ids in drafted], firsts, hidden_TD)

    def _forward(
        self,
        sequences: Sequence[SequenceState],
        token_ids: Sequence[Sequence[int]],
        first_positions: Sequence[int],
        hidden_TD: Tensor,
    ) -> Tensor:
        batch = make_batch(
            token_ids,
            first_positions=first_positions,
            prompt_tokens=[sequence.spec.num_prompt_tokens for sequence in sequences],
        )
        view = self._cache.view(batch, [sequence.pages for sequence in sequences])
        return self._transformer.mtp_forward(batch, hidden_TD, view, self._experts)


def _is_current(sequence: SequenceState) -> bool:
    """Whether the hidden state of its last computed position is kept."""
    kept = sequence.hidden_rows
    return kept.num_rows > 0 and kept.end_position == sequence.num_cached_tokens
