"""Prefix reuse: sequences take the pages that others have computed, and leave theirs to those who come after.

One object of the engine thread between the page accounts and the sequences. Pages are found by the hashes of
wire/prefix.py, so reuse changes no bit of any row. A full page is published as soon as it is computed:
another sequence with the same prompt that is still at it takes it over.
"""

from typing import Protocol

from wire.metrics import Metrics
from wire.prefix import PrefixRules, extend_hashes
from workers.attention.pages import PageAllocator
from workers.attention.partial import PartialIndex, Texts
from workers.attention.tiers import PageTiers
from workers.attention.types import Phase, SequenceState


class CopyPage(Protocol):
    """Copies the first rows of a page into another one, in every layer."""

    def __call__(self, source: int, target: int, *, num_tokens: int) -> None:
        """From page `source` to page `target`."""


class PrefixCache:
    """Gives sequences their pages, with what is cached of their prefix."""

    def __init__(
        self,
        pages: PageAllocator,
        *,
        rules: PrefixRules,
        is_on: bool,
        copy_page: CopyPage,
        metrics: Metrics,
        tiers: PageTiers | None = None,
    ) -> None:
        """Takes the page accounts; pages that they give away go to `tiers`, and come back from there."""
        self._pages = pages
        self.tiers = tiers
        pages.on_eviction = self._on_eviction
        self._copy_page = copy_page
        self._partial = PartialIndex(rules)
        self._rules = rules
        self._is_on = is_on
        self._metrics = metrics

    def reserve(self, sequence: SequenceState, *, num_rows: int) -> None:
        """Gives a waiting sequence pages; `num_cached_tokens` of its rows are there already."""
        prefix = self._hashes(sequence)[: self._num_shareable(sequence)]
        sequence.pages = self._pages.reserve(sequence.spec.key, num_tokens=num_rows, prefix=prefix)
        self._count(sequence, self._pages.count_prefix(prefix))
        if self.tiers is not None:
            self._restore(sequence, prefix, self.tiers)
        self._copy_partial(sequence)
        self._metrics.counter("prefix_lookup_tokens_total").inc(len(prefix) * self._rules.page_tokens)

    def expect(self, sequence: SequenceState) -> None:
        """Notes how many rows of a new sequence are there now."""
        prefix = self._hashes(sequence)[: self._num_shareable(sequence)]
        num_cached = self._pages.count_prefix(prefix)
        sequence.num_expected_tokens = num_cached * self._rules.page_tokens
        if self.tiers is not None:
            sequence.fetch = self.tiers.fetch(prefix[num_cached:])

    def next_page(self, sequence: SequenceState) -> bytes | None:
        """Hash of the page that the next tokens of a prompt are in; None where nobody may take it over."""
        page_idx = sequence.num_cached_tokens // self._rules.page_tokens
        hashes = self._hashes(sequence)[: self._num_shareable(sequence)]
        return hashes[page_idx] if page_idx < len(hashes) else None

    def adopt(self, sequence: SequenceState) -> None:
        """Takes over the next pages of a prompt where another sequence has computed them by now."""
        page_idx = sequence.num_cached_tokens // self._rules.page_tokens
        first_idx = page_idx
        hashes = self._hashes(sequence)[: self._num_shareable(sequence)]
        key = sequence.spec.key
        while page_idx < len(hashes) and self._pages.adopt(key, page_idx=page_idx, digest=hashes[page_idx]):
            page_idx += 1
        if page_idx > first_idx:
            sequence.pages = self._pages.pages_of(key)
            self._count(sequence, page_idx)

    def publish(self, sequence: SequenceState) -> None:
        """Gives the pages that are full by now to those who come with the same prefix."""
        # Rows of accepted drafts are there before their tokens are.
        num_full = min(sequence.num_cached_tokens, len(sequence.token_ids)) // self._rules.page_tokens
        if not self._is_on or num_full == sequence.num_published_pages:
            return
        hashes = self._hashes(sequence)
        for page_idx in range(sequence.num_published_pages, num_full):
            self._pages.publish(sequence.spec.key, page_idx=page_idx, digest=hashes[page_idx])
            texts = self._texts(sequence, page_idx, end=len(sequence.token_ids))
            self._partial.add(self._parent(hashes, page_idx), hashes[page_idx], texts)
        sequence.num_published_pages = num_full
        sequence.pages = self._pages.pages_of(sequence.spec.key)

    def _restore(self, sequence: SequenceState, prefix: list[bytes], tiers: PageTiers) -> None:
        """Fills the next own pages of a prefix with cold ones, and publishes them."""
        key, fetch, sequence.fetch = sequence.spec.key, sequence.fetch, None
        page_idx = sequence.num_published_pages
        while page_idx < len(prefix):
            digest = prefix[page_idx]
            if not self._pages.adopt(key, page_idx=page_idx, digest=digest):
                if not tiers.restore(digest, self._pages.pages_of(key)[page_idx], fetch):
                    break
                self._pages.publish(key, page_idx=page_idx, digest=digest)
            page_idx += 1
        sequence.pages = self._pages.pages_of(key)
        self._count(sequence, page_idx)

    def _copy_partial(self, sequence: SequenceState) -> None:
        """Copies the next rows from a page that goes on in the same way, as far as it does."""
        # The rows of a remote one come as they are wanted; where all of them are, none is copied.
        if not self._is_on or sequence.is_remote or sequence.spec.needs_prompt_rows:
            return
        page_idx = sequence.num_published_pages
        texts = self._texts(sequence, page_idx, end=len(sequence.token_ids) - 1)
        found = self._partial.find(self._parent(sequence.page_hashes, page_idx), texts)
        source = self._pages.find(found[0]) if found else None
        if found and source is not None:
            self._copy_page(source, sequence.pages[page_idx], num_tokens=found[1])
            self._count_tokens(sequence, found[1])

    def _on_eviction(self, page: int, digest: bytes) -> None:
        self._partial.forget(digest)
        if self.tiers is not None:
            self.tiers.keep(page, digest)

    def _parent(self, hashes: list[bytes], page_idx: int) -> bytes:
        return hashes[page_idx - 1] if page_idx else self._rules.root()

    def _texts(self, sequence: SequenceState, page_idx: int, *, end: int) -> Texts:
        begin = page_idx * self._rules.page_tokens
        return Texts(
            token_ids=tuple(sequence.token_ids[begin : min(begin + self._rules.page_tokens, end)]),
            first_position=begin,
            num_prompt_tokens=sequence.spec.num_prompt_tokens,
        )

    def _hashes(self, sequence: SequenceState) -> list[bytes]:
        """Hashes of all full pages of its tokens; none where nothing is reused."""
        if self._is_on:
            extend_hashes(
                sequence.page_hashes,
                sequence.token_ids,
                num_prompt_tokens=sequence.spec.num_prompt_tokens,
                rules=self._rules,
            )
        return sequence.page_hashes

    def _num_shareable(self, sequence: SequenceState) -> int:
        """Pages that may come from others: one token is left to who computes, for the logits behind it."""
        if sequence.spec.needs_prompt_rows:
            return 0
        is_received = sequence.is_remote and sequence.phase is not Phase.PREFILL
        is_received = is_received and sequence.spec.takes_first_token
        num_tokens = len(sequence.token_ids) - (0 if is_received else 1)
        return num_tokens // self._rules.page_tokens

    def _count(self, sequence: SequenceState, num_shared: int) -> None:
        self._count_tokens(sequence, num_shared * self._rules.page_tokens - sequence.num_cached_tokens)
        sequence.num_published_pages = num_shared

    def _count_tokens(self, sequence: SequenceState, num_tokens: int) -> None:
        sequence.num_cached_tokens += num_tokens
        # What a preempted sequence finds again is its own.
        sequence.num_reused_tokens += 0 if sequence.was_preempted else num_tokens
        self._metrics.counter("prefix_hit_tokens_total").inc(num_tokens)
