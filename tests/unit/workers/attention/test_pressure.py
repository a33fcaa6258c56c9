"""Plans carried out on two workers with too few pages: everything ends, whoever waits for whom.

Toy workers keep the real page accounts and the real lobby, and compute nothing. A remote sequence has its
rows when its prefill on the other worker has ended.
"""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.workers.attention.harness import make_spec
from wire.metrics import Metrics
from wire.prefix import PrefixRules
from workers.attention.lobby import Lobby
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.scheduler import Backlog, StepLimits, plan_step
from workers.attention.types import Key, Phase, SequenceSpec, SequenceState, Source

PAGE_TOKENS = 2


class ToyWorker:
    """The engine without a model."""

    def __init__(self, num_pages: int, limits: StepLimits, *, lookahead_tokens: int) -> None:
        self.limits = limits
        self.pages = PageAllocator(num_pages, page_tokens=PAGE_TOKENS)
        rules = PrefixRules(page_tokens=PAGE_TOKENS, cache_form="", index_topk=4)
        self.prefix = PrefixCache(
            self.pages,
            rules=rules,
            is_on=True,
            copy_page=lambda source, target, *, num_tokens: None,  # noqa: ARG005  there are no rows
            metrics=Metrics("attention"),
        )
        self.lobby = Lobby(pages=self.pages, prefix=self.prefix, lookahead_tokens=lookahead_tokens)
        self.sequences: dict[Key, SequenceState] = {}
        self.prefilled: set[str] = set()
        """Request ids of prefills for the other worker that have ended."""
        self.num_preempted = 0

    def submit(self, spec: SequenceSpec) -> None:
        self.sequences[spec.key] = SequenceState(spec, lambda _: None, token_ids=list(spec.token_ids))

    def step(self) -> bool:
        """One plan; whether anything changed."""
        plan = plan_step(
            [self.lobby.candidate(s) for s in self.sequences.values()],
            num_free_pages=self.pages.num_available,
            now_s=0.0,
            backlog=Backlog({"": 0.0}),
            limits=self.limits,
        )
        assert not plan.fail
        assert not plan.refuse
        if plan.preempt is not None:
            self.num_preempted += 1
            victim = self.sequences[plan.preempt]
            assert victim.spec.source is not Source.PREFILL_ONLY
            self.pages.release(plan.preempt)
            victim.give_up_pages()
        for key, num_pages in plan.grow:
            self.sequences[key].pages = self.pages.extend(key, num_pages=num_pages)
        for key in plan.admit:
            sequence = self.sequences[key]
            self.prefix.reserve(sequence, num_rows=self.lobby.num_first_rows(sequence))
            sequence.phase = Phase.RECEIVING if sequence.is_remote else Phase.PREFILL
        for key, num_tokens in plan.run:
            self._compute(self.sequences[key], num_tokens)
        self.pages.check_integrity()
        assert set(self.pages.owners()) == {s.spec.key for s in self.sequences.values() if s.pages}
        return not plan.is_idle

    def receive(self, request_id: str) -> bool:
        """Whether a sequence waited for these rows."""
        sequence = self.sequences.get((request_id, 0))
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            return False
        sequence.num_cached_tokens = len(sequence.token_ids)
        self._append(sequence)
        return True

    def _compute(self, sequence: SequenceState, num_tokens: int) -> None:
        sequence.num_cached_tokens += num_tokens
        assert sequence.num_cached_tokens <= len(sequence.pages) * PAGE_TOKENS
        self.prefix.publish(sequence)
        if sequence.num_pending_tokens == 0:
            self._append(sequence)

    def _append(self, sequence: SequenceState) -> None:
        sequence.token_ids.append(7)
        sequence.phase = Phase.DECODE
        is_prefill = sequence.spec.source is Source.PREFILL_ONLY
        if is_prefill or sequence.num_new_tokens == sequence.spec.max_tokens:
            self.pages.release(sequence.spec.key)
            del self.sequences[sequence.spec.key]
        if is_prefill:
            self.prefilled.add(sequence.spec.request_id)


@st.composite
def orders(draw: st.DrawFn, num_pages: int) -> list[tuple[int, SequenceSpec]]:
    """(worker, sequence) that each fit alone."""
    found = []
    for i in range(draw(st.integers(1, 10))):
        num_rows = draw(st.integers(1, num_pages * PAGE_TOKENS))
        num_prompt_tokens = draw(st.integers(1, num_rows))
        spec = make_spec(
            draw(st.lists(st.integers(1, 2), min_size=num_prompt_tokens, max_size=num_prompt_tokens)),
            request_id=str(i),
            max_tokens=num_rows - num_prompt_tokens + 1,
            priority=draw(st.integers(0, 1)),
            source=draw(st.sampled_from([Source.LOCAL, Source.REMOTE])),
        )
        found.append((draw(st.integers(0, 1)), spec))
    return found


@settings(max_examples=150)
@given(data=st.data(), num_pages=st.integers(2, 8))
def test_everything_ends_on_two_workers_that_prefill_for_each_other(
    data: st.DataObject, num_pages: int
) -> None:
    limits = StepLimits(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)))
    lookahead_tokens = data.draw(st.integers(1, 5))
    workers = [ToyWorker(num_pages, limits, lookahead_tokens=lookahead_tokens) for _ in range(2)]
    for worker_idx, spec in data.draw(orders(num_pages)):
        workers[worker_idx].submit(spec)
    asked: set[str] = set()
    for _ in itertools.repeat(None, 5000):
        changes = [worker.step() for worker in workers]
        for worker, other in (workers, reversed(workers)):
            for sequence in list(worker.sequences.values()):
                request_id = sequence.spec.request_id
                if sequence.phase is Phase.RECEIVING and request_id not in asked:
                    asked.add(request_id)
                    prompt = sequence.spec.token_ids
                    other.submit(make_spec(prompt, request_id=f"p{request_id}", source=Source.PREFILL_ONLY))
                    changes.append(True)
            changes += [worker.receive(prefilled[1:]) for prefilled in sorted(other.prefilled)]
        if not any(changes):
            break
    assert [list(worker.sequences) for worker in workers] == [[], []]
    assert [worker.pages.num_available for worker in workers] == [num_pages] * 2


def test_the_oldest_is_not_preempted_by_its_equals() -> None:
    """Three that grow to 8 rows in 5 pages of 2: the youngest starts again, and the oldest ends first."""
    worker = ToyWorker(5, StepLimits(4, 8), lookahead_tokens=1)
    for i in range(3):
        worker.submit(make_spec([i, i], request_id=str(i), max_tokens=7))
    ended = []
    while worker.sequences:
        before = list(worker.sequences)
        assert worker.step()
        ended += [key[0] for key in before if key not in worker.sequences]
    assert ended == ["0", "1", "2"]
    assert worker.num_preempted > 0
