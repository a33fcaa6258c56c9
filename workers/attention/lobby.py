"""The lobby: what never fits is refused here, and what waits or runs is described to the scheduler."""

from wire.errors import PromptTooLong
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.scheduler import Candidate
from workers.attention.types import Phase, SequenceState, Source


class Lobby:
    """Looks at sequences and pages, changes nothing; the engine thread is its only user."""

    def __init__(self, *, pages: PageAllocator, prefix: PrefixCache) -> None:
        self._pages = pages
        self._prefix = prefix

    def too_long(self, num_tokens: int, *, field: str) -> PromptTooLong | None:
        """The refusal of tokens that would not fit if every page were free."""
        num_pages = self._pages.pages_for(num_tokens)
        if num_pages <= self._pages.num_pages:
            return None
        message = f"needs {num_pages} KV pages of {self._pages.page_tokens} tokens, the worker has "
        return PromptTooLong(f"{message}{self._pages.num_pages}; raise num_pages", field=field)

    def candidate(self, sequence: SequenceState) -> Candidate:
        """What the scheduler must know of a sequence."""
        spec = sequence.spec
        num_cached_tokens = sequence.num_cached_tokens
        if sequence.phase is Phase.WAITING:
            # Others compute the prompt of a remote one; of a local one, what is not here.
            is_remote = spec.source is Source.REMOTE
            num_cached_tokens = len(spec.token_ids) - 1 if is_remote else sequence.num_expected_tokens
        return Candidate(
            key=spec.key,
            phase=sequence.phase,
            num_pending_tokens=len(sequence.token_ids) - num_cached_tokens,
            num_pages=self._pages.pages_for(spec.num_reserved_tokens),
            num_cached_tokens=num_cached_tokens,
            priority=spec.priority,
            tenant=spec.tenant,
            deadline_s=sequence.deadline_s,
            next_page=self._prefix.next_page(sequence) if sequence.phase is Phase.PREFILL else None,
        )
