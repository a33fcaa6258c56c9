"""The lobby: what never fits is refused here, and what waits or runs is described to the scheduler."""

from wire.errors import PromptTooLong
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.scheduler import Candidate
from workers.attention.types import Phase, SequenceState, Source

_SPARE_ROWS = 8
"""A sequence that decodes asks for its next page so many rows before it is full: drafts need some."""


class Lobby:
    """Looks at sequences and pages, changes nothing; the engine thread is its only user."""

    def __init__(self, *, pages: PageAllocator, prefix: PrefixCache, lookahead_tokens: int) -> None:
        self._pages = pages
        self._prefix = prefix
        self._lookahead_tokens = lookahead_tokens

    def too_long(self, num_tokens: int, *, field: str) -> PromptTooLong | None:
        """The refusal of tokens that would not fit if every page were free."""
        num_pages = self._pages.pages_for(num_tokens)
        if num_pages <= self._pages.num_pages:
            return None
        message = f"needs {num_pages} KV pages of {self._pages.page_tokens} tokens, the worker has "
        return PromptTooLong(f"{message}{self._pages.num_pages}; raise num_pages", field=field)

    def num_first_rows(self, sequence: SequenceState) -> int:
        """Rows for which a waiting sequence gets pages: its tokens, and those that it will have soon."""
        return min(len(sequence.token_ids) + self._lookahead_tokens, sequence.spec.num_reserved_tokens)

    def candidate(self, sequence: SequenceState) -> Candidate:
        """What the scheduler must know of a sequence."""
        spec = sequence.spec
        num_cached_tokens = sequence.num_cached_tokens
        if sequence.phase is Phase.WAITING:
            # Others compute the prompt of a remote one; of a local one, what is not here.
            is_remote = sequence.is_remote
            num_cached_tokens = len(spec.token_ids) - 1 if is_remote else sequence.num_expected_tokens
        return Candidate(
            key=spec.key,
            phase=sequence.phase,
            num_pending_tokens=len(sequence.token_ids) - num_cached_tokens,
            num_pages=self._num_wanted(sequence),
            num_held_pages=len(sequence.pages),
            is_full=self._pages.pages_for(len(sequence.token_ids)) > len(sequence.pages),
            may_grow=self._may_grow(sequence),
            is_for_others=spec.source is Source.PREFILL_ONLY,
            num_cached_tokens=num_cached_tokens,
            priority=spec.priority,
            tenant=spec.tenant,
            deadline_s=sequence.deadline_s,
            patience_s=sequence.patience_s,
            next_page=self._prefix.next_page(sequence) if sequence.phase is Phase.PREFILL else None,
        )

    def _num_wanted(self, sequence: SequenceState) -> int:
        if sequence.phase is Phase.WAITING:
            return self._pages.pages_for(self.num_first_rows(sequence))
        if sequence.phase is not Phase.DECODE:
            return 0
        num_rows = min(len(sequence.token_ids) + _SPARE_ROWS, sequence.spec.num_reserved_tokens)
        return max(self._pages.pages_for(num_rows) - len(sequence.pages), 0)

    def _may_grow(self, sequence: SequenceState) -> bool:
        num_pages = len(sequence.pages) or self._num_wanted(sequence)
        return self._pages.pages_for(sequence.spec.num_reserved_tokens) > num_pages
