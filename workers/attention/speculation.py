"""Speculative decoding: how many tokens to draft, and which of them stand. Pure decisions.

A draft stands when it is the very token that the main model chooses at its position (docs/adr/0012), so the
text is that of a worker that never drafts.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.attention.draft_record import DraftRecord


def accept_drafts(
    draft_ids: Sequence[int], chosen_ids: Sequence[int], *, stop_token_ids: frozenset[int], max_tokens: int
) -> tuple[int, ...]:
    """The new tokens of a sequence: its first choice, and each further one whose draft stood.

    Example: drafts 7, 8, 9 and choices 7, 8, 5, 4: the new tokens are 7, 8 and 5. With 7 as a stop token it
    is 7 alone.

    Args:
        draft_ids: k drafted tokens.
        chosen_ids: k + 1 tokens: the choice behind the last token, and behind each draft as if it stood.
        stop_token_ids: nothing follows one of these.
        max_tokens: new tokens at most, >= 1.
    """
    new_ids: list[int] = []
    for position, token_id in enumerate(chosen_ids):
        new_ids.append(token_id)
        is_last = token_id in stop_token_ids or len(new_ids) == max_tokens
        if is_last or position == len(draft_ids) or draft_ids[position] != token_id:
            break
    return tuple(new_ids)


@dataclass(frozen=True, kw_only=True)
class DraftRules:
    """The bounds of the policy."""

    max_drafts: int
    """Drafted tokens of a sequence and step, at most; >= 1."""
    probe_steps: int = 16
    """Steps between two tries of another number of drafts, at first; doubled while the tries lose."""
    max_probe_steps: int = 128
    """The most steps between two tries."""
    choice_steps: int = 16
    """Steps without drafts, at most, between two choices of what is best."""
    prior_chance: float = 0.6
    """The chance that a draft stands, before any was seen."""
    prior_weight: float = 2.0
    """Drafts that the prior counts for."""
    memory: float = 0.95
    """What a step's drafts still count for one step later."""
    prior_cost: float = 0.4
    """Time of each draft, drafting and verifying, in steps without drafts, before it was measured."""
    least_cost: float = 0.05
    """The same at least, whatever was measured."""


@dataclass
class _Chance:
    """Of the drafts at one position whose predecessors stood: how many stood, the older counting less."""

    num_drafted: float
    num_accepted: float

    @property
    def share(self) -> float:
        return self.num_accepted / self.num_drafted


@dataclass
class _Size:
    """What is known of steps of about one number of sequences."""

    pause_steps: int
    """From the next try of another number of drafts to the one behind it."""
    until_probe: int
    """Steps to the next try."""
    until_choice: int = 0
    """Steps to the next choice of what is best."""
    best: int = 0
    """Number of drafts."""
    probes_up: bool = False
    seconds: defaultdict[int, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=5))
    )
    """Number of drafts -> newest times of steps."""


class DraftPolicy:
    """Chooses the number of drafts that makes most tokens a second, from what it is told of steps.

    It tries a neighbour of its choice now and then, and soon again when such a try won; that is all that text
    without predictable tokens pays.
    """

    def __init__(self, rules: DraftRules) -> None:
        self.max_drafts = rules.max_drafts
        self._rules = rules
        weight = rules.prior_weight
        self._chances = [_Chance(weight, weight * rules.prior_chance) for _ in range(rules.max_drafts)]
        self._sizes: dict[int, _Size] = {}

    def plan_drafts(self, num_sequences: int) -> int:
        """How many tokens to draft for each of the sequences of a decode step at most, 0 to max_drafts."""
        size = self._size(num_sequences)
        size.until_choice -= 1
        if size.until_choice < 0:
            self._choose(size)
        size.until_probe -= 1
        if size.until_probe > 0:
            return size.best
        size.until_probe = size.pause_steps
        size.pause_steps = min(2 * size.pause_steps, self._rules.max_probe_steps)
        size.probes_up = not size.probes_up
        is_down = size.best == self.max_drafts or (size.best > 0 and not size.probes_up)
        return size.best - 1 if is_down else size.best + 1

    def plan_each(self, num_drafts: int, records: Sequence[DraftRecord]) -> list[int]:
        """How many of those each sequence gets, by how its drafts did.

        What is spared counts as not accepted, so both sides of the choice of a number are of such steps. One
        sequence alone needs no record: all that was measured is of steps like its own.
        """
        if len(records) == 1:
            return [num_drafts]
        return [record.plan_drafts(num_drafts) for record in records]

    def on_step(
        self, num_sequences: int, num_drafts: int, *, seconds: float, accepted: Sequence[int]
    ) -> None:
        """Learns from a step.

        Args:
            num_sequences: that decoded.
            num_drafts: of each sequence at most, as planned.
            seconds: of the whole step.
            accepted: of each sequence that had all the drafts that `plan_each` gave it: how many stood.
        """
        size = self._size(num_sequences)
        size.seconds[num_drafts].append(seconds)
        if num_drafts == 0:
            return
        size.until_choice = 0
        for position, chance in enumerate(self._chances[:num_drafts]):
            num_tried = sum(stood >= position for stood in accepted)
            num_stood = sum(stood > position for stood in accepted)
            memory = self._rules.memory if num_tried else 1.0
            chance.num_drafted = chance.num_drafted * memory + num_tried
            chance.num_accepted = chance.num_accepted * memory + num_stood
        if num_drafts > size.best:
            rate = (1 + sum(accepted) / len(accepted)) / self._seconds(size, num_drafts)
            if rate > self._rate(size, size.best):
                size.until_probe = min(size.until_probe, 2)

    def _size(self, num_sequences: int) -> _Size:
        pause_steps = self._rules.probe_steps
        return self._sizes.setdefault(num_sequences.bit_length(), _Size(pause_steps, pause_steps))

    def _choose(self, size: _Size) -> None:
        best = max(range(self.max_drafts + 1), key=lambda num_drafts: self._rate(size, num_drafts))
        if best != size.best:
            size.best, size.pause_steps = best, self._rules.probe_steps
            size.until_probe = min(size.until_probe, size.pause_steps)
        size.until_choice = self._rules.choice_steps

    def _rate(self, size: _Size, num_drafts: int) -> float:
        """Expected tokens of a sequence in a second; any unit, but the same for all numbers of drafts."""
        tokens, chance = 1.0, 1.0
        for position in range(num_drafts):
            chance *= self._chances[position].share
            tokens += chance
        return tokens / self._seconds(size, num_drafts)

    def _seconds(self, size: _Size, num_drafts: int) -> float:
        """The time of a step: measured, or by those with the next number of drafts that was.

        Of the newest times the least counts: what else runs on a machine only adds to it. And no step is
        quicker than one with fewer drafts: where it was, the machine was slow when those were measured.
        """
        measured = {k: min(times) for k, times in size.seconds.items()}
        prior = self._prior_cost(num_drafts)
        if not measured:
            return prior
        nearest = min(measured, key=lambda k: (abs(k - num_drafts), k))
        seconds = measured[nearest] * prior / self._prior_cost(nearest)
        least_cost = self._rules.least_cost
        floors = [
            measured[k] * (1 + least_cost * num_drafts) / (1 + least_cost * k)
            for k in measured
            if k < num_drafts
        ]
        return max([seconds, *floors])

    def _prior_cost(self, num_drafts: int) -> float:
        return 1.0 + self._rules.prior_cost * num_drafts
