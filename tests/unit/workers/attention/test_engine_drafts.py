"""Text with drafts is the text without, whether drafts are right, wrong or now and then right."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from tests.reference_data import goldens
from tests.unit.workers.attention.harness import Lab, make_spec, open_engine
from tests.unit.workers.attention.test_engine_text import mixed_prompts
from workers.attention.draft_record import DraftRecord
from workers.attention.drafter import Drafter, Speculation
from workers.attention.scoring import ScoreSpec
from workers.attention.speculation import DraftPolicy, DraftRules
from workers.attention.types import Finish, Sampling, SequenceState, Source

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_p=0.95, seed=11),
    Sampling(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.7, min_p=0.01, logprobs=2),
]
Texts = dict[tuple[int, ...], list[int]]
"""Prompt -> the text that follows it."""


class Oracle:
    """Runs the MTP layer, and guesses the known text in its place, right so often."""

    def __init__(self, inner: Drafter, texts: Texts, *, chance: float) -> None:
        self._inner, self._texts, self._chance = inner, texts, chance
        self._rng = random.Random(3)

    def keep(self, sequence: SequenceState, hidden_TD: Tensor, *, first_position: int) -> None:
        self._inner.keep(sequence, hidden_TD, first_position=first_position)

    def catch_up(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        self._inner.catch_up(sequences, max_rows=max_rows)

    def forget(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        self._inner.forget(sequences, max_rows=max_rows)

    def draft(self, sequences: Sequence[SequenceState], num_drafts: Sequence[int]) -> list[tuple[int, ...]]:
        drafts = self._inner.draft(sequences, num_drafts)
        return [self._replace(s, ids) for s, ids in zip(sequences, drafts, strict=True)]

    def finish(self, sequences: Sequence[SequenceState], next_ids: Sequence[int]) -> None:
        self._inner.finish(sequences, next_ids)

    def _replace(self, sequence: SequenceState, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
        text = self._texts[sequence.spec.token_ids]
        truth = text[sequence.num_new_tokens : sequence.num_new_tokens + len(draft_ids)]
        assert len(truth) == len(draft_ids), "drafted behind the end"
        return tuple(i if self._rng.random() < self._chance else (i + 1) % 320 for i in truth)


class AlwaysDrafts(DraftPolicy):
    """As many drafts as there may be, in every step."""

    def plan_drafts(self, num_sequences: int) -> int:
        return self.max_drafts

    def plan_each(self, num_drafts: int, records: Sequence[DraftRecord]) -> list[int]:
        return [num_drafts] * len(records)


class SparingDrafts(DraftPolicy):
    """As many drafts as there may be in every step, but for sequences whose drafts rarely stand."""

    def plan_drafts(self, num_sequences: int) -> int:
        return self.max_drafts


class SometimesDrafts(DraftPolicy):
    """Another number of drafts in every step, often none."""

    def __init__(self, rules: DraftRules) -> None:
        super().__init__(rules)
        self._rng = random.Random(2)

    def plan_drafts(self, num_sequences: int) -> int:
        return max(0, self._rng.randint(-2, self.max_drafts))


def open_drafting(
    shape: str = "mtp",
    *,
    max_drafts: int = 3,
    policy: type[DraftPolicy] = AlwaysDrafts,
    wrap: Callable[[Drafter], Drafter] = lambda d: d,
    **group: Any,
) -> Any:
    """An engine that drafts in every step."""

    def change(speculation: Speculation) -> Speculation:
        drafter, rules = wrap(speculation.drafter), DraftRules(max_drafts=max_drafts)
        return replace(speculation, drafter=drafter, policy=policy(rules))

    return open_engine(shape, max_drafts=max_drafts, change_speculation=change, **group)


def drafts(lab: Lab, outcome: str) -> float:
    return sum(lab.metric("drafts_total", position=str(p), outcome=outcome) for p in range(1, 5))


def together(lab: Lab, prompts: Sequence[Sequence[int]], **fields: Any) -> list[list[int]]:
    lab.door.hold()
    listeners = [
        lab.submit(make_spec(prompt, request_id=str(i), **fields)) for i, prompt in enumerate(prompts)
    ]
    lab.door.open()
    return [listener.tokens() for listener in listeners]


@pytest.mark.parametrize("max_drafts", [1, 3])
@pytest.mark.parametrize("max_step_tokens", [7, 512])
def test_greedy_text_with_drafts_is_that_of_the_goldens(max_step_tokens: int, max_drafts: int) -> None:
    cases = goldens("mtp")
    expected = [golden.tensor("greedy").tolist() for golden in cases]
    with open_drafting(max_step_tokens=max_step_tokens, max_drafts=max_drafts) as lab:
        for golden, ids in zip(cases, expected, strict=True):
            assert lab.run(golden.prompt, max_tokens=len(ids)) == ids
        assert drafts(lab, "accepted") + drafts(lab, "rejected") > 0


@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seed", "penalties"])
@pytest.mark.parametrize(
    "group",
    [
        {},
        {"policy": SometimesDrafts},
        {"max_step_tokens": 9},
        {"micro_batches": 2},
        {"num_pages": 24, "page_tokens": 4},
    ],
    ids=["plain", "sometimes", "small steps", "micro-batches", "small pool"],
)
def test_mixed_prompts_give_the_text_that_they_give_without_drafts(
    chance: float, sampling: Sampling, group: dict[str, Any]
) -> None:
    prompts = mixed_prompts()
    with open_engine("mtp") as lab:
        alone = [lab.run(prompt, max_tokens=12, sampling=sampling) for prompt in prompts]
    texts = {tuple(prompt): text for prompt, text in zip(prompts, alone, strict=True)}
    with open_drafting(wrap=lambda inner: Oracle(inner, texts, chance=chance), **group) as lab:
        assert together(lab, prompts, max_tokens=12, sampling=sampling) == alone
        accepted, rejected = drafts(lab, "accepted"), drafts(lab, "rejected")
    assert accepted + rejected > 0
    assert chance == 0.0 or accepted > 0
    assert chance == 1.0 or rejected > 0
    assert chance != 0.0 or accepted == 0


class RightForOne(Oracle):
    """Always right about the first prompt, always wrong about the others."""

    def _replace(self, sequence: SequenceState, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
        self._chance = 1.0 if sequence.spec.token_ids == next(iter(self._texts)) else 0.0
        return super()._replace(sequence, draft_ids)


@pytest.mark.parametrize("num_late_rows", [256, 1])
def test_sequence_whose_drafts_never_stand_is_spared_them_and_no_text_changes(
    num_late_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tries begin anew, whether or not the rows of the layer were kept meanwhile."""
    monkeypatch.setattr("workers.attention.runner.MAX_LATE_ROWS", num_late_rows)
    prompts = [[5, 6, i] for i in range(7, 10)]
    with open_engine("mtp") as lab:
        alone = [lab.run(prompt, max_tokens=90) for prompt in prompts]
    texts = {tuple(prompt): text for prompt, text in zip(prompts, alone, strict=True)}
    rejected = {}
    for policy in (AlwaysDrafts, SparingDrafts):
        with open_drafting(policy=policy, wrap=lambda inner: RightForOne(inner, texts, chance=0.0)) as lab:
            assert together(lab, prompts, max_tokens=90) == alone
            assert drafts(lab, "accepted") >= 60
            rejected[policy] = drafts(lab, "rejected")
    assert 0 < rejected[SparingDrafts] < rejected[AlwaysDrafts] / 5


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_stop_token_among_accepted_drafts_is_the_last(stop_at: int) -> None:
    golden = goldens("mtp")[2]
    greedy = golden.tensor("greedy").tolist()
    texts: Texts = {tuple(golden.prompt): greedy}
    stop = greedy[stop_at]
    with open_drafting(wrap=lambda inner: Oracle(inner, texts, chance=1.0)) as lab:
        listener = lab.submit(make_spec(golden.prompt, max_tokens=12, stop_token_ids=frozenset({stop})))
        assert listener.tokens() == greedy[: greedy.index(stop) + 1]
        assert listener.finish() is Finish.STOP
        assert listener.is_silent()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_nothing_is_drafted_behind_max_tokens(max_tokens: int) -> None:
    golden = goldens("mtp")[1]
    greedy = golden.tensor("greedy").tolist()
    texts: Texts = {tuple(golden.prompt): greedy[:max_tokens]}
    with open_drafting(page_tokens=1, wrap=lambda inner: Oracle(inner, texts, chance=1.0)) as lab:
        assert lab.run(golden.prompt, max_tokens=max_tokens) == greedy[:max_tokens]
        assert drafts(lab, "rejected") == 0


@pytest.mark.parametrize("max_step_tokens", [3, 512])
def test_right_drafts_save_steps(max_step_tokens: int) -> None:
    """11 tokens behind the first: 4 a step with 3 drafts; 3 a step where steps have 3 rows."""
    golden = goldens("mtp")[0]
    greedy = golden.tensor("greedy").tolist()
    texts: Texts = {tuple(golden.prompt): greedy}
    with open_drafting(
        max_step_tokens=max_step_tokens, wrap=lambda inner: Oracle(inner, texts, chance=1.0)
    ) as lab:
        assert lab.run(golden.prompt, max_tokens=12) == greedy
        num_prompt_steps = -(-len(golden.prompt) // max_step_tokens)
        assert lab.door.num_arrivals == num_prompt_steps + -(-11 // min(max_step_tokens, 4))


def test_a_model_without_the_layer_drafts_nothing() -> None:
    golden = goldens("default")[0]
    with open_drafting("default") as lab:
        assert lab.run(golden.prompt, max_tokens=16) == golden.tensor("greedy").tolist()
        assert drafts(lab, "accepted") + drafts(lab, "rejected") == 0


class Recorder(Oracle):
    """Notes the first draft behind each number of tokens."""

    def __init__(self, inner: Drafter) -> None:
        super().__init__(inner, {}, chance=0.0)
        self.first_drafts: dict[int, int] = {}

    def _replace(self, sequence: SequenceState, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
        if draft_ids:
            self.first_drafts[len(sequence.token_ids)] = draft_ids[0]
        return draft_ids


@pytest.mark.parametrize("policy", [AlwaysDrafts, SometimesDrafts])
@pytest.mark.parametrize("max_step_tokens", [7, 512])
def test_drafts_are_what_the_layer_scores_best_over_the_whole_text(
    max_step_tokens: int, policy: type[DraftPolicy]
) -> None:
    golden = goldens("mtp")[2]
    recorders: list[Recorder] = []

    def wrap(inner: Drafter) -> Drafter:
        recorders.append(Recorder(inner))
        return recorders[0]

    with open_drafting(max_step_tokens=max_step_tokens, policy=policy, wrap=wrap) as lab:
        text = [*golden.prompt, *lab.run(golden.prompt, max_tokens=12)]
        scoring = lab.engine.score(ScoreSpec(token_ids=tuple(text), chunk_tokens=512))
        best = scoring.result(timeout=30)["mtp_logits"].argmax(-1).tolist()
    # Row i of the layer has seen tokens up to i + 1: it is the draft behind i + 2 tokens.
    wanted = {num_tokens: best[num_tokens - 2] for num_tokens in recorders[0].first_drafts}
    assert recorders[0].first_drafts == wanted
    assert len(wanted) >= 3


@pytest.mark.parametrize("max_step_tokens", [7, 512])
@pytest.mark.parametrize("with_layer", [True, False], ids=["with MTP rows", "without"])
def test_drafts_behind_a_hand_over_are_those_of_one_worker_where_the_rows_were_sent(
    max_step_tokens: int, with_layer: bool
) -> None:
    golden = goldens("mtp")[2]
    greedy = golden.tensor("greedy").tolist()
    with open_drafting(max_step_tokens=max_step_tokens) as lab:
        prefill = lab.submit(make_spec(golden.prompt, source=Source.PREFILL_ONLY))
        first = prefill.token()
    given = prefill.rows() if with_layer else [rows for rows in prefill.rows() if rows.layer_idx < 2]
    recorders: list[Recorder] = []

    def wrap(inner: Drafter) -> Drafter:
        recorders.append(Recorder(inner))
        return recorders[-1]

    with open_drafting(max_drafts=1, wrap=wrap) as lab:
        to = lab.submit(make_spec(golden.prompt, max_tokens=12, source=Source.REMOTE)).admitted()
        for rows in given:
            lab.engine.add_rows(to.spec.key, rows)
        lab.engine.finish_transfer(to.spec.key, first)
        assert to.tokens() == greedy
    with open_drafting(max_drafts=1, wrap=wrap) as lab:
        assert lab.run(golden.prompt, max_tokens=12) == greedy
    apart, alone = (recorder.first_drafts for recorder in recorders)
    both = apart.keys() & alone.keys()
    assert len(both) >= 3
    assert ({key: apart[key] for key in both} == {key: alone[key] for key in both}) is with_layer


class Listening(AlwaysDrafts):
    """Notes what it is told."""

    told: list[tuple[int, int, int]]

    def __init__(self, rules: DraftRules) -> None:
        super().__init__(rules)
        type(self).told = []

    def on_step(
        self, num_sequences: int, num_drafts: int, *, seconds: float, accepted: Sequence[int]
    ) -> None:
        assert seconds > 0
        self.told.append((num_sequences, num_drafts, len(accepted)))


def test_steps_tell_the_policy_though_one_sequence_is_at_its_end() -> None:
    """Four decode with one draft each; the last has one token left and gets none."""
    prompts = [[5, 6, i] for i in range(7, 11)]
    with open_drafting(max_drafts=1, policy=Listening) as lab:
        lab.door.hold()
        listeners = [
            lab.submit(make_spec(prompt, request_id=str(i), max_tokens=9 if i < 3 else 2))
            for i, prompt in enumerate(prompts)
        ]
        lab.door.open()
        assert [len(listener.tokens()) for listener in listeners] == [9, 9, 9, 2]
        assert (4, 1, 3) in Listening.told


def test_steps_without_room_for_drafts_do_not_run_the_layer() -> None:
    """Three sequences, steps of three tokens: the layer runs over prompts, and over nothing else."""
    prompts = [[5, 6, i] for i in range(7, 10)]
    with open_drafting(max_step_tokens=3, policy=Listening) as lab:
        texts = together(lab, prompts, max_tokens=12)
        assert (3, 0, 3) in Listening.told
        assert all(num_drafts == 0 for num_sequences, num_drafts, _ in Listening.told if num_sequences == 3)
    with open_engine("mtp") as lab:
        assert [lab.run(prompt, max_tokens=12) for prompt in prompts] == texts
